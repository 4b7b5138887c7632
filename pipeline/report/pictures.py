"""The images inside a page: thumbnails packed as WebP, with labels, predictions and neighbours.

The page's script uses them to show an image's neighbours on a click, and a gallery of all images with filters.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from pipeline.data import DatasetIndex
from pipeline.data.index import SEPARATOR
from pipeline.evaluation import HeadPredictions, audit
from pipeline.images import ImageProblem, decode, open_file
from pipeline.report.material import Material

SIDE = 112
"""Pixels of a thumbnail's side in the galleries."""
DOT_SIDE = 72
"""Pixels of a thumbnail's side on the map: there are hundreds."""
MOST_PIXELS = 64_000_000
MOST_INSIDE = 1_200
"""Most images inside a page: a thumbnail takes about 1 kB, and the page should stay well below 3 MB."""
MOST_MISTAKES = 200
"""Most mistakes among them besides those that sections show."""
NEAREST = 6


def small(root: Path, path: str, side: int) -> Image.Image | None:
    """Return an image scaled to fit a square of the given side; None when it cannot be read."""
    try:
        image = Image.fromarray(decode(open_file(root, path), max_pixels=MOST_PIXELS, at_least=side))
    except ImageProblem:
        return None
    # Tiny images are enlarged without interpolation, so that the pixels of an 8 x 8 digit stay visible.
    way = Image.Resampling.NEAREST if max(image.size) <= side // 2 else Image.Resampling.LANCZOS
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A large photo is first reduced by an integer factor, five times faster without visible loss.
    return image.resize(size, way, reducing_gap=2.0)


def data_address(image: Image.Image, quality: int = 72) -> str:
    """Return an image as a `data:` URL."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def gallery(index: DatasetIndex | None, paths: Iterable[str]) -> dict[str, str]:
    """Return thumbnails as `data:` URLs by path, without unreadable images."""
    if index is None:
        return {}
    known, found = set(index.paths.tolist()), dict[str, str]()
    for path in paths:
        image = small(index.root, path, SIDE) if path in known else None
        if image is not None:
            found[path] = data_address(image)
    return found


def sheet(index: DatasetIndex, rows: Sequence[int]) -> tuple[str, int]:
    """Return one picture with the thumbnails of all rows, in reading order, and its number of columns."""
    columns = max(1, int(np.ceil(np.sqrt(len(rows)))))
    lines = -(-len(rows) // columns)
    page = Image.new("RGB", (columns * DOT_SIDE, lines * DOT_SIDE), (236, 238, 241))
    for number, row in enumerate(rows):
        image = small(index.root, str(index.paths[row]), DOT_SIDE)
        if image is not None:
            left, top = (number % columns) * DOT_SIDE, (number // columns) * DOT_SIDE
            page.paste(image, (left + (DOT_SIDE - image.width) // 2, top + (DOT_SIDE - image.height) // 2))
    return data_address(page, quality=60), columns


def in_words(answer: Any) -> str:
    """Write an image's label, a text or numbers of shape (k,), for people."""
    if isinstance(answer, str):
        return answer.replace(SEPARATOR, ", ") or "no label"
    return ", ".join(f"{number:.4g}" for number in np.atleast_1d(answer))


def carried(material: Material, named: Iterable[str]) -> dict[str, Any] | None:
    """Return the image data for the page's script, in the order of the picture of thumbnails; None where there is no map.

    First come the dots of the map, then the images in sections, whose paths are `named`, then mistakes, and the nearest neighbours of
    the named ones. The listed neighbours of each image are among these.
    """
    index, view, space, kinds = material.index, material.view, material.map, material.kinds
    if index is None or view is None or space is None or kinds is None:
        return None
    exclusive = material.leaderboard.target.exclusive
    X, said = audit.project(view.features), _answers(material.best, exclusive)
    place = {path: row for row, path in enumerate(view.images.paths.tolist())}
    shown = [place[path] for path in dict.fromkeys(named) if path in place]
    wrong = [place[path] for path, (_, right, _) in said.items() if right == 0 and path in place][:MOST_MISTAKES]
    search = NearestNeighbors(n_neighbors=min(NEAREST + 1, len(X)), algorithm="brute").fit(X)
    near = search.kneighbors(X[shown], return_distance=False).T.ravel().tolist() if shown else []
    chosen = list(dict.fromkeys([*np.searchsorted(view.rows, space.rows).tolist(), *shown, *wrong, *near]))
    del chosen[MOST_INSIDE:]
    images, rows = view.images.rows(np.array(chosen)), view.rows[chosen]
    paths = images.paths.tolist()
    answers, right, sure = zip(*(said.get(path, ("", -1, 0.0)) for path in paths), strict=True)
    picture, columns = sheet(index, rows.tolist())
    return {
        "paths": paths,
        "splits": images.splits.tolist(),
        "labels": [images.said(row) if exclusive else in_words(images.said(row)) for row in range(len(images))],
        "codes": list(map(material.codes.get, paths)),
        "classes": list(kinds.classes),
        "said": answers,
        "right": right,
        "sure": sure,
        "near": audit.neighbours(X[chosen], NEAREST)[0].tolist(),
        "dots": len(space.rows),
        "total": len(view.rows),
        "columns": columns,
        "sheet": picture,
    }


def _answers(best: HeadPredictions | None, exclusive: bool) -> dict[str, tuple[str, int, float]]:
    """Return the best row's predictions by path for test images and, out of fold, training images.

    Each is the prediction in words, 1 if right, 0 if wrong or -1 for numbers, and the confidence in a class in per cent, else 0;
    the most confident come first in each part.
    """
    found = dict[str, tuple[str, int, float]]()
    for part in (best.test, best.out_of_fold) if best else ():
        if part is None or part.paths is None:
            continue
        right = np.full(len(part), -1) if part.target.kind == "regression" else part.correct.astype(int)
        p = part.probabilities if exclusive else None
        sure = np.zeros(len(part)) if p is None else 100 * p.max(axis=1)
        for row in np.argsort(-sure, kind="stable").tolist():
            answer = part.predicted[row]
            text = str(answer) if exclusive else in_words(answer)
            found.setdefault(str(part.paths[row]), (text, int(right[row]), round(float(sure[row]))))
    return found
