"""Vectors of the user's own on their way into a store, by the paths of the images or in the order of the manifest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import Config, names_vectors
from pipeline.data import DatasetIndex
from pipeline.data.index import texts
from pipeline.data.sources import list_source
from pipeline.errors import StoreError, first, number_of
from pipeline.experiment import Artifacts
from pipeline.io.remote import absolute
from pipeline.stages.extract.targets import Contents, Target
from pipeline.store.share import read_vectors
from pipeline.store.writer import StoreWriter

log = logging.getLogger(__name__)

EXAMPLES = 5


def fill(
    targets: Sequence[Target], contents: Contents, index: DatasetIndex, config: Config, files: Artifacts
) -> list[Target]:
    """Write the vectors of the user's files that their stores are missing; return the targets as they are then.

    Raises
    ------
    StoreError
        When a file has no vector for some images, or a `.npy` has not as many as there are images.
    """
    return [
        _filled(target, Path(target.source.section.name), contents, index, config, files)
        if target.source.section is not None and names_vectors(target.source.section.name) and target.pending.any()
        else target
        for target in targets
    ]


def _filled(
    target: Target, path: Path, contents: Contents, index: DatasetIndex, config: Config, files: Artifacts
) -> Target:
    paths, X = read_vectors(path)
    if paths is None:
        listing = list_source(config.dataset, files.dataset)
        in_order = listing.paths if config.dataset.source == "manifest" else sorted(listing.paths)
        if len(in_order) != len(X):
            raise StoreError(
                f"{path}: has {len(X):,} vectors, and the data set names {number_of(len(in_order), 'image')} that are there; a .npy "
                "file needs one for each, in the order of the manifest or else of the paths; a .parquet file may name them in a column `path`"
            )
        paths = texts(in_order)
    root = f"{absolute(index.root)}/"
    rows = {str(name).removeprefix(root).removeprefix("./"): row for row, name in enumerate(paths.tolist())}
    places = np.array([rows.get(name, -1) for name in index.paths.tolist()])
    lacking = index.paths[places < 0].tolist()
    if lacking:
        raise StoreError(f"{path}: has no vector for {number_of(len(lacking), 'image')}", first(lacking, EXAMPLES))
    order = np.unique(index.digests, axis=0, return_inverse=True)[1].reshape(-1)
    of_copies = places[np.unique(order, return_index=True)[1]][order]
    if differing := int((X[of_copies] != X[places]).any(axis=1).sum()):
        log.warning(
            "%s: %d copies of images have other vectors than the first of them, whose is taken", path, differing
        )
    pending = np.flatnonzero(target.pending)
    with StoreWriter.open(target.path, target.spec.identity(), target.spec.dim) as writer:
        new = writer.append(contents.digests[pending], X[places[contents.rows[pending]]])
    log.info("%s: %s taken from %s", target.spec.name, number_of(new, "vector"), path)
    return replace(target, pending=np.zeros_like(target.pending), rows=target.rows + new, why="")
