"""Do the picks of `manyheads pick` beat random ones at equal counts? From an experiment's stored features, on its test images.

    python tests/benchmarks/bench_pick.py artifacts/photos [ROUNDS [WAY...]]

Training images count as unlabelled until they are picked; of each way ROUNDS runs are averaged. The head is logistic regression.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.evaluation.picking import TYPICAL_UNTIL, typical, unsure
from pipeline.stages.load import load

SIZES = (10, 20, 40, 80, 160, 320, 640, 1280)
Pick = Callable[[NDArray[np.bool_], int, int], NDArray[np.intp]]


def main(output: str, rounds: int) -> None:
    X, y = np.asarray(load(output, "train").X), load(output, "train").y
    X_test, y_test = np.asarray(load(output, "test").X), load(output, "test").y

    def head(labelled: NDArray[np.bool_]) -> LogisticRegression:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        return model.fit(X[labelled], y[labelled])

    def at_random(labelled: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.intp]:
        return np.random.default_rng(seed).choice(np.flatnonzero(~labelled), count, replace=False)

    def by_typical(labelled: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.intp]:
        return typical(X, labelled, count, seed)

    def by_doubt(labelled: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.intp]:
        rows = np.flatnonzero(~labelled)
        if len(np.unique(y[labelled])) < 2:
            return at_random(labelled, count, seed)
        return rows[unsure(X[rows], head(labelled).predict_proba(X[rows]), count, seed)]

    def by_rule(labelled: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.intp]:
        few = labelled.sum() < TYPICAL_UNTIL * len(np.unique(y))
        return (by_typical if few else by_doubt)(labelled, count, seed)

    sizes = [size for size in SIZES if size <= 0.7 * len(y)]
    ways: dict[str, Pick] = {"random": at_random, "typical": by_typical, "unsure": by_doubt, "pick": by_rule}
    ways = {name: pick for name, pick in ways.items() if name in (sys.argv[3:] or ways)}
    print(f"{'way':<10}" + "".join(f"{size:>14}" for size in sizes))
    for name, pick in ways.items():
        found = np.array([one_run(pick, sizes, seed, y, head, X_test, y_test) for seed in range(rounds)])
        cells = [
            f"{100 * m:.1f} ± {100 * s:.1f}"
            for m, s in zip(found.mean(0), found.std(0, ddof=1) / np.sqrt(rounds), strict=True)
        ]
        print(f"{name:<10}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def one_run(pick: Pick, sizes, seed, y, head, X_test, y_test) -> list[float]:
    labelled, scores = np.zeros(len(y), bool), []
    for size in sizes:
        labelled[pick(labelled, size - int(labelled.sum()), seed)] = True
        scores.append(float(np.mean(head(labelled).predict(X_test) == y_test)) if len(set(y[labelled])) > 1 else 0.0)
    return scores


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
