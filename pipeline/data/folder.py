"""List the images of a source without opening them: folders of classes, with or without split folders above, archives and WebDatasets.
Every file that is passed over gets an entry with the reason.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import ARCHIVES
from pipeline.data.failures import Failure, noticed, shown
from pipeline.data.index import LABEL
from pipeline.errors import DatasetError, first, number_of
from pipeline.images import (
    NO_IMAGE,
    START_BYTES,
    Refused,
    Stat,
    entries,
    forget,
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
"""File name suffixes, in any case, that identify an image without reading the file."""

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""A split's name in the data, in lower case -> its name in the index."""

_HIDDEN = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"})


ListedImage = tuple[str, str | tuple[str, ...], str, str, str, int, int, int]
"""Path of an image below the root, label, split, group, domain, and the three numbers of its `Stat`; a plain tuple for speed.

The label is a tuple if the source has several label columns; split, group and domain are '' if the source has none.
"""


def is_image_name(name: str) -> bool:
    """Whether a file name has an image suffix, in any case."""
    return name.rpartition(".")[2].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a name belongs to the hidden files that file managers and archivers create."""
    return name[0] == "." or name.lower() in _HIDDEN


def is_folder(path: Path) -> bool | None:
    """Whether a path is a folder of images, which may be remote or an archive; False for a file, None if nothing is there."""
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
    """The contents of one folder: subfolders, and images with the `Stat` that shows later changes."""

    folders: list[str] = field(default_factory=list)
    images: dict[str, Stat] = field(default_factory=dict)


@dataclass
class Listing:
    """The contents of a source below `root`: its images, an entry for each file passed over, and counts of the rest.

    `below` and `read` walk folders without adding images. Paths are relative to the root; those of folders end in '/', and the root's
    own is ''. Symbolic links are followed to files below `inside`. The root, or a folder in it, may be an archive; the root may also be
    remote. `names` are the label columns' names in the index.
    """

    root: Path
    inside: str = "/"
    images: list[ListedImage] = field(default_factory=list)
    entries: list[Failure] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    names: tuple[str, ...] = (LABEL,)

    def below(self, start: str = "") -> Iterator[tuple[str, Folder]]:
        """Yield every folder from `start` down with its contents, sorted by name."""
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
        except OSError as error:  # including a disk that fails midway
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
                    # The hot path of a scan: nearly every entry is an image.
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
        """Read a folder that is remote or inside an archive."""
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
        """Add an entry for a file that is not used."""
        self.entries.append(noticed(path, status, reason))

    def _take(self, folder: str, name: str, stats: Stat, found: Folder, is_image: bool = False) -> None:
        """Add a file that is an image by its name or its content, or an entry with the reason why not."""
        problem = None if is_image or is_image_name(name) else self._problem(folder + name)
        if problem is not None:
            self.pass_over(folder + name, *problem)
        else:
            found.images[name] = stats

    def _problem(self, path: str) -> tuple[str, str] | None:
        """Return the status and reason if a file's content is not a readable image; None if it is."""
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
        """Add the target of a symbolic link to a file, or an entry with the reason why not."""
        real = os.path.realpath(self.root / folder / name)
        if os.path.commonpath([real, self.inside]) != self.inside:
            self.pass_over(folder + name, "unreadable", f"it is a symbolic link that leaves {self.root}")
        elif not os.path.isfile(real):
            self.pass_over(folder + name, "unreadable", "it is a symbolic link to no file, and is not followed")
        else:
            self._take(folder, name, stat_of(os.stat(real)), found)


# ---- the meaning of folders

LABELS = ("cls", "json", "txt")
"""Suffixes of the files next to an image that hold its label, most reliable first."""

KEYS = ("label", "cls", "class", "class_name")
"""Keys of the label in a .json file."""

MOST = 10
"""Number of missing files listed in an error."""


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern for several files: `shard-{000..003}.tar`, `{train,test}.zip`."""
    return "{" in path and not os.path.lexists(path)


def archives_of(path: Path, endings: tuple[str, ...] = ARCHIVES) -> tuple[Path, list[str]]:
    """Return the folder and names of the archives matching a pattern, or in a folder of archives only; no names otherwise.

    DatasetError if a pattern names files that do not exist.
    """
    text = address_of(path) or str(path)
    if is_pattern(text):
        found = list(_braces(text))
        missing = [name for name in found if address_of(name) is None and not os.path.exists(name)]
        if missing:
            raise DatasetError(f"{text}: {len(missing)} of {len(found)} files are not there", first(missing, MOST))
        folder = os.path.commonpath([os.path.dirname(name) for name in found])
        return Path(folder), [name[len(address_of(folder) or folder) :].lstrip("/") for name in found]
    if inside(text) is not None:
        return path, []
    try:
        if address_of(text) is None:
            held = {each.name: each.is_dir() for each in os.scandir(text)}
        else:
            held = {name: entry is None for name, entry in entries(text).items()}
    except OSError:
        return path, []  # not a folder: the code that reads it reports the problem
    names = sorted(name for name in held if not is_hidden(name))
    archives = [name for name in names if name.lower().endswith(endings)]
    others = [name for name in names if name not in archives and (is_image_name(name) or held[name])]
    return path, [] if others else archives


def _braces(text: str) -> Iterator[str]:
    """Expand `{a,b}` and `{000..003}` as a shell does."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        yield text
        return
    words = found[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        words = [f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    for word in words:
        yield from _braces(text[: found.start()] + word + text[found.end() :])


def splits_of(names: Sequence[str]) -> list[str]:
    """Return the split named at the start of each archive's name or folder: `train-0001.tar`; '' for all unless all have one."""
    words = [[re.split(r"[-_.]", part)[0].lower() for part in name.split("/")] for name in names]
    found = [next((SPLIT_NAMES[word] for word in parts if word in SPLIT_NAMES), "") for parts in words]
    return found if all(found) else [""] * len(names)


def list_folder(root: Path, labelled: bool = True) -> Listing:
    """List the images of a folder whose subfolders are classes, or splits that contain classes.

    Subfolders are splits only if all of them have the name of a split: "train" next to "bus" is a class.
    Images at any depth below a class folder belong to that class. Labels are folder names in Unicode form NFC. Without `labelled`,
    images may be anywhere and get the label ''. DatasetError if the folder is missing, is a file, or has no class folders.
    """
    forget(str(root))
    root, archives = archives_of(root)
    is_archive = inside(str(root)) is not None and root.suffix.lower() != ".parquet"
    places = [f"{root}/{name}" for name in archives] or ([str(root)] if is_archive or address_of(root) else [])
    for place in places:
        try:
            entries(place)
        except OSError as error:
            reason = "there is no such folder" if isinstance(error, FileNotFoundError) else error.strerror or error
            raise DatasetError(f"{address_of(place) or place}: {reason}") from None
    if not places and not root.is_dir():
        raise DatasetError(
            f"{root}: {'is a file' if root.exists() else 'there is no such folder'}; dataset.path is the folder that holds one folder "
            "per class, or an archive (zip, tar) of it; a manifest (.csv, .parquet) is read with dataset.source: manifest"
        )
    if labelled and (archives or is_archive):
        return _list_archives(root, archives)
    listing = Listing(root, os.path.realpath(root))
    if labelled:
        _add_layout(listing)
    for start in () if labelled else [f"{name}/" for name in archives] or [""]:
        _add_images(listing, start, "")
    return listing


def _list_archives(root: Path, names: Sequence[str]) -> Listing:
    """List the images of an archive, a folder in it, or several archives: WebDatasets, or class folders; each archive may be a split."""
    listing = Listing(root)
    if _add_web_dataset(listing, names or [""]):
        return listing
    look = Listing(root)
    if not names:
        listing = Listing(root / _descend(look, ""))
        _add_layout(listing)
    for name, split in zip(names, splits_of(names), strict=True):
        if problem := open_archive(address_of(root / name) or f"{root}/{name}").problem:
            listing.pass_over(name, "truncated", problem)
        top = _descend(look, f"{name}/")
        _add_classes(listing, listing.read(top), top, split)
    return listing


def _descend(look: Listing, path: str) -> str:
    """Return the folder in an archive that contains the classes, skipping the outer folder if a whole folder was packed."""
    while True:
        found = look.read(path)
        below = [look.read(f"{path}{name}/") for name in found.folders] if len(found.folders) == 1 else []
        if found.images or not below or not below[0].folders or found.folders[0].lower() in SPLIT_NAMES:
            return path
        path += f"{found.folders[0]}/"


def _add_layout(listing: Listing) -> None:
    """List the images below the root by class folders, or by splits that contain them."""
    top = listing.read("")
    splits = [SPLIT_NAMES.get(name.lower(), "") for name in top.folders]
    if not top.folders or not all(splits):
        _refuse_half_splits(listing.root, dict(zip(top.folders, splits, strict=True)))
        _add_classes(listing, top, "", "")
        return
    _pass_over_images(listing, top, "")
    for name, split in zip(top.folders, splits, strict=True):
        found = listing.read(f"{name}/")
        if found.folders or found.images:
            _add_classes(listing, found, f"{name}/", split)


def _pass_over_images(listing: Listing, found: Folder, path: str) -> None:
    for name in found.images:
        listing.pass_over(path + name, "not_in_a_class", "it is in no class folder, so it has no label")


def _add_classes(listing: Listing, found: Folder, above: str, split: str) -> None:
    """List the images of all class folders in a folder; DatasetError if there are none."""
    if not found.folders:
        place = f"{address_of(listing.root) or listing.root}/{above}".rstrip("/")
        raise DatasetError(
            f"{place}: holds no class folders ({number_of(len(found.images), 'image')} at its top); put the images of each class in a "
            "folder of its own, or list them in a CSV manifest (path,label) with dataset.source: manifest; `manyheads embed` takes "
            "photos that have no labels yet",
            [each.reason for each in listing.entries if each.status == "truncated"],
        )
    _pass_over_images(listing, found, above)
    for name in found.folders:
        if not _add_images(listing, f"{above}{name}/", unicodedata.normalize("NFC", name), split):
            listing.warnings.append(f"class folder {shown(above + name)} holds no images")


def _add_images(listing: Listing, start: str, label: str, split: str = "") -> bool:
    """List all images below a folder with one label; return whether there are any."""
    before = len(listing.images)
    for path, found in listing.below(start):
        plain = _is_text(path)
        for file, stat in found.images.items():
            if plain and (file.isascii() or _is_text(file)):
                listing.images.append((path + file, label, split, "", "", *stat))
            else:
                listing.pass_over(path + file, "bad_name", "its name is not UTF-8 text; rename it")
    return len(listing.images) > before


def _is_text(name: str) -> bool:
    """Whether a file name is valid UTF-8; Python represents other bytes by surrogates."""
    return name.encode(errors="ignore").decode() == name


def _refuse_half_splits(root: Path, splits: Mapping[str, str]) -> None:
    """Raise DatasetError for folders such as train and test that contain only folders, next to one that is no split."""
    named = [name for name, split in splits.items() if split]
    look = Listing(root)  # the listing's own walk reports problems in there
    found = [look.read(f"{name}/") for name in named]
    if len(named) > 1 and all(folder.folders and not folder.images for folder in found):
        others = ", ".join(shown(name) for name in splits if name not in named)
        raise DatasetError(
            f"{address_of(root) or root}: {', '.join(map(shown, named))} look like splits above class folders, but {others} beside them "
            "does not; move it elsewhere, or list the images in a CSV manifest with dataset.source: manifest"
        )


def _add_web_dataset(listing: Listing, names: Sequence[str]) -> bool:
    """List the images of archives whose labels are in files with the same key; return False if they are not WebDatasets.

    They are if there is a .cls file, or a .json or .txt file and no folders. `names` are relative to the root, '' is the root itself.
    """
    places = {name: f"{address_of(listing.root) or listing.root}/{name}".rstrip("/") for name in names}
    found = {name: _samples(place) for name, place in places.items()}
    endings = {ending for samples in found.values() for files in samples.values() for ending in files}
    bare = not any("/" in key for samples in found.values() for key in samples)
    if "cls" not in endings and not (bare and endings.intersection(LABELS)):
        return False
    for name, split in zip(names, splits_of(names), strict=True):
        archive = open_archive(places[name])
        if archive.problem:
            listing.pass_over(name or listing.root.name, "truncated", archive.problem)
        for files in found[name].values():
            label = _label(places[name], files)
            for image in filter(is_image_name, files.values()):
                path, about = f"{name}/{image}".lstrip("/"), archive.members[image]
                if isinstance(about, Refused):
                    listing.pass_over(path, *about)
                elif not label:
                    told = "it has no label: no .cls, .json or .txt of its key says one"
                    listing.pass_over(path, "not_in_a_class", told)
                else:
                    listing.images.append((path, label, split, "", "", *about))
    return True


def _samples(place: str) -> Mapping[str, Mapping[str, str]]:
    """Return the images of an archive with their accompanying files: key (the path up to the first dot of the name) -> suffix -> member."""
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    for member in open_archive(place).members if inside(place) == (place, "") else ():
        folder, slash, file = member.rpartition("/")
        key, _, ending = file.partition(".")
        if not is_hidden(file):
            samples[folder + slash + key][ending.lower()] = member
    return {key: files for key, files in samples.items() if any(map(is_image_name, files.values()))}


def _label(place: str, files: Mapping[str, str]) -> str:
    """Return the label of an image from its most reliable label file; '' if none has one."""
    for ending in LABELS:
        try:
            text = read_elsewhere(f"{place}/{files[ending]}").decode().strip()
            said = json.loads(text) if ending == "json" else text
        except (KeyError, OSError, ValueError):
            continue
        if isinstance(said, dict):
            said = next((said[key] for key in KEYS if key in said), "")
        if isinstance(said, str | int) and str(said):
            return unicodedata.normalize("NFC", str(said))
    return ""
