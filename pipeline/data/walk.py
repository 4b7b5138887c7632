"""The one walk of a folder: which files are images by their content, and a line for everything that is passed over."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.failures import Failure, noticed
from pipeline.data.listing import OTHER_IMAGES, ending_of, is_hidden, is_image_name
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
    """What one folder holds: names of folders and of images, and (size, mtime_ns, ctime_ns) of each image."""

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    stats: list[Stat] = field(default_factory=list)


@dataclass
class Walk:
    """A walk below `root`, and what it passed over: `entries` has a line for each file, `ignored` counts of the rest.

    Paths are relative to the root; those of folders end in '/', and the root's own is ''. With `follow_symlinks`, links are
    followed to what lies below `inside`, every folder once. The root, or a folder in it, may be an archive, the root also remote.
    """

    root: Path
    follow_symlinks: bool
    inside: str
    entries: list[Failure] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    _linked: set[tuple[int, int]] = field(default_factory=set, init=False)
    """Folders reached through a link, by device and inode, so that no cycle of links is endless."""

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
        if address_of(self.root) is not None:
            return self._read_elsewhere(path)
        try:
            descriptor = os.open(self.root / path, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError:
            return self._read_elsewhere(path)
        except OSError as error:
            self.pass_over(path.rstrip("/"), "unreadable", f"the folder cannot be read: {error.strerror}")
            return found
        try:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = entry.name
                    # The one hot line of a scan: nearly every entry is an image.
                    if is_image_name(name) and name[0] != "." and entry.is_file(follow_symlinks=False):
                        found.images.append(name)
                        found.stats.append(stat_of(entry.stat(follow_symlinks=False)))
                    elif is_hidden(name):
                        self.ignored["hidden files and folders"] += 1
                    elif entry.is_symlink():
                        self._take_link(path, name, found)
                    elif entry.is_dir(follow_symlinks=False):
                        found.folders.append(name)
                    else:
                        self._take_file(path, name, entry.stat(follow_symlinks=False), found)
        except OSError as error:  # a disk that fails in the middle of it
            self.pass_over(path.rstrip("/"), "unreadable", f"the folder cannot be read to its end: {error.strerror}")
        finally:
            os.close(descriptor)
        found.folders.sort()
        return found

    def _read_elsewhere(self, path: str) -> Folder:
        """Read a folder inside an archive, or a remote one."""
        found, full = Folder(), f"{self.root}/{path}".rstrip("/")
        try:
            archive = open_archive(place[0]) if (place := inside(full)) else None
            if archive is not None and archive.problem and path == "":
                self.pass_over(self.root.name, "truncated", archive.problem)
            for name, entry in sorted(entries(full).items()):
                if is_hidden(name):
                    self.ignored["hidden files and folders"] += 1
                elif entry is None:
                    found.folders.append(name)
                elif isinstance(entry, Refused):
                    if is_image_name(name):
                        self.pass_over(path + name, *entry)
                    else:
                        self.ignored["files in archives that are no images"] += 1
                elif not ((archive and archive.holds_images) or is_image_name(name)) and (
                    problem := self._problem(path + name)
                ):
                    self.pass_over(path + name, *problem)
                else:
                    found.images.append(name)
                    found.stats.append(entry)
        except OSError as error:
            self.pass_over(path.rstrip("/"), "unreadable", f"it cannot be read: {error.strerror or error}")
        return found

    def pass_over(self, path: str, status: str, reason: str) -> None:
        """Add a line."""
        self.entries.append(noticed(path, status, reason))

    def _take_file(self, folder: str, name: str, about: os.stat_result, found: Folder) -> None:
        """Take in a file that is an image by its name or its content, or say what it is."""
        if not stat.S_ISREG(about.st_mode):
            status = "unreadable" if is_image_name(name) else "not_an_image"
            self.pass_over(folder + name, status, "it is not a regular file")
            return
        problem = None if is_image_name(name) else self._problem(folder + name)
        if problem is None:
            found.images.append(name)
            found.stats.append(stat_of(about))
        else:
            self.pass_over(folder + name, *problem)

    def _problem(self, path: str) -> tuple[str, str] | None:
        """Say as status and reason why a file is not read as an image; None where its content is one that can be."""
        try:
            kind = kind_of(self._start(path))
        except OSError as error:
            return "unreadable", f"it cannot be read: {error.strerror}"
        ending = ending_of(path)
        if kind is not None and kind.format == "TIFF" and ending in OTHER_IMAGES:
            return "unsupported_format", f"it is a camera's raw file (.{ending}); save the photo as JPEG or PNG"
        if kind is None and ending in OTHER_IMAGES:
            return "unsupported_format", f"images of kind .{ending} are not read; save it as JPEG or PNG"
        if kind is None:
            return "not_an_image", NO_IMAGE
        if not kind.refusal:
            return None
        return "unsupported_format" if kind.is_image else "not_an_image", kind.refusal

    def _start(self, path: str) -> bytes:
        """Return the first bytes of a file."""
        full = f"{self.root}/{path}"
        if address_of(full) is not None:
            return read_elsewhere(full, START_BYTES)
        try:
            descriptor = os.open(full, os.O_RDONLY | os.O_NONBLOCK)
        except NotADirectoryError:
            return read_elsewhere(full, START_BYTES)
        try:
            return os.read(descriptor, START_BYTES)
        finally:
            os.close(descriptor)

    def _take_link(self, folder: str, name: str, found: Folder) -> None:
        """Take in a symbolic link, or say why not."""
        if not self.follow_symlinks:
            self.ignored["symbolic links (dataset.follow_symlinks: true follows those that stay inside)"] += 1
            return
        path = folder + name
        real = os.path.realpath(self.root / path)
        if os.path.commonpath([real, self.inside]) != self.inside:
            self.pass_over(path, "unreadable", f"it is a symbolic link that leaves {self.root}")
            return
        try:
            about = os.stat(real)
        except OSError as error:
            self.pass_over(path, "unreadable", f"it is a broken symbolic link: {error.strerror}")
            return
        if not stat.S_ISDIR(about.st_mode):
            self._take_file(folder, name, about, found)
        elif (about.st_dev, about.st_ino) in self._linked | self._above(folder):
            self.ignored["symbolic links to a folder that is already read"] += 1
        else:
            self._linked.add((about.st_dev, about.st_ino))
            found.folders.append(name)

    def _above(self, folder: str) -> set[tuple[int, int]]:
        """The folder itself and those above it, by device and inode."""
        parts = folder.split("/")[:-1]
        above = [os.stat(self.root.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]
        return {(about.st_dev, about.st_ino) for about in above}
