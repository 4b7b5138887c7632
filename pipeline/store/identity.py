"""Two identities side by side: which fields differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError

MIN_COSINE = 0.9999
MAX_DEVIATION = 1e-2
"""Largest difference of a probe vector's number, relative to the root mean square of the recorded row."""


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], one: str = "the store", other: str = "this run"
) -> list[str]:
    """Return one line for each field that differs: `preprocessing.resize: the store has 256, this run has 224`."""
    left, right = dict(_flat(stored)), dict(_flat(wanted))
    return [
        f"{name}: {one} has {_show(left, name)}, {other} has {_show(right, name)}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, _ABSENT) != right.get(name, _ABSENT)
    ]


_ABSENT = object()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(item) if isinstance(item, tuple) else item


def _show(fields: Mapping[str, Any], name: str) -> str:
    text = repr(fields[name]) if name in fields else "nothing"
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def check_probe(stored: NDArray[np.float32], found: NDArray[np.float32], where: str) -> None:
    """Compare the vectors of the built-in probe images, float32 of shape (k, dim), with those recorded when the store was made.

    They catch what no list of fields can: a driver, a patched library, a network left in training mode.

    Raises
    ------
    StoreError
        When a row's cosine is below 0.9999 or a number is off by more than 1 % of the row's root mean square.
    """
    if stored.shape != found.shape:
        raise StoreError(f"{where}: has probe features of shape {stored.shape}, this run has {found.shape}")
    if not np.isfinite(found).all():
        raise StoreError(f"{where}: the network gives numbers that are not finite for the built-in probe images")
    left, right = stored.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    equal = (left == right).all(axis=1)
    cosine = np.where(equal, 1.0, (left * right).sum(axis=1) / np.where(norms > 0, norms, 1.0))
    scale = np.sqrt((left**2).mean(axis=1))
    deviation = np.abs(left - right).max(axis=1, initial=0.0) / np.where(scale > 0, scale, 1.0)
    problems = [
        f"probe image {row}: cosine {cosine[row]:.6f} (expected at least {MIN_COSINE}), "
        f"largest difference {deviation[row]:.2g} of the root mean square (expected at most {MAX_DEVIATION})"
        for row in np.flatnonzero((cosine < MIN_COSINE) | (deviation > MAX_DEVIATION))
    ]
    if problems:
        raise StoreError(
            f"{where}: the network does not give the features it gave when this store was made, although nothing in its "
            "identity has changed (a library, a driver, a device?); use a new output folder, or the old environment",
            problems,
        )
