"""What a source lists: image files with label, split and group as the user gave them, not yet opened."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.failures import Failure
from pipeline.data.index import LABEL
from pipeline.images import Stat

EXTENSIONS = frozenset({
    "apng", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "mpo", "pjp", "pjpeg", "png", "tif", "tiff", "webp",
})  # fmt: skip
"""File name endings, in any case, that say "image" without a look into the file."""

OTHER_IMAGES = frozenset({
    "arw", "cr2", "cr3", "crw", "dng", "heic", "heif", "nef", "nrw", "orf", "pcx", "pef", "raf", "raw", "rw2", "srw", "tga",
})  # fmt: skip
"""Endings of images that are not read, where the content does not say so: a user who has them should hear of it as of a failure."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""How users call a split, in lower case -> how it is called here."""

_HIDDEN = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"})


@dataclass
class Listing:
    """The files of a data set as found by one walk; lists of equal length, one item for each image.

    `stats` has (size, mtime_ns, ctime_ns) of each. `splits`, `groups` and `domains` are None where the source has none. A label is a
    text, or a tuple of them where the source has several columns, whose `names` are those of the index.
    """

    root: Path
    paths: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    splits: list[str] | None = None
    groups: list[str] | None = None
    domains: list[str] | None = None
    stats: list[Stat] = field(default_factory=list)
    entries: list[Failure] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    names: tuple[str, ...] = (LABEL,)

    def sort(self) -> None:
        """Bring every list into the order of the paths."""
        self.keep(sorted(range(len(self.paths)), key=self.paths.__getitem__))
        self.entries.sort()

    def keep(self, order: list[int]) -> None:
        """Keep these rows, in this order."""
        for name in ("paths", "labels", "splits", "groups", "domains", "stats"):
            column = getattr(self, name)
            if column is not None:
                setattr(self, name, list(map(column.__getitem__, order)))

    def stat_array(self) -> NDArray[np.int64]:
        """Return size, mtime_ns, ctime_ns as int64 of shape (n, 3)."""
        flat = np.fromiter(chain.from_iterable(self.stats), dtype=np.int64, count=3 * len(self.stats))
        return flat.reshape(-1, 3)


def ending_of(name: str) -> str:
    """Return what follows the last dot of a file name, in lower case."""
    return name.rpartition(".")[2].lower()


def is_image_name(name: str) -> bool:
    """Whether a file name ends as an image's does."""
    return ending_of(name) in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a name is one that file managers and archivers leave behind."""
    return name[0] == "." or name.lower() in _HIDDEN
