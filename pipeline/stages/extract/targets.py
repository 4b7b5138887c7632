"""What each embedding's store is missing, and why: the decision that comes before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data import DatasetIndex
from pipeline.embed.spec import EmbeddingSpec
from pipeline.errors import StoreError, first
from pipeline.experiment import Artifacts
from pipeline.io.digests import Digests, digests_to_hex
from pipeline.stages.extract.sources import Source
from pipeline.stages.extract.stores import open_store, place
from pipeline.store import FeatureStore, differences

MOST_DIFFERENCES = 6
IDENTITY_DIFFERS = "identity differs"


@dataclass(frozen=True, eq=False)
class Contents:
    """The distinct images of a data set in the order of the index; n of them."""

    digests: Digests
    rows: NDArray[np.int64]
    """The first row of the index with each content."""
    failed: NDArray[np.bool_]
    """Known not to decode."""

    @staticmethod
    def of(index: DatasetIndex, failed: Digests) -> Contents:
        """Take the distinct contents of an index; `failed` are digests, uint64 of shape (k, 2), of those that do not decode."""
        _, first = np.unique(index.digests, axis=0, return_index=True)
        rows = np.sort(first).astype(np.int64)
        digests = index.digests[rows]
        known = set(digests_to_hex(failed))
        if not known:  # no name for each of millions
            return Contents(digests, rows, np.zeros(len(rows), dtype=bool))
        return Contents(digests, rows, np.array([text in known for text in digests_to_hex(digests)], dtype=bool))


@dataclass(frozen=True, eq=False)
class Target:
    """One embedding and its store, as they were found."""

    source: Source
    output: int
    """Which of the source's outputs."""
    spec: EmbeddingSpec
    path: Path
    pending: NDArray[np.bool_]
    """Which contents are to be embedded, shape (n,)."""
    rows: int
    """Vectors the store has."""
    why: str
    """Why something is missing; '' when nothing is."""


def find_targets(
    sources: Sequence[Source], contents: Contents, files: Artifacts, folders: Sequence[Path] = ()
) -> list[Target]:
    """Compare every embedding's store with the data set; the same embedding asked for twice is one target.

    `folders` : where else a store may lie, for who only looks.
    """
    targets: dict[Path, Target] = {}
    for source in sources:
        for output, spec in enumerate(source.specs):
            path = place(spec, files, folders)
            if path not in targets:
                targets[path] = _target(source, output, spec, path, contents, files)
    return list(targets.values())


def _target(
    source: Source, output: int, spec: EmbeddingSpec, path: Path, contents: Contents, files: Artifacts
) -> Target:
    store = open_store(path, spec)
    missing = np.ones(len(contents.rows), dtype=bool) if store is None else store.missing(contents.digests)
    pending = missing & ~contents.failed
    count = int(pending.sum())
    why = ""
    if count and (store is None or not store.rows):
        why = _why_no_store(spec, path, files)
    elif count:
        why = f"{count:,} images are new or changed since the store was filled"
    return Target(source, output, spec, path, pending, 0 if store is None else store.rows, why)


def _why_no_store(spec: EmbeddingSpec, path: Path, files: Artifacts) -> str:
    """Name what is new in this identity against the most similar store there is."""
    closest: tuple[int, Path, list[str]] | None = None
    folders = dict.fromkeys([files.stores, *files.stores_before()])
    for other in (path for folder in folders for path in sorted(folder.glob("*.store"))):
        if other == path:
            continue
        try:
            store = FeatureStore.open(other)
        except StoreError:
            continue  # whoever uses that store will hear of it
        if (
            store.rows
            and store.identity.get("architecture") == spec.architecture
            and store.identity.get("layer") == spec.layer
        ):
            changes = differences(store.identity, json.loads(json.dumps(spec.identity())))
            if closest is None or len(changes) < closest[0]:
                closest = (len(changes), other, changes)
    if closest is None:
        return "no features of it yet"
    _, other, changes = closest
    return f"{IDENTITY_DIFFERS} from that of {other.name} in {'; '.join(first(changes, MOST_DIFFERENCES))}"


def reasons(index: DatasetIndex, before: Mapping[str, str], contents: Contents, target: Target) -> list[str]:
    """Say for every image to be embedded why: `path: new`, `changed`, `identity differs`, or `not embedded yet`.

    `before` : path -> hex digest of the index as it was before this run's scan.
    """
    chosen = np.flatnonzero(target.pending)
    same = IDENTITY_DIFFERS if target.why.startswith(IDENTITY_DIFFERS) else "not embedded yet"
    lines = []
    for row, digest in zip(contents.rows[chosen].tolist(), digests_to_hex(contents.digests[chosen]), strict=True):
        path = str(index.paths[row])
        earlier = before.get(path)
        lines.append(f"{path}: {'new' if earlier is None else same if earlier == digest else 'changed'}")
    return lines
