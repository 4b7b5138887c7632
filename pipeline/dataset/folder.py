"""A folder of class folders, or the same below train/, validation/ and test/."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.dataset.ledger import LedgerEntry
from pipeline.dataset.listing import OTHER_IMAGES, SPLIT_NAMES, Listing, ending_of, is_hidden, is_image_name, shown
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
    walk = _Walk(Listing(root), os.path.realpath(root), follow_symlinks)
    top = walk.read("")
    if not top.folders:
        raise DatasetError(_no_classes(root, top))
    walk.not_in_a_class("", top.files)
    splits = {name: SPLIT_NAMES.get(name.lower()) for name in top.folders}
    by_split = all(splits.values())
    if by_split:
        walk.listing.splits = []
        for name in top.folders:
            inside = walk.read(f"{name}/")
            if not inside.folders and any(is_image_name(file) for file in inside.files):
                raise DatasetError(
                    f"{root}: {shown(name)}/ is called like a split but holds images, not class folders; put each class in its "
                    "own folder below it, or list the images in a CSV manifest (path,label) with dataset.source: manifest"
                )
            walk.not_in_a_class(f"{name}/", inside.files)
            walk.classes(inside.folders, f"{name}/", splits[name] or "")
    else:
        _refuse_half_splits(root, splits)
        walk.classes(top.folders, "", None)
    _warn_of_siblings(walk.listing, root)
    return walk.listing


@dataclass
class _Inside:
    """What one folder holds, hidden things left out."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@dataclass
class _Walk:
    """One walk over a folder, filling a listing."""

    listing: Listing
    real_root: str
    follow_symlinks: bool
    linked: set[tuple[int, int]] = field(default_factory=set)
    """Folders reached through a link, by device and inode: each once, so that no cycle of links is endless."""

    def classes(self, names: list[str], above: str, split: str | None) -> None:
        for name in names:
            label = unicodedata.normalize("NFC", name)
            found = self.images(f"{above}{name}/", label, split)
            if not found:
                self.listing.warnings.append(f"class folder {shown(above + name)} holds no images")

    def images(self, start: str, label: str, split: str | None) -> int:
        """List the images below a class folder; return how many."""
        listing = self.listing
        before = len(listing.paths)
        pending = [start]
        while pending:
            folder = pending.pop()
            plain = _is_text(folder)
            inside = self.read(folder, plain)
            pending.extend(f"{folder}{name}/" for name in inside.folders)
            for name in inside.files:
                if (ending := ending_of(name)) in OTHER_IMAGES:
                    reason = f"images of kind .{ending} are not read; save it as JPEG or PNG"
                    self.fail(folder + name, "unsupported_format", reason)
                else:
                    reason = "its name does not end like an image's (.jpg, .png, .webp, .bmp, .gif, .tif)"
                    self.fail(folder + name, "not_an_image", reason)
        found = len(listing.paths) - before
        listing.labels.extend([label] * found)
        if listing.splits is not None:
            listing.splits.extend([split or ""] * found)
        return found

    def read(self, folder: str, take_images: bool | None = None) -> _Inside:
        """Read one folder, its path ending in '/' or ''.

        With `take_images` given, image files go into the listing, or into the ledger where it is False because the
        folder's name is not text; otherwise they are returned with the files.
        """
        inside = _Inside()
        listing = self.listing
        paths, stats = listing.paths, listing.stats
        try:
            descriptor = os.open(listing.root / folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self.fail(folder.rstrip("/"), "unreadable", f"the folder cannot be read: {error.strerror}")
            return inside
        try:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = entry.name
                    # The one hot line of a scan: nearly every entry is an image.
                    if (
                        take_images
                        and is_image_name(name)
                        and name[0] != "."
                        and entry.is_file(follow_symlinks=False)
                        and (name.isascii() or _is_text(name))
                    ):
                        found = entry.stat(follow_symlinks=False)
                        paths.append(folder + name)
                        stats.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns))
                    elif is_hidden(name):
                        listing.ignored["hidden files and folders"] += 1
                    elif entry.is_symlink():
                        self.link(folder, name, inside, take_images)
                    elif entry.is_dir(follow_symlinks=False):
                        inside.folders.append(name)
                    elif take_images is None or not is_image_name(name):
                        inside.files.append(name)
                    elif entry.is_file(follow_symlinks=False):
                        self.fail(folder + name, "bad_name", "its name is not UTF-8 text; rename it")
                    else:
                        self.fail(folder + name, "unreadable", "it is not a regular file")
        finally:
            os.close(descriptor)
        inside.folders.sort()
        return inside

    def link(self, folder: str, name: str, inside: _Inside, take_images: bool | None) -> None:
        """Take in a symbolic link, or say why not."""
        path = folder + name
        if not self.follow_symlinks:
            self.listing.ignored["symbolic links (dataset.follow_symlinks: true follows those that stay inside)"] += 1
            return
        real = os.path.realpath(self.listing.root / path)
        if os.path.commonpath([real, self.real_root]) != self.real_root:
            self.fail(path, "unreadable", f"it is a symbolic link that leaves {self.listing.root}")
            return
        try:
            found = os.stat(real)
        except OSError as error:
            self.fail(path, "unreadable", f"it is a broken symbolic link: {error.strerror}")
            return
        if stat.S_ISDIR(found.st_mode):
            above = {(own.st_dev, own.st_ino) for own in self._folders_above(folder)}
            identity = (found.st_dev, found.st_ino)
            if identity in above or identity in self.linked:
                self.listing.ignored["symbolic links to a folder that is already read"] += 1
            else:
                self.linked.add(identity)
                inside.folders.append(name)
        elif take_images is None or not is_image_name(name):
            inside.files.append(name)
        elif not take_images or not _is_text(name):
            self.fail(path, "bad_name", "its name is not UTF-8 text; rename it")
        elif stat.S_ISREG(found.st_mode):
            self.listing.paths.append(path)
            self.listing.stats.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        else:
            self.fail(path, "unreadable", "it is not a regular file")

    def _folders_above(self, folder: str) -> list[os.stat_result]:
        parts = folder.split("/")[:-1]
        return [os.stat(self.listing.root.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]

    def not_in_a_class(self, folder: str, files: list[str]) -> None:
        for name in files:
            if is_image_name(name):
                self.fail(folder + name, "not_in_a_class", "it is in no class folder, so it has no label")
            else:
                self.fail(folder + name, "not_an_image", "it is in no class folder and no image")

    def fail(self, path: str, status: str, reason: str) -> None:
        self.listing.entries.append(LedgerEntry(shown(path), "", status, reason))


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


def _no_classes(root: Path, top: _Inside) -> str:
    images = sum(is_image_name(name) for name in top.files)
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
