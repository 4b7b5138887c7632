"""Several labels for each image: two photos side by side, and how quickly many labels and penalties are tuned.

    python tests/benchmarks/bench_labels.py photos FOLDER [--images 800] [--output build/benchmarks/pairs] [--set tuning.trials=8 ...]
    python tests/benchmarks/bench_labels.py speed [--rows 10000] [--dim 512] [--labels 50] [--penalties 32] [--theirs 2]

`photos`: FOLDER has a folder of photos for each kind of thing. Seeded pairs of two photos of different kinds stand side by side, and
an image has both kinds as labels. All photos are first dealt out to batches of 20, pairs are drawn within a batch, and a batch is a group, so
that no photo is in training and in test. Then an experiment with `dataset.target: multilabel` is run on them as users would,
EfficientNet-Lite0 against pixels, HOG and the labels' shares.

`speed`: logistic regression of many labels on made-up vectors, a search over so many penalties in five folds, against scikit-learn's
`OneVsRestClassifier` in scikit-optimize's `BayesSearchCV` on as many threads; theirs is measured on fewer penalties and scaled up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.config import TuningConfig
from pipeline.data.classes import MultiLabel
from pipeline.heads.table import OF_LABELS
from pipeline.heads.tuning import make_folds, tune
from pipeline.stages import extract, settings, train_heads

BATCH, SIDE = 20, 224
CONFIG = """
dataset: {source: manifest, path: pairs.csv, label_columns: labels, target: multilabel}
backbones: [{name: efficientnet_lite0, weights: imagenet, layers: [penultimate, stage4]}]
tuning: {trials: 8}
"""


def make(source: Path, folder: Path, images: int, seed: int) -> None:
    """Write the pairs and their manifest."""
    rng = np.random.default_rng(seed)
    photos = sorted(path for path in source.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    photos = rng.permutation(np.array(photos, dtype=object))[: images // BATCH * BATCH].tolist()
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    lines = ["path,labels,group"]
    for number in range(images):
        group = number // BATCH
        batch = photos[group * BATCH : (group + 1) * BATCH]
        first, second = rng.choice(len(batch), 2, replace=False)
        while batch[first].parent.name == batch[second].parent.name:
            first, second = rng.choice(len(batch), 2, replace=False)
        pair, name = Image.new("RGB", (SIDE, SIDE), (255, 255, 255)), f"pairs/{number:04d}.jpg"
        for place, row in enumerate((first, second)):
            half = ImageOps.pad(Image.open(batch[row]).convert("RGB"), (SIDE // 2, SIDE), color=(255, 255, 255))
            pair.paste(half, (place * SIDE // 2, 0))
        pair.save(folder / name, quality=92)
        labels = sorted({batch[row].parent.name for row in (first, second)})
        lines.append(f"{name},{'|'.join(labels)},batch {group}")
    (folder / "pairs.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")


def photos(arguments: argparse.Namespace) -> None:
    """Run the experiment and print its leaderboard."""
    made = arguments.output / "pairs.yaml"
    if not made.with_suffix(".csv").exists():
        make(arguments.folder, arguments.output, arguments.images, arguments.seed)
    made.write_text(CONFIG, encoding="utf-8")
    config = settings.load(made, arguments.set)
    extract.run(config)
    print(train_heads.run(config).leaderboard.to_markdown())


def vectors(rows: int, dim: int, labels: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return vectors of which a few directions matter, and labels of 2 to 30 % of them."""
    rng = np.random.default_rng(seed)
    spread = 1 / np.sqrt(1 + np.arange(dim))
    hidden = rng.normal(size=(rows, dim)) * spread
    mixed = hidden @ np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    scores = hidden @ rng.normal(size=(dim, labels)) + rng.normal(size=(rows, labels))
    shares = np.geomspace(0.02, 0.3, labels)
    return mixed.astype(np.float32), scores > np.array(
        [np.quantile(c, 1 - s) for c, s in zip(scores.T, shares, strict=True)]
    )


def speed(arguments: argparse.Namespace) -> None:
    """Time both searches, ours first."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, make_scorer
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from skopt import BayesSearchCV
    from skopt.space import Real

    X, y = vectors(arguments.rows, arguments.dim, arguments.labels, arguments.seed)
    target = MultiLabel(tuple(f"label {number}" for number in range(arguments.labels)))
    folds = make_folds(target.strata(y), 5, arguments.seed)
    head = OF_LABELS["logistic_regression"]
    with tempfile.TemporaryDirectory() as folder:
        began, used = time.perf_counter(), time.process_time()
        tuning = TuningConfig(trials=arguments.penalties, jobs=arguments.jobs)
        run = tune(head, X, y, folds, tuning, arguments.seed, Path(folder) / "journal.jsonl", target=target)
        ours, own = time.perf_counter() - began, time.process_time() - used
    print(
        f"ours: {arguments.penalties} penalties, {ours:.1f} s ({own:.1f} s of processor), mAP {run.best.mean:.4f}, {run.best.params}"
    )
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(max_iter=1000)))
    space = {"onevsrestclassifier__estimator__C": Real(1e-6, 1e2, prior="log-uniform")}
    scorer = make_scorer(average_precision_score, response_method="predict_proba")
    search = BayesSearchCV(
        model, space, n_iter=arguments.theirs, cv=list(folds), scoring=scorer, n_jobs=arguments.jobs,
        random_state=arguments.seed, n_points=1, optimizer_kwargs={"n_initial_points": arguments.theirs},
    )  # fmt: skip
    began, used = time.perf_counter(), time.process_time()
    search.fit(X, y.astype(int))
    seconds, own_seconds = time.perf_counter() - began, time.process_time() - used
    once = search.refit_time_
    scaled = [(part - once) * arguments.penalties / arguments.theirs + once for part in (seconds, own_seconds)]
    print(
        f"scikit-learn's: {arguments.theirs} penalties {seconds:.1f} s ({own_seconds:.1f} s of processor), mAP {search.best_score_:.4f}"
    )
    print(
        f"scaled to {arguments.penalties}: {scaled[0]:.0f} s, {scaled[0] / ours:.0f} times ours; of processor {scaled[1]:.0f} s, {scaled[1] / own:.0f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("photos")
    one.add_argument("folder", type=Path)
    one.add_argument("--images", type=int, default=800)
    one.add_argument("--output", type=Path, default=Path("build/benchmarks/pairs"))
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    one.set_defaults(run=photos)
    two = parts.add_parser("speed")
    for name, value in (("rows", 10_000), ("dim", 512), ("labels", 50), ("penalties", 32), ("theirs", 2), ("jobs", 1)):
        two.add_argument(f"--{name}", type=int, default=value)
    two.set_defaults(run=speed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
