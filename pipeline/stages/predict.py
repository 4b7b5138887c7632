"""Predict: a bundle and new images become labels and probabilities, one row of a CSV file per image.

An image that cannot be read has a row too, with the reason in its `status`; what else is passed over in a folder is counted.
Rows are written as batches come: what grows in memory with the number of images is the names of one folder.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import checked_device
from pipeline.data import REMARKS, Failure, Walk, passed_over_lines
from pipeline.data.targets import Target
from pipeline.embed.loader import Batch, Item, Lane, Part, embed
from pipeline.embed.records import EmbeddingRecord, open_records
from pipeline.errors import BundleError, ConfigError, DatasetError, first
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts, to_cell
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.files import growing, require_place
from pipeline.io.progress import bar

log = logging.getLogger(__name__)

BATCH_SIZE = 32
EXAMPLES = 5
"""Reasons told when no image can be read."""


@dataclass(frozen=True)
class PredictRun:
    """What was written."""

    output: Path
    bundle: Path
    labels: Mapping[str, int]
    """Label -> images."""
    unreadable: int
    passed_over: Sequence[str]
    """Lines on the files in the folders that are no images, and on what else is not looked at."""
    untrained: bool

    def summary_lines(self) -> list[str]:
        """How many images got which label, and where the file is."""
        total = sum(self.labels.values())
        lines = [f"{total:,} images labelled by {self.bundle}"]
        lines += [
            f"  {label}: {count:,}"
            for label, count in sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))
        ]
        if self.unreadable:
            lines.append(f"{self.unreadable:,} images could not be read; their `status` says why")
        lines += self.passed_over
        if self.untrained:
            lines.append("warning: this head's backbone is untrained (weights: random); it is a control, not for use")
        return [*lines, f"written to {self.output}"]


@dataclass(frozen=True)
class Row:
    """One image's outcome: `label` is None where `status` says why it could not be read."""

    path: str
    label: str | None
    probabilities: NDArray[np.float64] | None
    status: str


def run(
    bundle: Path,
    images: Sequence[Path],
    *,
    output: Path,
    top: int = 3,
    device: str = "auto",
    trust_code: bool = False,
    max_pixels: int | None = None,
) -> PredictRun:
    """Label image files and folders of them with a saved head.

    `bundle` is a bundle's folder, or an experiment's output folder: then its best head is used. `max_pixels` is the
    experiment's where it is not given. A run that is stopped leaves its rows beside `output`, as `NAME.*.partial`.

    Raises
    ------
    PipelineError
        When the bundle or an image path is not there, the backbone that made the head's features is not to be had, or no
        image can be read; the rows are written in that last case too.
    OSError
        When `output` cannot be written, which is found before the work where it can be.
    """
    try:
        checked_device(device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from None
    folder = find_bundle(bundle)
    model = bundles.load(folder, trust_code=trust_code)
    require_all(images)
    require_place(output)
    if not all(part.embedding for part in model.parts):
        raise BundleError(f"{folder}: is the constant guess, which looks at no image; name another bundle's folder")
    records = [EmbeddingRecord.from_dict(part.embedding) for part in model.parts]
    embedders, places = open_records(records, device)
    walks = [Walk(path, follow_symlinks=True, inside="/") for path in images if path.is_dir()]
    total = sum(1 for _ in images_in(images, walks))
    unread, passed_over = _passed_over(walks)
    if not total and not unread:
        raise DatasetError(f"no image files in {', '.join(map(str, images))}", passed_over)
    given, ahead = tee(images_in(images, [replace(walk, entries=[], ignored=Counter()) for walk in walks]))

    def outcomes() -> Iterator[list[Row]]:
        lanes = [Lane(embedder, BATCH_SIZE) for embedder in embedders]
        limit = max_pixels or records[0].max_pixels
        for batch, parts in embed(lanes, _items(ahead, len(lanes)), Path("/"), limit):
            yield list(_rows(batch, parts, given, model, places))
        if unread:
            yield unread

    labels: Counter[str] = Counter()
    total += len(unread)
    done, reasons = 0, list[str]()
    with growing(output) as file, bar(total, "images", "predicting") as progress:
        try:
            for rows in outcomes():
                header = "" if done else csv_header(model.target, top)
                file.add((header + to_csv(rows, model.target, top)).encode())
                labels.update(row.label for row in rows if row.label is not None)
                done += len(rows)
                if len(reasons) <= EXAMPLES:
                    reasons += [f"{row.path}: {row.status}" for row in rows if row.label is None]
                progress.update(len(rows))
        except BaseException:
            if done:
                kept = "stopped after %d of %d images: their rows are in %s, and a new run begins with the first image"
                log.warning(kept, done, total, file.path)
            raise
    unreadable = done - labels.total()
    if unreadable == done:
        raise DatasetError(
            f"none of the {done:,} images could be read; {output} says why of each", first(reasons, EXAMPLES)
        )
    return PredictRun(output, folder, labels, unreadable, passed_over, any(record.untrained for record in records))


def find_bundle(path: Path) -> Path:
    """Return a bundle's folder: the path itself, or the best one of an experiment's output folder."""
    leaderboard = Artifacts(path).leaderboard
    if (path / "bundle.json").exists() or not leaderboard.exists():
        return path
    board = read_leaderboard(path)
    best = next((row for row in board.rows if row.bundle is not None and not row.constant), None)
    if best is None or best.bundle is None:
        raise BundleError(f"{path}: its leaderboard has no head that looks at images; name a bundle's folder")
    if board.best.constant:
        log.warning(
            "the best row is the constant guess, which looks at no image; labelling with the best head, %s", best.key
        )
    return path / best.bundle


def require_all(paths: Sequence[Path]) -> None:
    """See that every path is there; DatasetError with one line for each that is not."""
    missing = [shown(str(path)) for path in paths if not path.exists()]
    if missing:
        raise DatasetError("no such file or folder", missing)


def images_in(paths: Sequence[Path], walks: Sequence[Walk]) -> Iterator[str]:
    """Yield the files named, and every image in the folders named, by one walk for each; each once, in order."""
    seen: set[str] = set()
    left = iter(walks)
    for path in paths:
        for file in _images(next(left)) if path.is_dir() else (str(path),):
            if len(paths) > 1:  # one folder has no file twice, and millions of names are memory
                if file in seen:
                    continue
                seen.add(file)
            yield file


def _images(walk: Walk) -> Iterator[str]:
    for folder, found in walk.below():
        for name in sorted(found.images):
            yield str(walk.root / folder / name)


def _passed_over(walks: Sequence[Walk]) -> tuple[list[Row], list[str]]:
    """Return a row for each image that finished walks passed over, and lines on the rest."""
    unread: set[tuple[str, str]] = set()
    others: set[Failure] = set()
    ignored: Counter[str] = Counter()
    for walk in walks:
        ignored += walk.ignored
        for entry in walk.entries:
            path = str(walk.root / entry.path)
            if entry.status in REMARKS:
                others.add(entry._replace(path=path))
            else:
                unread.add((path, f"{entry.status}: {entry.reason}"))
    rows = [Row(path, None, None, status) for path, status in sorted(unread)]
    return rows, passed_over_lines(sorted(others), ignored, "")


def shown(path: str) -> str:
    """Return a path as text that can be written: bytes of it that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def csv_header(target: Target, top: int) -> str:
    """Return the first line: path, status, and what the target's predictions look like."""
    return ",".join(["path", "status", *target.csv_columns(top)]) + "\n"


def to_csv(rows: Sequence[Row], target: Target, top: int) -> str:
    """Return the lines of some rows, without the first; a cell that a spreadsheet would run begins with `'`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        cells = [row.path, row.status, *target.csv_cells(row.label, row.probabilities, top)]
        writer.writerow(map(to_cell, cells))
    return text.getvalue()


def _items(paths: Iterable[str], lanes: int) -> Iterator[Item]:
    here, wanted = os.getcwd(), tuple(range(lanes))
    return (Item(number, os.path.join(here, path), None, wanted) for number, path in enumerate(paths))


def _rows(
    batch: Batch,
    parts: Sequence[Part | None],
    given: Iterator[str],
    model: ModelBundle,
    places: Sequence[tuple[int, int]],
) -> Iterator[Row]:
    """Label a batch; `given` are the paths of its images, and of all after it, as the user wrote them.

    `places` has for each part of the model its lane, and which of the lane's outputs it takes.
    """
    labelled: dict[int, tuple[str, NDArray[np.float64] | None]] = {}
    made = [part for part in parts if part is not None]  # an image that can be read is read for every lane
    if made:
        labels, probabilities = model.predict(*(made[lane].vectors[output] for lane, output in places))
        labelled = {
            row: (str(labels[place]), None if probabilities is None else probabilities[place])
            for place, row in enumerate(made[0].rows.tolist())
        }
    for row in range(len(batch.items)):
        path = shown(next(given))
        if row in labelled:
            yield Row(path, *labelled[row], "ok")
        else:
            problem = batch.problems[row]
            yield Row(path, None, None, f"{problem.status}: {problem.reason}")
