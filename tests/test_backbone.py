"""Backbones: every family's penultimate layer, weights from each source, and vectors that depend on the image alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import BackboneConfig, ExtractionConfig, PreprocessingConfig
from pipeline.embed import backbone, graph, published, torchvision_models, weights
from pipeline.embed.engines import choose_precision
from pipeline.embed.spec import EmbeddingSpec, probe_images
from pipeline.errors import BackboneError
from pipeline.store import differences

FP32 = ExtractionConfig(device="cpu", precision="fp32")
SMALL = PreprocessingConfig(resize=40, crop=32)

FAMILIES = {
    # name: (length of the penultimate vector, the node it comes from)
    "alexnet": (4096, "classifier.5"),
    "vgg11": (4096, "classifier.5"),
    "resnet18": (512, "flatten"),
    "resnext50_32x4d": (2048, "flatten"),
    "densenet121": (1024, "flatten"),
    "inception_v3": (2048, "flatten"),
    "googlenet": (1024, "dropout"),
    "mobilenet_v2": (1280, "classifier.0"),
    "mobilenet_v3_small": (1024, "classifier.2"),
    "efficientnet_b0": (1280, "classifier.0"),
    "convnext_tiny": (768, "classifier.1"),
    "regnet_y_400mf": (440, "flatten"),
    "shufflenet_v2_x0_5": (1024, "mean"),
    "squeezenet1_1": ((512, 13, 13), "classifier.0"),
    "mnasnet0_5": (1280, "classifier.0"),
    "vit_b_32": (768, "getitem_5"),
    "swin_t": (768, "flatten"),
    "maxvit_t": (512, "classifier.4"),
    "efficientnet_lite0": (1280, "pool.1"),
}


STAGES = {
    # name: the nodes at which stages end
    "resnet18": ["bn1", "layer1.1.relu_1", "layer2.1.relu_1", "layer3.1.relu_1", "layer4.1.relu_1"],
    "densenet121": ["features.norm0", *(f"features.denseblock{number}.cat" for number in (1, 2, 3)), "features.norm5"],
    "convnext_tiny": [
        "features.0.1.permute_1",
        "features.1.2.add",
        "features.3.2.add",
        "features.5.8.add",
        "features.7.2.add",
    ],
    "swin_t": ["features.0.2", "features.1.1.add_1", "features.3.1.add_1", "features.5.5.add_1", "norm"],
    "vit_b_32": ["conv_proj", *(f"encoder.layers.encoder_layer_{number}.add_1" for number in range(11)), "encoder.ln"],
    "squeezenet1_1": ["features.0", "features.4.cat", "features.7.cat", "features.12.cat"],
    "efficientnet_lite0": [
        "stem.act",
        "stages.0.0.1.act",
        "stages.1.1.add",
        "stages.2.1.add",
        "stages.4.2.add",
        "head.act",
    ],
}


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


def load(
    name: str = "mobilenet_v3_small", extraction: ExtractionConfig = FP32, seed: int = 0, **section: object
) -> backbone.Backbone:
    section.setdefault("preprocessing", SMALL)
    return backbone.load(BackboneConfig(name=name, **section), extraction, seed)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are not worth handing to other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> backbone.Backbone:
    return load("resnet18")


# ---- the default layer


@pytest.mark.parametrize("name", FAMILIES)
def test_penultimate_is_the_input_of_the_classifier_in_every_family_and_stages_end_where_resolution_or_a_block_ends(
    name: str,
) -> None:
    # Without weights (meta tensors) the graph and its shapes are all that is computed, so the real architectures are cheap.
    model = weights.build_empty(name, {})
    found = graph.trace(model)
    if name in STAGES:
        stages = graph.stage_ends(model, found, (224, 224))
        assert list(stages) == ["stem", *(f"stage{number}" for number in range(1, len(stages)))]
        assert list(stages.values()) == STAGES[name]
    expected, expected_node = FAMILIES[name]
    (node,) = graph.resolve(found, ["penultimate"])
    assert node == expected_node
    head = model.get_submodule(str(graph.classifier(found[0]).target))
    size = 299 if name == "inception_v3" else 224
    cut = graph.cut(found, [node])
    with torch.inference_mode():
        (output,) = cut(torch.empty(2, 3, size, size, device="meta"))
    assert tuple(output.shape) == (2, *(expected if isinstance(expected, tuple) else (expected,)))
    assert output.shape[1] == (head.in_features if isinstance(head, torch.nn.Linear) else head.in_channels)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_the_classifier_on_the_penultimate_vectors_gives_the_networks_own_scores(name: str, pixels: np.ndarray) -> None:
    section = BackboneConfig(name=name, preprocessing=SMALL)
    network = weights.load_network(section, seed=3)
    scaled = (
        torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(SMALL.mean).view(3, 1, 1)
    ) / torch.tensor(SMALL.std).view(3, 1, 1)
    with torch.inference_mode():
        scores = network.module(scaled).numpy()
    head = network.module.get_submodule(str(graph.classifier(graph.trace(network.module)[0]).target))
    extra = {"pooling": "flatten"} if name == "squeezenet1_1" else {}
    (vectors,) = load(name, seed=3, **extra).embed(pixels)
    with torch.inference_mode():
        if name == "squeezenet1_1":
            maps = torch.from_numpy(vectors).reshape(len(pixels), head.in_channels, 1, 1)
            mine = torch.relu(head(maps)).flatten(1).numpy()
        else:
            mine = head(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(mine, scores, rtol=1e-3, atol=1e-4 * np.abs(scores).max())


def test_several_layers_come_from_one_pass_and_in_place_operations_do_not_touch_them(pixels: np.ndarray) -> None:
    alone = load("resnet18", layers=("layer1.0.bn1",)).embed(pixels)[0]
    both = load("resnet18", layers=("penultimate", "layer1.0.bn1"))
    last, inner = both.embed(pixels)
    assert [spec.layer for spec in both.specs] == ["flatten", "layer1.0.bn1"]
    assert [spec.name for spec in both.specs] == ["resnet18-random-penultimate", "resnet18-random-layer1.0.bn1"]
    # The ReLU behind bn1 works in place: had it overwritten the kept output, no value below zero would be left.
    assert inner.min() < 0
    np.testing.assert_allclose(inner, alone, rtol=1e-4, atol=1e-5)
    assert last.shape == (9, 512)


def test_pooling_turns_places_and_tokens_into_one_vector() -> None:
    maps = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    assert torch.equal(graph.pool(maps, "avg"), maps.mean((2, 3)))
    assert torch.equal(graph.pool(maps, "max"), maps.amax((2, 3)))
    assert torch.equal(graph.pool(maps, "flatten"), maps.reshape(2, -1))
    large = torch.randn(2, 5, 6, 6)
    cells = torch.stack([large[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2, 4) for x in (0, 2, 4)], dim=2)
    torch.testing.assert_close(graph.pool(large, "grid"), cells.flatten(1))
    torch.testing.assert_close(graph.pool(large.permute(0, 2, 3, 1), "grid"), cells.flatten(1))
    last = maps.permute(0, 2, 3, 1)  # channels last, as swin has them
    assert torch.equal(graph.pool(last, "avg"), maps.mean((2, 3)))
    tokens = torch.arange(2 * 5 * 3, dtype=torch.float32).reshape(2, 5, 3)
    assert torch.equal(graph.pool(tokens, "cls"), tokens[:, 0])
    assert torch.equal(graph.pool(tokens, "avg"), tokens.mean(1))
    assert torch.equal(graph.pool(tokens, "avg[1:]"), tokens[:, 1:].mean(1))
    assert torch.equal(graph.pool(tokens, "max[2:]"), tokens[:, 2:].amax(1))
    assert torch.equal(graph.pool(tokens, "cls+avg[2:]"), torch.cat([tokens[:, 0], tokens[:, 2:].mean(1)], 1))


REGISTERS = graph.Tokens(prefix=5, class_token=True, own="token")


@pytest.mark.parametrize(
    ("shape", "asked", "effective"),
    [
        ((2, 21, 8), "own", "avg[5:]"),
        ((2, 21, 8), "avg", "avg[5:]"),
        ((2, 21, 8), "max", "max[5:]"),
        ((2, 21, 8), "cls", "cls"),
        ((2, 21, 8), "cls+avg", "cls+avg[5:]"),
        ((2, 21, 8), "flatten", "flatten"),
        ((2, 16, 8), "avg", "avg"),  # behind the layer that makes the patches, in front of which nothing stands yet
        ((2, 8, 4, 4), "avg", "avg"),
        ((2, 8), "own", "none"),
        ((2, 8), "cls", "none"),
    ],
)
def test_an_average_of_tokens_is_one_of_patches(shape: tuple[int, ...], asked: str, effective: str) -> None:
    assert graph.effective_pooling(torch.zeros(shape), asked, REGISTERS, "x") == effective


@pytest.mark.parametrize(
    ("tokens", "asked", "layer"),
    [
        (REGISTERS, "own", "penultimate"),
        (REGISTERS, "cls", "penultimate"),
        (REGISTERS, "cls+avg", "unpooled"),
        (REGISTERS, "avg", "unpooled"),
        (REGISTERS._replace(own="avg"), "cls", "unpooled"),
        (graph.Tokens(attention_pool=True, own="map"), "map", "penultimate"),
        (graph.Tokens(prefix=1, class_token=True), "cls", "penultimate"),
        (graph.Tokens(), "max", "penultimate"),
    ],
)
def test_at_the_last_layer_a_pooling_is_of_the_tokens_before_it(tokens: graph.Tokens, asked: str, layer: str) -> None:
    assert graph.source("penultimate", asked, tokens) == layer
    assert graph.source("blocks.3", asked, tokens) == "blocks.3"


def test_pooling_that_has_no_meaning_is_refused() -> None:
    with pytest.raises(
        BackboneError, match=r"layer 'x' gives 8, no pooling 'cls\+avg': it has no class token; use avg, max or flatten"
    ):
        graph.effective_pooling(torch.zeros(2, 8), "cls+avg", REGISTERS, "x")
    with pytest.raises(
        BackboneError,
        match=r"layer 'x' gives 21 x 8, no pooling 'map': it needs a network with attention pooling, and layer penultimate",
    ):
        graph.effective_pooling(torch.zeros(2, 21, 8), "map", REGISTERS, "x")
    with pytest.raises(
        BackboneError,
        match=r"layer 'layer4.1.relu_1' gives 512 x 1 x 1, no pooling 'cls': it has no class token",
    ):
        load("resnet18", layers=("layer4",), pooling="cls")
    with pytest.raises(
        BackboneError, match=r"layer 'x' gives 5 x 2 x 2, no pooling 'grid': it has no map of at least 3 x 3 places"
    ):
        graph.effective_pooling(torch.zeros(2, 5, 2, 2), "grid", tokens=graph.Tokens(), layer="x")
    with pytest.raises(
        BackboneError,
        match=r"layer 'x' gives 2 x 3 x 4, no pooling 'avg': its places cannot be distinguished from its channels",
    ):
        graph.effective_pooling(torch.zeros(2, 2, 3, 4), "avg", tokens=graph.Tokens(), layer="x")


def test_all_wrong_poolings_of_all_layers_are_told_at_once() -> None:
    with pytest.raises(BackboneError, match="layers for which none of the given poolings is possible") as caught:
        load("resnet18", layers=("layer3", "layer4", "penultimate"), pooling=("cls", "map"))
    assert [line.split("'")[1] for line in caught.value.problems] == ["layer3.1.relu_1"] * 2 + [
        "layer4.1.relu_1"
    ] * 2 + ["flatten"] * 2


def test_layers_and_poolings_are_embeddings_of_one_pass_and_what_is_a_vector_already_is_not_doubled(
    pixels: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = load("resnet18", layers=("penultimate", "stage3", "layer3"), pooling=("avg", "cls", "max"))
    assert [spec.name.removeprefix("resnet18-random-") for spec in found.specs] == [
        "penultimate", "stage3", "stage3-max",
    ]  # fmt: skip
    told = "left out: layer 'layer3.1.relu_1' gives 256 x 2 x 2, no pooling 'cls': it has no class token; use avg, max or flatten"
    assert told in caplog.messages
    by_name = load("resnet18", layers=("layer3",), pooling="max")
    assert found.specs[2].fingerprint() == by_name.specs[0].fingerprint()
    np.testing.assert_allclose(found.embed(pixels)[2], by_name.embed(pixels)[0], atol=1e-5)


def test_a_layer_that_no_pooling_fits_and_a_stage_there_is_not_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"no pooling 'cls'"):
        load("resnet18", layers=("stage2",), pooling=("cls",))
    with pytest.raises(BackboneError) as error:
        load("resnet18", layers=("stage7",))
    assert error.value.problems == ("no layer 'stage7', did you mean 'stage4'?",)


def test_a_networks_own_name_is_before_that_of_a_stage() -> None:
    (spec,) = load("shufflenet_v2_x0_5", layers=("stage2",)).specs
    assert spec.layer == "stage2.3.view_1"


def test_pooling_is_in_the_identity_only_where_it_changes_the_vectors(small: backbone.Backbone) -> None:
    average, maximum = load("squeezenet1_1"), load("squeezenet1_1", pooling="max")
    assert average.specs[0].fingerprint() != maximum.specs[0].fingerprint()
    assert maximum.specs[0].name == "squeezenet1_1-random-penultimate-max"
    assert load("resnet18", pooling="max").specs[0].fingerprint() == small.specs[0].fingerprint()


def test_unknown_layers_are_reported_together_with_a_guess() -> None:
    with pytest.raises(BackboneError) as error:
        load("resnet18", layers=("layer4.1.relu_2", "avgpol"))
    assert str(error.value).splitlines() == [
        "layers that are not in the network, which `manyheads layers MODEL` lists",
        "  no layer 'layer4.1.relu_2', did you mean 'layer4.1.relu_1'?",
        "  no layer 'avgpol', did you mean 'avgpool'?",
    ]


def test_layers_lists_the_nodes_with_their_shapes() -> None:
    nodes = {name: (shape, called) for name, shape, called in backbone.layers("squeezenet1_1")}
    assert nodes["features.0"] == ((64, 111, 111), "stem")
    assert nodes["classifier.0"] == ((512, 13, 13), "penultimate")
    assert nodes["flatten"] == ((1000,), "")


def test_layers_lists_those_of_the_bundled_network_and_of_a_weights_file(regnet: tuple[Path, object]) -> None:
    assert ("flatten", (384,), "penultimate") in backbone.layers("regnet_small")
    assert ("fc", (5,), "") in backbone.layers(str(regnet[0]))


def test_a_vision_transformer_takes_its_own_image_size_and_no_other() -> None:
    with pytest.raises(BackboneError, match=r"vit_b_32 takes images of 224 pixels only; set preprocessing.crop: 224"):
        weights.fitting_preprocessing(
            BackboneConfig(name="vit_b_32", preprocessing=SMALL),
            weights.build_empty("vit_b_32", {}),
            weights.Preprocessing(256, 224),
        )


# ---- vectors


def test_an_image_has_the_same_vector_alone_in_a_batch_and_after_others(
    small: backbone.Backbone, pixels: np.ndarray
) -> None:
    (together,) = small.embed(pixels)
    (again,) = small.embed(pixels)
    alone = np.concatenate([small.embed(pixels[i : i + 1])[0] for i in range(len(pixels))])
    np.testing.assert_array_equal(again, together)
    # Another batch size may take another path of the matrix library: equal to a few units in the last place of fp32.
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5 * np.abs(together).max())
    assert np.abs(together[0] - together[1]).max() > 1e-2 * np.abs(together).max()  # and images differ


def test_bf16_vectors_are_close_to_fp32_and_of_another_identity(small: backbone.Backbone, pixels: np.ndarray) -> None:
    half = load("resnet18", ExtractionConfig(device="cpu", precision="bf16"))
    (coarse,), (exact,) = half.embed(pixels), small.embed(pixels)
    assert coarse.dtype == np.float32
    cosine = (coarse * exact).sum(1) / np.linalg.norm(coarse, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosine.min() > 0.999
    assert not np.array_equal(coarse, exact)
    assert differences(small.specs[0].identity(), half.specs[0].identity()) == [
        "precision: the store has 'fp32', this run has 'bf16'"
    ]


def test_folding_the_batch_norms_changes_next_to_nothing(small: backbone.Backbone, pixels: np.ndarray) -> None:
    network = weights.load_network(BackboneConfig(name="resnet18", preprocessing=SMALL), seed=0)
    scaled = (
        torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(SMALL.mean).view(3, 1, 1)
    ) / torch.tensor(SMALL.std).view(3, 1, 1)
    network.module.fc = torch.nn.Identity()
    with torch.inference_mode():
        expected = network.module(scaled).numpy()
    np.testing.assert_allclose(small.embed(pixels)[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in small._module.modules())


def test_probe_is_the_vectors_of_the_probe_images(small: backbone.Backbone) -> None:
    probes = probe_images((32, 32))
    assert probes.shape == (4, 32, 32, 3)
    assert probes.dtype == np.uint8
    assert [int(probe.astype(np.int64).sum()) for probe in probes] == [291904, 113344, 228864, 389618]
    np.testing.assert_array_equal(small.probe[0], small.embed(probes)[0])


# ---- identity


def test_the_seed_decides_random_weights_and_reaches_the_identity() -> None:
    first, same, other = load("squeezenet1_1", seed=1), load("squeezenet1_1", seed=1), load("squeezenet1_1", seed=2)
    assert first.specs[0].untrained
    assert first.specs[0].fingerprint() == same.specs[0].fingerprint()
    assert first.specs[0].fingerprint() != other.specs[0].fingerprint()
    before = torch.random.get_rng_state()
    load("squeezenet1_1", seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's own random numbers are left alone


def test_identity_holds_what_changes_vectors_and_nothing_else(small: backbone.Backbone) -> None:
    spec = small.specs[0]
    assert set(spec.identity()) == {
        "embed_version", "library", "architecture", "arguments", "weights", "layer", "pooling", "dim", "dtype", "preprocessing", "precision", "engine",
    }  # fmt: skip
    assert spec.identity()["preprocessing"]["decode"]["version"] >= 1
    other = load("resnet18", ExtractionConfig(device="auto", precision="fp32", batch_size=3, workers=1))
    if other.device.type == "cpu":
        assert other.specs[0].fingerprint() == spec.fingerprint()
    crop = load("resnet18", preprocessing=PreprocessingConfig(resize=41, crop=32))
    assert differences(spec.identity(), crop.specs[0].identity()) == [
        "preprocessing.resize: the store has 40, this run has 41"
    ]


def test_a_spec_survives_json(small: backbone.Backbone) -> None:
    spec = small.specs[0]
    again = EmbeddingSpec(**json.loads(json.dumps(asdict(spec))))
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()


def test_the_digest_of_the_weights_sees_one_bit_a_name_and_a_shape() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(1)}
    digest = published.tensors_digest(state)
    assert digest == published.tensors_digest(dict(reversed(state.items())))
    flipped = {**state, "a": state["a"].clone()}
    flipped["a"].view(torch.uint8)[0, 0] ^= 1
    assert (
        len(
            {
                digest,
                published.tensors_digest(flipped),
                published.tensors_digest({**state, "a": torch.zeros(3, 2)}),
            }
        )
        == 3
    )
    assert digest != published.tensors_digest({"c": state["a"], "b": state["b"], "n": state["n"]})


# ---- weights files


def test_a_fine_tuned_file_loads_with_its_own_number_of_classes(tmp_path: Path, pixels: np.ndarray) -> None:
    model = weights.build("squeezenet1_1", {"num_classes": 10})
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "tuned.pth"
    )
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    pickled = load("squeezenet1_1", weights=str(tmp_path / "tuned.pth"))
    safe = load("squeezenet1_1", weights=str(tmp_path / "tuned.safetensors"))
    assert pickled.specs[0].name == "squeezenet1_1-tuned-penultimate"
    assert not pickled.specs[0].untrained
    # The same numbers are the same identity, whatever file they come from.
    assert pickled.specs[0].fingerprint() == safe.specs[0].fingerprint()
    np.testing.assert_array_equal(pickled.embed(pixels)[0], safe.embed(pixels)[0])


@pytest.mark.parametrize(
    "wrapped", ["model.", "backbone.", "_orig_mod.module.", "module._orig_mod.", "model.backbone.module._orig_mod."]
)
def test_what_wrappers_put_before_names_is_taken_off_in_any_order(wrapped: str, tmp_path: Path) -> None:
    model = weights.build("squeezenet1_1", {"num_classes": 3})
    state = {f"{wrapped}{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": {"n_averaged": torch.tensor(2), **state}}, tmp_path / "wrapped.pth")
    found, _ = weights.read_weights(tmp_path / "wrapped.pth")
    assert published.tensors_digest(found) == weights.tensors_digest(model.state_dict())


def test_weights_without_a_classifier_give_all_that_is_before_it(
    tmp_path: Path, pixels: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """As self-supervised training leaves them: a projection head beside the backbone, or in the classifier's place."""
    caplog.set_level("INFO", logger="pipeline")
    state = weights.build("shufflenet_v2_x0_5", {}).state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    bare = {key: value for key, value in state.items() if not key.startswith("fc.")}
    beside = {f"backbone.{key}": value for key, value in bare.items()} | {"projector.0.weight": torch.zeros(4, 1024)}
    (expected,) = load("shufflenet_v2_x0_5", weights=str(tmp_path / "whole.safetensors")).embed(pixels)
    for name, content in {
        "bare": bare,
        "beside": beside,
        "inside": {**bare, "fc.0.weight": torch.zeros(4, 1024)},
    }.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path)
        np.testing.assert_array_equal(load("shufflenet_v2_x0_5", weights=str(path)).embed(pixels)[0], expected)
    assert [line for line in caplog.messages if "not part of the network" in line] == [
        f"{tmp_path / 'beside.safetensors'}: tensors that are not part of the network are left out: 1, such as projector.0.weight"
    ]
    with pytest.raises(BackboneError, match=r"the weights have no classifier, so no fc; use layers: \[penultimate\]"):
        load("shufflenet_v2_x0_5", weights=str(path), layers=("conv5", "fc"))


def test_every_misfit_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    state = weights.build("squeezenet1_1", {}).state_dict()
    state["extra.weight"] = torch.zeros(2)
    state["features.0.bias"] = torch.zeros(3)
    del state["features.3.squeeze.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError) as error:
        load("squeezenet1_1", weights=str(tmp_path / "w.safetensors"))
    assert error.value.message == f"weights file {tmp_path / 'w.safetensors'} does not fit squeezenet1_1"
    _, missing, unexpected, other = error.value.problems
    assert missing == 'Missing key(s) in state_dict: "features.3.squeeze.weight".'
    assert unexpected == 'Unexpected key(s) in state_dict: "extra.weight".'
    assert other.startswith("size mismatch for features.0.bias: copying a param with shape torch.Size([3])")


def test_a_file_with_code_or_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Path("x")}}, tmp_path / "code.pth")
    with pytest.raises(BackboneError, match="cannot be read as a state dict"):
        load(weights=str(tmp_path / "code.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BackboneError, match="holds no tensors by name"):
        load(weights=str(tmp_path / "list.pth"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(BackboneError, match="cannot be read as a state dict"):
        load(weights=str(tmp_path / "cut.safetensors"))
    with pytest.raises(BackboneError, match=r"gone.pth does not exist; a path in a config is relative to its folder"):
        load(weights=str(tmp_path / "gone.pth"))


@pytest.fixture
def regnet(tmp_path: Path) -> tuple[Path, dict[str, object]]:
    description: dict[str, object] = {
        "architecture": "torchvision.models.regnet.RegNet",
        "arguments": {
            "block_params": {
                "depths": [1, 1], "widths": [16, 32], "group_widths": [8, 8], "bottleneck_multipliers": [1.0, 1.0], "strides": [2, 2], "se_ratio": 0.25,
            },
            "stem_width": 8,
            "num_classes": 5,
        },
        "preprocessing": {"resize": 36, "crop": 32, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "classes": ["a", "b", "c", "d", "e"],
        "trained_on": "abc",
    }  # fmt: skip
    model = weights.build(description["architecture"], description["arguments"])  # type: ignore[arg-type]
    path = tmp_path / "own.safetensors"
    save_file(model.state_dict(), path, metadata={"manyheads": json.dumps(description)})
    return path, description


def test_a_weights_file_of_this_project_describes_itself(
    regnet: tuple[Path, dict[str, object]], pixels: np.ndarray
) -> None:
    path, _ = regnet
    made = backbone.load(BackboneConfig(name="finetuned", weights=str(path)), FP32, 0)
    spec = made.specs[0]
    assert (spec.name, spec.architecture, spec.dim) == (
        "finetuned-own-penultimate",
        "torchvision.models.regnet.RegNet",
        32,
    )
    assert spec.trained_on == "abc"
    assert spec.preprocessing["interpolation"] == "bicubic"
    assert made.preprocessing.size == (32, 32)
    assert made.embed(pixels)[0].shape == (9, 32)
    with pytest.raises(BackboneError, match=r"holds a torchvision.models.regnet.RegNet; write name"):
        backbone.load(BackboneConfig(name="resnet18", weights=str(path)), FP32, 0)


def test_bundled_weights_load_from_the_package(
    regnet: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, description = regnet
    path = path.rename(tmp_path / "bundled.safetensors")
    path.with_suffix(".json").write_text(json.dumps(description))
    monkeypatch.setattr(weights, "BUNDLED", path)
    made = backbone.load(BackboneConfig(name="bundled", weights="bundled"), FP32, 0)
    assert made.specs[0].name == "bundled-bundled-penultimate"
    assert made.specs[0].trained_on == "abc"


# ---- torchvision's own weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_without_network_the_file_and_its_folder_are_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(BackboneError) as error:
        load("squeezenet1_1", weights="IMAGENET1K_V1")
    assert str(error.value) == (
        "weights SqueezeNet1_1_Weights.IMAGENET1K_V1 cannot be fetched (<urlopen error no network>); fetch "
        f"https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth elsewhere and put it in {hub}; "
        "name: efficientnet_lite0, weights: imagenet, as in configs/folder.yaml, needs no download"
    )


def test_enum_weights_bring_their_own_preprocessing(hub: Path) -> None:
    hub.mkdir()
    model = weights.build("shufflenet_v2_x0_5", {})
    torch.save(model.state_dict(), hub / "shufflenetv2_x0.5-f707e7126e.pth")
    made = backbone.load(BackboneConfig(name="shufflenet_v2_x0_5", weights="IMAGENET1K_V1"), FP32, 0)
    assert made.specs[0].name == "shufflenet_v2_x0_5-IMAGENET1K_V1-penultimate"
    assert not made.specs[0].untrained
    assert (made.preprocessing.resize, made.preprocessing.crop, made.preprocessing.mean) == (
        256,
        224,
        (0.485, 0.456, 0.406),
    )
    assert made.specs[0].weights_digest == published.tensors_digest(model.state_dict())


def test_other_weights_have_other_transforms() -> None:
    members = torchvision_models.torchvision.models.get_model_weights("resnet50").__members__
    assert torchvision_models.preprocessing_of(members["IMAGENET1K_V1"].transforms()).resize == 256
    assert torchvision_models.preprocessing_of(members["IMAGENET1K_V2"].transforms()).resize == 232
    bicubic = torchvision_models.torchvision.models.get_model_weights("efficientnet_b0").__members__["IMAGENET1K_V1"]
    assert torchvision_models.preprocessing_of(bicubic.transforms()).interpolation == "bicubic"


def test_unknown_names_get_a_guess() -> None:
    with pytest.raises(
        BackboneError,
        match=r"no network 'resnet81', did you mean 'resnet18'\?; there are efficientnet_lite0, 1 and 2; torchvision's classification models; timm's, as timm:TAG",
    ):
        load("resnet81")
    with pytest.raises(
        BackboneError,
        match=r"resnet50 has no weights 'IMAGENET1K_V3', did you mean 'IMAGENET1K_V2'\?; there are IMAGENET1K_V1, IMAGENET1K_V2, random",
    ):
        load("resnet50", weights="IMAGENET1K_V3")
    with pytest.raises(BackboneError, match=r"squeezenet1_1 cannot be built with arguments {'width': 2}: .*width"):
        load("squeezenet1_1", arguments={"width": 2})
    with pytest.raises(
        BackboneError, match=r"squeezenet1_1 cannot take images of 8 x 8 pixels \(.*\); change preprocessing.crop"
    ):
        load("squeezenet1_1", preprocessing=PreprocessingConfig(resize=8, crop=8))


def test_a_section_is_checked_without_fetching_or_loading_anything(hub: Path) -> None:
    weights.check(BackboneConfig(name="resnet50", weights="IMAGENET1K_V2", layers=("layer4", "penultimate")))
    weights.check(BackboneConfig(name="vit_b_32"))
    assert not hub.exists()
    with pytest.raises(BackboneError, match=r"resnet50 has no weights 'IMAGENET1K_V9'"):
        weights.check(BackboneConfig(name="resnet50", weights="IMAGENET1K_V9"))
    with pytest.raises(BackboneError, match="no layer 'layer5'"):
        weights.check(BackboneConfig(name="resnet50", layers=("layer5",)))
    with pytest.raises(BackboneError, match=r"vit_b_32 takes images of 224 pixels only"):
        weights.check(BackboneConfig(name="vit_b_32", preprocessing=SMALL))


# ---- device and precision


@pytest.mark.parametrize(
    ("asked", "device", "flags", "cuda_bf16", "expected"),
    [
        ("auto", "cpu", {"AuthenticAMD", "avx512_bf16", "avx512f"}, False, "bf16"),
        ("auto", "cpu", {"GenuineIntel", "avx512_bf16", "avx512f"}, False, "fp32"),
        ("auto", "cpu", {"GenuineIntel", "amx_bf16", "avx512_bf16"}, False, "bf16"),
        ("auto", "cpu", {"amx_bf16"}, False, "bf16"),
        ("auto", "cpu", {"avx512f", "avx2"}, False, "fp32"),
        ("auto", "cuda", {"avx512_bf16"}, True, "bf16"),
        ("auto", "cuda", {"avx512_bf16"}, False, "fp32"),
        ("auto", "mps", {"avx512_bf16"}, False, "fp32"),
        ("fp32", "cpu", {"amx_bf16"}, False, "fp32"),
    ],
)
def test_the_precision_follows_from_what_the_machine_is(
    asked: str, device: str, flags: set[str], cuda_bf16: bool, expected: str
) -> None:
    name, reason = choose_precision(asked, device, frozenset(flags), cuda_bf16)
    assert name == expected
    assert reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        BackboneError,
        match=r"device 'cuda' is not available; there are .*cpu and 0 GPUs",
    ):
        load(extraction=ExtractionConfig(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_a_gpu_gives_the_vectors_of_the_processor(precision: str, tolerance: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    section = BackboneConfig(name="resnet18", preprocessing=PreprocessingConfig(resize=64, crop=64))
    there, here = (
        backbone.load(
            section, ExtractionConfig.model_validate({"device": device, "precision": asked, "engine": "torch"}), 0
        )
        for device, asked in (("cuda", precision), ("cpu", "fp32"))
    )
    (found,), (expected,) = there.embed(pixels), here.embed(pixels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
