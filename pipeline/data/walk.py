"""What a source lists, not yet opened; the one walk of a folder: images by their content, a line for all that is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.failures import Failure, noticed
from pipeline.data.index import LABEL
from pipeline.errors import DatasetError
from pipeline.images import (
    NO_IMAGE,
    START_BYTES,
    Refused,
    Stat,
    entries,
    inside,
    kind_of,
    open_archive,
    read_elsewhere,
    stat_of,
)
from pipeline.io.remote import address_of

EXTENSIONS = frozenset({
    "apng", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "mpo", "pjp", "pjpeg", "png", "tif", "tiff", "webp",
})  # fmt: skip
"""File name endings, in any case, that say "image" without a look into the file."""

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""How users call a split, in lower case -> how it is called here."""

_HIDDEN = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"})


ListedImage = tuple[str, str | tuple[str, ...], str, str, str, Stat]
"""Path of an image below the root, label, split, group, domain, and what tells whether it was touched; a plain tuple, as there are many.

The label is a tuple where the source has several columns; split, group and domain are '' where it has none.
"""


@dataclass
class Listing:
    """The images of a source as found by one walk, what was passed over, and what the columns of labels are called in the index."""

    root: Path
    images: list[ListedImage] = field(default_factory=list)
    entries: list[Failure] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    names: tuple[str, ...] = (LABEL,)


def is_image_name(name: str) -> bool:
    """Whether a file name ends as an image's does, in any case."""
    return name.rpartition(".")[2].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a name is one that file managers and archivers leave behind."""
    return name[0] == "." or name.lower() in _HIDDEN


def is_folder(path: Path) -> bool | None:
    """Whether a path is a folder of images, on this machine, remote or an archive; False for a file, None where there is nothing."""
    if path.exists() and (path.is_dir() or inside(str(path)) is None):
        return path.is_dir()
    try:
        entries(str(path))
    except NotADirectoryError:
        return False if inside(str(path)) or address_of(path) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatasetError(f"{address_of(path) or path}: {error.strerror or error}") from None
    return True


@dataclass
class Folder:
    """What one folder holds: the names of folders, and of images with what tells whether each was touched."""

    folders: list[str] = field(default_factory=list)
    images: dict[str, Stat] = field(default_factory=dict)


@dataclass
class Walk:
    """A walk below `root`, and what it passed over: `entries` has a line for each file, `ignored` counts of the rest.

    Paths are relative to the root; those of folders end in '/', and the root's own is ''. Symbolic links are followed to files below
    `inside`. The root, or a folder in it, may be an archive, the root also remote.
    """

    root: Path
    inside: str = "/"
    entries: list[Failure] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def below(self, start: str = "") -> Iterator[tuple[str, Folder]]:
        """Yield every folder from `start` down with what it holds, in the order of their names."""
        pending = [start]
        while pending:
            path = pending.pop()
            found = self.read(path)
            pending.extend(f"{path}{name}/" for name in reversed(found.folders))
            yield path, found

    def read(self, path: str) -> Folder:
        """Read one folder."""
        found = Folder()
        try:
            if address_of(self.root) is None and (self.root / path).is_dir():
                self._read(path, found)
            else:
                self._read_elsewhere(path, found)
        except OSError as error:  # also a disk that fails in the middle of it
            told = f"the folder cannot be read to its end: {error.strerror or error}"
            self.pass_over(path.rstrip("/"), "unreadable", told)
        found.folders.sort()
        return found

    def _read(self, path: str, found: Folder) -> None:
        descriptor = os.open(self.root / path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = entry.name
                    # The one hot line of a scan: nearly every entry is an image.
                    if is_image_name(name) and name[0] != "." and entry.is_file(follow_symlinks=False):
                        found.images[name] = stat_of(entry.stat(follow_symlinks=False))
                    elif is_hidden(name):
                        self.ignored["hidden files and folders"] += 1
                    elif entry.is_symlink():
                        self._take_link(path, name, found)
                    elif entry.is_dir(follow_symlinks=False):
                        found.folders.append(name)
                    elif entry.is_file(follow_symlinks=False):
                        self._take(path, name, stat_of(entry.stat(follow_symlinks=False)), found)
                    else:
                        status = "unreadable" if is_image_name(name) else "not_an_image"
                        self.pass_over(path + name, status, "it is not a regular file")
        finally:
            os.close(descriptor)

    def _read_elsewhere(self, path: str, found: Folder) -> None:
        """Read a folder inside an archive, or a remote one."""
        full = f"{self.root}/{path}".rstrip("/")
        archive = open_archive(place[0]) if (place := inside(full)) else None
        if archive is not None and archive.problem and path == "":
            self.pass_over(self.root.name, "truncated", archive.problem)
        for name, entry in sorted(entries(full).items()):
            if is_hidden(name):
                self.ignored["hidden files and folders"] += 1
            elif entry is None:
                found.folders.append(name)
            elif not isinstance(entry, Refused):
                self._take(path, name, entry, found, archive is not None and archive.holds_images)
            elif is_image_name(name):
                self.pass_over(path + name, *entry)
            else:
                self.ignored["files in archives that are no images"] += 1

    def pass_over(self, path: str, status: str, reason: str) -> None:
        """Add a line."""
        self.entries.append(noticed(path, status, reason))

    def _take(self, folder: str, name: str, stats: Stat, found: Folder, is_image: bool = False) -> None:
        """Take in a file that is an image by its name or its content, or say what it is."""
        problem = None if is_image or is_image_name(name) else self._problem(folder + name)
        if problem is not None:
            self.pass_over(folder + name, *problem)
        else:
            found.images[name] = stats

    def _problem(self, path: str) -> tuple[str, str] | None:
        """Say as status and reason why a file's content is not read as an image; None where it is."""
        full = f"{self.root}/{path}"
        try:
            if address_of(full) or not os.path.isfile(full):
                kind = kind_of(read_elsewhere(full, START_BYTES))
            else:
                with open(full, "rb") as file:
                    kind = kind_of(file.read(START_BYTES))
        except OSError as error:
            return "unreadable", f"it cannot be read: {error.strerror}"
        if kind is None:
            return "not_an_image", NO_IMAGE
        return ("unsupported_format", kind.refusal) if kind.refusal else None

    def _take_link(self, folder: str, name: str, found: Folder) -> None:
        """Take in a symbolic link to a file, or say why not."""
        real = os.path.realpath(self.root / folder / name)
        if os.path.commonpath([real, self.inside]) != self.inside:
            self.pass_over(folder + name, "unreadable", f"it is a symbolic link that leaves {self.root}")
        elif not os.path.isfile(real):
            self.pass_over(folder + name, "unreadable", "it is a symbolic link to no file, and is not followed")
        else:
            self._take(folder, name, stat_of(os.stat(real)), found)
