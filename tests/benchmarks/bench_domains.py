"""Domains: how far changed photos are from photos, what that costs, and what adapting without labels brings, and when it must not.

    python tests/benchmarks/bench_domains.py CLOTHING [--output build/benchmarks/domains]

CLOTHING has folders of photos by kind in train/, validation/ and test/. Heads learn from 400 photos; 400 others are the test: as they
are, darkened, blurred, cut out (what the colours of the border explain is made white), and those of three kinds alone, of which
alignment takes the mix of kinds for a difference. Likewise 600 handwritten digits, 600 others as they are and inverted. Photos by
efficientnet_lite0 at 128 pixels, digits by the bundled network at 32. One photo in several domains is one group. Prints tables.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from advisor_cells import bundled, lite0
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_digits

from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.stages import extract, settings, train_heads

KINDS = ("t-shirt", "pants", "shoes")
Change = Callable[[Image.Image], Image.Image]
Picture = tuple[str, Image.Image]


def cut_out(image: Image.Image) -> Image.Image:
    """Return a photo with a white background: pixels that a Gaussian of the border's colours explains better than one of the middle's."""
    small = np.asarray(image.resize((48, 48))).astype(float).reshape(-1, 3)
    y, x = np.divmod(np.arange(48 * 48), 48)
    radius = np.hypot(x - 23.5, y - 23.5) / 24

    def told(part: np.ndarray) -> np.ndarray:
        centred, spread = small - small[part].mean(axis=0), np.cov(small[part].T) + 25 * np.eye(3)
        squares = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(spread), centred)
        return -(squares + np.linalg.slogdet(spread)[1]) / 2

    kept = told(radius < 0.6) - told(np.minimum.reduce([x, y, 47 - x, 47 - y]) < 4) + 4 * (0.8 - radius) > 0
    mask = Image.fromarray((255 * kept.reshape(48, 48)).astype(np.uint8)).filter(ImageFilter.MedianFilter(5))
    white = Image.new("RGB", image.size, "white")
    white.paste(image, (0, 0), mask.resize(image.size))
    return white


PHOTOS: Mapping[str, Change] = {
    "other photos": lambda image: image,
    "darkened": lambda image: ImageEnhance.Brightness(image).enhance(0.25),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "cut out": cut_out,
    "three kinds": lambda image: image,
}
DIGITS: Mapping[str, Change] = {"other digits": lambda image: image, "inverted": ImageOps.invert}


def clothing(folder: Path, count: int) -> Iterator[Picture]:
    """Yield photos in a drawn order, at most 160 pixels wide."""
    paths = sorted(folder.glob("*/*/*"))
    for row in np.random.default_rng(0).permutation(len(paths))[:count].tolist():
        image = Image.open(paths[row]).convert("RGB")
        image.thumbnail((160, 160))
        yield paths[row].parent.name, image


def digits(count: int) -> Iterator[Picture]:
    found = load_digits()
    for row in np.random.default_rng(0).permutation(len(found.target))[:count].tolist():
        pixels = Image.fromarray((found.images[row] * 15.9).astype(np.uint8))
        yield str(found.target[row]), pixels.convert("RGB")


def experiment(
    pictures: Iterator[Picture], source: str, training: int, domains: Mapping[str, Change], section: str, folder: Path
) -> dict[str, Any]:
    """Write the images and their manifest, make the experiment, and return what is known of its domains."""
    rows = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (label, image) in enumerate(pictures):
        there = {source: domains[next(iter(domains))]} if number < training else domains
        for name, change in there.items():
            # The three kinds alone are photos that no other domain of the test has.
            alone = name == "three kinds"
            if number >= training and "three kinds" in domains and alone != (number >= training + 400):
                continue
            if alone and label not in KINDS:
                continue
            path = folder / "images" / f"{name.replace(' ', '-')}-{number:04d}.png"
            change(image).save(path)
            rows.append([path.name, label, "train" if number < training else "test", name, str(number)])
    with (folder / "images.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "split", "domain", "group"], *rows])
    given = [
        f"output={folder}/experiment",
        f"dataset={json.dumps({'source': 'manifest', 'path': str(folder / 'images.csv'), 'root': str(folder / 'images'), 'domain': 'domain', 'leaks': 'keep'})}",
        f"backbones=[{section}]",
        "baselines=[majority]",
        "heads=[logistic_regression]",
        "tuning.trials=8",
    ]
    config = settings.load(folder / "images.csv", given)
    extract.run(config)
    train_heads.run(config)
    return dict(read_leaderboard(Path(config.output)).provenance["domains"]["more"])


def lines(told: Mapping[str, Any], source: str) -> Iterator[str]:
    """Return two tables in Markdown: of distances, and of accuracies."""
    yield f"| from {source} to | AUC [95 %] | MMD² (p) | means | covariances |"
    yield "|---|---|---|--:|--:|"
    for pair in told["pairs"]:
        if pair["one"] == source:
            low, high = pair["interval"]
            yield (
                f"| {pair['other']} | {pair['auc']:.2f} [{low:.2f}, {high:.2f}] | {pair['mmd']:.3f} ({pair['p_value']:.3f}) | {pair['mean']:.2f} "
                f"| {pair['covariance']:.2f} |"
            )
    yield ""
    yield "| domain | images | accuracy [95 %] | CORAL | gain, points [95 %] | re-weighted | gain, points [95 %] |"
    yield "|---|--:|---|--:|---|--:|---|"
    for each in told["each"]:
        cells = [each["name"], f"{each['images']:,}", percent(each["accuracy"], each["interval"])]
        for way in ("coral", "reweight"):
            one = next((one for one in told["adapted"] if (one["way"], one["domain"]) == (way, each["name"])), None)
            cells += (
                [f"{100 * one['score']:.1f}", percent(one["gain"]["difference"], one["gain"]["interval"], "+")]
                if one
                else ["", ""]
            )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield from (
        f"Suffer in {each['name']}: {', '.join(one['label'] for one in each['classes'] if one['suffers']) or 'none shown'}"
        for each in told["each"]
        if each["new"]
    )


def percent(value: float, interval: tuple[float, float], sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clothing", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/domains"))
    given = parser.parse_args()
    output = given.output.resolve()
    found = experiment(clothing(given.clothing, 1400), "photos", 400, PHOTOS, lite0(128), output / "clothing")
    print("\n".join(lines(found, "photos")), flush=True)
    found = experiment(digits(1200), "digits", 600, DIGITS, bundled(32), output / "digits")
    print("\n".join(["", *lines(found, "digits")]))


if __name__ == "__main__":
    main()
