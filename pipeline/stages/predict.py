"""Predict: label new images with a bundle, or one per target, and write labels and probabilities as a CSV file, one row per image.

An unreadable image has a row too, with the reason in its `status`; other files passed over in a folder are counted.
Rows are written batch by batch: only the file names of one folder grow in memory with the number of images.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import checked_device, names_vectors
from pipeline.data import REMARKS, DatasetIndex, Failure
from pipeline.data.failures import shown as as_named
from pipeline.data.folder import Listing, archives_of, is_folder, is_pattern
from pipeline.data.index import INDEX_FILE
from pipeline.data.scan import passed_over_lines
from pipeline.data.targets import Target
from pipeline.embed.baselines import no_network
from pipeline.embed.loader import Batch, Item, Lane, Part, embed
from pipeline.embed.records import EmbeddingRecord, Places, open_networks
from pipeline.errors import BundleError, ConfigError, DatasetError, first, number_of
from pipeline.evaluation.domains import LEAST, Alignment, Apart, apart
from pipeline.evaluation.domains import align as fit_alignment
from pipeline.evaluation.intervals import wilson
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import REFIT, Artifacts, from_plain, read_document, to_cell
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.export.strangers import Strangers, names, open_strangers
from pipeline.images import forget
from pipeline.io.files import growing, require_place
from pipeline.io.process import bar
from pipeline.io.remote import absolute, address_of
from pipeline.stages import settings
from pipeline.store.share import read_vectors

if TYPE_CHECKING:
    from pipeline.stages.explain import ExplainRun

log = logging.getLogger(__name__)

BATCH_SIZE = 32
MANY = 4096
"""Vectors passed to a head at a time, if they come from a file."""
EXAMPLES = 5
"""Number of reasons shown if no image can be read."""

Made = tuple[Batch, list[Part | None]]
"""A batch of images, and each network's output for it."""


@dataclass(frozen=True)
class PredictRun:
    """The result of a run."""

    output: Path
    bundles: Mapping[str, Path]
    """The folder of each target's head; '' is the name of a single target."""
    labels: Mapping[str, Mapping[str, int]]
    """Target -> label -> images."""
    unreadable: int
    passed_over: Sequence[str]
    """Lines on files in the folders that are not images, and on other skipped files."""
    untrained: bool
    agreement: Agreement
    """Agreement with the names of folders, if these are classes."""
    models: Mapping[str, LoadedHead]
    """Heads by target, with their novelty detection and alignment."""
    explained: ExplainRun | None
    """Explanations of the first images' labels, if requested."""

    def summary_lines(self) -> list[str]:
        """Return the number of images per label, warnings, and the path of the file."""
        lines = []
        for target, labels in self.labels.items():
            name, model = f"{target}: " if target else "", self.models[target]
            lines.append(f"{name}{number_of(sum(labels.values()), 'image')} labelled by {self.bundles[target]}")
            counts = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
            lines += [f"  {label}: {count:,}" for label, count in counts if label]
            lines += [name + line for line in (*self.agreement.lines(target), *model.strangers.lines())]
            lines += [name + model.aligned.line()] if model.aligned else []
        if self.unreadable:
            lines.append(f"{number_of(self.unreadable, 'image')} could not be read; their `status` says why")
        lines += self.passed_over
        if self.untrained:
            lines.append("warning: a head's backbone is untrained (weights: random); it is a control, not for use")
        lines += self.explained.summary_lines() if self.explained else ()
        return [*lines, f"written to {self.output}"]


@dataclass(frozen=True)
class PredictionRow:
    """The result for one image; without labels if it could not be read, as `status` explains."""

    path: str
    status: str
    labels: Sequence[Any] = ()
    cells: Sequence[str] = ()
    """Labels, probabilities and novelty as written."""


@dataclass(frozen=True)
class LoadedHead:
    """A head of one target; `places` holds, for each of its parts, the lane and output of each block of its vectors."""

    bundle: ModelBundle
    places: Sequence[Places]
    strangers: Strangers
    aligned: Aligned | None = None

    def vectors(self, made: Sequence[Part]) -> list[NDArray[np.float32]]:
        """Return the vectors of n images for each part of the head, float32 of shape (n, dim), from the outputs of all lanes."""
        return [together(made, blocks) for blocks in self.places]


def together(made: Sequence[Part], blocks: Places) -> NDArray[np.float32]:
    """Return concatenated vectors of n images, float32 of shape (n, dim), from the lane and output of each block."""
    return np.concatenate([made[lane].vectors[output] for lane, output in blocks], axis=1)


@dataclass(frozen=True)
class Aligned:
    """The alignment of images to the training images' mean and covariance, and their distance before it."""

    alignment: Alignment
    apart: Apart

    @staticmethod
    def of(batches: Iterable[Made], model: LoadedHead, folder: Path) -> Aligned:
        """Fit an alignment to a head's stored training images; ConfigError if it has none, or there are too few images."""
        known = None if model.strangers.known is None else model.strangers.known.vectors()
        if known is None or not len(known) or model.bundle.members:
            raise ConfigError(
                f"--align: {folder} keeps no training images to align with; those of the best and the recommended row do, where they "
                "label one class per image and are no soft vote"
            )
        made = [[part for part in parts if part is not None] for _, parts in batches]
        read = [model.vectors(parts)[0] for parts in made if parts]
        few = min(sum(map(len, read)), len(known))
        if few < LEAST:
            raise ConfigError(
                f"--align: {few} images, expected {LEAST} at least, as many of training, to tell a covariance"
            )
        X = np.concatenate(read)
        some = np.linspace(0, len(X) - 1, few).astype(int)
        return Aligned(fit_alignment(known, X), apart(known, X[some], 0))

    def line(self) -> str:
        """Return a line on the alignment and the distance of the images."""
        auc, (low, high) = self.apart.auc, self.apart.interval
        alike = "" if self.apart.shown else "; no difference is shown, so labels without --align are as good or better"
        return (
            f"aligned: features moved to the mean and covariance of the training images, from which a linear classifier told these images "
            f"with AUC {auc:.2f} [{low:.2f}, {high:.2f}] (0.5: alike){alike}. It assumes the mix of labels of training: with another mix it does harm"
        )


def run(
    bundle: Path,
    images: Sequence[Path],
    *,
    output: Path,
    top: int = 3,
    device: str = "auto",
    trust: bool = False,
    max_pixels: int | None = None,
    unknown: float | None = None,
    sets: float | None = None,
    explain: Path | None = None,
    align: bool = False,
) -> PredictRun:
    """Label image files and folders with a saved head, with the options of `manyheads predict`.

    Files of vectors are labelled if the head was fitted on such. With `align` all vectors are held in memory. An interrupted run
    leaves its rows next to `output`, as `NAME.*.partial`; if no image can be read, the rows are written before the error.
    """
    try:
        checked_device(device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from None
    folders = find_bundles(bundle)
    heads = {name: bundles.load(folder, trust_code=trust) for name, folder in folders.items()}
    require_place(output)
    taken = records_of(heads, folders)
    records = [record for own in taken.values() for record in own]
    only_vectors = all(record.section is not None and names_vectors(record.section.name) for record in records)
    if explain is not None:
        # It imports `similar`, which imports this module.
        from pipeline.stages import explain as explaining

        if align or only_vectors:
            raise ConfigError(
                "--explain shows images as they are: not with --align, and not for a head on vectors alone"
            )
        explaining.require(heads, explain)
    strangers = {name: open_strangers(folders[name], head, unknown, sets) for name, head in heads.items()}
    limit = max_pixels or max(record.max_pixels for record in records)
    if only_vectors:
        if not all(names_vectors(path.name) for path in images):
            raise no_network(records[0].name)
        given, images = _of_vectors(images, heads), []
    else:
        images = expanded(images)
        given = _of_images(images, taken, limit, device, trust)
    models = {name: LoadedHead(head, given.places[name], strangers[name]) for name, head in heads.items()}
    targets = {name: head.target for name, head in heads.items()}
    labels, agreement = {name: Counter[str]() for name in heads}, Agreement.of(images, bundle, targets)
    total, done, unreadable, reasons = given.total + len(given.unread), 0, 0, list[str]()
    header = csv_header(models, top)
    with growing(output) as file, bar(total, "images", "predicting") as progress:
        try:
            batches = given.batches
            if align:
                batches = [(replace(batch, pixels=[]), parts) for batch, parts in batches]
                for name, model in models.items():
                    models[name] = replace(model, aligned=Aligned.of(batches, model, folders[name]))
            labelled = (list(_rows(*made, given.paths, list(models.values()), top)) for made in batches)
            for rows in chain(labelled, [given.unread] if given.unread else []):
                lines = [[row.path, row.status, *(row.cells or [""] * (len(header) - 2))] for row in rows]
                file.add(to_lines(lines if done else [header, *lines]).encode())
                for row in rows:
                    for (name, target), label in zip(targets.items(), row.labels, strict=False):
                        labels[name][target.counted_as(label)] += 1
                        agreement.add(row.path, name, str(label))
                done += len(rows)
                failed = [f"{row.path}: {row.status}" for row in rows if not row.labels]
                unreadable += len(failed)
                reasons += failed[: EXAMPLES + 1 - len(reasons)]
                progress.update(len(rows))
        except BaseException:
            if done:
                kept = "stopped after %d of %d images: their rows are in %s, and a new run begins with the first image"
                log.warning(kept, done, total, file.path)
            raise
    if unreadable == done:
        raise DatasetError(
            f"none of the {number_of(done, 'image')} could be read; {output} gives the reason for each",
            first(reasons, EXAMPLES),
        )
    explained = None
    if explain is not None:
        (model,), (place,) = models.values(), folders.values()
        some = list(islice(images_in(images, list(map(Listing, filter(is_folder, images)))), explaining.MOST))
        explained = explaining.run(explain, place, model, given.lanes, some, given.total, limit)
    untrained = any(record.untrained for record in records)
    return PredictRun(output, folders, labels, unreadable, given.passed_over, untrained, agreement, models, explained)


# ---- the input


@dataclass(frozen=True)
class ToLabel:
    """The images or vectors to label."""

    batches: Iterable[Made]
    paths: Iterator[str]
    """Paths of the images in the batches, in order, as the user wrote them."""
    total: int
    """Number of images in the batches."""
    places: Mapping[str, Sequence[Places]]
    """The `places` of each target's `LoadedHead`."""
    lanes: Sequence[Lane] = ()
    unread: Sequence[PredictionRow] = ()
    """Rows of images that were passed over."""
    passed_over: Sequence[str] = ()


def _of_vectors(files: Sequence[Path], heads: Mapping[str, ModelBundle]) -> ToLabel:
    """Return the vectors in files as batches, as if a network had computed them."""
    read = [(path, *read_vectors(path)) for path in files]

    def batches() -> Iterator[Made]:
        for *_, X in read:
            for part in np.array_split(X, -(-len(X) // MANY)):
                rows = np.arange(len(part))
                yield Batch([Item(row, "", None, ()) for row in rows.tolist()], []), [Part(rows, (part,), 0.0)]

    def paths() -> Iterator[str]:
        for path, named, X in read:
            yield from (f"{path} row {row + 1}" for row in range(len(X))) if named is None else map(str, named)

    places = {name: [[(0, 0)]] * len(head.parts) for name, head in heads.items()}
    return ToLabel(batches(), paths(), sum(len(X) for *_, X in read), places)


def _of_images(
    images: Sequence[Path], taken: Mapping[str, Sequence[EmbeddingRecord]], limit: int, device: str, trust: bool
) -> ToLabel:
    """Return image files, and those in folders, as batches of vectors of some embeddings."""
    walks = [Listing(path) for path in images if is_folder(path)]
    total = sum(1 for _ in images_in(images, walks))
    unread, passed_over = _passed_over(walks)
    if not total and not unread:
        raise DatasetError(f"no image files in {', '.join(map(str, images))}", passed_over)
    embedders, places = open_networks(taken, device, trust_code=trust)
    lanes = [Lane(embedder, BATCH_SIZE) for embedder in embedders]
    paths, ahead = tee(images_in(images, [Listing(walk.root) for walk in walks]))
    every = tuple(range(len(lanes)))
    items = (Item(number, absolute(path), None, every) for number, path in enumerate(ahead))
    return ToLabel(embed(lanes, items, Path("/"), limit), paths, total, places, lanes, unread, passed_over)


def find_bundles(path: Path) -> dict[str, Path]:
    """Return the bundle of each target of an experiment's output folder by name; '' for a single target."""
    settings.require_there(path, expected="an experiment's output folder, or a bundle's folder in it")
    return {name: find_bundle(folder) for name, folder in Artifacts(path).each_target().items()}


def records_of(heads: Mapping[str, ModelBundle], folders: Mapping[str, Path]) -> dict[str, list[EmbeddingRecord]]:
    """Return the embeddings that each head's parts need; BundleError for the constant baseline, which needs none."""
    found = dict[str, list[EmbeddingRecord]]()
    for target, head in heads.items():
        if not all(part.embedding for part in head.parts):
            problem = "is the constant guess, which looks at no image; name another bundle's folder"
            raise BundleError(f"{folders[target]}: {problem}")
        found[target] = [from_plain(EmbeddingRecord, part.embedding) for part in head.parts]
    return found


def find_bundle(path: Path) -> Path:
    """Return a bundle's folder: the path itself, or the best one of an experiment's output folder."""
    files = Artifacts(path)
    if files.refitted.exists():
        refitted = str(read_document(files.refitted, REFIT)["heads"][0]["bundle"])
        if not {"..", ""}.isdisjoint(refitted.split("/")):
            raise REFIT.damaged(files.refitted, f"the bundle {refitted!r} lies outside of its folder")
        return path / refitted
    if (path / "bundle.json").exists() or not files.leaderboard.exists():
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


def experiment_around(bundle: Path) -> Artifacts | None:
    """Return the experiment that contains a bundle, or that the path itself names."""
    place = Path(os.path.abspath(bundle))
    around = map(Artifacts, (place, *place.parents))
    return next((files for files in around if (files.dataset / INDEX_FILE).exists()), None)


def expanded(paths: Sequence[Path]) -> list[Path]:
    """Return the paths, with patterns replaced by the archives that they match; DatasetError with a line per missing path."""
    for path in paths:
        forget(str(path))
    found = [archives_of(path) if is_pattern(str(path)) else (path, [""]) for path in paths]
    paths = [folder / name for folder, names in found for name in names]
    missing = [shown(address_of(path) or str(path)) for path in paths if is_folder(path) is None]
    if missing:
        raise DatasetError("no such file or folder", missing)
    return paths


def images_in(paths: Sequence[Path], walks: Sequence[Listing]) -> Iterator[str]:
    """Yield the given files, and every image in the given folders, each once and in order; `walks` holds a new walk of each folder."""
    seen: set[str] = set()
    left = iter(walks)
    files: Iterable[str]
    for path in paths:
        if is_folder(path):
            walk = next(left)
            files = (_full(walk, folder + name) for folder, found in walk.below() for name in sorted(found.images))
        else:
            files = [address_of(path) or str(path)]
        for file in files:
            if len(paths) > 1:  # a single folder has no duplicates, and a set of millions of names costs memory
                if file in seen:
                    continue
                seen.add(file)
            yield file


def _full(walk: Listing, path: str) -> str:
    whole = str(walk.root / path)
    return address_of(whole) or whole


def _passed_over(walks: Sequence[Listing]) -> tuple[list[PredictionRow], list[str]]:
    """Return a row for each image passed over by finished walks, and lines on the other files."""
    unread, others, ignored = set[tuple[str, str]](), set[Failure](), Counter[str]()
    for walk in walks:
        ignored += walk.ignored
        for entry in walk.entries:
            path = _full(walk, entry.path)
            if entry.status in REMARKS:
                others.add(entry._replace(path=path))
            else:
                unread.add((path, f"{entry.status}: {entry.reason}"))
    rows = [PredictionRow(path, status) for path, status in sorted(unread)]
    return rows, passed_over_lines(sorted(others), ignored, "")


# ---- labels, and the output file


def _rows(
    batch: Batch, parts: Sequence[Part | None], paths: Iterator[str], models: Sequence[LoadedHead], top: int
) -> Iterator[PredictionRow]:
    """Label a batch; `paths` yields the paths of its images and of all later ones, as the user wrote them."""
    labels, cells, strange = defaultdict[int, Any](list), defaultdict[int, Any](list), defaultdict[int, Any](list)
    made = [part for part in parts if part is not None]  # a readable image is in every lane's part
    for model in models if made else ():
        vectors = model.vectors(made)
        moved = vectors if model.aligned is None else [model.aligned.alignment(vectors[0])]
        said, probabilities = model.bundle.predict(*moved)
        marks = model.strangers.cells(vectors[0], probabilities)
        for place, row in enumerate(made[0].rows.tolist()):
            sure = None if probabilities is None else probabilities[place]
            labels[row].append(said[place])
            cells[row] += model.bundle.target.csv_cells(said[place], sure, top)
            strange[row] += marks[place]
    for row in range(len(batch.items)):
        problem = batch.problems.get(row)
        status = f"{problem.status}: {problem.reason}" if problem else "ok"
        yield PredictionRow(shown(next(paths)), status, labels[row], cells[row] + strange[row])


def shown(path: str) -> str:
    """Return a path as text that can be written: bytes that are not UTF-8 become `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def csv_header(models: Mapping[str, LoadedHead], top: int) -> list[str]:
    """Return the names of the columns: path, status, labels and probabilities of each target, and novelty."""
    cells = ["path", "status"]
    for name, model in models.items():
        first, *others = model.bundle.target.csv_columns(top)
        cells += [name or first, *(f"{name}_{other.removeprefix(f'{first}_')}" if name else other for other in others)]
    return [*cells, *names({name: model.strangers for name, model in models.items()})]


def to_lines(rows: Iterable[Iterable[str]]) -> str:
    """Return rows as CSV; a cell that a spreadsheet would execute gets a leading `'`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(map(to_cell, row) for row in rows)
    return text.getvalue()


# ---- agreement of labels with the names of folders, where these are classes


@dataclass
class Agreement:
    """Number of images per target whose label is the name of their folder directly below one of `roots`.

    Training images of the head are counted separately, as their accuracy is too good.
    """

    roots: Sequence[str]
    targets: Mapping[str, Target]
    learned: frozenset[str]
    """Paths of the experiment's training images."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(target, `right`, `wrong`, `taught` or `other`) -> images."""

    @staticmethod
    def of(images: Sequence[Path], bundle: Path, targets: Mapping[str, Target]) -> Agreement:
        """Create the counter for the images of some folders, and the bundle of an experiment or that experiment."""
        roots, learned = [absolute(path) for path in images if is_folder(path)], frozenset[str]()
        if roots and (files := experiment_around(bundle)):
            index = DatasetIndex.read(files.dataset)
            root = absolute(index.root)
            if any(f"{a}/".startswith(f"{b}/") for each in roots for a, b in ((root, each), (each, root))):
                learned = frozenset(f"{root}/{path}" for path in index.select("train", "validation").paths)
        return Agreement(roots, {name: target for name, target in targets.items() if target.exclusive}, learned)

    def add(self, path: str, target: str, label: str) -> None:
        """Count the label that a target's head gives an image file."""
        whole = absolute(path)
        root = next((each for each in self.roots if whole.startswith(f"{each}/")), None)
        folder, inside, _ = whole[len(root or "") + 1 :].partition("/")
        if root is None or not inside or target not in self.targets:
            return
        folder = unicodedata.normalize("NFC", as_named(folder))
        known = folder in self.targets[target].classes
        kind = "other" if not known else "taught" if whole in self.learned else "right" if folder == label else "wrong"
        self.counts[target, kind] += 1

    def lines(self, target: str) -> Iterator[str]:
        """Return lines on the accuracy; none if no folder is named like a class."""
        right, wrong, taught, others = (self.counts[target, kind] for kind in ("right", "wrong", "taught", "other"))
        if total := right + wrong:
            low, high = wilson(right, total)
            yield (
                f"accuracy {100 * right / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]: {right:,} of {number_of(total, 'image')} are "
                "labelled with the name of their folder"
            )
        if taught:
            yield f"not counted: {number_of(taught, 'training image')}, which the head has learned from"
        if others and total + taught:
            yield f"not counted: {number_of(others, 'image')} in folders that are no known class"
