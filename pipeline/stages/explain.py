"""Explain: the image parts that support a label, and the nearest training images with that label and with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from pipeline.embed.loader import Item, Lane, embed
from pipeline.errors import ConfigError, PipelineError, number_of
from pipeline.experiment import Artifacts
from pipeline.export.bundle import SMALLEST_PROBABILITY, ModelBundle
from pipeline.heads import HEADS, as_layer
from pipeline.images import Preprocessing, decode, open_file, prepare
from pipeline.io.files import require_place
from pipeline.io.process import bar
from pipeline.io.remote import absolute
from pipeline.report import explained, material, sections
from pipeline.report.explained import Explained, Near
from pipeline.stages.predict import experiment_around
from pipeline.stages.similar import Stored

if TYPE_CHECKING:
    from pipeline.stages.predict import LoadedHead

MOST = 200
"""Largest number of explained images, taken in order: each gets a page, and occlusion takes as long as labelling fifty images."""
NEIGHBOURS = 6
"""Number of nearest training images with the label, and as many with other labels."""
PATCHES = 7
"""Number of patches along each side of an image; each is covered in turn, with its neighbours."""
SIDE = 448
"""Longer side of an image for occlusion, in pixels."""


@dataclass(frozen=True)
class ExplainRun:
    """The explanations, and the page that links to their pages."""

    found: Sequence[Explained]
    """The explanations; an image with several labels has one per label."""
    total: int
    """Number of labelled images."""
    index: Path
    no_neighbours: str
    """The reason why no neighbours are shown; '' if they are."""

    def summary_lines(self) -> list[str]:
        """Return the number of explained images, the methods, and the page."""
        ways = " and ".join(sorted({each.way for each in self.found}))
        of_all = f", the first of {self.total:,}" if self.total > MOST else ""
        count = len({each.path for each in self.found})
        lines = [f"{number_of(count, 'image')} explained{of_all}, by {ways}: {self.index}"]
        return [*lines, self.no_neighbours] if self.no_neighbours else lines


def require(heads: Mapping[str, ModelBundle], folder: Path) -> None:
    """Check before the work that labels can be explained; ConfigError or OSError if not."""
    if len(heads) > 1:
        raise ConfigError(
            f"--explain explains one target at a time; name the output folder of one, targets/NAME: {', '.join(heads)}"
        )
    for bundle in heads.values():
        if not bundle.target.classes:
            raise ConfigError(f"--explain tells why an image has a label, and the target is {bundle.target.kind}")
    require_place(folder / explained.INDEX)


def run(
    folder: Path, place: Path, model: LoadedHead, lanes: Sequence[Lane], paths: Sequence[str], total: int, limit: int
) -> ExplainRun:
    """Write a page for each label of some images, the first of `total`, and an index page.

    `place` is the bundle's folder, `model` its content, and `limit` the largest number of pixels. Unreadable images are left out.
    """
    target, found, vectors = model.bundle.target, list[Explained](), list[NDArray[np.float32]]()
    items = (Item(number, absolute(path), None, tuple(range(len(lanes)))) for number, path in enumerate(paths))
    with bar(len(paths), "images", "explaining") as progress:
        for batch, parts in embed(lanes, items, Path("/"), limit):
            made = [part for part in parts if part is not None]
            if not made:
                continue
            X, rows = model.vectors(made), made[0].rows
            labels, probabilities = model.bundle.said(*X)
            maps = _activation(model, lanes, batch.pixels, rows)
            for number, row in enumerate(rows.tolist()):
                path, sure = paths[batch.items[row].content], None if probabilities is None else probabilities[number]
                codes, cells = _codes(labels[number], sure), list[NDArray[np.float64]]()
                if maps is not None:
                    pixels = batch.pixels[model.places[0][0][0]][row].copy()
                    cells = [maps[number][code] for code in codes]
                    if target.exclusive:  # the margin over the second-best label
                        cells[0] = cells[0] - np.delete(maps[number], codes[0], axis=0).max(axis=0)
                else:
                    pixels = _shrunk(path, limit)
                    cells = [] if sure is None else list(_occlusion(model, lanes, pixels, codes))
                for order, code in enumerate(codes):
                    own, part = (None if sure is None else float(sure[code])), cells[order] if cells else None
                    label, exact = target.classes[code], maps is not None
                    found.append(Explained(path, label, own, pixels, part, exact, target.exclusive))
                    vectors.append(X[0][number])
                progress.update(1)
    near = _neighbours(place, model.bundle, found, vectors)
    if isinstance(near, str):
        return ExplainRun(found, total, explained.build(folder, found, near), near)
    found = [replace(each, near=its) for each, its in zip(found, near, strict=True)]
    return ExplainRun(found, total, explained.build(folder, found), "")


def mistakes(output: Path) -> list[str]:
    """Explain the worst mistakes of an experiment's best row for its page; return lines on the result, or on why there is none."""
    from pipeline.stages import predict  # which imports this module

    files, shown = Artifacts(output), material.gather(output)
    found = [] if shown.best is None else sections.worst(shown.best.test)[0]
    if shown.index is None or not found:
        return ["mistakes   none explained: there are no predictions, no images, or no mistakes"]
    root, row, folder = shown.index.root, shown.leaderboard.best, files.mistakes.parent
    paths = {absolute(str(root / path)): path for path, *_ in found}
    try:
        images = [Path(each) for each in paths]
        made = predict.run(output / str(row.bundle), images, output=folder / "labels.csv", explain=folder).explained
    except (PipelineError, OSError) as error:
        return [f"mistakes   none explained: {error}"]
    assert made is not None  # because `explain` was given
    explained.keep(files, row.key, {paths[absolute(each.path)]: each for each in made.found})
    return [f"mistakes   {line}" for line in made.summary_lines()]


# ---- maps


def _codes(said: Any, sure: NDArray[np.float64] | None) -> list[int]:
    """Return the codes of an image's predicted labels; if there are none, the code of the likeliest label.

    said : a code for a single label, bool of shape (n_classes,) for several; sure : float64 of shape (n_classes,)
    """
    if np.ndim(said) == 0:
        return [int(said)]
    return np.flatnonzero(said).tolist() or ([] if sure is None else [int(sure.argmax())])


def _activation(
    model: LoadedHead, lanes: Sequence[Lane], pixels: Sequence[NDArray[np.uint8]], rows: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Return each location's contribution to the score of each class, float64 of shape (n, n_classes, rows, columns); its mean is the
    score.

    None if the head is not linear on a single map. A class that the head has not seen gets -inf.
    """
    bundle, (blocks, *others) = model.bundle, model.places
    lane, output = blocks[0]
    embedder: Any = lanes[lane].embedder
    linear = bundle.head in HEADS and HEADS[bundle.head].linear
    if not linear or others or len(blocks) > 1 or not hasattr(embedder, "contributions"):
        return None
    weights, bias = as_layer(bundle.estimator)
    cells: NDArray[np.float32] | None = embedder.contributions(pixels[lane][rows], output, weights)
    if cells is None:
        return None
    known = bundle.estimator.classes_ if bundle.target.exclusive else np.arange(len(weights))
    found = np.full((len(rows), bundle.target.width, *cells.shape[2:]), -np.inf)
    found[:, known] = cells + bias[:, None, None]
    return found


def _shrunk(path: str, limit: int) -> NDArray[np.uint8]:
    """Return an image, uint8 of shape (height, width, 3), scaled so that no side is longer than `SIDE`."""
    pixels = decode(open_file(Path("/"), absolute(path)), max_pixels=limit)
    scale = min(1.0, SIDE / max(pixels.shape))
    height, width = (max(1, round(scale * length)) for length in pixels.shape[:2])
    return prepare(pixels, Preprocessing(resize=(height, width), crop=(height, width), interpolation="lanczos"))


def _occlusion(
    model: LoadedHead, lanes: Sequence[Lane], pixels: NDArray[np.uint8], places: Sequence[int]
) -> NDArray[np.float64]:
    """Return how much covering each patch and its neighbours lowers the log-odds of k labels: float64 of shape (k, PATCHES, PATCHES).

    pixels : uint8 of shape (height, width, 3). Source: Zeiler and Fergus 2014.
    """
    items = (
        Item(number, "", None, tuple(range(len(lanes))), pixels=each) for number, each in enumerate(_covered(pixels))
    )
    odds: list[NDArray[np.float64]] = []
    for _, parts in embed(lanes, items, Path("/"), pixels.size):
        _, probabilities = model.bundle.said(*model.vectors([part for part in parts if part is not None]))
        assert probabilities is not None  # checked by the caller
        odds.append(logit(np.clip(probabilities[:, places], SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)))
    whole, covered = np.split(np.concatenate(odds), [1])
    return (whole - covered).T.reshape(-1, PATCHES, PATCHES)


def _covered(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yield an image, and then a copy for each patch with that patch and its neighbours covered, row by row.

    Covering a single patch often changes nothing, because the rest of the object is enough for a confident head.
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
    """Return for each image the nearest training images with its label and with others, or a message why there are none.

    For a soft vote the vectors, float32 of shape (dim,) each, are those of its first member.
    """
    files = experiment_around(place)
    if files is None:
        return f"no neighbours are shown: {place} is in no experiment with training images"
    try:
        stored = Stored.open(files, str(bundle.parts[0].embedding["name"]))
    except PipelineError as error:
        return f"no neighbours are shown: {error.message}"
    near: list[tuple[Near, Near]] = [((), ())] * len(found)
    taught = np.isin(stored.index.splits, ("train", "validation"))
    for label in {each.label for each in found}:
        rows = [row for row, each in enumerate(found) if each.label == label]
        own = stored.index.labels == label
        if not bundle.target.exclusive:
            own = bundle.target.encode(stored.index)[:, bundle.target.classes.index(label)]
        paths = [found[row].path for row in rows]
        sides = [
            stored.part(taught & side).neighbours(paths, np.stack([vectors[row] for row in rows]), NEIGHBOURS)
            for side in (own, ~own)
        ]
        for row, *both in zip(rows, *sides, strict=True):
            speaking_for, against = (tuple((each.distance, each.label, each.path) for each in side) for side in both)
            near[row] = speaking_for, against
    return near
