"""Similar: the stored images nearest to an image, with their labels; the image itself may be stored or new."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data import DatasetIndex
from pipeline.data.folder import Listing, is_folder
from pipeline.embed.records import EmbeddingRecord, choose, open_features, read_records
from pipeline.embed.transformer import digests_of
from pipeline.errors import DatasetError, PipelineError, first, number_of
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts, from_plain
from pipeline.export import bundle as bundles
from pipeline.io.files import require_place, write_text_atomic
from pipeline.io.remote import address_of
from pipeline.stages import settings
from pipeline.stages.estimators import embedder_of
from pipeline.stages.predict import EXAMPLES, expanded, images_in, shown, to_lines
from pipeline.store import FeatureStore, JoinedStores
from pipeline.store.rows import Nearest


@dataclass(frozen=True)
class Neighbour:
    """A nearby stored image: its distance, 1 - cosine, its label ('' if it has none), its split, and its path."""

    distance: float
    label: str
    split: str
    path: str


@dataclass(frozen=True)
class SimilarRun:
    """The results: for each image its neighbours, nearest first, or the reason why it could not be read."""

    embedding: str
    images: int
    """Number of stored images searched."""
    found: Mapping[str, Sequence[Neighbour]]
    problems: Mapping[str, str]
    output: Path | None

    def summary_lines(self) -> list[str]:
        """Return a table per image."""
        lines = [
            f"nearest of {number_of(self.images, 'image')} by {self.embedding}; 0 is the same, 1 has nothing in common"
        ]
        for path, near in self.found.items():
            width = max([5, *(len(each.label) for each in near)])
            rows = [(f"{each.distance:.4f}", each.label, each.path) for each in near]
            lines += ["", path, *(f"  {away}  {label:<{width}}  {where}" for away, label, where in rows)]
        lines += [f"{path}: {why}" for path, why in self.problems.items()]
        return lines if self.output is None else [*lines, "", f"written to {self.output}"]


def run(
    images: Sequence[Path],
    place: Path | None = None,
    *,
    embedding: str | None = None,
    count: int = 10,
    output: Path | None = None,
    trust: bool = False,
) -> SimilarRun:
    """Find the stored images nearest to the given image files, and to all images in the given folders.

    `place` is an output folder, a config or a folder of photos; by default the only experiment in `artifacts`. The embedding is the
    leaderboard's best row's unless one is named. A stored image needs no network, and is not its own neighbour; a
    copy of it is. `trust` allows networks defined by code. Unreadable images are reported unless all are unreadable, which is an error.
    """
    images = expanded(images)
    if output is not None:
        require_place(output)
    stored = Stored.open(experiment_at(place), embedding)
    walks = [Listing(path) for path in images if is_folder(path)]
    paths = list(images_in(images, walks))
    if not paths:
        raise DatasetError(f"no image files in {', '.join(map(str, images))}")
    vectors, problems = stored.embed(paths, trust)
    read = [path for path in paths if path not in problems]
    told = {shown(path): why for path, why in problems.items()}
    if not read:
        reasons = first([f"{path}: {why}" for path, why in told.items()], EXAMPLES)
        raise DatasetError("none of the images can be read", reasons)
    found = dict(zip(map(shown, read), stored.neighbours(read, vectors, count), strict=True))
    if output is not None:
        rows = [
            [path, str(rank), f"{each.distance:.6f}", each.label, each.split, each.path]
            for path, near in found.items()
            for rank, each in enumerate(near, 1)
        ]
        write_text_atomic(output, to_lines([["image", "rank", "distance", "label", "split", "path"], *rows]))
    return SimilarRun(stored.record.name, len(stored.index), found, told, output)


def experiment_at(place: Path | None) -> Artifacts:
    """Return the experiment, with features, of an output folder, a config or a folder of photos; by default the only one in `artifacts`."""
    if place is None:
        there = sorted(path.parent for path in Path("artifacts").glob("*/features.json"))
        if len(there) != 1:
            names = ", ".join(map(str, there)) or "none in artifacts/"
            raise PipelineError(f"name an experiment, its config or its photos with --in; there is {names}")
        (place,) = there
    files = Artifacts(place)
    if not files.features.exists():
        config = settings.load(place)
        files = Artifacts(config.output, config.store)
    if not files.features.exists():
        raise PipelineError(
            f"{files.root}: has no features yet; run `manyheads features {place}`, or `manyheads embed {place}` where images "
            "have no labels"
        )
    return files


def embedding_of(files: Artifacts, name: str | None = None) -> tuple[EmbeddingRecord, Path | None]:
    """Return an experiment's embedding of a name, or its best row's, and the best bundle on it; None if there is no bundle."""
    if files.leaderboard.exists():
        for row in read_leaderboard(files.root).rows:
            if row.bundle and not row.constant and name in (None, row.embedding):
                made = bundles.describe(files.root / row.bundle)["embedding"]
                if made:  # a soft vote has several instead
                    return from_plain(EmbeddingRecord, made), files.root / row.bundle
    return choose(read_records(files.features), name, "--embedding"), None


@dataclass(frozen=True, eq=False)
class Stored:
    """The n images of an experiment with a vector of one embedding, prepared for repeated searches."""

    record: EmbeddingRecord
    store: FeatureStore | JoinedStores
    index: DatasetIndex
    search: Nearest
    """Nearest-neighbour search among the distinct contents."""
    copies: NDArray[np.int64]
    """The position of each image's content, shape (n,)."""

    @staticmethod
    def open(files: Artifacts, embedding: str | None = None) -> Stored:
        """Open an embedding of an experiment; PipelineError if it does not exist."""
        record, _ = embedding_of(files, embedding)
        store, index = open_features(record, files), DatasetIndex.read(files.dataset)
        index = index.rows(~store.missing(index.digests))
        if not len(index):
            raise PipelineError(f"{files.root}: no image has a vector of {record.name}; run `manyheads features` again")
        return Stored._of(record, store, index)

    @staticmethod
    def _of(record: EmbeddingRecord, store: FeatureStore | JoinedStores, index: DatasetIndex) -> Stored:
        contents, copies = np.unique(index.digests, axis=0, return_inverse=True)
        return Stored(record, store, index, Nearest.of(store, contents), copies.reshape(-1))

    def part(self, rows: NDArray[np.bool_]) -> Stored:
        """Return a search among some of the images only, bool of shape (n,)."""
        return Stored._of(self.record, self.store, self.index.rows(rows))

    def embed(self, paths: Sequence[str], trust: bool = False) -> tuple[NDArray[np.float32], dict[str, str]]:
        """Return the vectors of the readable ones of some image files, float32 of shape (k, dim), and the reasons for the others.

        Vectors in the store are looked up; the network is loaded only for other images, whose vectors are not stored.
        """
        digests, problems = digests_of(paths, self.record.max_pixels)
        missing = self.store.missing(digests)
        new = [row for row in np.flatnonzero(missing).tolist() if row not in problems]
        vectors = np.zeros((len(paths), self.store.dim), np.float32)
        vectors[~missing] = self.store.read(digests[~missing])
        if new:
            parts = [embedder_of(part, None, "auto", trust) for part in self.record.parts or (self.record,)]
            made, failed = zip(*(part.embed([paths[row] for row in new]) for part in parts), strict=True)
            problems |= {new[number]: problem for number, problem in failed[0].items()}
            vectors[[row for row in new if row not in problems]] = np.concatenate(made, axis=1)
        ok = np.array([row not in problems for row in range(len(paths))])
        return vectors[ok], {paths[row]: problem.reason for row, problem in problems.items()}

    def neighbours(self, paths: Sequence[str], vectors: NDArray[np.float32], count: int) -> list[list[Neighbour]]:
        """Return the nearest images of some files, given their vectors, float32 of shape (k, dim); a file is not its own neighbour."""
        order = np.argsort(self.copies, kind="stable")
        starts = np.searchsorted(self.copies[order], np.arange(len(self.search.order) + 1))
        places, away = self.search.find(vectors, count + 1)
        found = []
        for path, own, distances in zip(paths, places.tolist(), away.tolist(), strict=True):
            near = []
            for place, distance in zip(own, distances, strict=True):
                for row in order[starts[place] : starts[place + 1]].tolist():
                    where = str(self.index.root / self.index.paths[row])
                    if os.path.realpath(where) != os.path.realpath(path):
                        said, part = self.index.said(row), str(self.index.splits[row])
                        near.append(Neighbour(distance, said, part, address_of(where) or where))
            found.append(near[:count])
        return found
