"""Thumbnails for a page that carries its images with it: decoded once, packed as WebP, shown as data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import DatasetIndex
from pipeline.images import ImageProblem, decode, open_file

SIDE = 112
"""Pixels of a thumbnail's side in the galleries."""
DOT_SIDE = 72
"""Pixels of a thumbnail's side on the map: there are hundreds."""
MOST_PIXELS = 64_000_000


def thumbnail(index: DatasetIndex, row: int, side: int) -> Image.Image | None:
    """Return an image of the index as `small` does."""
    return small(index.root, str(index.paths[row]), side)


def small(root: Path, path: str, side: int) -> Image.Image | None:
    """Return an image on a square of the given side, nothing cropped; None when it cannot be read."""
    try:
        file = open_file(root, path)
        image = Image.fromarray(decode(file, max_pixels=MOST_PIXELS, at_least=side))
    except ImageProblem:
        return None
    # Tiny images are enlarged in whole pixels, so that a digit of 8 x 8 stays what it is.
    small = max(image.size) <= side // 2
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A large photo is first reduced by whole pixels, which costs a fifth and cannot be seen.
    return image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS, reducing_gap=2.0)


def data_address(image: Image.Image, quality: int = 72) -> str:
    """Return an image as a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def gallery(index: DatasetIndex | None, paths: Sequence[str]) -> dict[str, str]:
    """Return the thumbnail of each path that can be shown, by path."""
    if index is None:
        return {}
    place = {path: row for row, path in enumerate(index.paths.tolist())}
    images = {path: thumbnail(index, place[path], SIDE) for path in paths if path in place}
    return {path: data_address(image) for path, image in images.items() if image is not None}


def sheet(index: DatasetIndex, rows: Sequence[int]) -> tuple[str, int]:
    """Return one picture with the thumbnails of all rows, left to right and top to bottom, and its number of columns."""
    columns = max(1, int(np.ceil(np.sqrt(len(rows)))))
    lines = -(-len(rows) // columns)
    page = Image.new("RGB", (columns * DOT_SIDE, lines * DOT_SIDE), (236, 238, 241))
    for number, row in enumerate(rows):
        image = thumbnail(index, int(row), DOT_SIDE)
        if image is not None:
            left, top = (number % columns) * DOT_SIDE, (number // columns) * DOT_SIDE
            page.paste(image, (left + (DOT_SIDE - image.width) // 2, top + (DOT_SIDE - image.height) // 2))
    return data_address(page, quality=60), columns
