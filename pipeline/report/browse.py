"""The images that the page carries: what is known of each, which are nearest to it, and one picture with them all.

An image that is pressed shows its neighbours, and a gallery of all can be filtered; both are the work of the page's script.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors

from pipeline.evaluation import HeadPredictions, audit
from pipeline.report.material import Material
from pipeline.report.names import in_words
from pipeline.report.pictures import sheet

MOST_INSIDE = 1_200
"""Images that a page carries: a thumbnail takes about 1 kB, and the page should stay well below 3 MB."""
MOST_MISTAKES = 200
"""Of them images labelled wrong that no section shows by itself."""
NEAREST = 6


def carried(material: Material, named: Iterable[str]) -> dict[str, Any] | None:
    """Return what the page's script knows of images, in the order of their picture; None where there is no map.

    First come those of the map, dot by dot, then those that sections show, whose paths are `named`, then mistakes, and what is nearest
    to the named ones among all images that are looked at. The neighbours of each are told among these.
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
    chosen = list(dict.fromkeys([*np.searchsorted(view.rows, space.rows).tolist(), *shown, *wrong, *near]))[
        :MOST_INSIDE
    ]
    images, rows = view.images.rows(np.array(chosen)), view.rows[chosen]
    paths = images.paths.tolist()
    answers = [said.get(path, ("", -1, 0.0)) for path in paths]
    picture, columns = sheet(index, rows.tolist())
    return {
        "paths": paths,
        "splits": images.splits.tolist(),
        "labels": [images.said(row) if exclusive else in_words(images.said(row)) for row in range(len(images))],
        "codes": [material.codes[path] for path in paths],
        "classes": list(kinds.classes),
        "said": [text for text, _, _ in answers],
        "right": [right for _, right, _ in answers],
        "sure": [sure for _, _, sure in answers],
        "near": audit.neighbours(X[chosen], NEAREST).rows.tolist(),
        "dots": len(space.rows),
        "total": len(view.rows),
        "columns": columns,
        "sheet": picture,
    }


def _answers(best: HeadPredictions | None, exclusive: bool) -> dict[str, tuple[str, int, float]]:
    """Return what the best row says of each image that it has not learned from, by path.

    That is its answer in words, 1 where it is right, 0 where it is wrong and -1 where there is no such thing, and how sure it is of
    a class, in per cent, else 0; mistakes of which it is surest come first.
    """
    found = dict[str, tuple[str, int, float]]()
    for part in (best.test, best.out_of_fold) if best else ():
        if part is None or part.paths is None:
            continue
        counted = part.target.kind != "regression"
        right = part.correct.astype(int) if counted else np.full(len(part), -1)
        p = part.probabilities if exclusive else None
        sure = np.zeros(len(part)) if p is None else 100 * p.max(axis=1)
        for row in np.argsort(-sure, kind="stable").tolist():
            answer = part.predicted[row]
            text = str(answer) if exclusive else in_words(answer)
            found.setdefault(str(part.paths[row]), (text, int(right[row]), round(float(sure[row]))))
    return found
