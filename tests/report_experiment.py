"""A small finished experiment, written the way the stages write it: three classes of coloured squares."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from photos import small_config
from PIL import Image
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestCentroid

from pipeline import report
from pipeline.config import DatasetConfig
from pipeline.data import DatasetIndex, scan
from pipeline.embed.records import EmbeddingRecord, write_records
from pipeline.embed.spec import EmbeddingSpec
from pipeline.evaluation import HeadPredictions, Predictions, scores
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, judge
from pipeline.experiment import Artifacts
from pipeline.store import FeatureStore, StoreWriter

CLASSES = ("ant", "猫 $5", "<b>bee</b> & 'co'")
COLOURS = ((200, 60, 60), (60, 160, 80), (70, 90, 200))
PER_CLASS = {"train": 40, "test": 20}
HEADS = {
    "logistic_regression": (LogisticRegression(max_iter=500), "random-net", False, True),
    "nearest_centroid": (NearestCentroid(), "random-net", False, True),
    "most_frequent": (DummyClassifier(strategy="prior"), "majority", True, False),
}


def row(head: str, cv: float, correct: int = 90, embedding: str = "resnet18-penultimate", **changes) -> LeaderboardRow:
    """Return a row without any artifact; of its 100 test images `correct` are right."""
    y = np.array(["a", "b"] * 50)
    guess = np.where(np.arange(100) < correct, y, "c")
    made = LeaderboardRow(
        embedding=embedding,
        backbone="resnet18",
        layer="penultimate",
        head=head,
        untrained=False,
        baseline=False,
        cv_mean=cv,
        cv_std=0.01,
        cv_scores=(cv - 0.01, cv, cv + 0.01),
        test=scores(Predictions.of(y, guess, ("a", "b", "c"))),
        fit_seconds=1.25,
        predict_seconds=0.01,
        trials=16,
        params={"C": np.float64(0.5), "k": np.int64(3)},
    )
    return dataclasses.replace(made, **changes)


def write_images(root: Path) -> None:
    """Write one coloured square per image; folders are split / class."""
    rng = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for number, colour in enumerate(COLOURS):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for image in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 25, (12, 12, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{image:03d}.png")


def make_experiment(output: Path, images: Path) -> Path:
    """Write every artifact of an experiment on these images below `output`."""
    files = Artifacts(output)
    write_images(images)
    index = scan(DatasetConfig(source="folder", path=str(images)), 0, files.dataset).index
    names = np.array([CLASSES[int(label[-1])] for label in index.labels], dtype=object)
    index = DatasetIndex(index.root, index.paths, names, index.splits, None, index.digests, index.sizes)
    index.write(files.dataset)
    truth = np.array([CLASSES.index(name) for name in names])
    X = features(truth, index.splits.astype(str))
    store = output / "features" / "random-net.store"
    spec = EmbeddingSpec(
        name="random-net",
        kind="backbone",
        library="none",
        architecture="random-net",
        arguments={},
        weights="random",
        weights_digest="",
        layer="",
        pooling="none",
        dim=X.shape[1],
        preprocessing={},
        precision="fp32",
        engine="torch",
        untrained=True,
    )
    with StoreWriter.open(store, spec.identity(), X.shape[1]) as writer:
        writer.append(index.digests, X)
    record = EmbeddingRecord("random-net", spec, "features/random-net.store", FeatureStore.open(store).digest, None, 0)
    write_records(files.features, [record], small_config(images, output), index.fingerprint())
    rows = tuple(make_row(files, name, index, X) for name in HEADS)
    provenance = {
        "seed": 0,
        "scoring": "accuracy",
        "date": "2026-11-21T06:00:00+00:00",
        "images": {"train": 120, "test": 60, "classes": 3},
        "config": {
            "dataset": {"source": "folder", "path": "photos/squares"},
            "tuning": {"strategy": "bayes", "folds": 4},
        },
        "versions": {"numpy": np.__version__},
        "command": "manyheads heads squares.yaml",
    }
    board = judge(Leaderboard(rows, provenance), output)
    files.leaderboard.write_text(board.to_json(), encoding="utf-8")
    return output


def features(truth: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Class centres with noise; the first test row is nearly a copy of the first training row, the second an outlier."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(len(truth), 12)) + 2.5 * np.eye(3, 12)[truth]
    train, test = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")
    X[test[0]] = X[train[0]] + 0.01
    X[test[1]] = 40.0
    return X.astype(np.float32)


def make_row(files: Artifacts, name: str, index: DatasetIndex, X: np.ndarray) -> LeaderboardRow:
    """Fit one head, write its predictions and its trials, and return its row."""
    head, embedding, baseline, untrained = HEADS[name]
    parts = {split: np.flatnonzero(index.splits.astype(str) == split) for split in ("train", "test")}
    y = index.labels.astype(str)
    train, test = parts["train"], parts["test"]
    given = y[train].copy()
    if not baseline:
        given[6] = CLASSES[(CLASSES.index(given[6]) + 1) % 3]
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    order = [list(np.unique(y)).index(label) for label in CLASSES]
    guess = cross_val_predict(head, X[train], given, cv=folds)
    head.fit(X[train], given)
    held, shown = None, None
    if hasattr(head, "predict_proba") and not baseline:
        held = cross_val_predict(head, X[train], given, cv=folds, method="predict_proba")[:, order]
        shown = head.predict_proba(X[test])[:, order]
    number = np.empty(len(train), dtype=int)
    for fold, (_, rows) in enumerate(folds.split(X[train], given)):
        number[rows] = fold
    labels = head.predict(X[test])
    fold_scores = tuple(float(np.mean((guess == given)[number == fold])) for fold in range(4))
    bundle = files.bundle(embedding, name)
    bundle.mkdir(parents=True)
    predictions = HeadPredictions(
        Predictions.of(y[test], labels, CLASSES, probabilities=shown, paths=index.paths[test]),
        Predictions.of(given, guess, CLASSES, probabilities=held, paths=index.paths[train], folds=number),
    )
    (bundle / "predictions.npz").write_bytes(predictions.to_bytes())
    trials = 1 if baseline else 3
    write_trials(files.trials(embedding, name), fold_scores, trials)
    return LeaderboardRow(
        embedding=embedding,
        backbone=embedding,
        layer="",
        head=name,
        untrained=untrained,
        baseline=baseline,
        cv_mean=float(np.mean(fold_scores)),
        cv_std=float(np.std(fold_scores, ddof=1)),
        cv_scores=fold_scores,
        test=scores(predictions.test),
        fit_seconds=0.12,
        predict_seconds=0.003,
        trials=trials,
        params={"C": 1.0},
        bundle=bundle.relative_to(files.root).as_posix(),
        simplicity=list(HEADS).index(name),
        embed_seconds=None if baseline else 0.004,
    )


def write_trials(path: Path, fold_scores: tuple[float, ...], count: int) -> None:
    """Write a journal of trials as the search does: a header, fits, trials, and a line torn by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"format": "manyheads trials", "version": 1}, {"event": "fit", "elapsed": 0.1}]
    for number in range(count):
        found = [score - 0.03 * number for score in fold_scores]
        mean = None if number == 2 else float(np.mean(found))
        status = "failed" if number == 2 else "ok"
        lines.append(
            {"event": "trial", "number": number, "status": status, "fold_scores": found, "mean": mean, "elapsed": 1.0}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tri', encoding="utf-8")


@lru_cache(maxsize=1)
def built_experiment(folder: Path) -> Path:
    """Return the experiment with its report; made once however many files ask."""
    output = make_experiment(folder / "squares", folder / "images")
    report.build(output)
    return output
