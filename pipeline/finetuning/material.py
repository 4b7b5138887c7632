"""The material of stage three: the embedding and head, the training, validation and test images, and their pixels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import config as configuration
from pipeline import images
from pipeline.config import Config
from pipeline.data import DatasetIndex, lineage, targets
from pipeline.data.lineage import Lineage
from pipeline.data.targets import Classification, Target
from pipeline.embed.loader import Item, Loader
from pipeline.embed.records import EmbeddingRecord, departures, read_asked_records, require_index, shared
from pipeline.errors import ConfigError, PipelineError, TrainingError, first
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.heads import HEADS
from pipeline.heads.tuning import make_folds
from pipeline.io import process
from pipeline.store import FeatureStore

MEMORY = 2 << 30
"""Limit of pixels kept in memory, in bytes; larger arrays are stored in a file next to the checkpoint."""

BATCH = 64
"""Images read per batch."""

SHOWN = 20

SERVED = Classification.kind

LINEAR = tuple(name for name, head in HEADS.items() if head.linear)


@dataclass(frozen=True)
class Choice:
    """The embedding to fine-tune, the head to start from, and the rows to compare the result with."""

    record: EmbeddingRecord
    linear: LeaderboardRow | None
    """The row whose head is handed over; None for a random start."""
    head: ModelBundle | None
    """The bundle of that head."""
    winner: LeaderboardRow
    """The best row of the leaderboard."""
    frozen: LeaderboardRow | None
    """The best row of the same network frozen: the row that is handed over, or the best linear one for a random start."""
    floor: LeaderboardRow | None = None
    """The best row without pretraining: a baseline's, or an untrained network's."""

    @property
    def balanced(self) -> bool:
        """Whether classes are weighted equally, as in the head that is handed over."""
        return self.head is not None and self.head.estimator[-1].get_params().get("class_weight") == "balanced"


@dataclass(frozen=True)
class Parts:
    """The images of stage two, divided for stage three."""

    target: Target
    train: DatasetIndex
    validation: DatasetIndex
    test: DatasetIndex


def choose(config: Config, files: Artifacts) -> Choice:
    """Return the embedding to fine-tune and the head to start from, both by cross-validation only.

    PipelineError if stages one and two have not been run, the leaderboard has no such embedding, or no linear head on it, or its
    target's kind is not supported.
    """
    each = files.each_target()
    if "" not in each:
        folder = next(iter(each.values()))
        raise TrainingError(
            f"finetune: a network is trained for one target, the experiment has {len(each)}; give the config of one, such as {folder / 'config.yaml'}"
        )
    records = {record.name: record for record in read_asked_records(files.features, config)}
    board = read_leaderboard(files.root)
    if board.target.kind != SERVED:
        raise TrainingError(f"finetune supports only {SERVED} targets, but the target is {board.target.kind}")
    _require_of(board, config, files)
    require_index(files.features, DatasetIndex.read(files.dataset).fingerprint())
    start = config.finetune.start
    wanted, _, head = ("best/random" if start == "random" else start).partition("/")
    head = head or "best"
    able = [row for row in board.rows if not row.baseline and row.embedding in records]
    names = sorted({row.embedding for row in able})
    if wanted != "best":
        able = [row for row in able if row.embedding == wanted]
    elif last := [row for row in able if records[row.embedding].layer.startswith("penultimate")]:
        able = last  # only heads on the last layer's input can be handed over
    if not able:
        raise TrainingError(
            f"finetune.start: {wanted!r} is not a backbone's embedding on the leaderboard; there are {', '.join(names) or 'none'}"
        )
    embedding = able[0].embedding
    floor = next((row for row in board.rows if row.baseline or row.untrained), None)
    linear = [row for row in able if row.embedding == embedding and row.head in LINEAR]
    if head == "random":
        return Choice(records[embedding], None, None, board.best, next(iter(linear), None), floor)
    if head != "best":
        linear = [row for row in linear if row.head == head]
    if not linear:
        raise TrainingError(
            f"finetune.start: {embedding} has no linear head {head!r}; add one of {', '.join(LINEAR)} to heads: and run "
            "`manyheads heads`, or set it to random"
        )
    saved = bundles.load(files.root / str(linear[0].bundle))
    return Choice(records[embedding], linear[0], saved, board.best, linear[0], floor)


def _require_of(board: Leaderboard, config: Config, files: Artifacts) -> None:
    """Raise PipelineError, with the differences, if a leaderboard was made for other images or backbones than this config's."""
    try:
        made = configuration.parse(board.provenance.get("config", {}), str(files.leaderboard))
    except ConfigError:
        problems = ["it was written by another version of this package"]
    else:
        problems = departures(shared(made), made.sections, config, "the leaderboard")
    if problems:
        raise PipelineError(
            f"{files.leaderboard}: is of another config; run `manyheads heads` with this config first", problems
        )


def divide(config: Config, files: Artifacts, store: FeatureStore, parent: Lineage = lineage.NONE) -> Parts:
    """Divide stage two's training images into training and validation images of stage three.

    The data's own validation split is used if there is one; otherwise a stratified share, in which groups and copies of
    an image stay together. Images that the network was trained on before are removed from validation.
    TrainingError if one of the three parts would be empty.
    """
    index = DatasetIndex.read(files.dataset).select("train", "validation", "test")
    usable = index.rows(~store.missing(index.digests))
    learned, validation, test = (usable.select(split) for split in ("train", "validation", "test"))
    if len(validation) == 0 and len(learned) > 0:
        folds = round(1 / config.finetune.validation_fraction)
        rows, held_out = make_folds(learned.labels, folds, config.seed, learned.fold_groups())[0]
        learned, validation = learned.rows(rows), learned.rows(held_out)
    validation = validation.rows(~parent.learned(validation.digests))
    for name, part in (("training", learned), ("validation", validation), ("test", test)):
        if len(part) == 0:
            raise TrainingError(
                f"there are no {name} images with features; fine-tuning needs training, validation and test images"
            )
    return Parts(targets.choose(usable, *config.dataset.kinds), learned, validation, test)


def read_pixels(
    config: Config, index: DatasetIndex, preprocessing: images.Preprocessing, scratch: Path | None = None
) -> NDArray[np.uint8]:
    """Decode and preprocess images: uint8 (n, height, width, 3), in the file `scratch` if they do not fit in memory.

    TrainingError with the images that can no longer be read.
    """
    shape = (len(index), *preprocessing.size, 3)
    pixels: NDArray[np.uint8] = (
        np.lib.format.open_memmap(scratch, mode="w+", dtype=np.uint8, shape=shape)
        if scratch is not None and np.prod(shape) > MEMORY
        else np.empty(shape, np.uint8)
    )
    items = (Item(row, str(path), index.digests[row].tobytes(), (0,)) for row, path in enumerate(index.paths))
    loader = Loader(index.root, config.dataset.max_pixels, (preprocessing,), BATCH, os.cpu_count() or 1)
    problems = []
    done = 0
    with process.bar(len(index), "image", "reading") as bar:
        for batch in loader.batches(items):
            count = len(batch.items)
            pixels[done : done + count] = batch.pixels[0][:count]
            problems += [
                f"{batch.items[row].path}: {problem.reason}" for row, problem in sorted(batch.problems.items())
            ]
            done += count
            bar.update(count)
    if problems:
        raise TrainingError(
            f"{len(problems)} of {len(index)} images that have features cannot be read now; run `manyheads features` again",
            first(problems, SHOWN),
        )
    return pixels
