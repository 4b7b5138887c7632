"""Networks of the user's own: vectors are what their forward returns, of an identity that sees their code, and run only if asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import rewrite
from photos import make_photos, small_config

from pipeline.config import BackboneConfig, Config, ExtractionConfig
from pipeline.embed import backbone, weights
from pipeline.embed.records import open_record, read_records
from pipeline.errors import BackboneError, PipelineError
from pipeline.experiment import Artifacts
from pipeline.stages import check, extract, finetune, maintenance, predict, train_heads

FP32 = ExtractionConfig(device="cpu", precision="fp32")

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.conv, self.proj = nn.Conv2d(3, 5, 3, 2), nn.Linear(5, dim)
        numbers = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=numbers)

    def forward(self, images):
        return self.proj(torch.relu(self.conv(images)).mean((2, 3)))


class Branches(Net):
    def forward(self, images):
        return super().forward(images if float(images.std()) > 0 else -images)


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


def net(dim=6):
    return Net(dim), {"resize": 40, "crop": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


net.license = "mit"


def branches():
    return Branches(), {"resize": 32, "crop": 32}


def maps():
    torch.manual_seed(3)
    return nn.Conv2d(3, 4, 8, 8), {"resize": 40, "crop": 32, "mean": (0, 0, 0), "std": (1, 1, 1)}


def untrained():
    return nn.Sequential(nn.Conv2d(3, 4, 3))


def no_network():
    return "resnet"


def mapping():
    return Returns({"features": torch.zeros(2, 4)})


def scalar():
    return Returns(torch.zeros(2))


def missing_file():
    raise FileNotFoundError("weights.pt")


def odd_transform():
    return Net(), {"resize": "large"}


def wants_32():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A module `my_nets` in the working folder, which is written anew by what is returned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str) -> None:
        (tmp_path / "my_nets.py").write_text(text, encoding="utf-8")
        sys.modules.pop("my_nets", None)

    write(NETS)
    yield write
    sys.modules.pop("my_nets", None)


def section(function: str, **changes: object) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": f"my_nets:{function}", **changes})


def load(function: str, **changes: object) -> backbone.Backbone:
    return backbone.load(section(function, **changes), FP32, 0)


def pixels(side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)


def by_hand(function: str, given: np.ndarray, mean: torch.Tensor, std: torch.Tensor) -> np.ndarray:
    module, _ = getattr(sys.modules["my_nets"], function)()
    with torch.inference_mode():
        return module.eval()((torch.from_numpy(given).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()


@pytest.mark.parametrize("function", ["net", "branches"])
def test_a_vector_is_what_the_forward_returns_whether_it_can_be_traced_or_not(
    nets: Callable[[str], None], function: str
) -> None:
    made = load(function)
    numbers = {"net": [[0.5] * 3, [0.25] * 3], "branches": [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]}[function]
    expected = by_hand(function, pixels(), *torch.tensor(numbers).view(2, 3, 1, 1))
    np.testing.assert_allclose(made.embed(pixels())[0], expected, rtol=1e-4, atol=1e-5)
    (spec,) = made.specs
    assert (spec.name, spec.dim, spec.layer) == (
        f"my_nets_{function}-own-penultimate",
        6,
        {"net": "network.proj", "branches": "network"}[function],
    )
    assert not spec.untrained


def test_inner_layers_and_poolings_are_those_of_any_network_where_it_can_be_traced(nets: Callable[[str], None]) -> None:
    made = load("net", layers=["network.conv", "penultimate"], pooling="max")
    assert [(spec.layer, spec.dim, spec.pooling) for spec in made.specs] == [
        ("network.conv", 5, "max"),
        ("network.proj", 6, "none"),
    ]
    assert [spec.dim for spec in load("maps", pooling="grid").specs] == [36]
    assert load("maps").preprocessing.mean == (0.0, 0.0, 0.0)
    with pytest.raises(BackboneError, match=r"no layer 'network\.conv'"):
        load("branches", layers=["network.conv"])
    with pytest.raises(BackboneError, match="the weights have no classifier, so no classifier"):
        load("net", layers=["classifier"])


def test_the_config_says_the_arguments_and_the_image_size(nets: Callable[[str], None]) -> None:
    made = load("net", arguments={"dim": 9}, preprocessing={"resize": 48, "crop": 48})
    assert (made.specs[0].dim, made.preprocessing.size) == (9, (48, 48))
    assert load("wants_32", preprocessing={"resize": 32, "crop": 32}).specs[0].dim == 4
    assert section("net").weights == "own"
    assert BackboneConfig(name="resnet18").weights == "random"


def test_the_identity_sees_weights_text_and_source_and_nothing_else(nets: Callable[[str], None]) -> None:
    before = load("net").specs[0]
    assert load("net").specs[0].identity() == before.identity()
    nets(NETS.replace("torch.relu", "torch.sigmoid"))
    other = load("net").specs[0]
    assert other.weights_digest == before.weights_digest
    assert other.code["text"] == before.code["text"]
    assert other.fingerprint() != before.fingerprint()
    nets(NETS.replace("5, 3, 2)", "5, 3, 3)"))
    assert load("net").specs[0].code["text"] != before.code["text"]
    assert "code" not in backbone.load(BackboneConfig(name="squeezenet1_1"), FP32, 0).specs[0].identity()


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("no_network", "my_nets:no_network: returns str, expected a torch.nn.Module, or it and a transform"),
        (
            "mapping",
            "my_nets:mapping: gives a dict for 2 images, expected vectors, such as (2, 512)",
        ),
        (
            "scalar",
            "my_nets:scalar: gives (2,) for 2 images, expected vectors, such as (2, 512)",
        ),
        ("missing_file", "my_nets:missing_file: fails with {}: FileNotFoundError: weights.pt"),
        (
            "untrained",
            "my_nets:untrained: has different weights each time; load trained ones in it, or set weights: random",
        ),
        (
            "odd_transform",
            "my_nets:odd_transform: its transform is not understood (1 validation error for PreprocessingConfig); expected the keys "
            "of preprocessing (resize, crop, interpolation, mean, std), or the result of torchvision's weights.transforms()",
        ),
        (
            "nett",
            "my_nets:nett: 'my_nets' has no function 'nett', did you mean 'net'?",
        ),
        (
            "wants_32",
            "my_nets:wants_32: fails on images of 224 x 224 pixels (RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x150528 "
            "and 3072x4)); set its image size under preprocessing, or in a transform that the function returns with it",
        ),
    ],
)
def test_what_cannot_be_embedded_with_is_told_in_one_line(
    nets: Callable[[str], None], function: str, told: str
) -> None:
    with pytest.raises(BackboneError) as caught:
        load(function)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_a_module_that_cannot_be_imported_is_one_line(nets: Callable[[str], None]) -> None:
    nets("import no_such_thing\n")
    with pytest.raises(BackboneError) as caught:
        weights.check(section("net"))
    assert str(caught.value) == (
        "backbone 'my_nets:net': module 'my_nets' cannot be imported (ModuleNotFoundError: No module named 'no_such_thing'); it "
        "must be installed, or lie beside the config or in the folder the command is run in"
    )


def test_an_untrained_module_is_a_control_of_its_seed(nets: Callable[[str], None]) -> None:
    first, again, other = (
        backbone.load(section("untrained", weights="random"), FP32, seed).specs[0] for seed in (0, 0, 1)
    )
    assert first.untrained
    assert first.weights_digest == again.weights_digest != other.weights_digest


def test_a_weights_file_of_the_module_is_taken(nets: Callable[[str], None], tmp_path: Path) -> None:
    module, _ = __import__("my_nets").net()
    state = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    torch.save(state, tmp_path / "more.pth")
    made = load("net", weights=str(tmp_path / "more.pth"))
    module.load_state_dict(state)
    with torch.inference_mode():
        expected = module(torch.from_numpy(pixels()).permute(0, 3, 1, 2) / 255 * 4 - 2).numpy()
    np.testing.assert_allclose(made.embed(pixels())[0], expected, rtol=1e-4, atol=1e-4)
    assert made.preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.fixture
def config(nets: Callable[[str], None], tmp_path: Path) -> Config:
    config = small_config(make_photos(tmp_path / "photos", per_class=6), tmp_path / "out")
    config = config.model_copy(
        update={"backbones": (section("net"),), "baselines": ("pixels",), "heads": config.heads[:1]}
    )
    check.run(config)
    extract.run(config)
    return config


def test_from_images_to_a_finetuned_network_and_a_strangers_experiment_is_refused(
    config: Config, tmp_path: Path, nets: Callable[[str], None]
) -> None:
    assert extract.run(config).work is None, "nothing is embedded twice"
    found = train_heads.run(config)
    (best,) = [row for row in found.leaderboard.rows if not row.baseline]
    bundle = Path(config.output, str(best.bundle))
    assert json.loads((bundle / "bundle.json").read_text("utf-8"))["runs_code_when_loaded"]
    done = predict.run(bundle, [tmp_path / "photos"], output=tmp_path / "labels.csv", trust=True)
    assert sum(done.labels[""].values()) == 18
    refused = "its network is code, my_nets:net, which can do anything when run; if you trust its author"
    nets("raise SystemExit('ran')")
    with pytest.raises(BackboneError, match=refused):
        predict.run(bundle, [tmp_path / "photos"], output=tmp_path / "labels.csv")
    with pytest.raises(BackboneError, match=refused):  # the config names another network, features.json this one
        maintenance.verify(config.model_copy(update={"backbones": (BackboneConfig(name="resnet18"),)}), sample=1)
    nets(NETS)
    tuned = finetune.run(config.model_copy(update={"finetune": config.finetune.model_copy(update={"steps": 3})}))
    made = load("net", weights=str(tuned.weights))
    assert made.preprocessing.resize == 40
    assert made.specs[0].trained_on is not None
    assert weights.license_of(section("net", weights=str(tuned.weights))) == "mit"
    with pytest.raises(
        BackboneError, match="holds a network of code; write name: my_nets:net only if you know whose it is"
    ):
        backbone.load(BackboneConfig(name="mine", weights=str(tuned.weights)), FP32, 0)
    nets(NETS.replace("torch.relu", "torch.sigmoid"))
    with pytest.raises(BackboneError) as caught:
        open_record(read_records(Artifacts(config.output).features)[0], "cpu", trust_code=True)
    assert caught.value.message.endswith("this machine computes another embedding than the stored one")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["code.source"]
    assert extract.run(config).work.vectors["my_nets_net-own-penultimate"] == 18


def test_a_record_of_any_function_runs_nothing(config: Config, tmp_path: Path) -> None:
    path = Artifacts(config.output).features
    document = json.loads(path.read_text("utf-8"))
    ran = tmp_path / "ran"
    document["embeddings"][0]["section"] |= {"name": "os:system", "arguments": {"command": f"touch {ran}"}}
    rewrite(path, document)
    with pytest.raises(PipelineError, match="its network is code, os:system"):
        maintenance.verify(config, sample=1)
    assert not ran.exists()


def test_permissive_takes_what_the_function_says(config: Config) -> None:
    assert weights.license_of(section("net")) == "mit"
    assert weights.license_of(section("branches")) == "unknown"
    assert weights.license_of(section("untrained", weights="random")) == "none needed"
