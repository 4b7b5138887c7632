"""The default data set: scikit-learn's 1,797 handwritten digits (8 x 8 grey), written out as PNG files once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.data.materialise import materialised, write_png


def digit_images(root: Path) -> Path:
    """Return the folder of the digits, one folder per class, after writing it if need be; no download."""
    return materialised(root, _write)


def _write(folder: Path) -> None:
    from sklearn.datasets import load_digits  # costs a second of imports, needed once

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the sheets hold 0 to 16
    for number, (pixels, label) in enumerate(zip(grey, bunch.target, strict=True)):
        write_png(folder / str(label) / f"{number:04d}.png", pixels)
