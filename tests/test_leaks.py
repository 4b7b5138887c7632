"""What would flatter a cross-validation score: each fault is planted, and the measure that passes without it must see it.

Three faults: a scaler fitted outside the folds, a copy of an image in another fold, a group divided among folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from pipeline import config as configuration
from pipeline.config import TuningConfig
from pipeline.data import DatasetIndex
from pipeline.experiment import Artifacts
from pipeline.heads import HEADS, Head
from pipeline.heads.tuning import make_folds, tune
from pipeline.io.digests import content_digest, digests_from_hex
from pipeline.stages.train_heads import Task, make_task

N = 120
"""Images."""


# A scaler fitted outside the folds


def held_out_rows_reach_the_fit(
    head_of: Callable[[np.ndarray], Head], folder: Path, tuning: TuningConfig | None = None
) -> bool:
    """Whether what a fold's model says of some held-out rows changes when other held-out rows do; head_of : X -> head."""
    rng = np.random.default_rng(0)
    y = np.arange(N) % 3
    X = (rng.normal(size=(N, 6)) + 1.5 * np.eye(3, 6)[y]).astype(np.float32)
    folds = make_folds(y, 3, 0)
    probe, moved = np.array_split(folds[0][1], 2)
    other = X.copy()
    other[moved] = 50 * other[moved] + 7
    said, tuning = [], tuning or TuningConfig(trials=1, jobs=1)
    for number, features in enumerate((X, other)):
        run = tune(head_of(features), features, y, folds, tuning, 0, folder / f"{number}.jsonl")
        scores = run.out_of_fold.scores
        said.append((run.out_of_fold.y_pred if scores is None else scores)[probe])
    return not np.array_equal(said[0], said[1])


@pytest.mark.parametrize("name", sorted(HEADS))
def test_no_head_learns_from_the_rows_it_is_judged_on(name: str, tmp_path: Path) -> None:
    head = HEADS[name]
    if name == "random_forest":  # a small one says the same
        head = replace(head, space={}, defaults={}, fixed={"n_estimators": 20})
    if name == "mlp":
        head = replace(head, fixed={**head.fixed, "max_iter": 3})
    assert not held_out_rows_reach_the_fit(lambda X: head, tmp_path)


def test_a_scaler_fitted_outside_the_folds_is_seen(tmp_path: Path) -> None:
    classifier = HEADS["logistic_regression"].build(0)[-1]

    def leaky(X: np.ndarray) -> Head:
        scale = FunctionTransformer(StandardScaler().fit(X).transform)  # the fault: X has the held-out rows too
        return Head("leaky", lambda seed: Pipeline([("scale", scale), ("head", clone(classifier))]), {}, {})

    assert held_out_rows_reach_the_fit(leaky, tmp_path)


# Copies and groups


def make_index(folder: Path, units: np.ndarray, *, copies: bool) -> DatasetIndex:
    """Write an index whose images of one unit are copies of one content, or share a group; labels are chance."""
    labels = np.random.default_rng(0).integers(0, 2, units.max() + 1)[units].astype(str).astype(object)
    contents = units if copies else np.arange(N)
    digests = digests_from_hex(content_digest(str(number).encode()).hex() for number in contents.tolist())
    paths = np.array([f"{number:03d}.png" for number in range(N)], dtype=object)
    splits = np.where(units >= units.max() - 3, "test", "train").astype(object)
    groups = None if copies else np.array([f"person {unit}" for unit in units], dtype=object)
    index = DatasetIndex(folder, paths, labels, splits, groups, digests, np.full(N, 10))
    index.write(Artifacts(folder).dataset)
    return index


def task_of(folder: Path) -> Task:
    raw = {
        "output": str(folder),
        "backbones": [{"name": "resnet18"}],
        "heads": ["knn"],
        "tuning": {"folds": 4},
    }
    files = Artifacts(folder)
    return make_task(configuration.parse(raw, "test"), files, DatasetIndex.read(files.dataset), [])


def divided(task: Task, units: np.ndarray) -> int:
    """How many units have images in more than one fold."""
    place = np.empty(len(task.train), dtype=int)
    for number, (_, held_out) in enumerate(task.folds):
        place[held_out] = number
    return sum(len(set(place[units == unit].tolist())) > 1 for unit in np.unique(units))


def nearest_neighbour_score(task: Task, units: np.ndarray, folder: Path) -> float:
    """Accuracy out of fold of the nearest neighbour on features that know the unit and nothing of the label."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(units.max() + 1, 8))[units] + 0.01 * rng.normal(size=(len(units), 8))
    head = replace(HEADS["knn"], space={}, defaults={}, fixed={"n_neighbors": 1})
    tuning = TuningConfig(trials=1, jobs=1)
    run = tune(head, X.astype(np.float32), task.y_train, task.folds, tuning, 0, folder / "trials.jsonl")
    return float(run.best.mean or 0.0)


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "groups"])
def test_copies_and_groups_stay_in_one_fold_and_the_score_at_chance(
    copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = np.arange(N) // 3
    index = make_index(tmp_path, units, copies=copies)
    trained = units[index.splits.astype(str) == "train"]
    task = task_of(tmp_path)
    assert divided(task, trained) == 0
    honest = nearest_neighbour_score(task, trained, tmp_path)
    assert abs(honest - 0.5) < 0.2

    monkeypatch.setattr(DatasetIndex, "fold_groups", lambda self: None)  # the fault
    faulty = task_of(tmp_path)
    assert divided(faulty, trained) > 10
    assert nearest_neighbour_score(faulty, trained, tmp_path) > honest + 0.2


def test_inner_folds_of_nested_cross_validation_keep_groups_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.train_heads import row

    units = np.arange(N) // 3
    index = make_index(tmp_path, units, copies=False)
    task = task_of(tmp_path)
    trained = units[index.splits.astype(str) == "train"]
    asked: list[int] = []

    def watching(head, X, y, folds, *rest, **more):
        rows = X[:, 0].astype(int)
        asked.append(sum(bool(set(trained[rows[a]]) & set(trained[rows[b]])) for a, b in folds))
        return tune(head, X, y, folds, *rest, **more)

    monkeypatch.setattr(row, "tune", watching)
    X = np.stack([np.arange(len(trained)), np.zeros(len(trained))], axis=1).astype(np.float32)
    tuning = TuningConfig(trials=1, folds=4, nested=True, jobs=1)
    row.nested(HEADS["nearest_centroid"], X, task, tuning, 0, tmp_path / "main.jsonl")
    assert asked == [0, 0, 0, 0]
