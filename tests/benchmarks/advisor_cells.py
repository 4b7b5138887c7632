"""Measure the cells that the advice of `manyheads advise` is fitted on: what fine-tuning brought, and what was known before.

    python tests/benchmarks/advisor_cells.py CLOTHING TINY [--work FOLDER] [--only NAME ...]

CLOTHING is a folder with train/, validation/ and test/ of class folders, TINY the archive of Tiny ImageNet at 32 x 32 pixels. A cell
is a data set, at a size, with a network. Its signs are collected as `advise` does, from the training images; its truth is the
accuracy of the frozen features, of the last stage fine-tuned, and of everything fine-tuned, on up to 500 test images that played no
part. Writes pipeline/evaluation/advisor_cells.json after each cell; a cell that is there is not measured again.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_shortlist import COARSE
from judged_advice import judged
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_digits

from pipeline.config import Config
from pipeline.evaluation.advice import ARMS
from pipeline.experiment import Artifacts
from pipeline.finetuning.material import choose
from pipeline.stages import advise, extract, finetune, settings, train_heads

OUTPUT = Path(__file__).parents[2] / "pipeline" / "evaluation" / "advisor_cells.json"
TEST = 500
STEPS = 150
"""Of a run: fewer than `auto` takes, so that all cells can be measured in an hour or two."""
Pictures = list[tuple[str, Image.Image]]
BUNDLED = "mean: [0.4806, 0.4486, 0.3983], std: [0.2521, 0.2448, 0.2590]"


def bundled(size: int) -> str:
    """Return the section of the small bundled network at an image size."""
    return f"{{name: regnet_small, weights: bundled, preprocessing: {{resize: {size}, crop: {size}, {BUNDLED}}}}}"


def untrained(size: int) -> str:
    """Return the section of a network that has learned nothing."""
    return f"{{name: resnet18, weights: random, preprocessing: {{resize: {size}, crop: {size}}}}}"


def lite0(size: int) -> str:
    """Return the section of EfficientNet-Lite0 at an image size."""
    grey = [127 / 255] * 3, [128 / 255] * 3
    transform = f"resize: {round(size * 1.14)}, crop: {size}, interpolation: bicubic, mean: {grey[0]}, std: {grey[1]}"
    return f"{{name: efficientnet_lite0, weights: imagenet, preprocessing: {{{transform}}}}}"


def digits() -> Pictures:
    """Return scikit-learn's handwritten digits."""
    found = load_digits()
    return [
        (str(label), Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB"))
        for label, image in zip(found.target, found.images, strict=True)
    ]


def clothing(folder: Path, label: Callable[[str], str] = str) -> Pictures:
    """Return the photos of all splits, at most 160 pixels wide."""
    found = []
    for path in sorted(folder.glob("*/*/*")):
        image = Image.open(path).convert("RGB")
        image.thumbnail((160, 160))
        found.append((label(path.parent.name), image))
    return found


def tiny(archive: Path, first: int, classes: int, coarse: int = 1) -> Pictures:
    """Return the images of some classes of Tiny ImageNet, by name from the first one on; neighbours joined where `coarse`."""
    images: dict[str, list[Image.Image]] = defaultdict(list)
    with tarfile.open(archive) as file:
        for member in file:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and "train" in parts:
                label = parts[parts.index("train") + 1]
                if len(images[label]) < 150:
                    images[label].append(Image.open(io.BytesIO(file.extractfile(member).read())).convert("RGB"))  # type: ignore[union-attr]
    wanted = sorted(images)[first : first + classes]
    return [(f"{place // coarse:02d}", image) for place, name in enumerate(wanted) for image in images[name]]


def turned(pictures: Pictures) -> Pictures:
    """Return images turned by 0, 90, 180 or 270 degrees, which is their class."""
    rng = np.random.default_rng(0)
    return [
        (str(90 * turn), image.rotate(90 * turn, expand=True))
        for (_, image), turn in zip(pictures, rng.integers(0, 4, len(pictures)).tolist(), strict=True)
    ]


def changed(pictures: Pictures, change: Callable[[Image.Image], Image.Image]) -> Pictures:
    """Return images changed, under the same labels."""
    return [(label, change(image)) for label, image in pictures]


def cells(photos: Path, archive: Path) -> dict[str, tuple[Callable[[], Pictures], int, str]]:
    """Return the data set, the number of training images and the network of each cell."""
    names = {name: kind for kind, members in COARSE.items() for name in members}

    def coarse() -> Pictures:
        return clothing(photos, lambda name: names.get(name, name))

    return {
        "digits, 300, bundled": (digits, 300, bundled(32)),
        "digits, 1200, bundled": (digits, 1200, bundled(32)),
        "digits, 300, lite0": (digits, 300, lite0(64)),
        "digits, 600, untrained": (digits, 600, untrained(32)),
        "inverted digits, 600, bundled": (lambda: changed(digits(), ImageOps.invert), 600, bundled(32)),
        "clothing, 300, lite0": (lambda: clothing(photos), 300, lite0(64)),
        "clothing, 1200, lite0": (lambda: clothing(photos), 1200, lite0(64)),
        "clothing, 3200, lite0": (lambda: clothing(photos), 3200, lite0(64)),
        "clothing, 300, bundled": (lambda: clothing(photos), 300, bundled(48)),
        "clothing, 1600, bundled": (lambda: clothing(photos), 1600, bundled(48)),
        "clothing in 3 classes, 600, lite0": (coarse, 600, lite0(64)),
        "clothing in 3 classes, 600, bundled": (coarse, 600, bundled(48)),
        "blurred clothing, 1200, lite0": (
            lambda: changed(clothing(photos), lambda image: image.filter(ImageFilter.GaussianBlur(6))),
            1200,
            lite0(64),
        ),
        "turned clothing, 600, lite0": (lambda: turned(clothing(photos)), 600, lite0(64)),
        "turned clothing, 1600, bundled": (lambda: turned(clothing(photos)), 1600, bundled(32)),
        "20 tiny classes, 400, lite0": (lambda: tiny(archive, 0, 20), 400, lite0(64)),
        "20 tiny classes, 2000, lite0": (lambda: tiny(archive, 90, 20), 2000, lite0(64)),
        "20 tiny classes, 1000, untrained": (lambda: tiny(archive, 0, 20), 1000, untrained(32)),
        "5 coarse tiny classes, 1000, lite0": (lambda: tiny(archive, 150, 20, coarse=4), 1000, lite0(64)),
    }


def written(pictures: Pictures, images: int, folder: Path) -> Path:
    """Write some images to train/CLASS and up to `TEST` others to test/CLASS, once."""
    if not folder.is_dir():
        order = np.random.default_rng(1).permutation(len(pictures))[: images + TEST]
        for place, row in enumerate(order.tolist()):
            label, image = pictures[row]
            part = folder / ("train" if place < images else "test") / label
            part.mkdir(parents=True, exist_ok=True)
            image.save(part / f"{row:05d}.png")
    return folder


def config_of(photos: Path, section: str, output: Path, unfreeze: str) -> Config:
    """Return the config of a cell and an arm."""
    given = [
        f"output={output}",
        f"store={output}/store",
        f"backbones=[{section}]",
        "heads=[logistic_regression]",
        "tuning.trials=12",
        f"finetune.steps={STEPS}",
        f"finetune.unfreeze=[[0, {unfreeze}]]",
    ]
    return settings.load(photos, given)


def measured(photos: Path, section: str, output: Path) -> dict[str, object]:
    """Collect the signs of a cell, then its truth."""
    clock = time.perf_counter()
    config = config_of(photos, section, output, "all")
    extract.run(config)
    train_heads.run(config)
    choice = choose(config, Artifacts(config.output, config.store))
    record, _, _ = advise.signs(config, choice)
    frozen = choice.frozen
    assert frozen is not None
    assert frozen.test is not None
    truth: dict[str, object] = {"frozen": frozen.test.accuracy}
    for arm in ARMS:
        result = finetune.run(config_of(photos, section, output, arm)).result
        truth[arm] = {
            "test": result["test"],
            "minutes": result["minutes"],
            "alpha": result["alpha"],
            **result["validation"],
        }
    return {**record, "truth": truth, "seconds": round(time.perf_counter() - clock)}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Return what the advice is worth on the cells, each advised by a rule that has not seen it, in Markdown."""
    result = judged(found)
    yield "| cell | frozen | last stage | everything | advised | regret |"
    yield "|---|--:|--:|--:|---|--:|"
    for name, advised, regret in zip(result.names, result.advised, result.regrets, strict=True):
        truth = found[name]["truth"]
        scores = " | ".join(f"{100 * value:.1f}" for value in (truth["frozen"], *(truth[arm]["test"] for arm in ARMS)))
        yield f"| {name} | {scores} | {advised} | {100 * regret:.1f} |"
    yield ""
    yield f"Mean regret {100 * float(np.mean(result.regrets)):.1f} points; intervals hold {result.covered:.0%}; says stop in {result.spared:.0%} of the cells where nothing is gained."
    yield "Accuracy gained minus its price: " + ", ".join(
        f"{way} {100 * value:+.2f}" for way, value in result.worth.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clothing", type=Path)
    parser.add_argument("tiny", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/advisor"))
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    found = json.loads(OUTPUT.read_text("utf-8")) if OUTPUT.exists() else {}
    for number, (name, (make, images, section)) in enumerate(cells(given.clothing, given.tiny).items()):
        if name in found or (given.only and name not in given.only):
            continue
        folder = given.work / "photos" / str(number)
        photos = folder if folder.is_dir() else written(make(), images, folder)
        found[name] = measured(photos, section, given.work / "artifacts" / str(number))
        OUTPUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
