"""The strict opener: a store's file is a stranger's until everything about it has been checked.

First the digest of the head, before libhdf5 sees a byte, because a damaged file can make it hang. Then the structure:
exactly the datasets of this kind, each a hard link to a contiguous, unfiltered, fully stored dataset of the expected
type inside the file, none overlapping another, no external storage, no virtual dataset. libhdf5 is given
the head alone and only asked where things are; it never opens a path and never reads data, so nothing outside can be reached.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DatasetError, StoreError, first_line
from pipeline.io.files import NOT_ORDINARY, open_ordinary, undisturbed
from pipeline.io.remote import address_of, open_remote, read_remote, stat_remote
from pipeline.store.format import (
    ATTRIBUTES,
    BLOCK_BYTES,
    BULK,
    FIRST_ATTRIBUTES,
    FORMAT,
    LAYOUTS,
    SNAPSHOT_ATTRIBUTES,
    TRAILER,
    TRAILER_MAGIC,
    VERSION_MAJOR,
    Field,
    HeadFile,
    StoreType,
    block_digest,
)

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_TEXT = 4096
"""Longest text attribute, and longest byte string of a text dataset, in bytes."""


@dataclass(frozen=True)
class StoreFile:
    """One file whose head has been checked; `array` gives its small datasets, `bulk` the memory-mapped large one."""

    path: Path
    digest: str
    size: int
    attributes: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    bulk: NDArray[Any]
    _checked: NDArray[np.bool_] = field(repr=False)

    @property
    def store_type(self) -> StoreType:
        """What all files of its store share."""
        return StoreType(self.attributes["identity"], self.attributes["dim"], self.attributes["dtype"])

    def bad_blocks(self, blocks: NDArray[np.intp] | None = None) -> list[int]:
        """Return the damaged ones of some blocks of the bulk, int64 of shape (k,), or of all; good ones are remembered."""
        data = self.bulk.reshape(-1).view(np.uint8).data
        bad = []
        blocks = np.arange(len(self._checked)) if blocks is None else blocks
        for block in np.unique(blocks[~self._checked[blocks]]).tolist():
            found = block_digest(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
            if found == self.arrays["block_digest"][block].tobytes():
                self._checked[block] = True
            else:
                bad.append(block)
        return bad

    def require_whole(self, blocks: NDArray[np.intp] | None = None) -> None:
        """Check some blocks, int64 of shape (k,), or all; StoreError when one is damaged."""
        if bad := self.bad_blocks(blocks):
            raise StoreError(
                f"{self.path}: {len(bad)} block(s) of {BLOCK_BYTES >> 10} KiB are damaged (the first at block {bad[0]}); "
                "nothing of them was used; run 'manyheads store repair' to embed just these images again"
            )

    def check_rows(self, rows: NDArray[np.int64]) -> None:
        """Check the blocks that hold some rows of the bulk, int64 of shape (k,), before they are used; StoreError for damage."""
        if self._checked.all():
            return
        first = rows * self.store_type.row_bytes // BLOCK_BYTES
        last = ((rows + 1) * self.store_type.row_bytes - 1) // BLOCK_BYTES
        # A mask, not a sorted set: there may be ten million rows in a thousand blocks.
        touched = np.zeros(len(self._checked), np.bool_)
        for step in range(int((last - first).max(initial=0)) + 1):
            touched[np.minimum(first + step, last)] = True
        self.require_whole(np.flatnonzero(touched))


def open_file(
    path: Path, kind: str | None = None, digest: str | None = None, data: mmap.mmap | None = None
) -> StoreFile:
    """Open one file of a store, checking its head, its structure and, where given, its kind and its digest.

    `data` is the file when it was mapped before; then it may have lost its name since. FileNotFoundError when there is no such
    file, StoreError when it is not what it should be.
    """
    data = map_file(path) if data is None else data
    head_bytes, found = _check_trailer(path, data, digest)
    try:
        if (known := _KNOWN.get((found, len(data)))) is None:
            with undisturbed():
                known = _parse(data, head_bytes)
            if len(_KNOWN) >= MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[found, len(data)] = known
        attributes, places = known
        _require(kind in (None, attributes["kind"]), f"it is a {attributes['kind']}, expected a {kind}")
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # libhdf5 reports whatever it trips over through these.
        raise StoreError(f"{path}: not a valid feature store file: {' '.join(str(error).split())[:200]}") from None
    arrays = {name: np.ndarray(place.shape, place.dtype, data, place.start) for name, place in places.items()}
    unchecked = np.zeros(len(arrays["block_digest"]), np.bool_)
    return StoreFile(path, found, len(data), attributes, arrays, arrays.pop(BULK[attributes["kind"]]), unchecked)


class _Place(NamedTuple):
    """Where a dataset is in its file: its first byte and the one behind its last, and what it is."""

    start: int
    stop: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


_KNOWN: dict[tuple[str, int], tuple[dict[str, Any], dict[str, _Place]]] = {}
"""What was found in a head, by its digest and the size of its file: the same files are opened again and again."""
MOST_KNOWN = 1000


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def map_file(path: Path) -> mmap.mmap:
    """Map a regular file into memory; links are not followed. Cheap: nothing is read or checked yet; a remote file is fetched.

    OSError when there is none, or the system does not let it be read, which says nothing about the file; StoreError when it is
    no regular file, or too short for one of ours.
    """
    if (address := address_of(path)) is not None:
        return fetch(address)
    try:
        descriptor = open_ordinary(path, getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if error.errno not in (*NOT_ORDINARY, errno.ENOTDIR):
            raise  # what may not be read, or not now, is not damaged
        raise StoreError(f"{path}: cannot be opened ({error.strerror})") from None
    try:
        size = os.fstat(descriptor).st_size
        _require_long(path, size)
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def fetch(address: str, head_only: bool = False) -> mmap.mmap:
    """Return the bytes of a remote file, in a file without a name that goes when nobody has it any more.

    With `head_only` just the head and the trailer are fetched, and zeros stand for the bulk. FileNotFoundError or StoreError when it
    is not there, or cannot be read.
    """
    try:
        size = stat_remote(address)[0]
        _require_long(address, size)
        if head_only:
            data = mmap.mmap(-1, size)
            data[-TRAILER.size :] = read_remote(address, size - TRAILER.size, size)
            head = min(int(TRAILER.unpack(data[-TRAILER.size :])[1]), size - TRAILER.size)
            data[:head] = read_remote(address, 0, head)
            return data
        with tempfile.TemporaryFile() as file, open_remote(address) as source:
            shutil.copyfileobj(source, file, 16 << 20)
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise
    except (OSError, DatasetError) as error:
        raise StoreError(f"{address}: cannot be read: {first_line(error)}") from None


def _require_long(path: object, size: int) -> None:
    if size < TRAILER.size + len(HDF5_MAGIC):
        raise StoreError(f"{path}: has {size} bytes, too few for a feature store file; it is truncated")


def _check_trailer(path: Path, data: mmap.mmap, digest: str | None) -> tuple[int, str]:
    """Check the head against the trailer and return the head's length and digest."""
    magic, head_bytes, said = TRAILER.unpack(data[-TRAILER.size :])
    if data[: len(HDF5_MAGIC)] != HDF5_MAGIC:
        raise StoreError(f"{path}: is not an HDF5 file, or its first bytes are damaged")
    with memoryview(data) as view:
        found = hashlib.blake2b(view[: min(head_bytes, len(data))], digest_size=32).digest()
    if magic != TRAILER_MAGIC or head_bytes > len(data) - TRAILER.size or found != said:
        raise StoreError(f"{path}: is truncated or damaged, or was not written by manyheads")
    if digest is not None and found.hex() != digest:
        raise StoreError(f"{path}: holds {found.hex()[:16]}…, expected {digest[:16]}…; it was swapped or renamed")
    return int(head_bytes), found.hex()


def _parse(data: mmap.mmap, head_bytes: int) -> tuple[dict[str, Any], dict[str, _Place]]:
    """Return the attributes and the place of each dataset; ValueError for what is not as it should be."""
    head = HeadFile(data[:head_bytes])
    head.size = size = len(data) - TRAILER.size
    with h5py.File(head, "r") as file:
        attributes = _attributes(file.id)
        kind = attributes["kind"]
        places = _places(file.id, kind)
    spans = sorted(place[:2] for place in places.values() if place.start < place.stop)
    _require(all(stop <= start for (_, stop), (start, _) in pairwise(spans)), "two datasets overlap")
    bulk = places[BULK[kind]]
    is_last = (bulk.start, bulk.stop) == (head_bytes, size) if bulk.start < bulk.stop else head_bytes == size
    _require(is_last, f"{BULK[kind]!r} is not all that is behind the head")
    _check_sizes(kind, places, attributes)
    return attributes, places


def _attributes(root: Any) -> dict[str, Any]:
    """Read the root's attributes: those first that say which others there must be."""
    found = {name: _attribute(root, name, of) for name, of in FIRST_ATTRIBUTES.items()}
    _require(found["format"] == FORMAT, f"its format is {found['format']!r}, expected {FORMAT!r}")
    _require(
        found["version_major"] == VERSION_MAJOR,
        f"it has format version {found['version_major']}, this program reads version {VERSION_MAJOR}; "
        "use the version of manyheads that wrote it, or a newer one",
    )
    _require(found["kind"] in LAYOUTS, f"its kind is {found['kind']!r}")
    others = ATTRIBUTES | (SNAPSHOT_ATTRIBUTES if found["kind"] == "snapshot" else {})
    found |= {name: _attribute(root, name, of) for name, of in others.items()}
    count = h5py.h5a.get_num_attrs(root)
    _require(count == len(found), f"it has {count} attributes, expected {len(found)}")
    return found


def _attribute(root: Any, name: str, of: type) -> str | int:
    """Read one attribute, which must be a single fixed text of ASCII, or a number of 64 bits."""
    _require(h5py.h5a.exists(root, name.encode()), f"it has no attribute {name!r}")
    attribute = h5py.h5a.open(root, name.encode())
    kind, single = attribute.get_type(), attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR
    size = kind.get_size()
    if of is int:
        is_number = kind.get_class() == h5py.h5t.INTEGER and size == 8
        _require(single and is_number, f"attribute {name!r} is no 64-bit number")
        number = np.zeros((), np.int64)
        attribute.read(number)
        _require(int(number) >= 0, f"attribute {name!r} is negative")
        return int(number)
    _require(single and _is_text(kind), f"attribute {name!r} is no fixed text")
    text = np.zeros((), f"S{size}")
    attribute.read(text, mtype=kind)
    return bytes(text[()]).decode("ascii")


def _is_text(kind: Any) -> bool:
    return kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str() and kind.get_size() <= MAX_TEXT


def _places(root: Any, kind: str) -> dict[str, _Place]:
    """Find every dataset of this kind, and nothing else, each of the layout's dtype and number of axes."""
    places: dict[str, _Place] = {}
    for name, wanted in LAYOUTS[kind].items():
        if root.links.exists(name.encode()):
            is_hard = root.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD
            _require(is_hard, f"{name!r} is a link to elsewhere")
            places[name] = _place(root, name, wanted)
        else:
            _require(wanted.optional, f"it has no dataset {name!r}")
    count = h5py.h5g.GroupID.get_num_objs(h5py.h5g.open(root, b"/"))
    _require(count == len(places), f"it has {count} objects, expected {len(places)}")
    return places


FORBIDDEN_MESSAGES = 1 << 0x0007 | 1 << 0x000B
"""Object header messages of external storage and of filters: the bytes of such a dataset are not simply there."""


def _place(root: Any, name: str, wanted: Field) -> _Place:
    info = h5py.h5o.get_info(root, name.encode())
    _require(info.type == h5py.h5o.TYPE_DATASET, f"{name!r} is not a dataset")
    _require(not int(info.hdr.mesg.present) & FORBIDDEN_MESSAGES, f"{name!r} has external storage or a filter")
    dataset = h5py.h5d.open(root, name.encode())
    is_contiguous = dataset.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
    _require(is_contiguous, f"{name!r} is not stored in one piece")
    _require(h5py.h5a.get_num_attrs(dataset) == 0, f"{name!r} has attributes")
    space = dataset.get_space()
    is_array = space.get_simple_extent_type() == h5py.h5s.SIMPLE
    _require(is_array and len(space.shape) == len(wanted.shape), f"{name!r} has a wrong number of axes")
    dtype = _dtype(dataset.get_type(), name, wanted)
    size, start = prod(space.shape) * dtype.itemsize, dataset.get_offset()
    stored = not size or (start is not None and dataset.get_storage_size() == size)
    _require(stored, f"{name!r} is not fully stored")
    start = int(start or 0)
    return _Place(start, start + size, dtype, space.shape)


def _dtype(kind: Any, name: str, wanted: Field) -> np.dtype[Any]:
    """Turn an HDF5 type into one of the expected dtypes, comparing types, not names."""
    for text in wanted.dtypes:
        if text == "|S*" and _is_text(kind):
            return np.dtype(f"S{kind.get_size()}")
        if text != "|S*" and kind.equal(h5py.h5t.py_create(np.dtype(text))):
            return np.dtype(text)
    raise ValueError(f"{name!r} has an unexpected type, expected {' or '.join(wanted.dtypes)}")


def _check_sizes(kind: str, places: dict[str, _Place], attributes: dict[str, Any]) -> None:
    """Check that a letter means the same length in the shapes of all datasets, and that the attributes say so, and the dtype, too."""
    bulk = places[BULK[kind]]
    lengths = {"n": attributes["rows"], "d": attributes["dim"], "b": -(-(bulk.stop - bulk.start) // BLOCK_BYTES)}
    for name, place in places.items():
        for letter, length in zip(LAYOUTS[kind][name].shape, place.shape, strict=True):
            wanted = letter if isinstance(letter, int) else lengths.setdefault(letter, length)
            _require(length == wanted, f"{name!r} has an axis of {length}, expected {wanted}")
    _require(0 < attributes["dim"] <= 1 << 24, "'dim' is out of range")
    dtypes = {bulk.dtype.str} if bulk.dtype.kind == "f" else {"<f4", "<f2"}
    _require(attributes["dtype"] in dtypes, f"its dtype is {attributes['dtype']!r}")
    _require(len(attributes["identity"]) == 64, "'identity' is not a digest")
