"""Several archives that are one data set: patterns of names, their splits, and the labels of WebDataset beside its images."""

from __future__ import annotations

import glob
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ARCHIVES
from pipeline.data.failures import noticed
from pipeline.data.listing import SPLIT_NAMES, Listing, is_hidden, is_image_name
from pipeline.errors import DatasetError, first
from pipeline.images import Refused, entries, image_columns, inside, open_archive, opened, read_elsewhere
from pipeline.io.remote import address_of, file_system

LABELS = ("cls", "json", "txt")
"""Endings of files with the label of the image beside them, the surest first."""

KEYS = ("label", "cls", "class", "class_name")
"""Under which names a .json holds it."""

MOST = 10
"""Missing files that are named."""


def is_pattern(path: str) -> bool:
    """Whether a path stands for several: `shard-{000..003}.tar`, `*.tar`."""
    return bool(re.search(r"[*{]", path)) and not os.path.lexists(path)


def archives_of(path: Path, endings: tuple[str, ...] = ARCHIVES) -> tuple[Path, list[str]]:
    """Return the folder and the names of the archives that a pattern means, or a folder that holds nothing else; no names otherwise.

    Raises
    ------
    DatasetError
        When a pattern means none, or files that are not there.
    """
    text = address_of(path) or str(path)
    if is_pattern(text):
        found = [name for each in _braces(text) for name in _matches(each)]
        if not found:
            raise DatasetError(f"{text}: no file is called so; expected archives such as shard-{{000..003}}.tar")
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
        return path, []  # no folder: whoever reads it will say what is wrong
    names = sorted(name for name in held if not is_hidden(name))
    archives = [name for name in names if name.lower().endswith(endings)]
    others = [name for name in names if name not in archives and (is_image_name(name) or held[name])]
    return path, [] if others else archives


def _braces(text: str) -> Iterator[str]:
    """Yield what a shell makes of `{a,b}` and `{000..003}`."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        yield text
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
    for word in [f"{number:0{len(span[1])}d}" for number in numbers] if span else found[1].split(","):
        yield from _braces(text[: found.start()] + word + text[found.end() :])


def _matches(text: str) -> list[str]:
    """Return the files that a name with `*` means; one without is itself."""
    if "*" not in text:
        return [text]
    if address_of(text) is None:
        return sorted(glob.glob(text))
    system, name = file_system(text)
    before = text.removesuffix(name.lstrip("/"))  # protocol and host, which some file systems leave out
    return sorted(before + each.lstrip("/") for each in system.glob(name))


def splits_of(names: Sequence[str]) -> list[str]:
    """Return the split that each archive's name, or a folder above it, begins with: `train-0001.tar`; nothing unless all do."""
    words = [[re.split(r"[-_.]", part)[0].lower() for part in name.split("/")] for name in names]
    found = [next((SPLIT_NAMES[word] for word in parts if word in SPLIT_NAMES), "") for parts in words]
    return found if all(found) else []


def add_web_dataset(listing: Listing, names: Sequence[str]) -> bool:
    """List the images of archives whose labels are files of the same key beside them; False where these are no such archives.

    They are if there is a .cls, or a .json or .txt beside images that no folder holds. `names` are relative to the root, '' itself.
    """
    splits = splits_of(names)
    root = address_of(listing.root) or str(listing.root)
    found = {name: _samples(f"{root}/{name}".rstrip("/")) for name in names}
    endings = {ending for samples in found.values() for files in samples.values() for ending in files}
    bare = not any("/" in key for samples in found.values() for key in samples)
    if "cls" not in endings and not (bare and endings.intersection(LABELS)):
        return False
    listing.splits = [] if splits else None
    for name, split in zip(names, splits or names, strict=True):
        place = f"{root}/{name}".rstrip("/")
        archive = open_archive(place)
        if archive.problem:
            listing.entries.append(noticed(name or listing.root.name, "truncated", archive.problem))
        for files in found[name].values():
            label = _label(place, files)
            for image in filter(is_image_name, files.values()):
                path, about = f"{name}/{image}".lstrip("/"), archive.members[image]
                if isinstance(about, Refused):
                    listing.entries.append(noticed(path, *about))
                elif not label:
                    told = "it has no label: no .cls, .json or .txt of its key says one"
                    listing.entries.append(noticed(path, "not_in_a_class", told))
                else:
                    listing.paths.append(path)
                    listing.labels.append(label)
                    listing.stats.append(about)
                    if listing.splits is not None:
                        listing.splits.append(split)
    return True


def _samples(place: str) -> Mapping[str, Mapping[str, str]]:
    """Return the images of an archive with what lies beside them, by key, the path up to the first dot of a name, and by ending."""
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    for member in open_archive(place).members if inside(place) == (place, "") else ():
        folder, slash, file = member.rpartition("/")
        key, _, ending = file.partition(".")
        if not is_hidden(file):
            samples[folder + slash + key][ending.lower()] = member
    return {key: files for key, files in samples.items() if any(map(is_image_name, files.values()))}


def _label(place: str, files: Mapping[str, str]) -> str:
    """Return the label of an image, from the surest file that says one; '' where none does."""
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


def table_of_images(folder: Path, names: Sequence[str], column: str) -> Any:
    """Return the columns of Parquet files with images as one Arrow table, with the images' paths in place of their bytes.

    Numbers that the files' own description, as Hugging Face writes it, gives names to become those names; where each file is
    called like a split, that is a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    splits, parts = splits_of(names), []
    for name, split in zip(names, splits or names, strict=True):
        place = f"{address_of(folder) or folder}/{name}"
        with opened(place) as file:
            source = pq.ParquetFile(file)
            images = image_columns(source.schema_arrow)
            table = source.read(columns=[each for each in source.schema_arrow.names if each not in images])
            features = json.loads((source.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        for title, about in features.get("info", {}).get("features", {}).items():
            if title in table.column_names:
                place_of = table.column_names.index(title)
                table = table.set_column(place_of, title, _named(table[title], about))
        members = [each for each in open_archive(place).members if each.rpartition("/")[0] in ("", column)]
        paths = pa.array([f"{name}/{member}" for member in members], pa.large_string())
        table = pa.table({**{title: table[title] for title in table.column_names}, column: paths})
        if splits and "split" not in table.column_names:
            table = table.append_column("split", pa.array([split] * len(table)))
        parts.append(table)
    return pa.concat_tables(parts, promote_options="permissive")


def _named(column: Any, about: Any) -> Any:
    """Return a column of class numbers, or of lists of them, as the names in its description; as it is where there are none."""
    import pyarrow as pa

    inner = about.get("feature", about) if isinstance(about, dict) else about
    if not isinstance(inner, dict) or not inner.get("names"):
        return column
    name = dict(enumerate(inner["names"])).get
    return pa.array([[*map(name, cell)] if isinstance(cell, list) else name(cell) for cell in column.to_pylist()])
