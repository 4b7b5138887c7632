"""Photos for benchmarks: drawn where there are none, and copied into class folders."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = "ab"


def draw_photos(folder: Path, count: int, width: int = 400, height: int = 533) -> Path:
    """Write JPEGs about the size of a photo's: smooth shapes with some noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=80)
    return folder


def copy_photos(found: Sequence[Path], count: int, target: Path) -> Path:
    """Copy so many of the photos, evenly chosen, into two class folders."""
    chosen = [found[row] for row in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]
    for row, path in enumerate(chosen):
        place = target / CLASSES[row % 2] / f"{row:06d}{path.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return target
