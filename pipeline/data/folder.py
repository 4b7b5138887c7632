"""A folder of class folders, or the same below train/, validation/ and test/."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.failures import shown
from pipeline.data.listing import SPLIT_NAMES, Listing
from pipeline.data.shards import add_web_dataset, archives_of, splits_of
from pipeline.data.walk import Folder, Walk
from pipeline.errors import DatasetError
from pipeline.images import entries, forget, inside, open_archive
from pipeline.io.remote import address_of


def list_folder(root: Path, follow_symlinks: bool = False, labelled: bool = True) -> Listing:
    """List the images of a folder whose sub-folders are classes, or splits above classes.

    Sub-folders are splits only when every one of them is called like a split: a class "train" beside "bus" is a class.
    Images any depth below a class folder belong to that class. Labels are folder names in Unicode form NFC. Unless it is `labelled`,
    images lie anywhere and have the label ''.

    Raises
    ------
    DatasetError
        When the folder is missing, or no file, or not laid out in classes.
    """
    forget(str(root))
    root, archives = archives_of(root)
    is_archive = inside(str(root)) is not None and root.suffix.lower() != ".parquet"
    places = [f"{root}/{name}" for name in archives] or ([str(root)] if is_archive or address_of(root) else [])
    for place in places:
        _require_listed(place)
    if not places:
        _require_folder(root)
    if labelled and (archives or is_archive):
        return _list_archives(root, archives)
    walk = Walk(root, follow_symlinks, os.path.realpath(root))
    listing = Listing(root, entries=walk.entries, ignored=walk.ignored)
    if not labelled:
        for start in [f"{name}/" for name in archives] or [""]:
            _add_images(listing, walk, start, "")
        return listing
    _add_layout(listing, walk)
    _warn_of_siblings(listing, root)
    return listing


def _list_archives(root: Path, names: Sequence[str]) -> Listing:
    """List the images in one archive, a folder in it, or several: WebDatasets, or laid out as folders are.

    Several are splits where each is called like one, parts of one data set where they hold class folders, and else classes.
    """
    listing = Listing(root)
    if add_web_dataset(listing, names or [""]):
        return listing
    look = Walk(root, follow_symlinks=False, inside="/")
    tops = [_descend(look, f"{name}/") for name in names]
    walk = Walk(root if names else root / _descend(look, ""), follow_symlinks=False, inside="/")
    listing = Listing(walk.root, entries=walk.entries, ignored=walk.ignored)
    splits = splits_of(names)
    for name in names:
        if problem := open_archive(address_of(root / name) or f"{root}/{name}").problem:
            walk.pass_over(name, "truncated", problem)
    if not names:
        _add_layout(listing, walk)
    elif splits or any(look.read(top).folders for top in tops):
        listing.splits = [] if splits else None
        for top, split in zip(tops, splits or names, strict=True):
            found = walk.read(top)
            _pass_over_images(walk, top, found)
            _add_classes(listing, walk, found.folders, top, split)
    else:
        _add_classes(listing, walk, names, "")
        listing.labels = [name.rpartition("/")[2].partition(".")[0] for name in listing.labels]
    return listing


def _descend(look: Walk, path: str) -> str:
    """Return the folder in an archive that holds the classes: the one in it, where somebody has packed a folder as a whole."""
    while True:
        found = look.read(path)
        below = [look.read(f"{path}{name}/") for name in found.folders] if len(found.folders) == 1 else []
        if found.images or not below or not below[0].folders or found.folders[0].lower() in SPLIT_NAMES:
            return path
        path += f"{found.folders[0]}/"


def _add_layout(listing: Listing, walk: Walk) -> None:
    """List the images below the root of a walk by its class folders, or splits above them."""
    root = address_of(walk.root) or walk.root
    top = walk.read("")
    if not top.folders:
        raise DatasetError(_no_classes(root, top), [each.reason for each in walk.entries if each.status == "truncated"])
    _pass_over_images(walk, "", top)
    splits = {name: SPLIT_NAMES.get(name.lower()) for name in top.folders}
    if all(splits.values()):
        listing.splits = []
        for name, split in splits.items():
            inside = walk.read(f"{name}/")
            if not inside.folders and inside.images:
                raise DatasetError(
                    f"{root}: {shown(name)}/ is called like a split but holds images, not class folders; put each class in its "
                    "own folder below it, or list the images in a CSV manifest (path,label) with dataset.source: manifest"
                )
            _pass_over_images(walk, f"{name}/", inside)
            _add_classes(listing, walk, inside.folders, f"{name}/", split or "")
    else:
        _refuse_half_splits(root, splits)
        _add_classes(listing, walk, top.folders, "")


def _add_classes(listing: Listing, walk: Walk, names: Sequence[str], above: str, split: str = "") -> None:
    """List the images of class folders."""
    for name in names:
        count = _add_images(listing, walk, f"{above}{name}/", unicodedata.normalize("NFC", name))
        if listing.splits is not None:
            listing.splits.extend([split] * count)
        if not count:
            listing.warnings.append(f"class folder {shown(above + name)} holds no images")


def _add_images(listing: Listing, walk: Walk, start: str, label: str) -> int:
    """List all images from a folder down under one label; return how many."""
    before = len(listing.paths)
    for path, found in walk.below(start):
        plain = _is_text(path)
        for file, stats in zip(found.images, found.stats, strict=True):
            if plain and _is_text(file):
                listing.paths.append(path + file)
                listing.stats.append(stats)
            else:
                walk.pass_over(path + file, "bad_name", "its name is not UTF-8 text; rename it")
    count = len(listing.paths) - before
    listing.labels.extend([label] * count)
    return count


def _pass_over_images(walk: Walk, path: str, found: Folder) -> None:
    """Say of images that no class folder holds that they have no label."""
    for name in found.images:
        walk.pass_over(path + name, "not_in_a_class", "it is in no class folder, so it has no label")


def _is_text(name: str) -> bool:
    """Whether a file name is UTF-8; others reach Python with surrogates in place of their bytes."""
    return name.isascii() or name.encode(errors="ignore").decode() == name


def _require_listed(place: str) -> None:
    """See that an archive, or a remote folder, can be listed."""
    try:
        entries(place)
    except OSError as error:
        reason = "there is no such folder" if isinstance(error, FileNotFoundError) else error.strerror or error
        what = f"cannot be listed ({reason})" if address_of(place) else reason
        raise DatasetError(f"{address_of(place) or place}: {what}") from None


def _require_folder(root: Path) -> None:
    if not root.exists():
        raise DatasetError(
            f"{root}: there is no such folder; set dataset.path to the folder that holds one folder per class"
        )
    if not root.is_dir():
        is_manifest = root.suffix.lower() in {".csv", ".parquet"}
        hint = (
            "a manifest file is read with dataset.source: manifest"
            if is_manifest
            else "of archives zip and tar are read"
        )
        raise DatasetError(f"{root}: is a file, expected a folder that holds one folder per class; {hint}")


def _refuse_half_splits(root: Path | str, splits: Mapping[str, str | None]) -> None:
    """Classes called train and test that hold nothing but folders are splits with something else beside them."""
    named = [name for name, split in splits.items() if split]
    if len({splits[name] for name in named}) < 2:
        return
    look = Walk(Path(root), follow_symlinks=True, inside="/")  # the listing's own walk will say what is wrong in there
    found = [look.read(f"{name}/") for name in named]
    if not all(folder.folders for folder in found) or any(folder.images for folder in found):
        return
    others = ", ".join(f"{shown(name)}/" for name, split in splits.items() if not split)
    raise DatasetError(
        f"{root}: {', '.join(f'{shown(name)}/' for name in named)} look like splits above class folders, but {others} beside them "
        "does not; move it elsewhere, or list the images in a CSV manifest with dataset.source: manifest"
    )


def _no_classes(root: Path | str, top: Folder) -> str:
    if top.images:
        return (
            f"{root}: holds {len(top.images):,} images but no class folders; put the images of each class in a folder of its own, "
            "or list them in a CSV manifest (path,label) with dataset.source: manifest; `manyheads embed` takes photos that have no "
            "labels yet"
        )
    return f"{root}: holds no class folders; expected one folder per class with its images inside"


def _warn_of_siblings(listing: Listing, root: Path) -> None:
    """A user who gives train/ itself may not know that the test/ beside it is never read."""
    if root.name.lower() not in SPLIT_NAMES or address_of(root):
        return
    near = sorted(root.resolve().parent.iterdir())
    beside = [
        path.name for path in near if path.name.lower() in SPLIT_NAMES and path.name != root.name and path.is_dir()
    ]
    if beside:
        listing.warnings.append(
            f"{root} is read alone; to use {', '.join(beside)} beside it as well, give {root.parent} as dataset.path"
        )
