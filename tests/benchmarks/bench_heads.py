"""How long tuning takes: the search a user would write with `BayesSearchCV`, and ours, on the same features and folds.

    python tests/benchmarks/bench_heads.py                                   # 2,500 x 512, the four main heads
    python tests/benchmarks/bench_heads.py --trials 32                       # the same number for every head: longer
    python tests/benchmarks/bench_heads.py --rows 10000 --dim 2048 --heads logistic_regression,ridge
    python tests/benchmarks/bench_heads.py --features photos.npz             # arrays X and y of your own
    python tests/benchmarks/bench_heads.py --rows 50000 --no-naive

Both searches get the same scikit-learn pipeline, space, folds, number of trials and processor cores, and both end with a
fit of the best parameters on all training rows. `--naive-seconds` stops a naive search after the trial in which it passes
that: the table then says how many trials it did, and its ratio is the least that it can be. On a machine that others use too, `--jobs 1` with OMP_NUM_THREADS=1 gives
the ratio of processor seconds, which waiting does not change. The default features are those of random ReLU layers over points of
normal clusters: correlated, not negative, with a spectrum that falls like that of a trained network.
Without `--trials` the linear SVM and the forest get fewer, because the naive search takes many minutes for them; a forest
can have rows and dimensions of its own for the same reason (`--forest-rows`, `--forest-dim`); the table says which.
"s to naive CV" is when ours had a trial within 0.002 of the naive search's best.
Writes bench_heads.json and bench_heads.md to --output, again after every head.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
import skopt
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config import TuningConfig
from pipeline.heads import HEADS
from pipeline.heads.tuning import make_folds, tune

MAIN_HEADS = "logistic_regression,linear_svm,rbf_svm,random_forest"
TRIALS = {"linear_svm": 8, "random_forest": 16}
LATENT = 64
EQUAL = 0.002
"""Cross-validation scores that differ by less count as equal."""


def network_features(rows: int, dim: int, classes: int, seed: int):
    """Return float32 features of shape (rows, dim) and int labels."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(classes, LATENT))
    y = generator.integers(0, classes, rows)
    points = (0.55 * centres[y] + generator.normal(size=(rows, LATENT))) * np.arange(1, LATENT + 1) ** -0.3
    for width in (256, 512, dim):
        weights = generator.normal(size=(points.shape[1], width)) / np.sqrt(points.shape[1])
        points = np.maximum(1.4 * points @ weights + 0.2 * generator.normal(size=width), 0)
    return points.astype(np.float32), y


def naive_search(head, X, y, folds, trials, seed, jobs, most_seconds):
    """The search a user would write; returns it fitted, with its seconds and those of the processor."""
    from skopt import BayesSearchCV

    pipeline = head.build(seed)
    last = pipeline.steps[-1][0]
    space = {f"{last}__{key}": dimension for key, dimension in head.space.items()}
    search = BayesSearchCV(pipeline, space, n_iter=trials, cv=list(folds), n_jobs=jobs, random_state=seed)
    start, used = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search.fit(X, y, callback=lambda _: time.perf_counter() - start > most_seconds)
    return search, time.perf_counter() - start, time.process_time() - used


def our_search(head, X, y, folds, trials, seed, jobs):
    """Ours; returns the run, its seconds, and (seconds, score) of every finished trial."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "trials.jsonl"
        start, used = time.perf_counter(), time.process_time()
        run = tune(head, X, y, folds, TuningConfig(trials=trials, jobs=jobs), seed, journal)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        events = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    finished = [(e["elapsed"], e["mean"]) for e in events if e["event"] == "trial" and e["mean"] is not None]
    return run, seconds, used, finished


def compare(name, arguments):
    X, y, X_test, y_test, folds = load(arguments, forest=name == "random_forest")
    head, trials = HEADS[name], arguments.trials or TRIALS.get(name, 32)
    run, seconds, used, finished = our_search(head, X, y, folds, trials, arguments.seed, arguments.jobs)
    plain = sum(score is not None for trial in run.trials for score in trial.fold_scores)
    row = {
        "head": name,
        "rows": len(X),
        "dim": X.shape[1],
        "trials": trials,
        "ours_seconds": seconds,
        "ours_cpu_seconds": used,
        "ours_last_fit_seconds": run.fit_seconds,
        "ours_cv": run.best.mean,
        "ours_test": float(run.pipeline.score(X_test, y_test)),
        "ours_params": dict(run.best.params),
        "ours_fold_fits": plain,
    }
    if arguments.naive:
        typed = X.astype(arguments.naive_dtype)
        search, naive_seconds, naive_used = naive_search(
            head, typed, y, folds, trials, arguments.seed, arguments.jobs, arguments.naive_seconds
        )
        reached = [elapsed for elapsed, score in finished if score >= search.best_score_ - EQUAL]
        row |= {
            "naive_trials": len(search.cv_results_["params"]),
            "naive_seconds": naive_seconds,
            "naive_cpu_seconds": naive_used if arguments.jobs == 1 else None,
            "naive_cv": float(search.best_score_),
            "naive_test": float(search.score(X_test.astype(arguments.naive_dtype), y_test)),
            "naive_params": {key.split("__")[1]: float(value) for key, value in search.best_params_.items()},
            "seconds_to_naive_cv": min(reached, default=None),
            "ratio": naive_seconds / seconds,
            "cpu_ratio": naive_used / used if arguments.jobs == 1 else None,
        }
    return row


COLUMNS = {
    "head": "head",
    "rows": "rows",
    "dim": "dim",
    "trials": "trials",
    "naive_trials": "naive did",
    "ours_cpu_seconds": "ours CPU s",
    "naive_cpu_seconds": "naive CPU s",
    "cpu_ratio": "CPU ratio",
    "ours_seconds": "ours s",
    "naive_seconds": "naive s",
    "ratio": "ratio",
    "ours_cv": "ours CV",
    "naive_cv": "naive CV",
    "ours_test": "ours test",
    "naive_test": "naive test",
    "seconds_to_naive_cv": "s to naive CV",
}


def table(rows, naive):
    keys = [key for key in COLUMNS if naive or ("naive" not in key and "ratio" not in key)]
    cells = [[row.get(key) for key in keys] for row in rows]
    return tabulate(cells, [COLUMNS[key] for key in keys], tablefmt="github", floatfmt=".4g")


def total(rows):
    """Return the row of all heads together."""
    sums = {}
    for kind in ("seconds", "cpu_seconds"):
        ours, naive = ([row[f"{who}_{kind}"] for row in rows] for who in ("ours", "naive"))
        if None not in naive:
            sums |= {f"ours_{kind}": sum(ours), f"naive_{kind}": sum(naive)}
            sums["ratio" if kind == "seconds" else "cpu_ratio"] = sum(naive) / sum(ours)
    return {"head": "all", **sums}


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2500, help="training rows")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--features", type=Path, help=".npz file with arrays X and y; a fifth of it is the test set")
    parser.add_argument("--heads", default=MAIN_HEADS)
    parser.add_argument("--forest-rows", type=int, help="training rows of the forest, where they differ")
    parser.add_argument("--forest-dim", type=int)
    parser.add_argument("--trials", type=int, help=f"of every head; without: 32, but {TRIALS}")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--naive-dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument(
        "--naive-seconds", type=float, default=float("inf"), help="stop the naive search of a head then"
    )
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="time our search alone")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    return parser.parse_args(words)


def load(arguments, forest=False):
    if arguments.features is not None:
        with np.load(arguments.features) as arrays:
            X, y = arrays["X"].astype(np.float32), arrays["y"]
        order = np.random.default_rng(arguments.seed).permutation(len(X))
        X, y, rows = X[order], y[order], len(X) - len(X) // 5
    else:
        rows = (forest and arguments.forest_rows) or arguments.rows
        dim = (forest and arguments.forest_dim) or arguments.dim
        X, y = network_features(rows + 2000, dim, arguments.classes, arguments.seed)
    return X[:rows], y[:rows], X[rows:], y[rows:], make_folds(y[:rows], arguments.folds, arguments.seed)


def main(words=None):
    arguments = parse(words)
    rows = []
    for name in arguments.heads.split(","):
        rows.append(compare(name, arguments))
        print(json.dumps(rows[-1]), flush=True)
        write(rows, arguments)


def write(rows, arguments):
    shown = [*rows, total(rows)] if arguments.naive and len(rows) > 1 else rows
    report = {
        "rows": shown,
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()},
        "versions": {
            "scikit-learn": sklearn.__version__,
            "scikit-optimize": skopt.__version__,
            "python": platform.python_version(),
        },
    }
    text = f"{arguments.classes} classes, {arguments.folds} folds, {arguments.jobs} jobs\n\n{table(shown, arguments.naive)}\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "bench_heads.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.output / "bench_heads.md").write_text(text)
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
