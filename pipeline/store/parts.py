"""Parts: vectors in immutable packed files, made by many at once, without a lock; on a disk or in an object store.

    PLACE/NAME.parts/<digest>.h5      some vectors of one embedding; PLACE/NAME.store is made of them by `maintain.merge`

A file is there as a whole or not at all. Whoever dies leaves the files that are finished; whoever makes vectors twice does no harm,
because those who read take each content once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, canonical_json, digest_keys, fingerprint
from pipeline.io.remote import address_of, write_remote
from pipeline.store.format import StoreType, compose
from pipeline.store.lock import explained
from pipeline.store.opener import StoreFile, fetch, open_file
from pipeline.store.reader import listed

log = logging.getLogger(__name__)

PART_BYTES = 32 << 20
PART_SECONDS = 60.0
"""A part is finished when it has so many bytes, or after so many seconds: as much as a kill can cost."""

SUFFIX = ".parts"


def folders(place: str | Path) -> list[str]:
    """Return the names of the embeddings that a place has parts of, without `.parts`."""
    return [name.removesuffix(SUFFIX) for name in listed(place) if name.endswith(SUFFIX)]


def part_files(place: str | Path, name: str) -> list[str]:
    """Return the paths or addresses of an embedding's parts."""
    folder = f"{place}/{name}{SUFFIX}"
    return [f"{folder}/{file}" for file in listed(folder) if file.endswith(".h5")]


class PartWriter:
    """Writes vectors of one embedding as parts, which `due` says when to finish; leaving it normally finishes the last one."""

    def __init__(
        self,
        place: str | Path,
        store: Path,
        identity: Mapping[str, Any],
        dim: int,
        dtype: str = "float32",
        probe: NDArray[np.float32] | None = None,
        look: bool = True,
    ) -> None:
        """Look at the parts that are there already, unless the caller knows that none is of use.

        store : named like the one that they are for
        probe : float32 of shape (k, dim)
        """
        self.folder = f"{place}/{store.stem}{SUFFIX}"
        self.store_type = StoreType(fingerprint(dict(identity)), dim, np.dtype(dtype).str)
        self._identity = np.frombuffer(canonical_json(dict(identity)).encode("ascii"), np.uint8)
        self._probe = np.zeros((0, dim), "<f4") if probe is None else np.ascontiguousarray(probe, "<f4")
        self._waiting: list[tuple[Digests, NDArray[Any]]] = []
        self._waiting_bytes, self._since = 0, time.monotonic()
        heads = map(self._head, part_files(place, store.stem) if look else ())
        found = [file.arrays["content"] for file in heads if file is not None]
        self._known = digest_keys(np.concatenate([np.zeros((0, 2), np.uint64), *found]))

    def _head(self, path: str) -> StoreFile | None:
        """Open a part to see which contents it has; one that is damaged counts as missing."""
        try:
            data = fetch(path, head_only=True) if address_of(path) else None
            file = open_file(Path(path), "pack", data=data)
        except StoreError as error:
            log.warning("%s; its images are embedded again", error)
            return None
        if file.store_type != self.store_type:
            raise StoreError(f"{path}: is of another embedding than its folder's; move it away")
        return file

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, uint64 of shape (n, 2), whether no part that was there at the start has its vector: bool (n,)."""
        return ~np.isin(digest_keys(digests), self._known)

    def append(self, digests: Digests, features: NDArray[Any]) -> int:
        """Add vectors, float of shape (n, dim), of n distinct digests, uint64 of shape (n, 2); return how many."""
        if len(digests):
            vectors = np.ascontiguousarray(features, self.store_type.dtype)
            self._waiting.append((np.ascontiguousarray(digests, "<u8"), vectors))
            self._waiting_bytes += vectors.nbytes
        return len(digests)

    @property
    def due(self) -> bool:
        """Whether it is time to finish a part."""
        return self._waiting_bytes >= PART_BYTES or time.monotonic() - self._since >= PART_SECONDS

    def commit(self) -> None:
        """Finish a part of what was appended since the last one."""
        self._since = time.monotonic()
        if not self._waiting:
            return
        content = np.concatenate([digests for digests, _ in self._waiting])
        arrays = {"content": content, "identity_json": self._identity, "canary": self._probe}
        bulk = (self.store_type.dtype, (len(content), self.store_type.dim))
        composed = compose(
            "pack", self.store_type.attributes(len(content)), arrays, bulk, lambda: [each for _, each in self._waiting]
        )
        path = f"{self.folder}/{composed.digest}.h5"
        with explained(Path(self.folder)):
            if address_of(path):
                write_remote(path, b"".join(composed.parts()))
            else:
                files.make_folder(Path(self.folder))
                files.rename(files.write_temporary(Path(self.folder), composed.parts()), Path(path))
        self._waiting, self._waiting_bytes = [], 0

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
