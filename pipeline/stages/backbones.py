"""Backbones: the networks that a config can use, with size, availability and licence. Nothing is loaded or downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

from tabulate import tabulate

from pipeline.config import ExtractionConfig
from pipeline.embed import baselines
from pipeline.embed.published import BUNDLED, NO_WEIGHTS
from pipeline.embed.weights import FAMILIES, bundled, penultimate_dim
from pipeline.errors import BackboneError

MOST_BUILT = 40
"""Longest list in which vector lengths are determined for networks that must be built, which takes up to seconds each."""

HERE, FETCH, INSTALL = "here", "to fetch", "to install"

HEADERS = ("name", "weights", "family", "dim", "image", "MB", "licence", "")


@dataclass(frozen=True)
class NetworkRow:
    """One network with one set of weights, under their names in a config."""

    name: str
    weights: str
    family: str
    dim: Callable[[], int | None]
    image: int
    """Side of the network's input images, in pixels."""
    megabytes: float
    license: str
    where: str

    def cells(self, with_dim: bool) -> tuple[str, ...]:
        """Return the cells of the columns in `HEADERS`."""
        size = f"{self.megabytes:.0f}" if self.megabytes >= 10 else f"{self.megabytes:.1f}"
        dim = self.dim() if with_dim else None
        return (
            self.name,
            self.weights,
            self.family,
            f"{dim:,}" if dim else "",
            str(self.image or ""),
            size if self.megabytes else "",
            self.license,
            self.where,
        )


def run(word: str = "") -> list[str]:
    """Return a table of the networks whose row contains a word; without a word those available here, with the number of others."""
    found = rows()
    shown = [row for row in found if row.where == HERE]
    if word:
        shown = [row for row in found if word.lower() in " ".join(row.cells(False)).lower()]
    if not shown:
        raise BackboneError(
            f"no network, weights, family or licence contains {word!r}; leave it out to see what is available"
        )
    short = len({row.name for row in shown}) <= MOST_BUILT
    cells = [row.cells(short or row.where == HERE) for row in shown]
    alignment = ("left", "left", "left", "right", "right", "right", "left", "left")
    lines = [tabulate(cells, HEADERS, "simple", disable_numparse=True, colalign=alignment), ""]
    if not word:
        others = Counter((row.family, row.where) for row in found if row.where != HERE)
        lines += [
            f"{count:,} more of {family} {where}: `manyheads backbones {family}` lists them"
            for (family, where), count in others.items()
        ]
    if not short:
        lines.append("dim is left out of long lists: name a network to see it")
    return [
        *lines,
        "any network also with `weights: random`, an untrained control, or with a .safetensors or .pth file of yours",
    ]


def rows(names: Collection[str] = ()) -> list[NetworkRow]:
    """Return every network with each of its sets of weights; with `names` only those networks, which is faster."""
    return [row for row in (*_published(names), *_here()) if not names or row.name in names]


def _published(names: Collection[str]) -> Iterator[NetworkRow]:
    for family in FAMILIES:
        for name in family.names():
            if names and name not in names:
                continue
            try:
                known = family.weights(name)
            except BackboneError:  # the library is not installed
                yield NetworkRow(name, "", family.library, lambda: None, 0, 0, "", INSTALL)
                continue
            for weights, found in known.items():
                fetch = found.to_fetch()
                where = INSTALL if found.to_install() else FETCH if fetch else HERE
                size = found.megabytes or (fetch.megabytes if fetch else 0)
                dim, side = partial(penultimate_dim, name), found.preprocessing.size[0]
                yield NetworkRow(name, weights, family.library, dim, side, size, found.license, where)


def _here() -> Iterator[NetworkRow]:
    """Yield the networks and baselines that come with the package."""
    found = bundled()
    dim, crop = found["arguments"]["block_params"]["widths"][-1], found["preprocessing"]["crop"]
    size = BUNDLED.stat().st_size / 1e6
    yield NetworkRow(found["name"], "bundled", "manyheads", lambda: dim, crop, size, found["license"], HERE)
    for name in baselines.NAMES:
        (spec,) = baselines.load(name, ExtractionConfig().decode).specs
        side = spec.preprocessing["crop"][0]
        yield NetworkRow(name, "", "baselines", lambda dim=spec.dim: dim, side, 0, NO_WEIGHTS, HERE)  # type: ignore[misc]
