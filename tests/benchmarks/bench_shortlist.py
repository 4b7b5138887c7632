"""What the choice of `manyheads shortlist` loses against full runs: regret on several data sets, beside simpler ways to choose.

    python tests/benchmarks/bench_shortlist.py CLOTHING TINY [--images 300] [--most 1200] [--sets digits ...] [--work FOLDER]

CLOTHING is a folder with train/, validation/ and test/ of class folders. TINY is the archive of Tiny ImageNet at 32 x 32 pixels with
train/CLASS/ in it; subsets of its classes are data sets. Of each at most `--most` images are used, by seed. A full run embeds all of
them by every candidate that is here and tunes logistic regression, ridge and kNN on each; the truth is the best cross-validated
accuracy that an embedding reaches. Regret is what the best embedding has more than the one that was chosen, in points; `cheap` is
the choice that the shortlist recommends, which may be worse than the best by what the sample cannot show. The others choose the
network with the most parameters, that of the highest LogME on the same sample, or any (the mean regret over all networks). Writes
build/benchmarks/shortlist.json, whose data sets are not run again, and a Markdown table.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.config import HeadConfig
from pipeline.stages import extract, settings, shortlist, train_heads

OUTPUT = Path("build/benchmarks/shortlist.json")
COARSE: Mapping[str, tuple[str, ...]] = {
    "tops": ("t-shirt", "shirt", "longsleeve", "outwear"),
    "below": ("pants", "shorts", "skirt"),
    "others": ("dress", "hat", "shoes"),
}
"""Clothing's ten classes in three."""

Picture = tuple[str, Callable[[Path], None]]
"""A class, and what writes the image to a path."""


def writer(data: bytes, suffix: str) -> Callable[[Path], None]:
    """Return what writes a file to a path without its ending."""

    def write(place: Path) -> None:
        place.with_suffix(suffix).write_bytes(data)

    return write


def clothing(folder: Path, per_class: int | None = None, coarse: bool = False) -> list[Picture]:
    """Return the photos of all splits; a few of each class, or under coarse classes."""
    names = {name: kind for kind, members in COARSE.items() for name in members}
    by_class: dict[str, list[Picture]] = defaultdict(list)
    for path in sorted(folder.glob("*/*/*")):
        label = names.get(path.parent.name, path.parent.name) if coarse else path.parent.name

        by_class[label].append((label, writer(path.read_bytes(), path.suffix)))
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(len(photos))[:per_class] for photos in by_class.values()]
    return [photos[row] for photos, rows in zip(by_class.values(), chosen, strict=True) for row in rows]


def digits() -> list[Picture]:
    """Return scikit-learn's handwritten digits."""
    found = load_digits()

    def png(pixels: np.ndarray) -> bytes:
        data = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(data, "png")
        return data.getvalue()

    return [(str(label), writer(png(image), ".png")) for label, image in zip(found.target, found.images, strict=True)]


def tiny(archive: Path, first: int, classes: int, coarse: int = 1) -> list[Picture]:
    """Return the images of some classes of Tiny ImageNet, by name from the first one on; neighbours joined where `coarse`."""
    images: dict[str, list[bytes]] = defaultdict(list)
    with tarfile.open(archive) as file:
        for member in file:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and "train" in parts:
                label = parts[parts.index("train") + 1]
                if len(images[label]) < 100:
                    images[label].append(file.extractfile(member).read())  # type: ignore[union-attr]
    wanted = sorted(images)[first : first + classes]

    return [
        (f"{place // coarse:02d}", writer(data, ".jpg")) for place, label in enumerate(wanted) for data in images[label]
    ]


def sets(photos: Path, archive: Path) -> dict[str, Callable[[], list[Picture]]]:
    """Return what makes each data set."""
    return {
        "digits": digits,
        "clothing": lambda: clothing(photos),
        "clothing, 25 a class": lambda: clothing(photos, per_class=25),
        "clothing, 3 coarse classes": lambda: clothing(photos, coarse=True),
        "20 classes of 32 pixels": lambda: tiny(archive, 0, 20),
        "20 others of them": lambda: tiny(archive, 90, 20),
        "5 coarse classes of them": lambda: tiny(archive, 150, 20, coarse=4),
    }


def written(pictures: list[Picture], folder: Path, most: int) -> Path:
    """Write a data set of class folders, once."""
    if not folder.is_dir():
        rows = np.sort(np.random.default_rng(0).permutation(len(pictures))[:most])
        for row in rows.tolist():
            label, write = pictures[row]
            (folder / label).mkdir(parents=True, exist_ok=True)
            write(folder / label / f"{row:05d}")
    return folder


def measured(photos: Path, images: int, output: Path) -> dict[str, object]:
    """Run the shortlist and the full run on one data set."""
    config = settings.load(photos, [f"output={output}", "tuning.trials=8"])
    config = config.model_copy(
        update={"heads": tuple(HeadConfig(name=name) for name in ("logistic_regression", "ridge", "knn"))}
    )
    found = shortlist.run(config, images)
    sections = [entry.section for entry in found.entries if entry.section is not None]
    whole = config.model_copy(update={"backbones": tuple(sections)})
    run = extract.run(whole)
    best: dict[str, float] = {}
    for row in train_heads.run(whole).leaderboard.rows:
        best[row.embedding] = max(best.get(row.embedding, 0.0), row.cv_mean)
    top = max(best.values())
    networks = [entry for entry in found.entries if entry.section is not None]
    choices = {
        "best": found.entries[0],
        "cheap": found.chosen,
        "size": max(networks, key=lambda entry: entry.parameters),
        "LogME": max((entry for entry in networks if not entry.dropped), key=lambda entry: entry.evidence),
    }
    regret = {way: 100 * (top - best[entry.spec.name]) for way, entry in choices.items()}
    regret["any"] = float(np.mean([100 * (top - best[entry.spec.name]) for entry in networks]))
    return {
        "images": found.images,
        "of": found.of,
        "candidates": {name: 100 * score for name, score in best.items() if name != "majority"},
        "chosen": {way: entry.spec.name for way, entry in choices.items()},
        "dropped": [entry.spec.name for entry in found.entries if entry.dropped],
        "regret": regret,
        "embedded_again": 0 if run.work is None else dict(run.work.vectors),
        "lines": list(found.summary_lines()),
    }


def lines(results: Mapping[str, dict]) -> Iterator[str]:
    """Return the table in Markdown."""
    ways = ("best", "cheap", "LogME", "size", "any")
    yield f"| data set | sample | best embedding | {' | '.join(ways)} |"
    yield "|---|---|---|" + "--:|" * len(ways)
    for name, found in results.items():
        top = max(found["candidates"], key=found["candidates"].get)
        cells = " | ".join(f"{found['regret'][way]:.1f}" for way in ways)
        yield f"| {name} | {found['images']} of {found['of']:,} | {top} {found['candidates'][top]:.1f} | {cells} |"
    means = (np.mean([found["regret"][way] for found in results.values()]) for way in ways)
    yield f"| mean | | | {' | '.join(f'{mean:.1f}' for mean in means)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clothing", type=Path)
    parser.add_argument("tiny", type=Path)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--most", type=int, default=1200)
    parser.add_argument("--sets", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks/shortlist"))
    given = parser.parse_args()
    results = json.loads(OUTPUT.read_text("utf-8")) if OUTPUT.exists() else {}
    for number, (name, make) in enumerate(sets(given.clothing, given.tiny).items()):
        if name in results or (given.sets and name not in given.sets):
            continue
        photos = given.work / "photos" / str(number)
        photos = photos if photos.is_dir() else written(make(), photos, given.most)
        results[name] = measured(photos, given.images, given.work / "artifacts" / str(number))
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.write_text(json.dumps(results, indent=1), encoding="utf-8")
        print("\n".join(lines(results)), flush=True)


if __name__ == "__main__":
    main()
