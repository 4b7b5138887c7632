"""Features that stay on disk: the results of those in memory, within a bounded memory, or a plain line that says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from test_tuning_solvers import network

from pipeline import config as configuration
from pipeline.config import Config, HeadConfig, TuningConfig
from pipeline.data import DatasetIndex
from pipeline.data.classes import Classification
from pipeline.embed.records import EmbeddingRecord, write_records
from pipeline.embed.spec import EmbeddingSpec
from pipeline.errors import ConfigError, HeadError
from pipeline.evaluation import HeadPredictions
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.heads import HEADS, RIDGE, Head, resolve
from pipeline.heads.fast import linear
from pipeline.heads.tuning import blocks, features, limited, make_folds, memory_needed, refit, room, tune, works_on_disk
from pipeline.heads.tuning.evaluation import Problem
from pipeline.io import process
from pipeline.io.digests import content_digest, digests_from_hex
from pipeline.stages import train_heads
from pipeline.stages.train_heads.task import objections
from pipeline.store import FeatureStore, StoredRows
from pipeline.store.writer import StoreWriter

DISK = [name for name, head in HEADS.items() if works_on_disk(head)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in little data; the sizes are not what is tested."""
    monkeypatch.setattr(features, "BLOCK_BYTES", 1 << 14)


def stored(folder: Path, X: np.ndarray) -> StoredRows:
    """Put rows into two segments of a store, in another order than they are asked for."""
    digests = digests_from_hex(content_digest(str(number).encode()).hex() for number in range(len(X)))
    order = np.random.default_rng(0).permutation(len(X))
    for half in np.array_split(order, 2):
        with StoreWriter.open(folder, {"test": "on disk"}, X.shape[1]) as writer:
            writer.append(digests[half], X[half])
    return StoredRows.of(FeatureStore.open(folder), digests)


def test_stored_rows_look_like_the_matrix(tmp_path: Path, small_blocks: None) -> None:
    X = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    rows = stored(tmp_path / "store", X)
    assert (rows.shape, rows.dtype, rows.nbytes, len(rows)) == (X.shape, X.dtype, X.nbytes, len(X))
    some = np.array([250, 3, 3, 17])
    np.testing.assert_array_equal(rows[some], X[some])
    np.testing.assert_array_equal(rows.part(some)[np.array([3, 0])], X[[17, 250]])
    np.testing.assert_array_equal(rows[10:20], X[10:20])
    read = np.empty_like(X)
    for place, block in blocks(rows, np.arange(300)[::-1]):
        read[place] = block
    np.testing.assert_array_equal(read, X[::-1])
    order = rows.file_order(some)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert (np.diff(rows.segments[some[order]]) >= 0).all()
    assert (np.diff(rows.rows[some[order]])[np.diff(rows.segments[some[order]]) == 0] >= 0).all()


@pytest.mark.parametrize(
    ("name", "shape", "classes", "class_weight"),
    [(name, (300, 40), 3, None) for name in DISK]
    + [(name, (240, 24), 2, None) for name in DISK]
    + [("logistic_regression", (90, 120), 3, None), ("linear_svm", (240, 24), 4, "balanced")],
)
def test_a_search_on_disk_finds_what_one_in_memory_finds(
    name: str,
    shape: tuple[int, int],
    classes: int,
    class_weight: Any,
    tmp_path: Path,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both roads stop near the optimum; nearer, to tell what they find from where they stop.
    monkeypatch.setattr(linear, "LOGISTIC_TOLERANCE", 2e-6)
    monkeypatch.setattr(linear, "HINGE_TOLERANCE", 2e-6)
    X, y = network(*shape, classes)
    head, folds = resolve(HeadConfig(name=name, class_weight=class_weight)), make_folds(y, 3, 0)
    tuning = TuningConfig(trials=3, jobs=1)
    here = tune(head, X, y, folds, tuning, 0, tmp_path / "memory.jsonl")
    disk = tune(head, stored(tmp_path / "store", X), y, folds, tuning, 0, tmp_path / "disk.jsonl")
    assert disk.best.params == here.best.params
    assert [trial.params for trial in disk.trials] == [trial.params for trial in here.trials]
    size = max(1.0, float(np.abs(here.out_of_fold.scores).max()))
    np.testing.assert_allclose(disk.out_of_fold.scores, here.out_of_fold.scores, atol=1e-4 * size)
    np.testing.assert_array_equal(disk.out_of_fold.y_pred, here.out_of_fold.y_pred)
    np.testing.assert_array_equal(disk.out_of_fold.folds, here.out_of_fold.folds)
    assert np.mean(disk.pipeline.predict(X) != here.pipeline.predict(X)) <= 0.005
    np.testing.assert_array_equal(disk.pipeline.classes_, here.pipeline.classes_)


def test_parameters_that_the_config_holds_reach_the_fits(tmp_path: Path, small_blocks: None) -> None:
    X, y = network(100, 11, 2)
    X = X[:, 1:]
    rows, folds = stored(tmp_path / "store", X), make_folds(y, 3, 0)
    for name, key in (("ridge", "alpha"), ("logistic_regression", "C")):
        head = resolve(HeadConfig(name=name, space={key: (0.3,)}))
        run = tune(head, rows, y, folds, TuningConfig(trials=2, jobs=1), 0, tmp_path / f"{name}.jsonl")
        assert (len(run.trials), run.best.params) == (1, {})
        assert run.pipeline[-1].get_params()[key] == 0.3
        np.testing.assert_allclose(
            run.pipeline.decision_function(X),
            clone(run.pipeline).fit(X, y).decision_function(X),
            rtol=0.01,
            atol=0.01,
        )


def test_a_class_missing_from_a_fold_and_a_resumed_search(tmp_path: Path, small_blocks: None) -> None:
    X, y = network(60, 10, 3)
    y[y == 2] = 1
    y[7] = 2
    rows, folds, tuning = stored(tmp_path / "store", X), make_folds(y, 3, 0), TuningConfig(trials=3, jobs=2)
    for name in DISK:
        first = tune(HEADS[name], rows, y, folds, tuning, 0, tmp_path / f"{name}.jsonl")
        assert (first.best.mean or 0) > 0.5
        assert first.out_of_fold.y_pred[7] != 2
        assert first.pipeline.classes_.tolist() == [0, 1, 2]
        again = tune(HEADS[name], rows, y, folds, tuning, 0, tmp_path / f"{name}.jsonl")
        assert again.replayed == 3 * len(first.trials)
        np.testing.assert_array_equal(again.out_of_fold.scores, first.out_of_fold.scores)


def test_a_head_that_cannot_work_on_disk_says_so(tmp_path: Path) -> None:
    X, y = network(60, 10, 2)
    rows, folds, tuning = stored(tmp_path / "store", X), make_folds(y, 3, 0), TuningConfig(trials=1, jobs=1)
    other = Head(
        "mine", lambda seed: make_pipeline(MinMaxScaler(), RidgeClassifier()), {}, {}, evaluator=RIDGE.evaluator
    )
    weighted = resolve(HeadConfig(name="ridge", class_weight="balanced"))
    for head in (HEADS["knn"], other, weighted):
        text = f"head {head.name}: cannot be fitted on features that are larger than memory; set tuning.pca, or raise tuning.memory"
        with pytest.raises(HeadError) as caught:
            tune(head, rows, y, folds, tuning, 0, tmp_path / f"{head.name}.jsonl")
        assert str(caught.value) == text
        with pytest.raises(HeadError) as caught:
            refit(head, head.defaults, rows, y, 0)
        assert str(caught.value) == text


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from dataclasses import replace
from pipeline.config import TuningConfig
from pipeline.heads import HEADS
from pipeline.store import FeatureStore, StoredRows
from pipeline.heads.tuning import features, make_folds, tune

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
# Smaller blocks for a smaller test.
features.BLOCK_BYTES = 1 << 19
y, digests = np.load(folder / "y.npy"), np.load(folder / "digests.npy")
store = FeatureStore.open(folder / "store")
folds = make_folds(y, 2, 0)
tuning = TuningConfig(trials=1, jobs=1, folds=2, memory=f"{limit}MB")
logistic = replace(HEADS["logistic_regression"], defaults={"C": 1e-5})
heads = [HEADS["ridge"], logistic]
# What libraries keep for themselves is there before the limit is set.
little = np.arange(300)
for head in [*heads, HEADS["decision_tree"]]:
    tune(head, store.read(digests[little]), y[little], make_folds(y[little], 2, 0), tuning, 0, folder / f"warm-{head.name}")
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + limit * 10**6,) * 2)
for head in heads:
    run = tune(head, StoredRows.of(store, digests), y, folds, tuning, 0, folder / head.name)
    assert not run.best.error, run.best.error
    print(head.name, round(run.best.mean, 3))
reduced = tuning.model_copy(update={"pca": 4})
run = tune(HEADS["decision_tree"], StoredRows.of(store, digests), y, folds, reduced, 0, folder / "components")
print("decision_tree", round(run.best.mean, 3))
try:
    store.read(digests)
except MemoryError:
    print("the whole matrix does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts allocations on Linux")
def test_features_of_several_times_the_limit_are_tuned_within_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(12_000) % 3
    centres = 0.2 * rng.normal(size=(3, 256))
    digests = digests_from_hex(content_digest(str(number).encode()).hex() for number in range(len(y)))
    with StoreWriter.open(tmp_path / "store", {"test": "large"}, 256) as writer:  # 12 MB
        for start in range(0, len(y), 3000):
            part = slice(start, start + 3000)
            rows = rng.standard_normal((3000, 256), dtype=np.float32) + centres[y[part]].astype(np.float32)
            writer.append(digests[part], rows)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "digests.npy", digests)
    made = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), "5"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    lines = dict(line.rsplit(" ", 1) for line in made.stdout.splitlines())
    names = ["ridge", "logistic_regression", "decision_tree"]
    assert list(lines) == [*names, "the whole matrix does not"]
    assert all(float(lines[name]) > (0.4 if name == "decision_tree" else 0.9) for name in names)


N, DIM = 900, 32


def stage_one(output: Path) -> Config:
    """Write what stage one leaves behind: an index, a store, features.json."""
    files = Artifacts(output)
    codes = np.arange(N) % 3
    X = np.random.default_rng(0).normal(size=(N, DIM)) + 0.8 * np.eye(3, DIM)[codes]
    splits = np.where(np.arange(N) % 5 == 0, "test", "train").astype(object)
    paths = np.array([f"{number:04d}.png" for number in range(N)], dtype=object)
    digests = digests_from_hex(content_digest(path.encode()).hex() for path in paths)
    labels = np.array(["a", "b", "c"], dtype=object)[codes]
    DatasetIndex(output, paths, labels, splits, None, digests, np.full(N, 10)).write(files.dataset)
    spec = EmbeddingSpec("net", "backbone", "test", "net", {}, "w", "d", "", "none", DIM, {}, "fp32", "torch")
    path = output / "features" / "net.store"  # as release 0.1 laid it out
    with StoreWriter.open(path, spec.identity(), DIM) as writer:
        writer.append(digests, X.astype(np.float32))
    record = EmbeddingRecord("net", spec, path.relative_to(output).as_posix(), FeatureStore.open(path).digest, None, 0)
    raw = {
        "output": str(output),
        "backbones": [{"name": "resnet18"}],
        "baselines": ["majority"],
        "heads": ["logistic_regression", "ridge", "decision_tree"],
        "tuning": {"strategy": "random", "trials": 2, "folds": 3, "nested": True, "seeds": 2, "jobs": 1},
    }
    config = configuration.parse(raw, "test")
    write_records(files.features, [record], config, DatasetIndex.read(files.dataset).fingerprint())
    return config


def test_stage_two_ends_with_the_same_table_and_bundles_less_what_cannot_work_on_disk(
    tmp_path: Path, small_blocks: None
) -> None:
    here, disk = (
        train_heads.run(
            config.model_copy(
                update={"heads": config.heads[1:], "tuning": config.tuning.model_copy(update={"memory": memory})}
            )
        ).leaderboard
        for memory, config in (("auto", stage_one(tmp_path / "memory")), ("0.4MB", stage_one(tmp_path / "disk")))
    )
    assert {row.key for row in here.rows} - {row.key for row in disk.rows} == {"net/decision_tree"}
    for row in disk.rows:
        same = here.row(row.key)
        assert row.params == same.params
        assert row.cv_mean == pytest.approx(same.cv_mean, abs=0.002)
        assert row.test is not None
        assert same.test is not None
        assert row.test.accuracy == pytest.approx(same.test.accuracy, abs=0.004)
        if row.head != "most_frequent":
            assert row.test["log_loss"] == pytest.approx(same.test["log_loss"], abs=0.01)
        assert row.nested is not None
        assert same.nested is not None
        assert row.nested.mean == pytest.approx(same.nested.mean, abs=0.004)
        assert row.seeds is not None
        assert same.seeds is not None
        np.testing.assert_allclose(row.seeds.cv_means, same.seeds.cv_means, atol=0.004)
    assert disk.notes()[-2:] == [
        "net: its features stayed on disk, as tuning on them in memory takes about 0.6 MB and 0.4 MB are allowed (tuning.memory).",
        "net / decision_tree: left out: it needs the features in memory, about 0.6 MB, and 0.4 MB are allowed; raise "
        "tuning.memory, set tuning.pca to a number of components, or use heads that work from disk: "
        "ridge, logistic_regression, linear_svm",
    ]
    assert not any("disk" in note for note in here.notes())
    output, row = tmp_path / "disk", disk.row("net/ridge")
    index = DatasetIndex.read(Artifacts(output).dataset).select("test")
    record = json.loads(Artifacts(output).features.read_text(encoding="utf-8"))["embeddings"][0]
    X = FeatureStore.open(output / record["store"]).read(index.digests)
    labels, probabilities = bundles.load(output / str(row.bundle)).predict(X)
    assert row.test is not None
    assert np.mean(labels == index.labels) == row.test.accuracy
    saved = HeadPredictions.read(output / str(row.bundle) / "predictions.npz").test
    assert saved is not None
    np.testing.assert_allclose(probabilities, saved.probabilities, atol=1e-6)


@pytest.mark.parametrize("baselines", [(), ("majority",)])
def test_nothing_that_fits_is_told_in_one_line_per_row(
    tmp_path: Path, baselines: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A constant guess that is left over is no result."""
    config = stage_one(tmp_path)
    tuning = config.tuning.model_copy(update={"memory": "0.1MB"})
    with pytest.raises(HeadError, match="no head on images can be tuned") as caught:
        train_heads.run(config.model_copy(update={"tuning": tuning, "baselines": baselines}))
    assert not Artifacts(tmp_path).leaderboard.exists()
    assert "left out" not in caplog.text  # said once, by the error
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        f"net / {head.name}" for head in config.heads
    ]
    assert caught.value.problems[1].startswith(
        "net / ridge: left out: even with its features on disk it needs about 25."
    )
    assert caught.value.problems[1].endswith(
        "0.1 MB are allowed; raise tuning.memory, set tuning.pca to a smaller number of components, or choose a layer or "
        "pooling with fewer dimensions"
    )


def test_where_features_are_follows_from_their_size() -> None:
    shape = (1_000_000, 2048)
    assert memory_needed(shape) == 6 * 4 * 2_048_000_000
    tuning = TuningConfig(memory="8GB")
    weighted = resolve(HeadConfig(name="ridge", class_weight="balanced"))
    (told,) = objections(weighted, shape, 10, memory_needed(shape), tuning)
    assert "it needs the features in memory" in told
    able = [name for name, head in HEADS.items() if not objections(head, shape, 10, memory_needed(shape), tuning)]
    assert able == DISK == ["ridge", "logistic_regression", "linear_svm"]
    # The products of 100,000 numbers with each other take 40 GB in float32 alone.
    assert all(objections(head, (5_000, 100_000), 10, 10**10, tuning) for head in HEADS.values())


def test_a_limit_bounds_what_runs_at_once_and_what_is_kept(tmp_path: Path) -> None:
    X, y = network(400, 50, 2)
    problem = Problem(HEADS["ridge"], X, y, Classification(("a", "b")), (), 0)
    assert room.room_for(problem, TuningConfig(jobs=4)).jobs == 4
    tight = room.room_for(problem, TuningConfig(jobs=4, memory=f"{memory_needed(X.shape) / 1e6}MB"))
    assert (tight.jobs, tight.shared_bytes) == (1, 0)
    roomy = room.room_for(problem, TuningConfig(jobs=4, memory="1GB"))
    assert (roomy.jobs, roomy.shared_bytes) == (4, 256 << 20)


def test_the_limit_is_a_size_or_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"2GB": 2 * 10**9, "1.5 GB": 1_500_000_000, "500MB": 500 * 10**6}
    assert {text: TuningConfig(memory=text).memory_bytes for text in sizes} == sizes
    assert limited(TuningConfig(memory="2GB")).memory == "2GB"
    monkeypatch.setattr(process, "available_bytes", lambda: 4 * 10**9)
    assert limited(TuningConfig()).memory_bytes == 3 * 10**9
    raw = {"output": "o", "backbones": [{"name": "resnet18"}], "heads": ["knn"], "tuning": {"memory": "2 gigabytes"}}
    with pytest.raises(ConfigError) as caught:
        configuration.parse(raw, "test")
    assert caught.value.problems == (
        "tuning.memory: expected 'auto' or a size above 0 such as '2GB' or '500MB', got '2 gigabytes'",
    )
