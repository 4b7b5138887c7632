"""The shared folder of feature stores: taking over stores and parts, and the list of experiments that use the folder.

    FOLDER/NAME-FINGERPRINT.store     one store per embedding, and one of perceptual hashes
    FOLDER/experiments/DIGEST.json    one experiment that uses them, by its path relative to the folder
    FOLDER/LOCK                       held while vectors are removed or an experiment is added

Vectors are removed only if the indexes of all experiments in the list could be read and none names them. An experiment
enters the list after writing its index and before reading the stores, so the vectors that it finds there are kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data import DatasetIndex
from pipeline.embed.records import named, open_store, place
from pipeline.embed.spec import EmbeddingSpec
from pipeline.errors import PipelineError, StoreError
from pipeline.experiment import FEATURES, USER, Artifacts, read_document, write_document
from pipeline.images import HASH_STORE
from pipeline.io import files as system
from pipeline.io.digests import Digests
from pipeline.store import FeatureStore, lock
from pipeline.store.maintain import copy_rows
from pipeline.store.share import PARTS, part_files, part_folders

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds to wait for another experiment to enter the list."""


# ---- taking over


def take_over(specs: Sequence[EmbeddingSpec], files: Artifacts, digests: Digests) -> None:
    """Bring the vectors of n contents, uint64 of shape (n, 2), from this experiment's former folders into the shared folder.

    A store used by this experiment only, as in release 0.1, is renamed if possible; otherwise its rows are copied
    and the old store is not changed. After a kill at any moment, every vector is in at least one of the two places.
    """
    wanted = [(place(spec, files), named(spec)) for spec in specs]
    own = {files.root / "features", files.dataset}
    for target, pattern in [*wanted, (files.stores / HASH_STORE, HASH_STORE)]:
        for folder in files.stores_before():
            for source in sorted(folder.glob(pattern)):
                if not (folder in own and _moved(source, target)):
                    _copy(source, target, digests)
    with contextlib.suppress(OSError):  # not there, or not empty
        os.rmdir(files.root / "features")


def _moved(source: Path, target: Path) -> bool:
    """Rename a store that has no writer; return False if that cannot be done in one step."""
    if target.exists() or source.is_symlink() or source.parent.is_symlink():
        return False
    try:
        system.make_folder(target.parent)
        with lock.held(source):
            system.SYSTEM["rename"](source, target)
    except OSError:  # another file system, or a folder that cannot be written
        return False
    system.sync_folder(target.parent)
    system.sync_folder(source.parent)
    log.info("%s is now %s, where other experiments find it", source, target)
    return True


def _copy(source: Path, target: Path, digests: Digests) -> None:
    try:
        if (there := open_store(target)) is not None:
            digests = digests[there.missing(digests)]
        found = FeatureStore.open(source) if len(digests) else None
        if found is not None and len(wanted := digests[~found.missing(digests)]):
            log.info("%s: %d vectors copied from %s", target, *copy_rows([found], target, wanted), source)
    except StoreError as error:
        log.warning("%s; its vectors are not taken over", error)


def take_parts(place: str | Path, stores: Path, *, remove: bool = False) -> dict[str, int]:
    """Merge the parts in a place, a folder or an address, into the stores of their names; return each store's number of new vectors.

    A damaged part is skipped with a warning, and its images are embedded again. Use `remove` only for one's own folder.
    """
    new = {}
    for name in part_folders(place):
        found = dict[str, FeatureStore]()
        for path in part_files(place, name):
            try:
                store = FeatureStore.open(path)
                store.file.require_whole()
                found[path] = store
            except StoreError as error:
                log.warning("%s; passed over", error)
        if found:
            new[name] = sum(copy_rows(list(found.values()), stores / f"{name}.store"))
            log.info("%s: %d vectors from %d parts in %s", name, new[name], len(found), place)
        if remove:
            for path in found:
                system.remove(Path(path))
            with contextlib.suppress(OSError):  # another process writes more
                os.rmdir(Path(place) / f"{name}{PARTS}")
                os.rmdir(place)
    return new


# ---- the experiments that use the folder


def alone(files: Artifacts, patience: float = 0.0) -> contextlib.AbstractContextManager[None]:
    """Hold the lock that keeps other experiments from entering the list and from removing vectors."""
    system.make_folder(files.stores)
    return lock.held(files.stores, patience)


def enter(files: Artifacts) -> None:
    """Add this experiment to the list, replacing its entry from before it was moved."""
    try:
        with alone(files, PATIENCE):
            write_entry(files)
    except OSError as error:
        if system.refusal(error) is None:
            raise
        log.warning(
            "%s: cannot be written (%s); `gc` there does not know of %s", files.stores, error.strerror, files.root
        )


def write_entry(files: Artifacts) -> None:
    """Like `enter`, for a caller that holds the lock."""
    system.make_folder(files.entry.parent)
    with contextlib.suppress(PipelineError, OSError, KeyError):
        before = files.entry.with_name(f"{read_document(files.features, FEATURES)['entry']}.json")
        if before != files.entry and not _root(files.stores, before).exists():
            system.remove(before)
    write_document(files.entry, USER, {"path": files.seen_from_stores()})


def _root(stores: Path, entry: Path) -> Path:
    """Return the output folder named by an entry of the list."""
    where = read_document(entry, USER).get("path")
    if not isinstance(where, str) or not where:
        raise USER.damaged(entry, f"its path is {where!r}")
    return Path(os.path.normpath(os.path.join(os.path.realpath(stores), where)))


def others(files: Artifacts) -> tuple[list[Artifacts], list[str]]:
    """Return the other experiments in the list, and a line for each entry that is damaged or whose experiment is missing."""
    found, problems = [], []
    for entry in sorted((files.stores / "experiments").glob("*.json")):
        if entry == files.entry:
            continue
        try:
            root = _root(files.stores, entry)
            if root.exists():
                found.append(Artifacts(root, files.stores))
            else:
                problems.append(
                    f"{root}: is gone, or was moved or renamed; run `manyheads features` with it where it is now, or delete "
                    f"{entry} to forget it"
                )
        except PipelineError as error:
            problems.append(str(error))
    return found, problems


def contents_of_others(files: Artifacts) -> tuple[Digests, list[str]]:
    """Return the contents, uint64 of shape (n, 2), in the other experiments' indexes, and a line for each unreadable index."""
    roots, problems = others(files)
    contents = [np.zeros((0, 2), np.uint64)]
    for other in roots:
        try:
            contents.append(DatasetIndex.read(other.dataset).digests)
        except (PipelineError, OSError) as error:
            problems.append(f"{error}; or delete {other.entry} to forget {other.root}")
    return np.concatenate(contents), problems
