"""Which layers hold the signal, and is choosing several of them ever worse than taking the penultimate one?

    python tests/benchmarks/bench_layers.py [--clothing FOLDER] [--tiny FOLDER] [--work FOLDER]

--clothing is a folder with train/, validation/ and test/ of the clothing data set, --tiny one with train/CLASS of Tiny
ImageNet at 32 pixels; digits need none. Of each data set at most 1,500 training and 500 test images are taken. For each data
set and network the choice is made on training images alone, as `manyheads layers CONFIG` makes it, and ridge with the chosen
layers and with the penultimate one is fitted on the training images and scored once on the test images.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.evaluation import ACCURACY, Predictions, paired_answers
from pipeline.heads.layer_profile import PENALTIES, LayerProfile, gap, table
from pipeline.stages import extract
from pipeline.stages.train_heads import ask, layers

TRAIN, TEST = 1500, 500
COARSE = {
    **dict.fromkeys(("t-shirt", "shirt", "longsleeve", "outwear"), "upper body"),
    **dict.fromkeys(("pants", "shorts"), "legs"),
    **dict.fromkeys(("dress", "skirt"), "dress or skirt"),
}
LITE = {"name": "efficientnet_lite0", "weights": "imagenet", "layers": ["penultimate", "stage2", "stage3", "stage4"]}
BUNDLED = {"name": "regnet_small", "weights": "bundled", "layers": ["penultimate", "stage1", "stage2", "stage3"]}

Rows = list[tuple[str, str, str]]
"""Path, label and split of each image."""


def clothing(root: Path, named: Callable[[str], str] = str) -> Rows:
    """Take part of the training and validation images, and all test images, under other names of classes."""
    rng = np.random.default_rng(0)
    found = sorted((str(path.relative_to(root)), path.parts[-2], path.parts[-3]) for path in root.glob("*/*/*.jpg"))
    train = [row for row in found if row[2] != "test"]
    kept = [train[place] for place in sorted(rng.permutation(len(train))[:TRAIN].tolist())]
    return [
        (path, named(label), "test" if split == "test" else "train")
        for path, label, split in [*kept, *(row for row in found if row[2] == "test")]
    ]


def tiny(root: Path, first: str, last: str) -> Rows:
    """Take 20 classes of those whose names lie between two, 75 training and 25 test images of each."""
    classes = [path for path in sorted((root / "train").iterdir()) if first <= path.name < last][:20]
    rows: Rows = []
    for folder in classes:
        images = sorted(folder.rglob("*.JPEG"))[: (TRAIN + TEST) // 20]
        rows += [
            (str(path.relative_to(root)), folder.name, "train" if place < TRAIN // 20 else "test")
            for place, path in enumerate(images)
        ]
    return rows


def cases(given: argparse.Namespace) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each data set's name, its section of a config, and the network."""
    yield "digits, lite0", {"source": "digits"}, LITE
    yield "digits, bundled", {"source": "digits"}, BUNDLED
    if given.clothing:
        for name, named in (("clothing", str), ("clothing, coarse", lambda label: COARSE.get(label, label))):
            section = written(given.work, name, given.clothing, clothing(given.clothing, named))
            yield f"{name}, lite0", section, LITE
    if given.tiny:
        for name, first, last in (("tiny, animals", "n01", "n025"), ("tiny, things", "n03", "n04")):
            section = written(given.work, name, given.tiny, tiny(given.tiny, first, last))
            yield f"{name}, lite0", section, LITE  # the bundled network was trained on these images


def written(work: Path, name: str, root: Path, rows: Rows) -> dict[str, Any]:
    """Write a manifest and return what stands under `dataset:`."""
    path = work / f"{name.replace(', ', '-')}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return {"source": "manifest", "path": str(path), "root": str(root)}


def measure(config: Config) -> tuple[LayerProfile, list[str]]:
    """Return the profile, and of the penultimate layer, the choice and their difference the test accuracy in words."""
    asked = ask(config)
    stores, task = asked.stores, asked.task
    (found,) = layers.profiles(asked)
    said = {}
    for name in (found.usual, found.chosen):
        train, test = (
            np.concatenate([stores[part].read(images.digests) for part in found.row(name).embeddings], axis=1)
            for images in (task.train, task.test)
        )
        ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES)).fit(train, task.y_train)
        said[name] = Predictions(task.y_test, ridge.predict(test), units=task.test.fold_groups())
    usual, chosen = said[found.usual], said[found.chosen]
    gain = paired_answers(ACCURACY, chosen, usual, config.seed)
    return found, [
        ACCURACY.text(ACCURACY.score(usual)),
        ACCURACY.text(ACCURACY.score(chosen)),
        gap(ACCURACY, gain),
    ]


def main() -> None:
    """Measure every case, print its table, and one row for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", type=Path)
    parser.add_argument("--tiny", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/layers"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    lines = [
        "| data set, network | chosen | out of fold: penultimate | chosen within folds | difference | test: penultimate | chosen | difference |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, dataset, network in cases(given):
        raw = {
            "output": str(given.work / name.replace(", ", "-")),
            "dataset": dataset,
            "backbones": [network],
            "baselines": [],
            "heads": ["ridge"],
        }
        config = configuration.parse(raw, name)
        extract.run(config)
        began = time.process_time()
        found, test = measure(config)
        print(
            f"\n{name} ({time.process_time() - began:.0f} s of processor time)",
            *table(found),
            sep="\n",
            flush=True,
        )
        assert found.nested is not None
        assert found.nested_gain is not None
        usual = ACCURACY.text(found.row(found.usual).score)
        cells = [found.chosen, usual, ACCURACY.text(found.nested), gap(ACCURACY, found.nested_gain), *test]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
