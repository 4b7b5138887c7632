"""A number that no pixel mean tells: by how many degrees a photo was turned.

    python tests/benchmarks/bench_numbers.py FOLDER [--images 1000] [--output build/benchmarks/rotated] [--set tuning.trials=8 ...]

FOLDER is a folder of photos in any subfolders. Each of a seeded choice is turned by a seeded angle from -45 to 45 degrees, of which
only the disc is kept that shows no corner at any angle, on grey, and made smaller, so that neither corners nor the blur of turning
tell the angle. Then an experiment with `dataset.target: regression` is run on them as users would, EfficientNet-Lite0 against pixels,
HOG and the mean, and what its intervals hold of the test images is told. A network that was trained to know things however they
are turned keeps the angle in earlier layers only, where it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from pipeline.evaluation import HeadPredictions
from pipeline.evaluation.intervals import wilson
from pipeline.stages import extract, settings, train_heads

MOST = 45.0
SIDE = 224
CONFIG = """
dataset: {source: manifest, path: angles.csv, label_columns: angle, target: regression}
backbones: [{name: efficientnet_lite0, weights: imagenet, layers: [penultimate, stage4], pooling: [avg, grid]}]
heads: [ridge, knn, rbf_svm, random_forest, mlp]
tuning: {trials: 8}
"""


def turned(photo: Image.Image, angle: float) -> Image.Image:
    """Return the middle of a photo, turned: a disc that lies within it at every angle, on grey."""
    side = min(photo.size)
    square = ImageOps.fit(photo, (side, side)).rotate(angle, Image.Resampling.BICUBIC)
    disc = Image.new("L", (side, side))
    ImageDraw.Draw(disc).ellipse((4, 4, side - 5, side - 5), fill=255)
    kept = Image.composite(square, Image.new("RGB", (side, side), (124, 116, 104)), disc)
    return kept.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def make(source: Path, folder: Path, images: int, seed: int) -> None:
    """Write the turned photos and the manifest of their angles."""
    rng = np.random.default_rng(seed)
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    lines = ["path,angle"]
    for path in rng.permutation(np.array(found, dtype=object))[:images]:
        angle, name = rng.uniform(-MOST, MOST), f"photos/{path.stem}.png"
        turned(Image.open(path).convert("RGB"), angle).save(folder / name)
        lines.append(f"{name},{angle:.3f}")
    (folder / "angles.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/rotated"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    made = arguments.output / "angles.yaml"
    if not made.with_suffix(".csv").exists():
        make(arguments.folder, arguments.output, arguments.images, arguments.seed)
    made.write_text(CONFIG, encoding="utf-8")
    config = settings.load(made, arguments.set)
    extract.run(config)
    run = train_heads.run(config)
    print(run.leaderboard.to_markdown())
    for row in run.leaderboard.rows:
        said = HeadPredictions.read(run.files.root / str(row.bundle) / "predictions.npz")
        inside = said.test.target.inside(said.test.y_true, said.test.y_pred)[:, 0]
        low, high = wilson(int(inside.sum()), len(inside))
        print(
            f"{row.key}: +-{said.test.target.half[0]:.1f} has {inside.mean():.1%} of the test [{low:.1%}, {high:.1%}]"
        )


if __name__ == "__main__":
    main()
