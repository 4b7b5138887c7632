"""Predictions of a head: one record for test images and out-of-fold training images, and its file format.

Stage two writes one `predictions.npz` into each bundle's folder, with a part for the test images and a part for the
training images as predicted out of fold (each by a model not fitted on it).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.data.classes import ANY_CLASSES, Classification, ScoreKind
from pipeline.data.targets import Target, record_of, target_of
from pipeline.errors import BundleError, first_line
from pipeline.evaluation.intervals import numbered
from pipeline.experiment import PREDICTIONS, bundle_file, parse_arrays

READABLE = (1, PREDICTIONS.version)
"""Version 1 has no units, and its tuned probabilities, which are only those of the true classes, are ignored."""
FILE_NAME = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """One head's predictions for n images; unused columns are None.

    y_true, y_pred : labels as the target encodes them: ndarray of shape (n,), int64, indices of classes; (n,) or (n, k), float64,
        numbers; (n, k), bool, which labels apply. `y_true` is the same for all heads that are compared
    probabilities : ndarray of shape (n, width), columns in the order of the classes; None where a head gives none
    units : ndarray of shape (n,), int64: images that are not independent, of one group or copies, share a number; None
        when all are
    paths : ndarray of shape (n,), str
    folds : ndarray of shape (n,), int64: the fold in which a row was held out; None for the test images
    scores, kind : ndarray of shape (n, width): the head's own probabilities or decision values before calibration, which a
        search scores, and which of the two; a file has them only where probabilities were tuned
    target : how y is encoded; its classes may be unnamed
    """

    y_true: NDArray[Any]
    y_pred: NDArray[Any]
    probabilities: NDArray[np.floating] | None = None
    units: NDArray[np.int64] | None = None
    paths: NDArray[Any] | None = None
    folds: NDArray[np.int64] | None = None
    scores: NDArray[np.floating] | None = None
    kind: ScoreKind | None = None
    target: Target = ANY_CLASSES

    def __post_init__(self) -> None:
        lengths = {name: len(part) for name, part in self.columns().items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"predictions need one row per image in every part, got {lengths}")

    @staticmethod
    def of(y_true: ArrayLike, y_pred: ArrayLike, classes: Sequence[str], **more: Any) -> Predictions:
        """Make predictions from names of classes, each of shape (n,); ValueError for an unknown name."""
        target = Classification(tuple(classes))
        return Predictions(target.restored(y_true), target.restored(y_pred), target=target, **more)

    def __len__(self) -> int:
        return len(self.y_true)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns that are not None by name, each with n rows, of the shape and dtype above."""
        return {name: part for name, part in vars(self).items() if isinstance(part, np.ndarray)}

    def rows(self, which: NDArray[Any]) -> Predictions:
        """Return the predictions of some images.

        which : row indices, of any integer dtype, shape (m,), or a mask, bool of shape (n,)
        """
        return replace(self, **{name: part[which] for name, part in self.columns().items()})

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which images were labelled right, with several labels in all of them: bool of shape (n,)."""
        equal = np.equal(self.y_true, self.y_pred)
        return np.asarray(equal if equal.ndim == 1 else equal.all(axis=1))

    @property
    def members(self) -> list[NDArray[np.bool_]]:
        """A mask of its images for each class or label that occurs: bool of shape (n,) each."""
        if self.y_true.ndim > 1:
            return [flags for flags in self.y_true.T if flags.any()]
        return [self.y_true == code for code in np.unique(self.y_true)]

    @property
    def unit_numbers(self) -> NDArray[np.int64]:
        """The unit of each image, numbered from 0 without a gap: int64 of shape (n,)."""
        return numbered(self.units, len(self))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.target.classes

    @property
    def labels(self) -> NDArray[Any]:
        """The true labels decoded: names, str of shape (n,), or numbers, float64 of shape (n,) or (n, k)."""
        return self.target.decode(self.y_true)

    @property
    def predicted(self) -> NDArray[Any]:
        """The predicted labels decoded, of the same shape and dtype as `labels`."""
        return self.target.decode(self.y_pred)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate the predictions of several sets of images, with the columns that all of them have."""
    shared = [part.columns() for part in parts]
    whole = {
        name: np.concatenate([found[name] for found in shared]) if all(name in found for found in shared) else None
        for name in shared[0]
    }
    return replace(parts[0], **whole)  # type: ignore[arg-type]


@dataclass(frozen=True)
class HeadPredictions:
    """One head's predictions on the test images and, out of fold, on the training images: the content of a `predictions.npz`."""

    test: Predictions
    out_of_fold: Predictions | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.test.classes

    def to_bytes(self) -> bytes:
        """Return the content of a `predictions.npz`; the same predictions give the same bytes."""
        arrays: dict[str, NDArray[np.generic]] = {
            "format": np.array(PREDICTIONS.format),
            "version": np.array(PREDICTIONS.version),
            # NumPy would store an empty list as float64.
            **{
                key: np.array(value, str if value == [] else None) for key, value in record_of(self.test.target).items()
            },
        }
        for part, rows in (("test", self.test), ("out_of_fold", self.out_of_fold)):
            if rows is not None:
                found = {**rows.columns(), "y_true": rows.labels, "y_pred": rows.predicted}
                found |= {} if rows.scores is None else {"searched": rows.scores}
                arrays |= {
                    f"{part}_{name}": found[name].astype(kind or rows.target.stored_as)
                    for name, kind in STORED.items()
                    if name in found
                }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @staticmethod
    def read(path: Path) -> HeadPredictions:
        """Read a `predictions.npz`; BundleError when it is missing, damaged, or of another format or version."""
        kind = PREDICTIONS
        try:
            arrays = parse_arrays(bundle_file(path.parent, path.name))
            name, version = str(arrays.get("format", "")), int(arrays.get("version", -1))
        except (ValueError, TypeError) as error:
            raise BundleError(f"{path}: no readable predictions ({error}); {kind.again}") from None
        if name != kind.format or version not in READABLE:
            raise BundleError(
                f"{path}: found {name!r} version {version}, expected {kind.format!r} version {kind.version}; {kind.again}"
            )
        try:
            target = target_of({key: array.tolist() for key, array in arrays.items()})
            test = _part(arrays, "test", target)
            if test is not None:
                return HeadPredictions(test, _part(arrays, "out_of_fold", target))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise kind.damaged(path, first_line(error)) from None
        raise BundleError(f"{path}: holds no test predictions; {kind.again}")


STORED = {
    "paths": str, "y_true": None, "y_pred": None, "probabilities": np.float32, "folds": np.int64, "searched": np.float32,
    "units": np.int64,
}  # fmt: skip
"""The columns of a file in order with their dtypes; None is the target's dtype, in which classes are names."""


def _part(arrays: Mapping[str, NDArray[Any]], name: str, target: Target) -> Predictions | None:
    own: dict[str, Any] = {
        key: arrays[f"{name}_{key}"].astype(kind or target.stored_as)
        for key, kind in STORED.items()
        if f"{name}_{key}" in arrays
    }
    if not own:
        return None
    truth, guess = (target.restored(own.pop(key)) for key in ("y_true", "y_pred"))
    if "searched" in own:
        own |= {"scores": own.pop("searched"), "kind": "probability"}
    return Predictions(truth, guess, target=target, **own)
