"""What one head said about every image: the rows from which heads are compared, calibrated and looked at.

Stage two writes one `predictions.npz` into each bundle's folder, with a part for the test images and a part for the
training images as predicted out of fold (each by a model that did not see it).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BundleError, first_line
from pipeline.experiment import PREDICTIONS, bundle_file, parse_arrays

READABLE = (1, PREDICTIONS.version)
"""Version 1 has no units, and of the searched probabilities those of the true classes only, which are left out."""
FILE_NAME = "predictions.npz"


@dataclass(frozen=True)
class PredictionSet:
    """Predictions of n images: `paths`, `y_true`, `y_pred` of shape (n,), str.

    probabilities : ndarray of shape (n, n_classes), float32, columns in the order of the classes; None without any.
    folds : ndarray of shape (n,), int64: the fold in which a row was held out; None for the test images.
    searched : ndarray of shape (n, n_classes), float32: the head's own probabilities before calibration, as a search judges
        them; None where the score that was tuned looks at labels.
    units : ndarray of shape (n,), int64: images that are not independent, of one group or copies, share a number; None when
        all are.
    """

    paths: NDArray[np.str_]
    y_true: NDArray[np.str_]
    y_pred: NDArray[np.str_]
    probabilities: NDArray[np.float32] | None = None
    folds: NDArray[np.int64] | None = None
    searched: NDArray[np.float32] | None = None
    units: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for name in ("paths", "y_true", "y_pred"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)).astype(str))
        for name, kind in (
            ("probabilities", np.float32),
            ("searched", np.float32),
            ("folds", np.int64),
            ("units", np.int64),
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        lengths = {name: len(part) for name, part in vars(self).items() if part is not None}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a prediction set needs one row per image in every part, got {lengths}")

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which rows were labelled right: shape (n,)."""
        return np.equal(self.y_true, self.y_pred)


@dataclass(frozen=True)
class Predictions:
    """One head's predictions on the test images and, out of fold, on the training images."""

    classes: tuple[str, ...]
    test: PredictionSet
    out_of_fold: PredictionSet | None = None

    def to_bytes(self) -> bytes:
        """Return the content of a `predictions.npz`; the same predictions give the same bytes."""
        arrays: dict[str, NDArray[np.generic]] = {
            "format": np.array(PREDICTIONS.format),
            "version": np.array(PREDICTIONS.version),
            "classes": np.array(self.classes, dtype=str),
        }
        for part, rows in (("test", self.test), ("out_of_fold", self.out_of_fold)):
            for name, values in vars(rows).items() if rows is not None else ():
                if values is not None:
                    arrays[f"{part}_{name}"] = values
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @staticmethod
    def read(path: Path) -> Predictions:
        """Read a `predictions.npz`.

        Raises
        ------
        BundleError
            When the file is missing, damaged, or of another format or version.
        """
        try:
            arrays = parse_arrays(bundle_file(path.parent, path.name))
            found = (str(arrays.get("format", "")), int(arrays.get("version", -1)))
        except (ValueError, TypeError) as error:
            raise BundleError(f"{path}: no readable predictions ({error}); {PREDICTIONS.again}") from None
        if found not in [(PREDICTIONS.format, version) for version in READABLE]:
            raise BundleError(
                f"{path}: found {found[0]!r} version {found[1]}, expected {PREDICTIONS.format!r} version {PREDICTIONS.version}; "
                f"{PREDICTIONS.again}"
            )

        def part(name: str) -> PredictionSet | None:
            own = {key.removeprefix(f"{name}_"): value for key, value in arrays.items() if key.startswith(f"{name}_")}
            own.pop("log_probabilities", None)
            return PredictionSet(**own) if own else None

        try:
            test, classes = part("test"), tuple(arrays["classes"].astype(str).tolist())
            if test is not None:
                return Predictions(classes, test, part("out_of_fold"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PREDICTIONS.damaged(path, first_line(error)) from None
        raise BundleError(f"{path}: holds no test predictions; {PREDICTIONS.again}")
