"""`pipeline.load`: X, y, paths and groups of a split, from an experiment or from a packed file alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestCentroid

import pipeline
from pipeline.cli import cli
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.embed import records as embedders
from pipeline.errors import StoreError
from pipeline.experiment import Artifacts
from pipeline.stages import maintenance, train_heads
from pipeline.store import FeatureStore
from pipeline.store.share import pack
from pipeline.store.writer import StoreWriter

BACKBONE = "squeezenet1_1-random-penultimate"


def stored(config: Config, *splits: str) -> tuple[np.ndarray, DatasetIndex]:
    files = Artifacts(config.output)
    index = DatasetIndex.read(files.dataset)
    index = index.select(*splits) if splits else index
    record = next(record for record in embedders.read_records(files.features) if record.name == BACKBONE)
    return FeatureStore.open(files.find_store(record.store)).read(index.digests), index


@pytest.fixture(scope="module", params=["experiment", "pack"])
def place(request: pytest.FixtureRequest, experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "experiment":
        return Path(experiment.output)
    path = tmp_path_factory.mktemp("packed") / "features.h5"
    maintenance.pack(experiment, path, embedding=BACKBONE)
    return path


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_what_the_index_says(place: Path, experiment: Config, split: str) -> None:
    X, y, paths, groups = pipeline.load(place, split)
    vectors, index = stored(experiment, split)
    assert X.shape == vectors.shape
    assert X.dtype == np.float32
    assert np.array_equal(np.asarray(X), vectors)
    assert y.tolist() == index.labels.tolist()
    assert paths.tolist() == index.paths.tolist()
    assert groups is None


def test_rows_are_indexed_as_numpy_does(place: Path, experiment: Config) -> None:
    X = pipeline.load(place).X
    vectors, _ = stored(experiment)
    mask = np.arange(len(X)) % 3 == 0
    for rows in (
        0,
        -1,
        slice(3, 9),
        slice(None, None, -2),
        mask,
        [5, 2, 2],
        (3, 4),
        (slice(2, 5), slice(0, 3)),
        (mask, 1),
    ):
        assert np.array_equal(X[rows], vectors[rows]), rows


def test_in_a_notebook_it_is_one_line(place: Path) -> None:
    loaded = pipeline.load(place)
    assert repr(loaded) == "Features(X: StoredRows of shape (36, 512), float32, on disk, y: 3 classes, paths)"
    grouped = loaded._replace(groups=np.array(["a", "b"] * 18, dtype=object))
    assert repr(grouped).endswith("y: 3 classes, paths, 2 groups)")


def test_a_run_of_rows_is_a_view_of_the_file(place: Path) -> None:
    X = pipeline.load(place).X
    assert not X[3:9].flags.owndata
    assert not X[3:9].flags.writeable


def test_scikit_learn_takes_it(place: Path) -> None:
    X, y, _, _ = pipeline.load(place, "train")
    assert cross_val_score(NearestCentroid(), X, y, cv=2).mean() > 0.5


def test_what_is_not_there_is_told(place: Path) -> None:
    with pytest.raises(StoreError, match="has no images of split 'validation'; there are test, train"):
        pipeline.load(place, "validation")


def test_a_pack_of_contents_alone_has_no_labels(tmp_path: Path) -> None:
    digests = np.arange(8, dtype=np.uint64).reshape(4, 2)
    with StoreWriter.open(tmp_path / "s", {"a": 1}, 3) as writer:
        writer.append(digests, np.ones((4, 3), np.float32))
    pack(FeatureStore.open(tmp_path / "s"), tmp_path / "p.h5", digests)
    with pytest.raises(StoreError, match="was packed without labels"):
        pipeline.load(tmp_path / "p.h5")
    with pytest.raises(StoreError, match="was packed without splits"):
        pipeline.load(tmp_path / "p.h5", "train")


def test_a_table_of_ten_rows_has_groups(tmp_path: Path) -> None:
    digests = np.arange(20, dtype=np.uint64).reshape(10, 2)
    features = np.arange(30, dtype=np.float32).reshape(10, 3)
    with StoreWriter.open(tmp_path / "s", {"a": 1}, 3) as writer:
        writer.append(digests, features)
    columns = {"labels": list("aabbaabbaa"), "splits": ["train", "test"] * 5, "groups": list("0123456789")}
    pack(FeatureStore.open(tmp_path / "s"), tmp_path / "p.h5", digests, columns)
    X, y, paths, groups = pipeline.load(tmp_path / "p.h5", "test")
    assert np.array_equal(np.asarray(X), features[1::2])
    assert y.tolist() == ["a", "b", "a", "b", "a"]
    assert groups is not None
    assert groups.tolist() == list("13579")
    assert paths.tolist() == [""] * 5


# ---- a packed file in place of a store


def test_commands_take_a_packed_file_for_a_config(experiment: Config, tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    maintenance.pack(experiment, path, embedding=BACKBONE)
    runner = CliRunner()
    said = runner.invoke(cli, ["store", "status", str(path)])
    assert said.exit_code == 0
    assert said.output.startswith(
        "36 images with paths, labels, splits\nfeatures.h5: complete\n  36 vectors of 512 float32 "
    )
    said = runner.invoke(cli, ["store", "verify", str(path), "--full"], standalone_mode=False)
    assert said.return_value == 0
    assert said.output.startswith("features.h5: ok; 36 vectors; checked every byte")
    assert runner.invoke(cli, ["store", "export", str(tmp_path / "x.npy"), str(path)]).exit_code == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), stored(experiment)[0])
    assert runner.invoke(cli, ["store", "merge", str(tmp_path / "back.store"), str(path)]).exit_code == 0
    _, index = stored(experiment)
    assert np.array_equal(FeatureStore.open(tmp_path / "back.store").read(index.digests), stored(experiment)[0])
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    said = runner.invoke(cli, ["store", "verify", str(path), "--full"], standalone_mode=False)
    assert said.return_value == 1
    assert "images without a usable vector:" in said.output
    assert str(index.paths[-1]) in said.output


def test_an_experiment_whose_record_names_a_packed_file(experiment: Config, tmp_path: Path) -> None:
    """The heads read it like a store."""
    import shutil
    from dataclasses import replace

    output = Path(shutil.copytree(experiment.output, tmp_path / "output"))
    shutil.copytree(Artifacts(experiment.output).stores, tmp_path / "features")
    config = experiment.model_copy(update={"output": str(output)})
    files = Artifacts(output)
    maintenance.pack(config, tmp_path / "features" / "shared.h5", embedding=BACKBONE)
    records = [
        replace(record, store="shared.h5") if record.name == BACKBONE else record
        for record in embedders.read_records(files.features)
    ]
    for record in embedders.read_records(files.features):
        if record.name == BACKBONE:
            shutil.rmtree(files.find_store(record.store))
    embedders.write_records(files.features, records, config, DatasetIndex.read(files.dataset).fingerprint())
    assert all(check.ok for check in maintenance.verify(config, full=True, sample=2))
    assert any("shared.h5  digest" in line for line in maintenance.status(config))
    assert "which stays as it is" in maintenance.gc(config)[0]
    maintenance.export(config, tmp_path / "x.npy", embedding=BACKBONE)
    assert np.array_equal(np.load(tmp_path / "x.npy"), stored(experiment)[0])
    assert len(train_heads.run(config).summary_lines()) > 3
