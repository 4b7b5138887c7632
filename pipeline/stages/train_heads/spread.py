"""Heads on many machines: each row that is not finished is one task, which writes its bundle and its journal where all see them.

A worker tunes a head on all folds with the cores that it has. The features of an embedding are one file, which the workers map: a node
has it in memory once. A worker that dies costs its fits since the journal's last line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import UnfittedError
from pipeline.experiment import Artifacts
from pipeline.heads.tuning import limited
from pipeline.heads.tuning.backends import SHARING, cpu_count, spread
from pipeline.io.digests import fingerprint
from pipeline.io.process import bar, look_in
from pipeline.stages.train_heads.embedding import Embedding, Vectors
from pipeline.stages.train_heads.row import finished_row, make_row, row_key

if TYPE_CHECKING:
    from pipeline.stages.train_heads import Asked

FOLDER = "mapped"
"""In the output folder: the features that workers map, while they do."""


def make_rows(embeddings: Sequence[Embedding], config: Config, files: Artifacts) -> set[str]:
    """Make the rows that are not finished on the backend that is chosen; return the keys of those that were tried.

    What cannot be fitted is left to the caller, who says why.
    """
    tasks, keys, document = [], set(), _divided(config, SHARING.get()).model_dump_json()
    folder = Path(os.path.abspath(files.root)) / FOLDER
    try:
        for place, embedding in enumerate(embeddings):
            keyed = [(head.name, row_key(head, embedding, config.seed)) for head in embedding.heads]
            fresh = [each for each in keyed if finished_row(files.bundle(embedding.name, each[0]), each[1]) is None]
            if embedding.store is not None and fresh:
                vectors = Vectors(embedding, folder)
                assert len(vectors.train) + len(vectors.test) > 0  # the files are written, once for all workers
                tasks += [(place, name) for name, _ in fresh]
                keys |= {key for _, key in fresh}
        asked = (document, fingerprint({"rows": sorted(keys)}), os.getcwd(), folder)
        with bar(len(tasks), "heads", "tuning on the workers") as progress:
            for _ in spread(_make, [(*asked, *task) for task in tasks]) if tasks else ():
                progress.update()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return keys


def _divided(config: Config, workers: int) -> Config:
    """Leave each of some workers its share of the cores and of the memory."""
    tuning = config.tuning
    limit = limited(tuning).memory_bytes
    changes: dict[str, int | str] = {}
    if tuning.jobs == "auto" and workers > 1:
        changes["jobs"] = max(1, cpu_count() // workers)
    if limit and tuning.memory == "auto" and workers > 1:
        changes["memory"] = f"{limit // workers / 1e6:.3f}MB"
    return config.model_copy(update={"tuning": tuning.model_copy(update=changes)})


def _make(config: str, rows: str, working: str, folder: Path, place: int, name: str) -> None:
    """Make a row in a worker: of the embedding at this place, by the head of this name."""
    os.chdir(working)
    look_in(Path(working))
    asked = _asked(config, rows)
    embedding = asked.embeddings[place]
    head = next(head for head in embedding.heads if head.name == name)
    files, key = Artifacts(asked.config.output), row_key(head, embedding, asked.config.seed)
    with suppress(UnfittedError):
        make_row(head, embedding, Vectors(embedding, folder), asked.config, files, key)


@lru_cache(1)
def _asked(config: str, rows: str) -> Asked:
    """Open the features once in each worker, and again where other rows are asked for."""
    from pipeline.stages.train_heads import ask

    return ask(Config.model_validate_json(config))
