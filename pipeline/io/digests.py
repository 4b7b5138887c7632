"""Digests of contents, files and identities.

Image contents are named by BLAKE2b-128 (16 bytes), files and identities by BLAKE2b-256 (32 bytes). BLAKE2b is in the
standard library and runs at about 1 GB/s; 128-bit digests collide by chance once in 2**64 images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONTENT_BYTES = 16

Digests = NDArray[np.uint64]
"""Content digests of n images: ndarray of shape (n, 2), little-endian uint64; row i is one 16-byte digest."""


def content_digest(data: bytes | memoryview, revision: bytes = b"") -> bytes:
    """Return the 16-byte digest of some bytes; it also depends on `revision`, of at most 16 bytes."""
    return hashlib.blake2b(data, digest_size=CONTENT_BYTES, person=revision).digest()


def file_digest(path: Path) -> str:
    """Return the hex BLAKE2b-256 of every byte of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def bytes_digest(data: bytes | memoryview) -> str:
    """Return the hex BLAKE2b-256 of some bytes."""
    return parts_digest([data])


def parts_digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the hex BLAKE2b-256 of concatenated parts."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces, no NaN, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fingerprint(value: Any) -> str:
    """Return the hex BLAKE2b-256 of a value's canonical JSON."""
    return bytes_digest(canonical_json(value).encode("ascii"))


def digest_keys(digests: Digests) -> NDArray[np.void]:
    """View n digests, shape (n, 2), as n single values that can be compared and sorted."""
    keys: NDArray[np.void] = np.ascontiguousarray(digests, "<u8").reshape(-1, 2).view("V16").ravel()
    return keys


def digests_to_hex(digests: Digests) -> list[str]:
    """Turn digests, uint64 of shape (n, 2), into n hex texts of 32 characters."""
    text = np.ascontiguousarray(digests, dtype="<u8").tobytes().hex()
    return [text[start : start + 2 * CONTENT_BYTES] for start in range(0, len(text), 2 * CONTENT_BYTES)]


def digests_from_hex(texts: Iterable[str]) -> Digests:
    """Turn n hex texts of 32 characters into an array of shape (n, 2), uint64."""
    return np.frombuffer(bytes.fromhex("".join(texts)), dtype="<u8").reshape(-1, 2).copy()
