"""Predict: a bundle and new images become labels and probabilities, one row of a CSV file per image.

An image that cannot be read has a row too, with the reason in its `status`.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import bundle as bundles
from pipeline.bundle import ModelBundle
from pipeline.config import Artifacts, DatasetConfig
from pipeline.dataset import is_image_name
from pipeline.embedders import Embedder, EmbeddingRecord, open_record
from pipeline.errors import BundleError, DatasetError
from pipeline.feed import Batch, Feeder, Item, gpu_at_hand
from pipeline.files import write_text_atomic
from pipeline.progress import bar
from pipeline.report import Leaderboard

BATCH_SIZE = 32


@dataclass(frozen=True)
class PredictRun:
    """What was written."""

    output: Path
    bundle: Path
    labels: Mapping[str, int]
    """Label -> images."""
    unreadable: int
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
    bundle: Path, images: Sequence[Path], *, output: Path, top: int = 3, device: str = "auto", trust_code: bool = False
) -> PredictRun:
    """Label image files and folders of them with a saved head.

    `bundle` is a bundle's folder, or an experiment's output folder: then its best head is used.

    Raises
    ------
    PipelineError
        When the bundle or an image path is not there, or the backbone that made the head's features is not to be had.
    """
    folder = find_bundle(bundle)
    model = bundles.load(folder, trust_code=trust_code)
    files = list_images(images)
    record = EmbeddingRecord.from_dict(model.embedding)
    embedder, output_number = open_record(record, device)
    rows: list[Row] = []
    with bar(len(files), "images", "predicting") as progress:
        for batch in _batches(files, embedder):
            rows += _rows(batch, files, model, embedder, output_number)
            progress.update(len(batch.items))
    write_text_atomic(output, to_csv(rows, model.classes, top))
    labels = Counter(row.label for row in rows if row.label is not None)
    return PredictRun(output, folder, labels, sum(row.label is None for row in rows), record.untrained)


def find_bundle(path: Path) -> Path:
    """Return a bundle's folder: the path itself, or the best one of an experiment's output folder."""
    leaderboard = Artifacts(path).leaderboard
    if (path / "bundle.json").exists() or not leaderboard.exists():
        return path
    board = Leaderboard.from_json(leaderboard.read_text(encoding="utf-8"))
    best = next((row for row in board.rows if row.bundle is not None and row.embedding != "majority"), None)
    if best is None or best.bundle is None:
        raise BundleError(f"{path}: its leaderboard has no head that looks at images; name a bundle's folder")
    return path / best.bundle


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files named, and every image file in the folders named, each once, in order.

    Raises
    ------
    DatasetError
        With one line for every path that is not there.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DatasetError("no such file or folder", missing)
    found: dict[Path, None] = {}
    for path in paths:
        for file in _walk(path) if path.is_dir() else (path,):
            found[file] = None
    if not found:
        raise DatasetError(f"no image files in {', '.join(map(str, paths))}")
    return list(found)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and is_image_name(name):
                yield Path(root, name)


def to_csv(rows: Sequence[Row], classes: Sequence[str], top: int) -> str:
    """Return the CSV: path, status, label, probability, then the next likely labels with theirs."""
    top = min(top, len(classes))
    header = ["path", "status", "label", "probability"]
    for rank in range(2, top + 1):
        header += [f"label_{rank}", f"probability_{rank}"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([row.path, row.status, *_cells(row, classes, top)])
    return text.getvalue()


def _cells(row: Row, classes: Sequence[str], top: int) -> list[str]:
    if row.label is None or row.probabilities is None:
        return [row.label or "", *[""] * (2 * top - 1)]
    # The head's own label comes first, also where another is exactly as likely.
    order = sorted(range(len(classes)), key=lambda place: (classes[place] != row.label, -row.probabilities[place]))  # type: ignore[index]
    return [cell for place in order[:top] for cell in (classes[place], f"{row.probabilities[place]:.6f}")]


def _batches(files: Sequence[Path], embedder: Embedder) -> Iterator[Batch]:
    items = [Item(number, str(path.absolute()), None, (0,)) for number, path in enumerate(files)]
    limits = DatasetConfig()
    gpu = gpu_at_hand(embedder.preprocessing, str(getattr(embedder, "device", "cpu")))
    feeder = Feeder(Path("/"), limits.max_pixels, (embedder.preprocessing,), BATCH_SIZE, os.cpu_count() or 1, gpu)
    return feeder.batches(items)


def _rows(
    batch: Batch, files: Sequence[Path], model: ModelBundle, embedder: Embedder, output_number: int
) -> Iterator[Row]:
    good = [row for row in range(len(batch.items)) if row not in batch.problems]
    labelled: dict[int, tuple[str, NDArray[np.float64] | None]] = {}
    if good:
        X = embedder.embed(batch.pixels[0][good])[output_number]
        labels, probabilities = model.predict(X)
        labelled = {
            row: (str(labels[place]), None if probabilities is None else probabilities[place])
            for place, row in enumerate(good)
        }
    for row, item in enumerate(batch.items):
        if row in labelled:
            yield Row(str(files[item.content]), *labelled[row], "ok")
        else:
            problem = batch.problems[row]
            yield Row(str(files[item.content]), None, None, f"{problem.status}: {problem.reason}")
