"""Maps of photos side by side: does what speaks for a label lie on the half that has it?

    python tests/benchmarks/bench_explain.py FOLDER [--per-class 100] [--pairs 100] [--covered 30] [--output build/benchmarks/explain]

FOLDER has a folder of photos for each kind of thing in train/ and in test/. Heads on efficientnet_lite0 learn from so many training
photos of each kind. Pairs of test photos of two kinds become the halves of one image each, labelled and explained: by exact maps with
linear heads, by occlusion with others (fewer images, each as costly as fifty). Told is, of the images labelled as one of their halves,
in how many more than half of the map's mass above 0 lies on that half, and the mean share of the mass there. `maps.png` shows the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.evaluation.intervals import wilson
from pipeline.experiment import Artifacts
from pipeline.report.explained import Explained, enlarged, overlaid
from pipeline.stages import extract, predict, settings, train_heads

CONFIG = """
output: {output}/experiment
dataset: {{source: manifest, path: {output}/photos.csv, root: {source}}}
backbones: [{{name: efficientnet_lite0, weights: imagenet}}]
baselines: [majority, hog]
heads: [logistic_regression, ridge, linear_svm, lda, knn, random_forest]
tuning: {{trials: 1, folds: 2}}
"""
EMBEDDING = "efficientnet_lite0-imagenet-penultimate"
LINEAR, COVERED = ("logistic_regression", "ridge", "linear_svm", "lda"), ("knn", "random_forest")
HALF = (224, 448)


def photos(folder: Path) -> dict[str, list[Path]]:
    return {kind.name: sorted(kind.iterdir()) for kind in sorted(folder.iterdir()) if kind.is_dir()}


def train(source: Path, output: Path, per_class: int) -> Path:
    """Write a manifest and make the experiment."""
    rows = [
        f"{path.relative_to(source)},{kind},train"
        for kind, paths in photos(source / "train").items()
        for path in paths[:per_class]
    ]
    rows += [
        f"{path.relative_to(source)},{kind},test"
        for kind, paths in photos(source / "test").items()
        for path in paths[:5]
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "photos.csv").write_text("\n".join(["path,label,split", *rows, ""]), encoding="utf-8")
    (output / "config.yaml").write_text(CONFIG.format(output=output, source=source), encoding="utf-8")
    config = settings.load(output / "config.yaml")
    extract.run(config)
    train_heads.run(config)
    return Path(config.output)


def compose(source: Path, folder: Path, pairs: int) -> None:
    """Write images of two test photos side by side; their names say what is left and right."""
    rng, kinds = np.random.default_rng(0), photos(source / "test")
    folder.mkdir(exist_ok=True)
    for number in range(pairs):
        names = rng.permutation(sorted(kinds))[:2].tolist()
        image = Image.new("RGB", (2 * HALF[0], HALF[1]))
        for side, name in enumerate(names):
            photo = Image.open(kinds[name][rng.integers(len(kinds[name]))]).convert("RGB")
            image.paste(ImageOps.fit(photo, HALF), (side * HALF[0], 0))
        image.save(folder / f"{number:03d}_{names[0]}_{names[1]}.png")


def share(found: Explained) -> float | None:
    """Return how much of a map's mass is on the half that has the label; None where neither has."""
    halves = Path(found.path).stem.split("_")[1:]
    if found.label not in halves or found.cells is None:
        return None
    columns = np.maximum(found.cells, 0).sum(axis=0)
    left = np.interp(len(columns) / 2, np.arange(len(columns) + 1), np.concatenate([[0], columns.cumsum()]))
    return float((left if halves[0] == found.label else columns.sum() - left) / max(columns.sum(), 1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--covered", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/explain"))
    options = parser.parse_args()
    source, output = options.folder.resolve(), options.output.resolve()
    experiment = train(source, output, options.per_class)
    compose(source, output / "pairs", options.pairs)
    images = sorted((output / "pairs").iterdir())
    pictures = []
    asked = [(EMBEDDING, head, options.pairs) for head in LINEAR]
    asked += [(EMBEDDING, head, options.covered) for head in COVERED] + [
        ("hog", "logistic_regression", options.covered)
    ]
    for embedding, head, count in asked:
        bundle, why = Artifacts(experiment).bundle(embedding, head), output / f"{embedding}-{head}"
        result = predict.run(bundle, images[:count], output=output / "labels.csv", explain=why).explained
        assert result is not None
        shares = [found for each in result.found if (found := share(each)) is not None]
        right = sum(each > 0.5 for each in shares)
        low, high = wilson(right, len(shares))
        print(
            f"{embedding} {head} ({result.found[0].way}): {len(shares)} of {count} labelled as one of their halves; the map lies there in "
            f"{right} ({right / len(shares):.1%} [{low:.1%}, {high:.1%}]), with {np.mean(shares):.1%} of its mass",
            flush=True,
        )
        for each in result.found[:6]:
            picture = enlarged(Image.fromarray(each.pixels), 160)
            assert each.cells is not None
            pictures.append((picture, overlaid(picture, each.cells)))
    sheet = Image.new("RGB", (12 * 160, 160 * len(asked)))
    for number, pair in enumerate(pictures):
        for side, picture in enumerate(pair):
            sheet.paste(picture, ((number % 6 * 2 + side) * 160, number // 6 * 160))
    sheet.save(output / "maps.png")


if __name__ == "__main__":
    main()
