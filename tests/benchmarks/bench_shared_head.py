"""Whether one head for several label columns is better than a head for each, on photos of clothes.

    python tests/benchmarks/bench_shared_head.py FOLDER [--per-class 52] [--seed 0] [--vectors vectors.npz]

FOLDER has a folder of photos for each class. Three columns are made of the class: the garment itself, the part of the body that it is
worn on, and whether it is long; columns that depend on each other so much are the best case for sharing. Every head answers for
held-out images of the same five folds, and the penalty of ridge and logistic regression is chosen within each training part, by three
folds; a perceptron has its defaults. Separate: ridge, logistic
regression and a perceptron for each column. Shared: ridge of all columns with one penalty, and one perceptron with a hidden layer for
all, each column's answer its likeliest class. Differences are told with the intervals of the leaderboard's comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from pipeline.embed.transformer import Embedder
from pipeline.evaluation import Predictions
from pipeline.evaluation.comparison import compare

PARTS = {"dress": "whole", "pants": "lower", "shorts": "lower", "skirt": "lower", "shoes": "feet", "hat": "head"}
LONG = {"pants", "longsleeve", "outwear", "dress"}
ALPHAS, CS = np.geomspace(1e2, 1e5, 7), np.geomspace(1e-4, 1e-1, 4)
PAIRS = {"shared ridge": ("ridge",), "shared mlp": ("mlp", "ridge", "logistic regression")}

Scores = NDArray[np.float64]
Fit = Callable[[NDArray[np.float32], Scores, NDArray[np.float32], float], Scores]


def vectors(folder: Path, per_class: int, kept: Path | None) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Return float32 (n, dim) of EfficientNet-Lite0 and the garment of each photo, (n,)."""
    if kept and kept.exists():
        with np.load(kept) as file:
            return file["X"], file["garment"]
    names = sorted({path.parent.name for path in folder.glob("*/*/*.jpg")})
    photos = [path for name in names for path in sorted(folder.glob(f"*/{name}/*.jpg"))[:per_class]]
    X = np.asarray(Embedder("efficientnet_lite0", weights="imagenet").fit_transform(photos), np.float32)
    garment = np.array([path.parent.name for path in photos])
    if kept:
        np.savez(kept, X=X, garment=garment)
    return X, garment


ROTATED: dict[bytes, NDArray[np.float32]] = {}


def rotated(X: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return all rows standardised by some, in the directions that these span, float32 (n, rank): what is linear is the same there."""
    key = rows.tobytes()
    if key not in ROTATED:
        Z = StandardScaler().fit(X[rows]).transform(X)
        ROTATED[key] = (Z @ np.linalg.qr(Z[rows].T)[0]).astype(np.float32)
    return ROTATED[key]


def ridge(X: NDArray[np.float32], Y: Scores, Z: NDArray[np.float32], alpha: float) -> Scores:
    return np.asarray(Ridge(alpha=alpha).fit(X, 2 * Y - 1).predict(Z))


def logistic(X: NDArray[np.float32], Y: Scores, Z: NDArray[np.float32], C: float) -> Scores:
    return np.asarray(LogisticRegression(C=C, max_iter=1000).fit(X, Y.argmax(1)).predict_proba(Z))


def perceptron(seed: int) -> Fit:
    def fit(X: NDArray[np.float32], Y: Scores, Z: NDArray[np.float32], alpha: float) -> Scores:
        alone = (Y.sum(1) == 1).all()  # one column: softmax; several: a sigmoid for each class of each
        model = MLPClassifier(128, alpha=alpha, max_iter=100, tol=1e-3, random_state=seed)
        return np.asarray(model.fit(X, Y.argmax(1) if alone else Y).predict_proba(Z))

    return fit


def answers(
    fit: Fit, penalties: list[float], X: NDArray[np.float32], blocks: list[Scores], train: NDArray[np.int64],
    test: NDArray[np.int64], seed: int,
) -> NDArray[np.int64]:  # fmt: skip
    """Return the classes of the test rows, (n_test, columns), at the penalty that is best within the training rows."""
    ends = np.cumsum([block.shape[1] for block in blocks])[:-1]
    Y = np.hstack(blocks)

    def said(rows: NDArray[np.int64], others: NDArray[np.int64], penalty: float) -> NDArray[np.int64]:
        Z = rotated(X, rows)
        scores = fit(Z[rows], Y[rows], Z[others], penalty)
        return np.stack([part.argmax(1) for part in np.split(scores, ends, axis=1)], axis=1)

    truth = np.stack([block.argmax(1) for block in blocks], axis=1)
    if len(penalties) == 1:
        return said(train, test, penalties[0])
    inner = list(StratifiedKFold(3, shuffle=True, random_state=seed).split(train, truth[train, 0]))
    right = [
        np.mean([(said(train[a], train[b], penalty) == truth[train[b]]).mean() for a, b in inner])
        for penalty in penalties
    ]
    return said(train, test, penalties[int(np.argmax(right))])


def main() -> None:
    """Print each head's accuracy and the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=52)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vectors", type=Path)
    given = parser.parse_args()
    X, garment = vectors(given.folder, given.per_class, given.vectors)
    columns = {
        "garment": garment,
        "part": np.array([PARTS.get(name, "upper") for name in garment]),
        "length": np.array(["long" if name in LONG else "short" for name in garment]),
    }
    truth = {name: np.unique(column, return_inverse=True)[1].astype(np.int64) for name, column in columns.items()}
    blocks = {name: np.eye(codes.max() + 1)[codes] for name, codes in truth.items()}
    mlp = (perceptron(given.seed), [1e-4])
    heads = {"ridge": (ridge, [*ALPHAS]), "logistic regression": (logistic, [*CS]), "mlp": mlp}
    heads |= {"shared ridge": heads["ridge"], "shared mlp": mlp}
    said = {head: {name: np.empty(len(X), np.int64) for name in columns} for head in heads}
    fold_of = np.empty(len(X), np.int64)
    for fold, (train, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=given.seed).split(X, garment)):
        fold_of[test] = fold
        for head, (fit, penalties) in heads.items():
            groups = [list(columns)] if head.startswith("shared") else [[name] for name in columns]
            for group in groups:
                found = answers(fit, penalties, X, [blocks[name] for name in group], train, test, given.seed)
                for name, classes in zip(group, found.T, strict=True):
                    said[head][name][test] = classes
    print(f"{len(X)} images x {X.shape[1]}, seed {given.seed}; accuracy of held-out images in %")
    for name in columns:
        rows = {head: Predictions(truth[name], said[head][name], folds=fold_of) for head in heads}
        print(f"{name}: " + ", ".join(f"{head} {100 * row.correct.mean():.1f}" for head, row in rows.items()))
        for shared, others in PAIRS.items():
            for other in others:
                pair = {key: rows[key] for key in (shared, other)}
                folds = {key: [row.correct[fold_of == k].mean() for k in range(5)] for key, row in pair.items()}
                found = next(row for row in compare(pair, shared, folds=folds) if row.key == other)
                low, high = (100 * end for end in found.interval)
                print(f"  {shared} - {other}: {100 * found.difference:+.1f} ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
