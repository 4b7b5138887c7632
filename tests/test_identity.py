"""What changes vectors is another identity, and its store is refused; what does not change them is the same one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import make_photos
from safetensors.numpy import load_file, save_file

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.embed import backbone
from pipeline.embed.records import read_records
from pipeline.errors import StoreError
from pipeline.experiment import Artifacts
from pipeline.io.digests import fingerprint
from pipeline.stages import extract as extract_features
from pipeline.store import FeatureStore
from pipeline.store.writer import StoreWriter

NAME = "squeezenet1_1"


def make(photos: Path, output: Path, weights: str = "random", **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "output": str(output),
        "dataset": {"source": "folder", "path": str(photos)},
        "backbones": [{"name": NAME, "weights": weights, "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": [],
        "extraction": {"device": "cpu", "precision": "fp32", "batch_size": 4, "workers": 1},
        "heads": ["nearest_centroid"],
    }
    return configuration.parse({**raw, **changes}, "test")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights: those of the seed."""
    from pipeline.embed import weights

    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    numbers = {name: value.numpy() for name, value in weights.build(NAME, {}).state_dict().items()}
    save_file(numbers, path)
    return path


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, network: Path) -> Config:
    """A finished first stage; tests must not change it."""
    root = tmp_path_factory.mktemp("identity")
    config = make(make_photos(root / "photos", per_class=3), root / "output", str(network))
    extract_features.run(config)
    return config


@pytest.fixture
def copied(embedded: Config, tmp_path: Path) -> Config:
    output = shutil.copytree(embedded.output, tmp_path / "moved to elsewhere")
    return embedded.model_copy(update={"output": str(output)})


def store_path(config: Config) -> Path:
    (record,) = read_records(Artifacts(config.output).features)
    return Artifacts(config.output).find_store(record.store)


def leaves(value: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from leaves(item, (*prefix, key))
        else:
            yield (*prefix, key)


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, 1]
    if isinstance(value, Mapping):
        return {"new": 1}
    return f"{value}x"


def test_every_field_of_a_real_identity_is_refused_when_it_changes(embedded: Config) -> None:
    path = store_path(embedded)
    identity = FeatureStore.open(path).identity
    names = list(leaves(identity))
    assert len(names) > 15
    assert {name[0] for name in names} == set(identity)
    for name in names:
        other = copy.deepcopy(identity)
        section = other
        for key in name[:-1]:
            section = section[key]
        before, section[name[-1]] = section[name[-1]], changed(section[name[-1]])
        assert fingerprint(other) != fingerprint(identity)
        with pytest.raises(StoreError, match="cannot be mixed with new ones") as caught:
            StoreWriter.open(path, other, FeatureStore.open(path).dim)
        field = ".".join(name)
        for line in caught.value.problems:
            assert line.startswith(field)
            assert ": the store has " in line
            assert ", this run has " in line
        if not isinstance(before, dict | list) and len(repr(before)) < 80:
            assert caught.value.problems == (f"{field}: the store has {before!r}, this run has {section[name[-1]]!r}",)


def test_every_field_of_the_spec_is_in_the_identity_or_changes_no_vector(embedded: Config) -> None:
    (record,) = read_records(Artifacts(embedded.output).features)
    free = {"name", "kind", "license", "weights", "untrained", "trained_on"}
    same = set()
    for field in asdict(record.spec):
        other = replace(record.spec, **{field: changed(getattr(record.spec, field))})
        if other.fingerprint() == record.spec.fingerprint():
            same.add(field)
    assert same == free, "`weights` is only how the weights are called; `weights_digest` says which they are"


def test_one_flipped_bit_of_one_weight_is_another_network(copied: Config, network: Path, tmp_path: Path) -> None:
    numbers = load_file(network)
    name = sorted(numbers)[len(numbers) // 2]
    numbers[name] = numbers[name].copy()
    numbers[name].view(np.uint32).reshape(-1)[3] ^= 1
    save_file(numbers, tmp_path / "net.safetensors")
    flipped = make(Path(str(copied.dataset.path)), Path(copied.output), str(tmp_path / "net.safetensors"))
    old = store_path(copied)
    before = {path: path.read_bytes() for path in old.rglob("*.h5")}
    plan = extract_features.run(flipped, plan=True)
    (target,) = plan.targets
    assert int(target.pending.sum()) == 9
    assert "weights: the store has '" in target.why
    assert "; " not in target.why, "the weights are all that differs"
    with pytest.raises(StoreError, match="made differently than asked for"):
        FeatureStore.open(old, target.spec.fingerprint())
    result = extract_features.run(flipped)
    assert result.work is not None
    assert result.work.images == 9
    assert {path: path.read_bytes() for path in old.rglob("*.h5")} == before, "the old features stay as they were"


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 7},
        {"batch_size": "auto", "workers": "auto"},
        {"workers": 3},
    ],
    ids=str,
)
def test_batch_size_and_workers_change_no_identity(copied: Config, change: dict[str, Any]) -> None:
    extraction = {**copied.extraction.model_dump(), **change}
    config = copied.model_copy(update={"extraction": type(copied.extraction).model_validate(extraction)})
    assert extract_features.run(config).work is None


def test_paths_change_no_identity(copied: Config, network: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(str(copied.dataset.path), tmp_path / "other photos")
    (tmp_path / "elsewhere").mkdir()
    weights = shutil.copy(network, tmp_path / "elsewhere" / network.name)
    (Path(copied.output) / "dataset" / "index.json").unlink()  # as is told where the images of before are still there
    result = extract_features.run(make(photos, Path(copied.output), str(weights)))
    assert result.work is None, (
        "the experiment, its images and its weights lie elsewhere, and nothing is embedded again"
    )
    renamed = shutil.copy(network, tmp_path / "renamed.safetensors")
    section = make(photos, Path(copied.output), str(renamed)).backbones[0]
    (spec,) = backbone.load(section, copied.extraction, 0).specs
    (target,) = result.targets
    assert spec.fingerprint() == target.spec.fingerprint()


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
def test_the_index_of_a_device_changes_no_identity(device: str, copied: Config, network: Path) -> None:
    import torch

    kind, _, number = device.partition(":")
    if kind == "cuda" and torch.cuda.device_count() <= int(number):
        pytest.skip(f"this machine has no {device}")
    prints = []
    for asked in (kind, device):
        extraction = type(copied.extraction).model_validate({"device": asked, "precision": "fp32"})
        prints.append(backbone.load(copied.backbones[0], extraction, 0).specs[0].fingerprint())
    assert prints[0] == prints[1]
