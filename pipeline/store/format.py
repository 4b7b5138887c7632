"""The bytes of every file of a feature store: plain HDF5, one large dataset at the end, and a trailer.

    [ HDF5 head: superblock, attributes, small datasets ][ the bulk dataset ][ trailer, 48 bytes ]

The head holds `block_digest`, the BLAKE2b-128 of each 64 KiB of the bulk dataset. The trailer holds the length of the head
and its BLAKE2b-256. So this one digest covers every byte of the file; opening checks only the head, and the bulk is checked
block by block as it is read. HDF5 readers ignore the trailer, which follows their end of file.

libhdf5 composes the head in memory and never writes to disk: it crashes on a full disk, and its writes in place do not survive
a power loss. There are no timestamps, so the same content gives the same bytes.

| kind     | bulk                 | other datasets                                                                  |
|----------|----------------------|---------------------------------------------------------------------------------|
| segment  | `features` (n, d)    | `content` (n, 2): digest of each row's image                                    |
| snapshot | `rows` (4, n)        | `segment_digest`, `segment_rows`, `segment_bytes`, `identity_json`, `canary`    |
| pack     | `features` (n, d)    | `content`, `identity_json`, `canary`; may have `row`, `path`, `label`, `split`, `group` |

`rows` has four lines: first and second half of a content digest (by which it is sorted), its segment, its row in the segment.
`canary` holds the probe vectors (those of the built-in probe images). Its name and the trailer's `MHSEALv1` are part of the format.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.io.digests import canonical_json
from pipeline.io.files import undisturbed

FORMAT = "manyheads features"
VERSION_MAJOR = 1
VERSION_MINOR = 0

SEGMENTS, JOURNAL, TEMPORARY, QUARANTINE = "segments", "journal", "tmp", "quarantine"
"""Folders of a store."""

BLOCK_BYTES = 1 << 16
BLOCK_DIGEST_BYTES = 16
ALIGNMENT = 64

TRAILER = struct.Struct("<8sQ32s")
TRAILER_MAGIC = b"MHSEALv1"

Chunks = Callable[[], Iterable[NDArray[Any]]]
"""Function that returns the bulk dataset piece by piece, in C order; called once for the digests and once for the bytes."""


@dataclass(frozen=True)
class Field:
    """One dataset: its allowed dtypes (`|S*` is a byte string of any length) and its shape in letters."""

    dtypes: tuple[str, ...]
    shape: tuple[str | int, ...]
    optional: bool = False


_BLOCKS = Field(("|u1",), ("b", BLOCK_DIGEST_BYTES))
_ORIGIN = {"identity_json": Field(("|u1",), ("j",)), "canary": Field(("<f4",), ("k", "d"))}
_SEGMENT = {
    "features": Field(("<f4", "<f2"), ("n", "d")),
    "content": Field(("<u8",), ("n", 2)),
    "block_digest": _BLOCKS,
}
_TEXTS = dict.fromkeys(("path", "label", "split", "group"), Field(("|S*",), ("m",), optional=True))

LAYOUTS: dict[str, dict[str, Field]] = {
    "segment": _SEGMENT,
    "snapshot": {
        "rows": Field(("<u8",), (4, "n")),
        "block_digest": _BLOCKS,
        "segment_digest": Field(("|u1",), ("s", 32)),
        "segment_rows": Field(("<u8",), ("s",)),
        "segment_bytes": Field(("<u8",), ("s",)),
        **_ORIGIN,
    },
    "pack": {**_SEGMENT, **_ORIGIN, "row": Field(("<u8",), ("m",), optional=True), **_TEXTS},
}
BULK = {"segment": "features", "snapshot": "rows", "pack": "features"}

FIRST_ATTRIBUTES: dict[str, type] = {"format": str, "version_major": int, "kind": str}
"""The attributes that are checked first, as they decide on the others."""
ATTRIBUTES: dict[str, type] = {"version_minor": int, "identity": str, "dtype": str, "rows": int, "dim": int}
SNAPSHOT_ATTRIBUTES: dict[str, type] = {"parent": str, "generation": int}


@dataclass(frozen=True)
class StoreType:
    """What all files of one store share: the identity's fingerprint, the dimension and the dtype of the features."""

    fingerprint: str
    dim: int
    dtype: str
    """`<f4` or `<f2`."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored feature vector."""
        return self.dim * np.dtype(self.dtype).itemsize


def slices(count: int, row_bytes: int, most_bytes: int) -> Iterator[slice]:
    """Yield consecutive slices of `count` rows, each of at most `most_bytes` (at least one row)."""
    step = max(1, most_bytes // row_bytes)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], one: str = "the store", other: str = "this run"
) -> list[str]:
    """Return one line per field that differs: `preprocessing.resize: the store has 256, this run has 224`."""
    left, right = dict(_flat(stored)), dict(_flat(wanted))
    return [
        f"{name}: {one} has {_shown(left, name)}, {other} has {_shown(right, name)}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, _flat) != right.get(name, _flat)
    ]


def _shown(fields: Mapping[str, Any], name: str) -> str:
    text = repr(fields[name]) if name in fields else "nothing"
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(item) if isinstance(item, tuple) else item


def compose(
    kind: str, store_type: StoreType, rows: int, arrays: Mapping[str, NDArray[Any]], chunks: Chunks, **others: str | int
) -> tuple[str, Iterator[bytes | memoryview]]:
    """Lay out one file: the bulk dataset of `rows` rows from `chunks`, the small datasets, and the attributes of its kind.

    Returns the digest that names it, and its bytes in order.
    """
    dtype, shape = ("<u8", (4, rows)) if kind == "snapshot" else (store_type.dtype, (rows, store_type.dim))
    blocks = block_digests(chunk.reshape(-1).view(np.uint8) for chunk in map(np.ascontiguousarray, chunks()))
    attributes: dict[str, str | int] = {
        "format": FORMAT,
        "kind": kind,
        "version_major": VERSION_MAJOR,
        "version_minor": VERSION_MINOR,
        "identity": store_type.fingerprint,
        "dtype": store_type.dtype,
        "rows": rows,
        "dim": store_type.dim,
        **others,
    }
    head = _head(BULK[kind], attributes, {**arrays, "block_digest": blocks}, dtype, shape)
    trailer = make_trailer(head)

    def parts() -> Iterator[bytes | memoryview]:
        yield head
        for chunk in chunks():
            yield np.ascontiguousarray(chunk).data.cast("B") if chunk.size else b""
        yield trailer

    return trailer[-32:].hex(), parts()


def origin(identity: Mapping[str, Any], probe: NDArray[np.float32] | None, dim: int) -> dict[str, NDArray[Any]]:
    """Return the datasets on the vectors' origin; `probe` are the probe vectors, float32 of shape (k, dim), or None."""
    return {
        "identity_json": np.frombuffer(canonical_json(dict(identity)).encode("ascii"), np.uint8),
        "canary": np.ascontiguousarray(np.zeros((0, dim)) if probe is None else probe, "<f4"),
    }


def make_trailer(head: bytes) -> bytes:
    """Return the 48-byte trailer of a file with this head."""
    return TRAILER.pack(TRAILER_MAGIC, len(head), hashlib.blake2b(head, digest_size=32).digest())


def block_digest(block: bytes | memoryview) -> bytes:
    """Return the digest of one block of a bulk dataset."""
    return hashlib.blake2b(block, digest_size=BLOCK_DIGEST_BYTES).digest()


def block_digests(pieces: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the digest of each 64 KiB of a stream of bytes: uint8 of shape (blocks, 16)."""
    digests: list[bytes] = []
    rest = b""
    for piece in pieces:
        view = memoryview(rest + piece.data) if rest else piece.data
        whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
        digests.extend(block_digest(view[at : at + BLOCK_BYTES]) for at in range(0, whole, BLOCK_BYTES))
        rest = bytes(view[whole:])
    if rest:
        digests.append(block_digest(rest))
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, BLOCK_DIGEST_BYTES)


class HeadFile(io.BytesIO):
    """A file for libhdf5 with only its head in memory, followed by zeros up to `size`."""

    size = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte, or to the end."""
        return super().seek(self.size) if whence == io.SEEK_END else super().seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        """Fill the whole buffer, as libhdf5 expects."""
        found = super().readinto(buffer)
        buffer[found:] = bytes(len(buffer) - found)
        return len(buffer)

    def truncate(self, size: int | None = None) -> int:
        """Set the file's length."""
        self.size = size or 0
        return self.size


def _head(
    bulk: str,
    attributes: Mapping[str, str | int],
    arrays: Mapping[str, NDArray[Any]],
    dtype: str,
    shape: tuple[int, ...],
) -> bytes:
    """Let libhdf5 lay out the whole file in memory and return the bytes before the bulk dataset, of this dtype and shape.

    The bulk is allocated by a single write after everything else, so that it comes last, and is not touched again: a segment of
    a gigabyte needs a few kilobytes of memory here.
    """
    memory = HeadFile()
    with (
        undisturbed(),
        h5py.File(memory, "w", libver=("v110", "v110"), alignment_threshold=1, alignment_interval=ALIGNMENT) as file,
    ):
        scalar = h5py.h5s.create(h5py.h5s.SCALAR)
        for name, value in attributes.items():
            single = np.array(value.encode("ascii") if isinstance(value, str) else value)
            h5py.h5a.create(file.id, name.encode(), h5py.h5t.py_create(single.dtype), scalar).write(single)
        last = _dataset(file.id, bulk, dtype, shape)
        for name, array in arrays.items():
            dataset = _dataset(file.id, name, array.dtype.str, array.shape)
            if array.size:
                dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(array))
        file.flush()
        offset = None
        if 0 not in shape:
            corner = h5py.h5s.create_simple(shape)
            corner.select_elements(np.zeros((1, len(shape)), np.uint64))
            last.write(h5py.h5s.create_simple((1,)), corner, np.zeros(1, dtype))
            offset = last.get_offset()
    size = memory.size if offset is None else offset + prod(shape) * np.dtype(dtype).itemsize
    assert size == memory.size, "libhdf5 put something behind the bulk dataset"
    return memory.getvalue()[:offset].ljust(offset or memory.size, b"\0")


def _dataset(file: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    """Create a contiguous dataset without timestamps, allocated on its first write."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)
    kind = h5py.h5t.py_create(np.dtype(dtype))
    return h5py.h5d.create(file, name.encode(), kind, h5py.h5s.create_simple(shape), settings)
