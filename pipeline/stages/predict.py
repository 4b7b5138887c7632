"""Predict: a bundle, or one of each target, and new images become labels and probabilities, one row of a CSV file per image.

An image that cannot be read has a row too, with the reason in its `status`; what else is passed over in a folder is counted.
Rows are written as batches come: what grows in memory with the number of images is the names of one folder.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import unicodedata
from collections import Counter
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
from pipeline.data.folder import archives_of, is_pattern
from pipeline.data.index import INDEX_FILE
from pipeline.data.scan import passed_over_lines
from pipeline.data.targets import Target
from pipeline.data.walk import Walk, is_folder
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
"""Vectors that a head is given at a time, where they come of a file."""
EXAMPLES = 5
"""Reasons told when no image can be read."""
MOST_CLASSES = 20
"""Classes of which it is told how often their folders agree, the worst first."""


@dataclass(frozen=True)
class PredictRun:
    """What was written."""

    output: Path
    bundles: Mapping[str, Path]
    """The folder of each target's head; '' is the name of a target alone."""
    labels: Mapping[str, Mapping[str, int]]
    """Target -> label -> images."""
    unreadable: int
    passed_over: Sequence[str]
    """Lines on the files in the folders that are no images, and on what else is not looked at."""
    untrained: bool
    strangers: Mapping[str, Strangers] = field(default_factory=dict)
    """By target, what was found of images unlike those of training."""
    agreement: Agreement | None = None
    """With the names of the folders, where they are called like classes."""
    explained: ExplainRun | None = None
    """Why the first images got their labels, where that was asked."""
    aligned: Mapping[str, Aligned] = field(default_factory=dict)
    """By target, how the images were aligned, where that was asked."""

    def summary_lines(self) -> list[str]:
        """How many images got which label, and where the file is."""
        lines = []
        for target, labels in self.labels.items():
            name = f"{target}: " if target else ""
            lines.append(f"{name}{number_of(sum(labels.values()), 'image')} labelled by {self.bundles[target]}")
            counts = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
            lines += [f"  {label}: {count:,}" for label, count in counts if label]
            lines += [name + line for line in (self.agreement.lines(target) if self.agreement else ())]
            lines += [name + line for line in self.strangers[target].lines()]
            lines += [name + self.aligned[target].line()] if target in self.aligned else []
        if self.unreadable:
            lines.append(f"{number_of(self.unreadable, 'image')} could not be read; their `status` says why")
        lines += self.passed_over
        if self.untrained:
            lines.append("warning: a head's backbone is untrained (weights: random); it is a control, not for use")
        lines += self.explained.summary_lines() if self.explained else ()
        return [*lines, f"written to {self.output}"]


Said = tuple[Any, NDArray[np.float64] | None]
"""A label, a number or several, and the probabilities of all labels, of shape (width,); None where the image could not be read, or
the head has none."""


@dataclass(frozen=True)
class PredictionRow:
    """One image's outcome: what was said of each target, nothing where `status` says why the image could not be read."""

    path: str
    status: str
    said: tuple[Said, ...] = ()
    strange: tuple[str, ...] = ()
    """Cells on how strange it is."""


@dataclass(frozen=True)
class LoadedHead:
    """A head of one target, and for each of its parts the lane and output of each block of its vectors."""

    bundle: ModelBundle
    places: Sequence[Places]
    strangers: Strangers
    aligned: Aligned | None = None

    def vectors(self, made: Sequence[Part]) -> list[NDArray[np.float32]]:
        """Return the vectors of n images for each part of the head, float32 of shape (n, dim), of what all lanes made of them."""
        return [together(made, blocks) for blocks in self.places]


def together(made: Sequence[Part], blocks: Places) -> NDArray[np.float32]:
    """Return vectors of n images, float32 of shape (n, dim), by the lane and output of each block."""
    return np.concatenate([made[lane].vectors[output] for lane, output in blocks], axis=1)


@dataclass(frozen=True)
class Aligned:
    """How the images of a folder are moved to the training images' mean and covariance, and how far they were from these."""

    alignment: Alignment
    apart: Apart

    @staticmethod
    def of(X: NDArray[np.float32], model: LoadedHead, folder: Path) -> Aligned:
        """Align vectors, float32 of shape (n, dim), with what a head keeps of its training images.

        Raises
        ------
        ConfigError
            When they are too few, or it keeps none.
        """
        known = None if model.strangers.known is None else model.strangers.known.vectors()
        if known is None or not len(known) or model.bundle.members:
            raise ConfigError(
                f"--align: {folder} keeps no training images to align with; those of the best and the recommended row do, where they "
                "label one class per image and are no soft vote. One of an earlier version does after `manyheads heads`"
            )
        few = min(len(X), len(known))
        if few < LEAST:
            whose = "images that can be read" if few == len(X) else f"training images are kept in {folder}"
            raise ConfigError(f"--align: {few} {whose}, expected {LEAST} at least to tell a mean and covariance")
        some = np.linspace(0, len(X) - 1, min(len(X), len(known))).astype(int)
        return Aligned(fit_alignment(known, X), apart(known, X[some], 0))

    def line(self) -> str:
        """Say what was done, and how far the images were."""
        auc, (low, high) = self.apart.auc, self.apart.interval
        alike = "" if self.apart.shown else "; no difference is shown, so labels without --align are as good or better"
        return (
            f"aligned: features moved to the mean and covariance of the training images, from which a linear classifier told these images "
            f"with AUC {auc:.2f} [{low:.2f}, {high:.2f}] (0.5: alike){alike}. It takes the mix of labels to be that of training: of another it does harm"
        )


def run(
    bundle: Path,
    images: Sequence[Path],
    *,
    output: Path,
    top: int = 3,
    device: str = "auto",
    trust_code: bool = False,
    max_pixels: int | None = None,
    unknown: float | None = None,
    sets: float | None = None,
    explain: Path | None = None,
    align: bool = False,
) -> PredictRun:
    """Label image files and folders of them with a saved head; or files of vectors, where the head was fitted on such.

    `bundle` is a bundle's folder, or an experiment's output folder: then its best head is used, and of several targets the best
    of each, on images that are read once. `max_pixels` is the experiment's where it is not given. `unknown` marks images of no known
    class, with so many false alarms; `sets` gives for each image the labels of which one is right in so many cases.
    `align` moves the images' features to the mean and covariance of the training images first; their vectors are held in memory for it.
    `explain` is a folder for pages on why the first images got their labels. A run that is stopped leaves its rows beside `output`, as `NAME.*.partial`.
    Where no image can be read the rows are written too, before the error. That `output` cannot be written is found before the work.
    """
    try:
        checked_device(device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from None
    folders = find_bundles(bundle)
    heads = {target: bundles.load(folder, trust_code=trust_code) for target, folder in folders.items()}
    require_place(output)
    if align and explain is not None:
        raise ConfigError("--explain shows the head on images as they are; leave out --align")
    taken = records_of(heads, folders)
    if explain is not None:
        from pipeline.stages import explain as explaining  # finds neighbours by `similar`, which imports this module

        explaining.require(heads, explain)
    strangers = {name: open_strangers(folders[name], head, unknown, sets) for name, head in heads.items()}
    records = [record for own in taken.values() for record in own]
    given: Iterator[str]
    unread, passed_over = list[PredictionRow](), list[str]()
    if all(record.section is not None and names_vectors(record.section.name) for record in records):
        models = [LoadedHead(head, [[(0, 0)]] * len(head.parts), strangers[name]) for name, head in heads.items()]
        if not all(names_vectors(path.name) for path in images):
            raise no_network(records[0].name)
        if explain is not None:
            raise ConfigError("--explain shows images, and this head was given vectors alone")
        files, images = [(path, *read_vectors(path)) for path in images], []
        total, given, batches = sum(len(X) for *_, X in files), _names_in(files), _vectors_in(files)
    else:
        images = expanded(images)
        walks = [Walk(path) for path in images if is_folder(path)]
        total = sum(1 for _ in images_in(images, walks))
        unread, passed_over = _passed_over(walks)
        if not total and not unread:
            raise DatasetError(f"no image files in {', '.join(map(str, images))}", passed_over)
        embedders, places = open_networks(taken, device, trust_code=trust_code)
        lanes = [Lane(embedder, BATCH_SIZE) for embedder in embedders]
        models = [LoadedHead(head, places[name], strangers[name]) for name, head in heads.items()]
        listed = images_in(images, [Walk(walk.root) for walk in walks])
        to_explain = list(islice(listed, explaining.MOST if explain is not None else 0))
        given, ahead = tee(chain(to_explain, listed))
        limit = max_pixels or max(record.max_pixels for record in records)
        every = tuple(range(len(lanes)))
        items = (Item(number, absolute(path), None, every) for number, path in enumerate(ahead))
        batches = embed(lanes, items, Path("/"), limit)

    def outcomes() -> Iterator[list[PredictionRow]]:
        made: Iterable[tuple[Batch, list[Part | None]]] = batches
        asked = models
        if align:
            made = held = list(batches)
            asked = [_aligned(model, held, folders[name]) for name, model in zip(heads, models, strict=True)]
            moved.update(zip(heads, asked, strict=True))
        for batch, parts in made:
            yield list(_rows(batch, parts, given, asked))
        if unread:
            yield unread

    labels = {target: Counter[str]() for target in heads}
    total += len(unread)
    targets, more = {target: head.target for target, head in heads.items()}, names(strangers)
    done, unreadable, reasons, moved = 0, 0, list[str](), dict[str, LoadedHead]()
    agreement = Agreement.of(images, bundle, targets)
    with growing(output) as file, bar(total, "images", "predicting") as progress:
        try:
            for rows in outcomes():
                header = "" if done else csv_header(targets, top, more)
                file.add((header + to_csv(rows, targets, top, more)).encode())
                for row in rows:
                    for (name, kind), (label, _) in zip(targets.items(), row.said, strict=False):
                        labels[name][kind.counted_as(label)] += 1
                        agreement.add(row.path, name, str(label))
                done += len(rows)
                unread_rows = [f"{row.path}: {row.status}" for row in rows if not row.said]
                unreadable += len(unread_rows)
                reasons += unread_rows[: EXAMPLES + 1 - len(reasons)]
                progress.update(len(rows))
        except BaseException:
            if done:
                kept = "stopped after %d of %d images: their rows are in %s, and a new run begins with the first image"
                log.warning(kept, done, total, file.path)
            raise
    if unreadable == done:
        raise DatasetError(
            f"none of the {number_of(done, 'image')} could be read; {output} says why of each", first(reasons, EXAMPLES)
        )
    explained = None
    if explain is not None:
        (model,), (place,) = models, folders.values()
        explained = explaining.run(explain, place, model, lanes, to_explain, total, limit)
    untrained = any(record.untrained for record in records)
    aligned = {name: model.aligned for name, model in moved.items() if model.aligned}
    return PredictRun(
        output, folders, labels, unreadable, passed_over, untrained, strangers, agreement, explained, aligned
    )


def find_bundles(path: Path) -> dict[str, Path]:
    """Return the bundle of each target of an experiment's output folder by its name; '' for one alone."""
    settings.require_there(path, expected="an experiment's output folder, or a bundle's folder in it")
    return {name: find_bundle(folder) for name, folder in (Artifacts(path).each_target() or {"": path}).items()}


def records_of(heads: Mapping[str, ModelBundle], folders: Mapping[str, Path]) -> dict[str, list[EmbeddingRecord]]:
    """Return the embeddings that the parts of each head take; BundleError for the constant guess, which takes none."""
    found = dict[str, list[EmbeddingRecord]]()
    for target, head in heads.items():
        if not all(part.embedding for part in head.parts):
            problem = "is the constant guess, which looks at no image; name another bundle's folder"
            raise BundleError(f"{folders[target]}: {problem}")
        found[target] = [from_plain(EmbeddingRecord, part.embedding) for part in head.parts]
    return found


VectorFile = tuple[Path, NDArray[np.object_] | None, NDArray[np.float32]]
"""A file of vectors, the paths in it, and the vectors, as `read_vectors` returns them."""


def _names_in(files: Sequence[VectorFile]) -> Iterator[str]:
    for path, named, X in files:
        yield from (f"{path} row {row + 1}" for row in range(len(X))) if named is None else map(str, named)


def _vectors_in(files: Sequence[VectorFile]) -> Iterator[tuple[Batch, list[Part | None]]]:
    """Yield vectors that were made elsewhere as if a network had just made them."""
    for _, _, X in files:
        for part in np.array_split(X, -(-len(X) // MANY)):
            rows = np.arange(len(part))
            yield Batch([Item(row, "", None, ()) for row in rows.tolist()], []), [Part(rows, (part,), 0.0)]


def find_bundle(path: Path) -> Path:
    """Return a bundle's folder: the path itself, or the best one of an experiment's output folder."""
    files = Artifacts(path)
    if files.refitted.exists():
        return path / _first_refitted(files.refitted)
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


def _first_refitted(path: Path) -> str:
    """Return the folder of the head that a `refit.json` says to use, which must lie beside it."""
    try:
        bundle = str(read_document(path, REFIT)["heads"][0]["bundle"])
    except (KeyError, IndexError, TypeError):
        raise REFIT.damaged(path, "it names no head") from None
    if not {"..", ""}.isdisjoint(bundle.split("/")):
        raise REFIT.damaged(path, f"the bundle {bundle!r} lies outside of its folder")
    return bundle


def experiment_around(bundle: Path) -> Artifacts | None:
    """Return the experiment that a bundle lies in, or that is named in its place."""
    place = Path(os.path.abspath(bundle))
    around = map(Artifacts, (place, *place.parents))
    return next((files for files in around if (files.dataset / INDEX_FILE).exists()), None)


def expanded(paths: Sequence[Path]) -> list[Path]:
    """Return the paths with the archives that a pattern means in its place; DatasetError with one line for each that is not there."""
    for path in paths:
        forget(str(path))
    found = [archives_of(path) if is_pattern(str(path)) else (path, [""]) for path in paths]
    paths = [folder / name for folder, names in found for name in names]
    missing = [shown(address_of(path) or str(path)) for path in paths if is_folder(path) is None]
    if missing:
        raise DatasetError("no such file or folder", missing)
    return paths


def images_in(paths: Sequence[Path], walks: Sequence[Walk]) -> Iterator[str]:
    """Yield the files named, and every image in the folders named, by one walk for each; each once, in order."""
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
            if len(paths) > 1:  # one folder has no file twice, and millions of names are memory
                if file in seen:
                    continue
                seen.add(file)
            yield file


def _full(walk: Walk, path: str) -> str:
    whole = str(walk.root / path)
    return address_of(whole) or whole


def _passed_over(walks: Sequence[Walk]) -> tuple[list[PredictionRow], list[str]]:
    """Return a row for each image that finished walks passed over, and lines on the rest."""
    unread: set[tuple[str, str]] = set()
    others: set[Failure] = set()
    ignored: Counter[str] = Counter()
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


def shown(path: str) -> str:
    """Return a path as text that can be written: bytes of it that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def csv_header(targets: Mapping[str, Target], top: int, more: Sequence[str] = ()) -> str:
    """Return the first line: path, status, and what predictions look like, where there are several targets after their names; and more."""
    cells = ["path", "status"]
    for name, target in targets.items():
        first, *others = target.csv_columns(top)
        cells += [name or first, *(f"{name}_{other.removeprefix(f'{first}_')}" if name else other for other in others)]
    return to_lines([[*cells, *more]])


def to_csv(rows: Sequence[PredictionRow], targets: Mapping[str, Target], top: int, more: Sequence[str] = ()) -> str:
    """Return the lines of some rows, without the first."""

    def cells(row: PredictionRow) -> Iterator[str]:
        yield from (row.path, row.status)
        for target, said in zip(targets.values(), row.said or [(None, None)] * len(targets), strict=True):
            yield from target.csv_cells(*said, top)
        yield from row.strange or [""] * len(more)

    return to_lines(map(cells, rows))


def to_lines(rows: Iterable[Iterable[str]]) -> str:
    """Return rows as CSV; a cell that a spreadsheet would run begins with `'`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(map(to_cell, row) for row in rows)
    return text.getvalue()


def _aligned(model: LoadedHead, made: Sequence[tuple[Batch, list[Part | None]]], folder: Path) -> LoadedHead:
    """Return the model with the alignment of all images that could be read."""
    found = [[part for part in parts if part is not None] for _, parts in made]
    X = [model.vectors(parts)[0] for parts in found if parts]
    if not X:
        return model
    return replace(model, aligned=Aligned.of(np.concatenate(X), model, folder))


def _rows(
    batch: Batch, parts: Sequence[Part | None], given: Iterator[str], models: Sequence[LoadedHead]
) -> Iterator[PredictionRow]:
    """Label a batch; `given` are the paths of its images, and of all after it, as the user wrote them."""
    said: dict[int, list[Said]] = {}
    strange: dict[int, list[str]] = {}
    made = [part for part in parts if part is not None]  # an image that can be read is read for every lane
    for model in models if made else ():
        vectors = model.vectors(made)
        moved = vectors if model.aligned is None else [model.aligned.alignment(vectors[0])]
        labels, probabilities = model.bundle.predict(*moved)
        cells = model.strangers.cells(vectors[0], probabilities)
        for place, row in enumerate(made[0].rows.tolist()):
            strange.setdefault(row, []).extend(cells[place])
            of_all = None if probabilities is None else probabilities[place]
            said.setdefault(row, []).append((labels[place], of_all))
    for row in range(len(batch.items)):
        problem = batch.problems.get(row)
        status = f"{problem.status}: {problem.reason}" if problem else "ok"
        yield PredictionRow(shown(next(given)), status, tuple(said.get(row, ())), tuple(strange.get(row, ())))


# ---- how often a head says what the folder of an image is called, where folders are called like its classes


@dataclass
class Agreement:
    """Images counted by the folder they lie in, right below one of `roots`, and by the label that each target's head gives them.

    Images that the head has learned from are counted apart: of those it says more than it can know.
    """

    roots: Sequence[str]
    targets: Mapping[str, Target]
    learned: frozenset[str] = frozenset()
    """Where the training images of the experiment lie."""
    said: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    """Target -> (folder, label) -> images."""
    of_training: Counter[str] = field(default_factory=Counter)
    """Folder -> images that were learned from."""

    @staticmethod
    def of(images: Sequence[Path], bundle: Path, targets: Mapping[str, Target]) -> Agreement:
        """Prepare for the images of some folders, and the bundle of an experiment or that experiment."""
        roots, learned = [absolute(path) for path in images if is_folder(path)], list[str]()
        if roots and (files := experiment_around(bundle)):
            index = DatasetIndex.read(files.dataset)
            root, taught = absolute(index.root), index.select("train", "validation")
            if any(f"{a}/".startswith(f"{b}/") for each in roots for a, b in ((root, each), (each, root))):
                learned = [f"{root}/{path}" for path in taught.paths]
        exclusive = {name: target for name, target in targets.items() if target.exclusive}
        return Agreement(roots, exclusive, frozenset(learned), {name: Counter() for name in exclusive})

    def add(self, path: str, target: str, label: str) -> None:
        """Count what the head of a target says of an image file."""
        if target not in self.said:
            return
        whole = absolute(path)
        root = next((each for each in self.roots if whole.startswith(f"{each}/")), None)
        folder, inside, _ = whole[len(root or "") + 1 :].partition("/")
        if root is None or not inside:
            return
        folder = unicodedata.normalize("NFC", as_named(folder))
        if whole in self.learned:
            self.of_training[folder] += target == next(iter(self.said))
        else:
            self.said[target][folder, label] += 1

    def lines(self, target: str) -> Iterator[str]:
        """Say how many are right, overall and by class; nothing where no folder is called like a class."""
        if target not in self.said:
            return
        counts, classes = self.said[target], {*self.targets[target].classes}
        images, right, wrong = Counter[str](), Counter[str](), dict[str, Counter[str]]()
        for (folder, label), number in counts.items():
            images[folder] += number
            right[folder] += number * (folder == label)
            wrong.setdefault(folder, Counter())[label] += number * (folder != label)
        known = [folder for folder in images if folder in classes]
        if not known and not classes & {*self.of_training}:
            return
        total, correct = sum(images[each] for each in known), sum(right[each] for each in known)
        if total:
            low, high = wilson(correct, total)
            yield (
                f"accuracy {100 * correct / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]: {correct:,} of {number_of(total, 'image')} are labelled as "
                "their folders are called"
            )
        told = []
        for name in sorted(known, key=lambda name: (right[name] / images[name], -images[name], name)):
            often = [f"{count:,} as {label}" for label, count in wrong[name].most_common(2) if count]
            told.append(f"  {name}: {right[name]:,} of {images[name]:,}" + f", {' and '.join(often)}" * bool(often))
        yield from first(told, MOST_CLASSES)
        if learned := sum(self.of_training[name] for name in classes):
            yield f"not counted: {number_of(learned, 'training image')}, which the head has learned from"
        if others := sorted({*images} - classes):
            left = number_of(sum(images[each] for each in others), "image")
            yield f"not counted: {left} in folders that are no known class: {', '.join(first(others, 5))}"
