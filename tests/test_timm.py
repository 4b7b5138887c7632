"""Networks of timm: their own feature, their own transform, and weights that nobody fetches unasked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm_families import FAMILIES, FEW, compared

from pipeline import config as configuration
from pipeline.config import TIMM_NAMES, BackboneConfig, ExtractionConfig
from pipeline.embed import backbone, efficientnet_lite, engines, graph, timm_models, weights
from pipeline.embed.spec import probe_images
from pipeline.errors import BackboneError, TrainingError
from pipeline.finetuning.plan import last_linear
from pipeline.finetuning.result import write_weights
from pipeline.finetuning.trainer import copy_weights
from pipeline.images import Preprocessing, prepare
from pipeline.stages import backbones

EXACT = ExtractionConfig(device="cpu", precision="fp32", engine="torch", decode="exact")
ABSENT = "networks of timm need the package timm; run `pip install 'manyheads[timm]'`"

installed = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    if importlib.util.find_spec("huggingface_hub"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    return tmp_path / "hub" / "checkpoints"


def section(name: str, **more: Any) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, **more})


def load(name: str, seed: int = 0, **more: Any) -> backbone.Backbone:
    return backbone.load(section(name, **more), EXACT, seed)


def small(**more: Any) -> backbone.Backbone:
    """A transformer of 64 numbers with class token, of random weights."""
    return load("timm:test_vit.r160_in1k", weights="random", arguments={"image_size": 32}, **more)


# ---- the feature


@installed
@pytest.mark.parametrize("tag", FEW)
def test_a_network_gives_timms_own_feature(tag: str) -> None:
    off, way, _ = compared(tag, FAMILIES[tag], **FEW[tag])
    assert off <= 1e-5
    assert way == ("module" if "crossvit" in tag else "graph")


@installed
@pytest.mark.parametrize(
    "tag", ["mobilenetv3_small_050.lamb_in1k", "tf_efficientnet_lite0.in1k", "regnety_002.pycls_in1k"]
)
def test_norms_are_folded_whatever_is_inside_them_and_however_the_convolution_pads(tag: str) -> None:
    network = weights.load_network(section(f"timm:{tag}", weights="random"), 0)
    traced = graph.trace(network.module)
    kept = graph.cut(traced, graph.resolve(traced, ["penultimate"]))
    assert not [part for part in kept.modules() if isinstance(part, torch.nn.BatchNorm2d)]


@installed
def test_efficientnet_lite_is_the_familys_own_to_the_last_bit(tmp_path: Path) -> None:
    name = "efficientnet_lite0"  # the larger ones are compared with the published networks by a test of theirs
    if weights.published(section(name, weights="imagenet")).to_install():
        pytest.skip(f"the weights of {name} are not installed")
    tensors = list(efficientnet_lite.read(name).values())
    with torch.device("meta"):
        names = timm_models.create(timm_models.find(f"timm:tf_{name}.in1k", {})).state_dict()
    save_file(
        {key: value.contiguous() for key, value in zip(names, tensors, strict=True)}, tmp_path / "lite.safetensors"
    )
    its = efficientnet_lite.preprocessing(name)  # timm takes another mean
    same = {"resize": 97, "crop": 97, "interpolation": "bicubic", "mean": list(its.mean), "std": list(its.std)}
    ours = load(name, weights="imagenet", preprocessing=same)
    theirs = load(f"timm:tf_{name}.in1k", weights=str(tmp_path / "lite.safetensors"), preprocessing=same)
    pixels = probe_images(ours.preprocessing.size)[-1:]
    assert np.array_equal(theirs.embed(pixels)[0], ours.embed(pixels)[0])


@installed
def test_tokens_are_pooled_as_asked_and_the_networks_own_way_is_the_default() -> None:
    pixels = probe_images((32, 32))
    embedder = small(layers=["penultimate", "unpooled"], pooling=["own", "avg", "cls", "cls+avg", "flatten"])
    found = dict(
        zip([spec.name.partition("-random-")[2] for spec in embedder.specs], embedder.embed(pixels), strict=True)
    )
    tokens = found["penultimate-flatten"].reshape(len(pixels), 1 + 4, 64)
    assert list(found) == [
        "penultimate",
        "penultimate-avg",
        "penultimate-cls_avg",
        "penultimate-flatten",
        "unpooled-cls",
    ]
    np.testing.assert_allclose(found["penultimate"], tokens[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["penultimate-avg"], tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["penultimate-cls_avg"][:, 64:], tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-6)
    assert np.array_equal(small().embed(pixels)[0], found["penultimate"])


@installed
def test_dinov3_gives_its_class_token_and_siglip_its_own_attention() -> None:
    dinov3 = timm_models.create(timm_models.find("timm:vit_small_patch16_dinov3.lvd1689m", {"image_size": 32}))
    assert graph.tokens_of(dinov3) == graph.Tokens(prefix=5, class_token=True, own="token")
    with torch.device("meta"):
        siglip = timm_models.create(timm_models.find("siglip2_base", {}))
    assert graph.tokens_of(siglip) == graph.Tokens(attention_pool=True, own="map")


@installed
def test_a_network_that_cannot_be_traced_has_its_modules_as_layers() -> None:
    """One of a changing image size asks for it in Python."""
    network = weights.load_network(section("timm:test_vit.r160_in1k", weights="random"), 0)
    images = torch.randn(2, 3, 160, 160)
    traced = graph.trace(network.module, images)
    assert isinstance(traced[0], graph.Taps)
    inner, last = graph.cut(traced, ["blocks.0", "pooled"])(images)
    seen: list[torch.Tensor] = []
    network.module.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(last, network.module(images))
    assert torch.equal(inner, seen[0])
    assert ("blocks.0", (101, 64)) in [row[:2] for row in backbone.layers("timm:test_vit.r160_in1k")]


@installed
def test_bf16_is_close() -> None:
    half = backbone.load(
        section("timm:test_vit.r160_in1k", weights="random", arguments={"image_size": 32}),
        ExtractionConfig(device="cpu", precision="bf16", engine="torch", decode="exact"),
        0,
    )
    engines.require_close(half.probe, small().probe)
    assert half.specs[0].precision == "bf16"


# ---- the transform


@installed
@pytest.mark.parametrize(
    ("tag", "size", "expected"),
    [
        ("vit_base_patch16_siglip_224.v2_webli", None, Preprocessing(248, 224, "bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)),
        ("convnextv2_tiny.fcmae_ft_in22k_in1k", 96, Preprocessing(109, 96, "bicubic")),
        ("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", None, Preprocessing(448, 448, "bicubic", fit="squash", mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))),
        ("deepseek_vit_412m.deepseek_v4_1_flash", None, Preprocessing(546, 546, "bicubic", fit="border", mean=(0.5,) * 3, std=(0.5,) * 3)),
    ],
)  # fmt: skip
def test_the_transform_is_the_one_that_timm_resolves(tag: str, size: int | None, expected: Preprocessing) -> None:
    given = {} if size is None else {"image_size": size}
    assert timm_models.preprocessing(timm_models.find(f"timm:{tag}", given)) == expected


@installed
@pytest.mark.parametrize("shape", [(40, 90), (90, 41), (30, 30), (10, 200)])
@pytest.mark.parametrize("fit", ["crop", "squash", "border"])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_its_pixels_are_timms(shape: tuple[int, int], fit: str, share: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    mean = (0.48, 0.1, 0.9)
    mode = {"crop": "center"}.get(fit, fit)
    transform = timm_models.library().data.create_transform(
        (3, 32, 32), crop_pct=share, crop_mode=mode, interpolation="bicubic", mean=mean, normalize=False
    )
    expected = np.asarray(transform(Image.fromarray(pixels))).transpose(1, 2, 0)
    mine = prepare(pixels, Preprocessing(int(32 / share), 32, "bicubic", mean=mean, fit=fit))
    assert np.array_equal(mine, expected)


def test_the_fit_is_in_an_identity_only_where_it_is_not_the_usual_one() -> None:
    assert "fit" not in Preprocessing(256, 224).identity()
    assert Preprocessing(224, 224, fit="squash").identity()["fit"] == "squash"
    with pytest.raises(ValueError, match=r"unknown fit 'stretch'; there are crop, squash, border"):
        Preprocessing(224, 224, fit="stretch")


@installed
def test_the_image_size_is_an_axis() -> None:
    sizes = [small(), load("timm:test_vit.r160_in1k", weights="random", arguments={"image_size": 48})]
    assert [each.preprocessing.size for each in sizes] == [(32, 32), (48, 48)]
    assert len({each.specs[0].fingerprint() for each in sizes}) == 2


# ---- names


def test_names_of_timm_say_which_weights_and_are_pooled_as_the_network_does() -> None:
    for name in (*TIMM_NAMES, "timm:resnet50.a1_in1k"):
        assert (section(name).weights, section(name).pooling) == ("pretrained", ("own",))
    asked = section("dinov2_base", weights="random", pooling="cls")
    assert (asked.weights, asked.pooling) == ("random", ("cls",))
    assert (section("resnet50").weights, section("resnet50").pooling) == ("random", ("avg",))


@installed
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnt50.a1_in1k", "timm has no 'resnt50.a1_in1k'; the nearest are timm:resnet50.a1_in1k, timm:resnet50d.a1_in1k,"),
        ("timm:resnet50.a9_in1k", "timm has no 'resnet50.a9_in1k'; the nearest are timm:resnet50."),
        ("timm:resnet18", "timm:resnet18 has no weights 'pretrained'; there are a1_in1k, a2_in1k, a3_in1k, "),
        ("timm:hf-hub:a/b", "timm has no 'hf-hub:a/b'; the nearest are timm:"),
        ("timm:local-dir:no/where", "no/where: expected config.json and weights of a network of timm (Config file not found"),
        ("timm:vit_base_patch16_sapiens2.fb", "vit_base_patch16_sapiens2.fb takes 3 x 1024 x 768 pixels, expected squares"),
    ],
)  # fmt: skip
def test_a_name_that_leads_nowhere_is_answered_in_one_line(name: str, message: str) -> None:
    with pytest.raises(BackboneError) as caught:
        weights.check(section(name))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# ---- weights: a folder, a file, the Hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What timm writes for others, of a network with three classes."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    timm = timm_models.library()
    place = tmp_path_factory.mktemp("weights") / "own"
    torch.manual_seed(1)
    place.mkdir()
    save_file(timm.create_model("test_resnet.r160_in1k", num_classes=3).state_dict(), place / "model.safetensors")
    cfg = {"input_size": [3, 160, 160], "tag": "mine", "license": "MIT", "mean": [0.5] * 3, "classifier": "fc"}
    described = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": cfg}
    (place / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return place


def test_a_folder_and_a_file_give_the_same_vectors_and_paths_are_of_the_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = probe_images((160, 160))
    by_folder = load(f"timm:local-dir:{folder}")
    file = folder / "model.safetensors"
    by_file = load(
        "timm:test_resnet.r160_in1k",
        weights=str(file),
        arguments={"num_classes": 3},
        preprocessing={"resize": 182, "crop": 160, "interpolation": "bicubic", "mean": [0.5] * 3},
    )
    assert np.array_equal(by_folder.embed(pixels)[0], by_file.embed(pixels)[0])
    assert by_folder.specs[0].weights_digest == by_file.specs[0].weights_digest
    assert (by_folder.specs[0].architecture, by_folder.specs[0].license) == ("timm:test_resnet.mine", "mit")
    assert by_folder.preprocessing.mean == (0.5, 0.5, 0.5)
    described = {"dataset": {"source": "digits"}, "backbones": [{"name": "timm:local-dir:own"}], "heads": ["ridge"]}
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")
    monkeypatch.chdir(folder.parent.parent)
    read = configuration.load(Path(folder.parent.name, "config.yaml"))
    assert read.backbones[0].name == f"timm:local-dir:{folder.parent.name}/own"
    assert "timm:local-dir:own" in configuration.dump_yaml(read, Path(folder.parent.name))


def test_a_part_that_no_file_fills_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = timm_models.library()
    tensors = load_file(folder / "model.safetensors")
    del tensors["layer4.0.conv1.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    asked = {"weights": str(tmp_path / "part.safetensors"), "arguments": {"num_classes": 3}}
    with pytest.raises(
        BackboneError, match=r'do not fit: .*Missing key\(s\) in state_dict: "layer4\.0\.conv1\.weight"'
    ):
        load("timm:test_resnet.r160_in1k", **asked)
    strictly = timm.models._builder.load_pretrained
    monkeypatch.setattr(
        timm.models._builder, "load_pretrained", lambda *args, **more: strictly(*args, **{**more, "strict": False})
    )
    with pytest.raises(BackboneError, match=r"tensors that are not in the weights: 1, such as layer4\.0\.conv1\.weight"):  # fmt: skip
        load("timm:test_resnet.r160_in1k", **asked)


@installed
def test_weights_are_told_with_their_size_and_without_a_network_in_one_line(caches: Path) -> None:
    asked = section("timm:gcvit_xxtiny.in1k")
    fetch = weights.to_fetch(asked)
    assert fetch is not None
    assert (round(fetch.megabytes), fetch.folder) == (48, caches)
    with pytest.raises(BackboneError, match=rf"cannot be fetched \(.*\); fetch it elsewhere and put it in {caches}; name") as caught:  # fmt: skip
        weights.load_network(asked, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(BackboneError, match=r"^dinov2_base: timm/vit_base_patch14_reg4_dinov2.lvd142m of the Hugging Face Hub cannot be fetched \(.*\); fetch it elsewhere and write name: timm:local-dir:FOLDER") as caught:  # fmt: skip
        weights.load_network(section("dinov2_base"), 0)
    assert "\n" not in str(caught.value)


@installed
def test_a_gated_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(timm_models.library().models._hub, "hf_hub_download", refuse)
    with pytest.raises(BackboneError, match=r"\(accept its terms on its page and run `hf auth login`\)"):
        weights.load_network(section("dinov3_base"), 0)


def test_without_timm_the_names_are_listed_and_each_use_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise BackboneError(ABSENT)

    monkeypatch.setattr(timm_models, "library", absent)
    (row,) = [line for line in backbones.run("dinov2_base")[0].splitlines() if line.startswith("dinov2_base")]
    assert row.split() == ["dinov2_base", "timm", "to", "install"]
    with pytest.raises(BackboneError, match=r"^networks of timm need the package timm; run `pip install"):
        weights.check(section("dinov2_base"))
    with pytest.raises(BackboneError, match=r"^networks of timm need the package timm; run `pip install"):
        weights.check(section("timm:resnet50.a1_in1k"))


# ---- fine-tuning


@installed
def test_a_fine_tuned_network_is_timms_with_a_last_layer_and_its_file_gives_its_feature(tmp_path: Path) -> None:
    arguments = {"image_size": 32}
    network = weights.load_network(section("timm:test_vit.r160_in1k", weights="random", arguments=arguments), 0)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        before = network.module(images)
    module = weights.family_of(network.architecture).with_classifier(network.module, 3)
    last = module.get_submodule(last_linear(module))
    with torch.inference_mode():
        torch.testing.assert_close(module(images), last(before))
    write_weights(
        tmp_path / "tuned.safetensors",
        copy_weights(module),
        name=network.name,
        architecture=network.architecture,
        arguments=network.arguments,
        preprocessing={"resize": 32, "crop": 32, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
        classes=("a", "b", "c"),
    )
    again = weights.load_network(section("timm:test_vit.r160_in1k", weights=str(tmp_path / "tuned.safetensors")), 0)
    with torch.inference_mode():
        assert torch.equal(again.module(images), before)
    assert (again.preprocessing.interpolation, again.preprocessing.fit) == ("bicubic", "crop")


@installed
def test_a_network_without_one_last_layer_is_refused() -> None:
    network = weights.load_network(section("timm:deit_tiny_distilled_patch16_224.fb_in1k", weights="random"), 0)
    module = weights.family_of(network.architecture).with_classifier(network.module, 3)
    with pytest.raises(TrainingError, match="the network has no linear layer to give one score per class"):
        last_linear(module)
