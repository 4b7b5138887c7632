"""Explanation pages: why images got their labels, as a map over each image with training images beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.experiment import MISTAKES, Artifacts, write_document
from pipeline.io.files import make_folder, write_text_atomic
from pipeline.io.remote import absolute
from pipeline.report.page import fill
from pipeline.report.pictures import DOT_SIDE, SIDE, data_address, small

INDEX = "index.html"
SHOWN_NEAR = 3
"""Neighbours with the label, and as many without it, on the experiment's page."""
SHOWN_SIDE = 384
"""Pixels of the longer side of an image on its page."""
FOR, AGAINST = (232, 89, 12), (59, 91, 219)
STRONGEST = 0.8
"""Opacity of the strongest cell of a map."""

Near = Sequence[tuple[float, str, str]]
"""Distance, label and path of images, nearest first."""


@dataclass(frozen=True, eq=False)
class Explained:
    """An image, its predicted label, and the explanation."""

    path: str
    label: str
    probability: float | None
    pixels: NDArray[np.uint8]
    """The image under the map, shape (height, width, 3)."""
    cells: NDArray[np.floating] | None
    """Evidence of each cell for the label, below 0 against it, shape (rows, columns); None where there is no map."""
    exact: bool
    """Whether the cells are the head's own scores at each place, and not the effects of occlusion."""
    exclusive: bool = True
    """Whether an image has one label, so that exact cells are its lead over the second-best label."""
    near: tuple[Near, Near] = ((), ())
    """Nearest training images with its label, and with other labels."""

    @property
    def way(self) -> str:
        """The method of the map."""
        if self.cells is None:
            return "neighbours alone, as the head gives no probability"
        return "exact class activation map" if self.exact else "occlusion"

    @property
    def largest(self) -> float:
        """The largest cell's distance from 0."""
        return 0.0 if self.cells is None else float(np.abs(self.cells).max())


def build(folder: Path, found: Sequence[Explained], no_neighbours: str = "") -> Path:
    """Write a numbered page for each image and an index, whose path is returned; `no_neighbours` says why neighbours are missing."""
    make_folder(folder)
    links = []
    for number, each in enumerate(found, 1):
        name, picture = _page(number), enlarged(Image.fromarray(each.pixels), SHOWN_SIDE)
        drawn = _drawn(each, SHOWN_SIDE)
        given = {
            "title": Path(each.path).name,
            "each": each,
            "no_neighbours": no_neighbours,
            "image": data_address(picture),
            "map": data_address(drawn),
            "sides": [[(*one, _thumbnail(one[2], SIDE)) for one in side] for side in each.near],
        }
        write_text_atomic(folder / name, fill("explained.html", given))
        links.append((name, each, data_address(enlarged(drawn, SIDE))))
    write_text_atomic(folder / INDEX, fill("explained.html", {"title": "Why these labels", "links": links}))
    return folder / INDEX


# ---- mistakes on an experiment's page


def keep(files: Artifacts, row: str, found: Mapping[str, Explained]) -> None:
    """Store explanations of a row's mistakes by path, small enough for the page: a map, the nearest images, a link."""
    images = {
        path: {
            "said": each.label,
            "page": f"{files.mistakes.parent.name}/{_page(number)}",
            "map": None if each.cells is None else data_address(_drawn(each, SIDE)),
            "near": [
                [(label, _thumbnail(where, DOT_SIDE)) for _, label, where in side[:SHOWN_NEAR]] for side in each.near
            ],
        }
        for number, (path, each) in enumerate(found.items(), 1)
    }
    write_document(files.mistakes, MISTAKES, {"row": row, "images": images})


# ---- pictures


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """Resize an image so that its longer side has `side` pixels."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def overlaid(image: Image.Image, cells: NDArray[np.floating]) -> Image.Image:
    """Overlay a grey image with a map, shape (rows, columns): values above 0 in the colour `FOR`, below in `AGAINST`."""
    smooth = np.asarray(Image.fromarray(cells.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    strength = STRONGEST * smooth / max(float(np.abs(cells).max()), 1e-12)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    colour = np.where(strength[..., None] > 0, np.array(FOR), np.array(AGAINST))
    share = np.abs(strength)[..., None]
    return Image.fromarray(((1 - share) * grey + share * colour).round().astype(np.uint8))


def _page(number: int) -> str:
    return f"{number:04d}.html"


def _drawn(each: Explained, side: int) -> Image.Image:
    picture = enlarged(Image.fromarray(each.pixels), side)
    return picture if each.cells is None else overlaid(picture, each.cells)


def _thumbnail(path: str, side: int) -> str | None:
    image = small(Path("/"), absolute(path), side)
    return None if image is None else data_address(image)
