"""A folder of class folders, or the same below train/, validation/ and test/."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.listing import SPLIT_NAMES, Listing, is_image_name, shown
from pipeline.data.walk import Folder, Walk
from pipeline.errors import DatasetError


def list_folder(root: Path, follow_symlinks: bool = False) -> Listing:
    """List the images of a folder whose sub-folders are classes, or splits above classes.

    Sub-folders are splits only when every one of them is called like a split: a class "train" beside "bus" is a class.
    Images any depth below a class folder belong to that class. Labels are folder names in Unicode form NFC.

    Raises
    ------
    DatasetError
        When the folder is missing, or no file, or not laid out in classes.
    """
    _require_folder(root)
    walk = Walk(root, follow_symlinks, os.path.realpath(root))
    listing = Listing(root, entries=walk.entries, ignored=walk.ignored)
    classes = _Classes(listing, walk)
    top = walk.read("")
    if not top.folders:
        raise DatasetError(_no_classes(root, top))
    classes.outside("", top)
    splits = {name: SPLIT_NAMES.get(name.lower()) for name in top.folders}
    by_split = all(splits.values())
    if by_split:
        listing.splits = []
        for name in top.folders:
            inside = walk.read(f"{name}/")
            if not inside.folders and inside.images:
                raise DatasetError(
                    f"{root}: {shown(name)}/ is called like a split but holds images, not class folders; put each class in its "
                    "own folder below it, or list the images in a CSV manifest (path,label) with dataset.source: manifest"
                )
            classes.outside(f"{name}/", inside)
            classes.add(inside.folders, f"{name}/", splits[name] or "")
    else:
        _refuse_half_splits(root, splits)
        classes.add(top.folders, "", None)
    _warn_of_siblings(listing, root)
    return listing


@dataclass(frozen=True)
class _Classes:
    """Fills a listing with the images of class folders, found by one walk."""

    listing: Listing
    walk: Walk

    def add(self, names: list[str], above: str, split: str | None) -> None:
        """List the images of class folders."""
        for name in names:
            before = len(self.listing.paths)
            for path, found in self.walk.below(f"{above}{name}/"):
                self._take(path, found)
            count = len(self.listing.paths) - before
            self.listing.labels.extend([unicodedata.normalize("NFC", name)] * count)
            if self.listing.splits is not None:
                self.listing.splits.extend([split or ""] * count)
            if not count:
                self.listing.warnings.append(f"class folder {shown(above + name)} holds no images")

    def _take(self, path: str, found: Folder) -> None:
        plain = _is_text(path)
        for name, stats in zip(found.images, found.stats, strict=True):
            if plain and (name.isascii() or _is_text(name)):
                self.listing.paths.append(path + name)
                self.listing.stats.append(stats)
            else:
                self.walk.pass_over(path + name, "bad_name", "its name is not UTF-8 text; rename it")

    def outside(self, path: str, found: Folder) -> None:
        """Say of images that no class folder holds that they have no label."""
        for name in found.images:
            self.walk.pass_over(path + name, "not_in_a_class", "it is in no class folder, so it has no label")


def _is_text(name: str) -> bool:
    """Whether a file name is UTF-8; others reach Python with surrogates in place of their bytes."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_folder(root: Path) -> None:
    if not root.exists():
        raise DatasetError(
            f"{root}: there is no such folder; set dataset.path to the folder that holds one folder per class"
        )
    if not root.is_dir():
        hint = (
            "a manifest file is read with dataset.source: manifest"
            if root.suffix.lower() in {".csv", ".parquet"}
            else "unpack archives first"
        )
        raise DatasetError(f"{root}: is a file, expected a folder that holds one folder per class; {hint}")


def _refuse_half_splits(root: Path, splits: Mapping[str, str | None]) -> None:
    """Classes called train and test that hold nothing but folders are splits with something else beside them."""
    named = [name for name, split in splits.items() if split]
    if len({splits[name] for name in named}) < 2:
        return
    for name in named:
        try:
            inside = os.listdir(root / name)
        except OSError:  # the walk will say so
            return
        if any(is_image_name(file) for file in inside):
            return
    others = ", ".join(f"{shown(name)}/" for name, split in splits.items() if not split)
    raise DatasetError(
        f"{root}: {', '.join(f'{shown(name)}/' for name in named)} look like splits above class folders, but {others} beside them "
        "does not; move it elsewhere, or list the images in a CSV manifest with dataset.source: manifest"
    )


def _no_classes(root: Path, top: Folder) -> str:
    images = len(top.images)
    if images:
        return (
            f"{root}: holds {images:,} images but no class folders; put the images of each class in a folder of its own, "
            "or list them in a CSV manifest (path,label) with dataset.source: manifest"
        )
    return f"{root}: holds no class folders; expected one folder per class with its images inside"


def _warn_of_siblings(listing: Listing, root: Path) -> None:
    """A user who gives train/ itself may not know that the test/ beside it is never read."""
    if root.name.lower() not in SPLIT_NAMES:
        return
    beside = [
        path.name
        for path in sorted(root.resolve().parent.iterdir())
        if path.is_dir() and path.name != root.name and path.name.lower() in SPLIT_NAMES
    ]
    if beside:
        listing.warnings.append(
            f"{root} is read alone; to use {', '.join(beside)} beside it as well, give {root.parent} as dataset.path"
        )
