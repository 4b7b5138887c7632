"""Heads: what a config can tune, for which targets, and over which parameters."""

from __future__ import annotations

from tabulate import tabulate

from pipeline.heads import FOR_PHOTOS, TABLES, Categorical, Dimension

HEADERS = ("head", "probabilities", "photos", "tuned")


def run() -> list[str]:
    """Return a table of the heads of each kind of target; in the column `photos` those that a folder of photos is tuned on."""
    lines: list[str] = []
    for kind, table in TABLES.items():
        cells = [
            (
                head.name,
                "yes" if head.probabilities else "",
                "yes" if kind == "classification" and head.name in FOR_PHOTOS else "",
                ", ".join(f"{name} {_told(dimension)}" for name, dimension in head.space.items())
                or f"nothing; needs manyheads[{head.name}]" * (head.name in table.optional),
            )
            for head in table.known.values()
        ]
        lines += [f"== {kind} ==", *tabulate(cells, HEADERS, "simple", disable_numparse=True).splitlines(), ""]
    return [
        *lines,
        "probabilities: of its own; others are given some by calibration. photos: what `manyheads photos/` tunes.",
        "In a config: heads: [ridge, {name: knn, space: {n_neighbors: [1, 20]}}]; a head of your own is module:NAME.",
    ]


def _told(dimension: Dimension) -> str:
    """Return the range of a parameter, or its choices."""
    if isinstance(dimension, Categorical):
        return "/".join(str(choice) for choice in dimension.categories)
    return f"{dimension.low:g} to {dimension.high:g}{' (log)' * (dimension.prior == 'log-uniform')}"
