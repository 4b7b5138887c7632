"""Explain: where in an image what speaks for its label is, and which training images speak for it and against it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from pipeline.data.index import INDEX_FILE
from pipeline.embed.loader import Item, Lane, embed
from pipeline.errors import ConfigError, HeadError, PipelineError, number_of
from pipeline.experiment import Artifacts
from pipeline.export.bundle import SMALLEST_PROBABILITY, ModelBundle
from pipeline.heads import HEADS, Layer, as_layer
from pipeline.images import Preprocessing, decode, open_file, prepare
from pipeline.io.files import require_place
from pipeline.io.process import bar
from pipeline.io.remote import absolute
from pipeline.report import explained
from pipeline.report.explained import Explained, Near
from pipeline.stages.similar import Stored

if TYPE_CHECKING:
    from pipeline.stages.predict import Model

MOST = 200
"""Images that are explained, the first ones: each is a page, and by occlusion takes as long as fifty others."""
NEIGHBOURS = 6
"""Training images that speak for a label, and as many that speak against it."""
PATCHES = 7
"""Parts along each side of an image; each is covered with those around it, one after another."""
SIDE = 448
"""Pixels of the longer side of an image that is covered in parts."""


@dataclass(frozen=True)
class ExplainRun:
    """What was found, and the page that leads to the pages on it."""

    found: Sequence[Explained]
    total: int
    """Images that were labelled."""
    index: Path
    no_neighbours: str
    """Why there are none, if so."""

    def summary_lines(self) -> list[str]:
        """How many images are explained by what, and where."""
        ways = " and ".join(sorted({each.way for each in self.found}))
        of_all = f", the first of {self.total:,}" if self.total > MOST else ""
        lines = [f"{number_of(len(self.found), 'image')} explained{of_all}, by {ways}: {self.index}"]
        return [*lines, self.no_neighbours] if self.no_neighbours else lines


def require(heads: Mapping[str, ModelBundle], folder: Path) -> None:
    """See that labels can be explained, before the work; ConfigError or OSError where they cannot."""
    if len(heads) > 1:
        raise ConfigError(
            f"--explain explains one target at a time; name the output folder of one, targets/NAME: {', '.join(heads)}"
        )
    for bundle in heads.values():
        if not bundle.target.exclusive:
            raise ConfigError(f"--explain tells why an image is of a class, and the target is {bundle.target.kind}")
    require_place(folder / explained.INDEX)


def run(
    folder: Path, place: Path, model: Model, lanes: Sequence[Lane], paths: Sequence[str], total: int, limit: int
) -> ExplainRun:
    """Write a page for each of the first images of all, by their paths, and one that leads to them.

    `place` is the bundle's folder, `model` what is in it, and `limit` an image's most pixels. Images that cannot be read are left out.
    """
    found, vectors = list[Explained](), list[NDArray[np.float32]]()
    items = (Item(number, absolute(path), None, tuple(range(len(lanes)))) for number, path in enumerate(paths))
    with bar(len(paths), "images", "explaining") as progress:
        for batch, parts in embed(lanes, items, Path("/"), limit):
            made = [part for part in parts if part is not None]
            if not made:
                continue
            X, rows = model.vectors(made), made[0].rows
            codes, probabilities = model.bundle.said(*X)
            labels = model.bundle.target.decode(codes)
            maps = _activation(model, lanes, batch.pixels, rows, codes)
            for number, row in enumerate(rows.tolist()):
                path = paths[batch.items[row].content]
                if maps is None:
                    pixels, cells = _shrunk(path, limit), None
                    if probabilities is not None:
                        cells = _occlusion(model, lanes, pixels, codes[number])
                else:
                    pixels, cells = batch.pixels[model.places[0][0][0]][row].copy(), maps[number]
                sure = None if probabilities is None else float(probabilities[number, codes[number]])
                found.append(Explained(path, str(labels[number]), sure, pixels, cells, maps is not None))
                progress.update(1)
            vectors += list(X[0])
    near = _neighbours(place, model.bundle, found, vectors)
    if isinstance(near, str):
        return ExplainRun(found, total, explained.build(folder, found, near), near)
    found = [replace(each, near=its) for each, its in zip(found, near, strict=True)]
    return ExplainRun(found, total, explained.build(folder, found), "")


# ---- maps


def layer_of(bundle: ModelBundle) -> Layer | None:
    """Return a head of ours as one layer on the vectors; None where it is not linear."""
    if bundle.head not in HEADS or not HEADS[bundle.head].linear:
        return None
    try:
        return as_layer(bundle.estimator)
    except HeadError:
        return None


def _activation(
    model: Model,
    lanes: Sequence[Lane],
    pixels: Sequence[NDArray[np.uint8]],
    rows: NDArray[np.int64],
    codes: NDArray[Any],
) -> NDArray[np.float64] | None:
    """Return what each place adds to the score of an image's label, float64 of shape (n, rows, columns); the mean is the score.

    None where the head is not linear on one map. `codes` are places of the labels in the classes, int64 of shape (n,).
    """
    bundle, (blocks, *others) = model.bundle, model.places
    layer = layer_of(bundle)
    lane, output = blocks[0]
    embedder: Any = lanes[lane].embedder
    if layer is None or others or len(blocks) > 1 or not hasattr(embedder, "contributions"):
        return None
    weights, bias = layer
    places = np.searchsorted(bundle.estimator.classes_, codes)
    cells: NDArray[np.float32] | None = embedder.contributions(pixels[lane][rows], output, weights[places])
    return None if cells is None else cells + bias[places, None, None]


def _shrunk(path: str, limit: int) -> NDArray[np.uint8]:
    """Return an image, uint8 of shape (height, width, 3), no side longer than `SIDE`."""
    pixels = decode(open_file(Path("/"), absolute(path)), max_pixels=limit)
    scale = min(1.0, SIDE / max(pixels.shape))
    height, width = (max(1, round(scale * length)) for length in pixels.shape[:2])
    return prepare(pixels, Preprocessing(resize=(height, width), crop=(height, width), interpolation="lanczos"))


def _occlusion(model: Model, lanes: Sequence[Lane], pixels: NDArray[np.uint8], code: int) -> NDArray[np.float64]:
    """Return by how much covering each part of an image and those around it lowers the log odds of a label: float64 of shape (PATCHES, PATCHES).

    pixels : uint8 of shape (height, width, 3). Source: Zeiler and Fergus 2014.
    """
    items = (
        Item(number, "", None, tuple(range(len(lanes))), pixels=each) for number, each in enumerate(_covered(pixels))
    )
    odds: list[float] = []
    for _, parts in embed(lanes, items, Path("/"), pixels.size):
        _, probabilities = model.bundle.said(*model.vectors([part for part in parts if part is not None]))
        assert probabilities is not None  # else nobody asks
        odds += logit(np.clip(probabilities[:, code], SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)).tolist()
    whole, *covered = odds
    return whole - np.array(covered).reshape(PATCHES, PATCHES)


def _covered(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yield an image, and it with each part and those around it covered, row by row.

    A part alone would often change nothing: what is left of a thing is enough for a sure head.
    """
    yield pixels
    colour = pixels.mean(axis=(0, 1)).round().astype(np.uint8)
    rows, columns = (np.linspace(0, length, PATCHES + 1).round().astype(int) for length in pixels.shape[:2])
    for row, column in np.ndindex(PATCHES, PATCHES):
        (top, bottom), (left, right) = (
            (ends[max(at - 1, 0)], ends[min(at + 2, PATCHES)]) for ends, at in ((rows, row), (columns, column))
        )
        image = pixels.copy()
        image[top:bottom, left:right] = colour
        yield image


# ---- neighbours


def _neighbours(
    place: Path, bundle: ModelBundle, found: Sequence[Explained], vectors: Sequence[NDArray[np.float32]]
) -> list[tuple[Near, Near]] | str:
    """Return for each image the nearest training images of its label and of others, or in words why there are none.

    Of a soft vote the vectors, float32 of shape (dim,) each, are its first member's.
    """
    whole = Path(os.path.abspath(place))
    root = next((each for each in (whole, *whole.parents) if (each / "dataset" / INDEX_FILE).exists()), None)
    if root is None:
        return f"no neighbours are shown: {place} lies in no experiment, whose training images they would be"
    try:
        stored = Stored.open(Artifacts(root), str(bundle.parts[0].embedding["name"]))
    except PipelineError as error:
        return f"no neighbours are shown: {error.message}"
    near: list[tuple[Near, Near]] = [((), ())] * len(found)
    taught = np.isin(stored.index.splits, ("train", "validation"))
    for label in {each.label for each in found}:
        rows = [row for row, each in enumerate(found) if each.label == label]
        own, paths = stored.index.labels == label, [found[row].path for row in rows]
        sides = [
            stored.part(taught & side).neighbours(paths, np.stack([vectors[row] for row in rows]), NEIGHBOURS)
            for side in (own, ~own)
        ]
        for row, *both in zip(rows, *sides, strict=True):
            speaking_for, against = (tuple((each.distance, each.label, each.path) for each in side) for side in both)
            near[row] = speaking_for, against
    return near
