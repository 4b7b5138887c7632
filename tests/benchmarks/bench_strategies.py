"""Bayesian, random and grid search at equal budgets: the best cross-validation score against the number of trials.

    python tests/benchmarks/bench_strategies.py                                   # 1,000 x 256 made features
    python tests/benchmarks/bench_strategies.py --experiment artifacts/digits     # a finished experiment's own
    python tests/benchmarks/bench_strategies.py --heads rbf_svm --trials 32 --seeds 10

Every strategy gets the same head, space, folds and number of trials; a seed changes folds and searches alike, so that what is
compared is paired. Forests are left out, as their candidates are judged by few trees first. The features are those of
bench_heads.py, or the training images of an experiment (`--embedding` names one of several). The table shows the mean over
seeds of the best score after some trials, and how often a strategy ended within 0.002 of the best of the three.
Writes bench_strategies.json, .md and .png to --output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_heads import EQUAL, network_features
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

import pipeline
from pipeline.config import TuningConfig
from pipeline.heads import HEADS
from pipeline.heads.tuning import make_folds, tune

STRATEGIES = {"bayes": "#4269d0", "random": "#efb118", "grid": "#ff725c"}


def search(head, X, y, strategy, arguments, seed):
    """Return the best score so far after each trial; trials that were stopped early add nothing."""
    folds = make_folds(y, arguments.folds, seed)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "trials.jsonl"
        config = TuningConfig(strategy=strategy, trials=arguments.trials, jobs=arguments.jobs)
        tune(head, X, y, folds, config, seed, journal)
        events = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    scores = [event["mean"] for event in events if event["event"] == "trial"]
    best = np.maximum.accumulate([-np.inf if score is None else score for score in scores])
    return np.pad(best, (0, arguments.trials - len(best)), mode="edge").tolist()  # a small grid has fewer points


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", help="output folder of a finished experiment")
    parser.add_argument("--embedding", help="which of its embeddings")
    parser.add_argument("--heads", default="logistic_regression,rbf_svm,mlp")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    arguments = parser.parse_args(words)
    if arguments.experiment:
        found = pipeline.load(arguments.experiment, "train", arguments.embedding)
        X, y = np.asarray(found.X), found.y
    else:
        X, y = network_features(1000, 256, 20, 0)
    names = arguments.heads.split(",")
    curves = {
        name: {
            strategy: [search(HEADS[name], X, y, strategy, arguments, seed) for seed in range(arguments.seeds)]
            for strategy in STRATEGIES
        }
        for name in names
    }
    text = f"{len(X):,} x {X.shape[1]}, {len(set(y))} classes, {arguments.folds} folds, {arguments.seeds} seeds\n\n{table(curves, arguments)}\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "bench_strategies.json").write_text(json.dumps(curves, indent=1) + "\n")
    (arguments.output / "bench_strategies.md").write_text(text)
    draw(curves).savefig(arguments.output / "bench_strategies.png", dpi=110)
    print(text)


def table(curves, arguments):
    """The mean best score after a quarter, half and all of the trials."""
    steps = sorted({max(1, arguments.trials // share) for share in (4, 2, 1)})
    rows = []
    for name, found in curves.items():
        top = np.max([[curve[-1] for curve in found[strategy]] for strategy in STRATEGIES], axis=0)
        for strategy in STRATEGIES:
            means = np.mean(found[strategy], axis=0)
            near = sum(curve[-1] >= best - EQUAL for curve, best in zip(found[strategy], top, strict=True))
            rows.append([name, strategy, *(f"{100 * means[step - 1]:.2f}" for step in steps), f"{near} of {len(top)}"])
    heads = ["head", "strategy", *(f"after {step}" for step in steps), "ends within 0.2 points of the best"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def draw(curves):
    """A panel per head: thin lines are seeds, thick ones their mean."""
    figure = Figure(figsize=(3.6 * len(curves), 3.2), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for strategy, colour in STRATEGIES.items():
            scores = 100 * np.array(found[strategy])
            trials = np.arange(1, scores.shape[1] + 1)
            axes.step(trials, scores.T, where="post", color=colour, linewidth=0.6, alpha=0.4)
            axes.step(trials, scores.mean(axis=0), where="post", color=colour, linewidth=2.2, label=strategy)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        low, high = np.quantile([curve[1:] for group in found.values() for curve in group], [0.05, 1])
        axes.set_ylim(100 * low - 0.3, 100 * high + 0.2)
    figure.axes[0].set_ylabel("best so far, cross-validation, %")
    figure.axes[-1].legend(fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    sys.exit(main())
