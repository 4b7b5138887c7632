"""The data doctor finds what was planted, names little else, and gives tables of paths."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from pipeline import doctor


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32)[:1000], y[:1000]


def names(n: int, what: str = "image") -> list[str]:
    return [f"{what}/{row:04d}.png" for row in range(n)]


def precision_and_recall(found: set, planted: set) -> tuple[float, float]:
    return len(found & planted) / max(len(found), 1), len(found & planted) / len(planted)


def test_planted_wrong_labels_are_found(digits):
    """Of 50 flipped labels among 1,000 digits at least 80 % are found; at least 70 % of those named are flipped."""
    X, y = digits
    rng = np.random.default_rng(0)
    flipped = rng.choice(len(y), 50, replace=False)
    given = y.copy()
    given[flipped] = (y[flipped] + rng.integers(1, 10, 50)) % 10
    p = cross_val_predict(LogisticRegression(C=0.1, max_iter=300), X, given, cv=5, method="predict_proba")
    found = doctor.suspicious_labels(p, given, [str(digit) for digit in range(10)], names(len(y)))
    precision, recall = precision_and_recall({item.row for item in found}, set(flipped.tolist()))
    assert precision >= 0.70
    assert recall >= 0.80
    top = found[:25]
    assert np.mean([item.row in set(flipped.tolist()) for item in top]) >= 0.95
    named = [item for item in found if item.row in set(flipped.tolist())]
    assert np.mean([item.suggested == str(y[item.row]) for item in named]) >= 0.9
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)


def test_a_class_the_head_never_believes_accuses_nobody():
    """A rare class gets 0.3 at best; an absolute rule would call all of it mislabelled."""
    rng = np.random.default_rng(0)
    y = np.array([0] * 180 + [1] * 20)
    rare = np.clip(np.where(y == 1, 0.30, 0.05) + rng.normal(0, 0.01, 200), 0, 1)
    found = doctor.suspicious_labels(np.stack([1 - rare, rare], axis=1), y, ("common", "rare"), names(200))
    assert len([item for item in found if item.label == "rare"]) <= 2


def test_planted_copies_are_found_within_and_across_splits(digits):
    """Of 40 copies with noise all are found; at least 85 % of the pairs named are planted."""
    X, y = digits
    X, y = X[:600], y[:600]
    rng = np.random.default_rng(1)
    originals = rng.choice(600, 40, replace=False)
    copies = X[originals] + rng.normal(0, 0.02, (40, X.shape[1])).astype(np.float32)
    paths = names(600) + [f"copy/{row:04d}.png" for row in originals]
    splits = ["train"] * 600 + ["test"] * 20 + ["train"] * 20
    labels = [str(digit) for digit in np.concatenate([y, y[originals]])]
    found = doctor.examine(np.concatenate([X, copies]), paths, labels, splits).duplicates
    pairs = {tuple(sorted((pair.path, pair.other))) for pair in found}
    planted = {tuple(sorted((f"image/{row:04d}.png", f"copy/{row:04d}.png"))) for row in originals}
    precision, recall = precision_and_recall(pairs, planted)
    assert recall == 1.0
    assert precision >= 0.85
    across = [pair for pair in found if pair.across]
    assert len(across) >= 20
    assert found[: len(across)] == tuple(across), "what reaches the test comes first"


def test_a_burst_of_equal_frames_is_told_once_per_frame():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 16)).astype(np.float32)
    X[:12] = X[0] + rng.normal(0, 1e-3, (12, 16))
    found = doctor.examine(X, names(100), ["a"] * 100, ["train"] * 100).duplicates
    assert len(found) == 11
    assert {path for pair in found for path in (pair.path, pair.other)} == set(names(12))


def test_planted_outliers_are_found(digits):
    """Pictures of noise among digits: all are found, and few digits are called strange."""
    X, _ = digits
    noise = np.random.default_rng(0).uniform(0, 1, (10, X.shape[1])).astype(np.float32) * 1.5
    paths = names(len(X)) + names(10, "noise")
    found = doctor.examine(np.concatenate([X, noise]), paths, ["a"] * len(paths), ["train"] * len(paths)).outliers
    precision, recall = precision_and_recall({item.path for item in found}, set(names(10, "noise")))
    assert recall == 1.0
    assert precision >= 0.8


def test_ordinary_data_have_next_to_nothing_wrong():
    X = np.random.default_rng(0).normal(size=(800, 32)).astype(np.float32)
    findings = doctor.examine(X, names(800), ["a"] * 800, ["train"] * 800)
    assert findings.duplicates == ()
    assert len(findings.outliers) <= 4


def test_neighbours_equal_a_plain_search_whatever_the_block(monkeypatch):
    X = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32)
    monkeypatch.setattr(doctor, "BLOCK", 16)
    near = doctor.neighbours(X, 3)
    for row in range(70):
        distances = np.linalg.norm(X - X[row], axis=1)
        distances[row] = np.inf
        expected = np.argsort(distances)[:3]
        assert near.rows[row].tolist() == expected.tolist()
        assert near.distances[row] == pytest.approx(distances[expected], rel=1e-5)


@pytest.mark.parametrize("shape", [(50, 8), (20, 40)])
def test_projection_keeps_distances_when_nothing_is_cut(shape):
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    projected = doctor.project(X)
    for a, b in [(0, 1), (3, 7), (10, 19)]:
        assert np.linalg.norm(projected[a] - projected[b]) == pytest.approx(np.linalg.norm(X[a] - X[b]), rel=1e-4)
    assert np.array_equal(doctor.project(X), projected)


def test_two_images_and_one_image_are_no_trouble():
    for n in (1, 2):
        findings = doctor.examine(np.arange(n * 3, dtype=np.float32).reshape(n, 3), names(n), ["a"] * n, ["train"] * n)
        assert findings.outliers == ()


def test_tables_have_paths_and_survive_commas():
    findings = doctor.Findings(
        (doctor.SuspiciousLabel("a,b/1.png", "a,b", "été", 0.75, 3),),
        (doctor.NearDuplicate("x.png", "y.png", 0.1, "train", "test", "a", "a"),),
    )
    tables = findings.to_csv()
    assert list(csv.DictReader(io.StringIO(tables["suspicious_labels.csv"]))) == [
        {"path": "a,b/1.png", "label": "a,b", "suggested": "été", "score": "0.75"}
    ]
    assert tables["near_duplicates.csv"].startswith(
        "path,other,ratio,split,other_split,label,other_label\nx.png,y.png,0.1,train,test"
    )
    assert tables["outliers.csv"] == "path,label,score\n"
