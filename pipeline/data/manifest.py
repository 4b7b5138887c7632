"""A manifest: a table of images with their labels, splits and groups, as a CSV or Parquet file or from Python.

The columns are `path,label[,split][,group]` unless the config names others; paths are relative to `dataset.root`, by default the
manifest's own folder, or absolute and inside it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from pipeline.config import NO_LABELS, DatasetConfig, guess, parse
from pipeline.data.failures import shown
from pipeline.data.folder import SPLIT_NAMES, Listing, archives_of, is_folder, splits_of
from pipeline.data.index import EXCLUDED, LABEL, SEPARATOR
from pipeline.errors import DatasetError, first, number_of
from pipeline.images import Refused, Stat, entries, forget, image_columns, open_archive, opened, stat_of
from pipeline.io.files import make_folder, write_atomic
from pipeline.io.remote import address_of

MOST_PROBLEMS = 50
"""Number of problems listed in one error."""

SPLITS = {**SPLIT_NAMES, EXCLUDED: EXCLUDED}
"""A split's name in a manifest -> its name in the index; `excluded` images are not used."""


NamedImage = tuple[str, str | tuple[str, ...], str, str, str]
"""The content of one row: path, label, split, group, domain."""


class ManifestTable(NamedTuple):
    """A manifest as read: the column names, the location of each row ('line 7'), and a function that returns a column by position."""

    header: list[str]
    where: list[str]
    column: Callable[[int], list[str]]


def list_manifest(path: Path, config: DatasetConfig) -> Listing:
    """List the images in a manifest; missing files are recorded as failures, invalid rows raise a DatasetError."""
    for place in (path, config.root):
        forget(str(place))
    folder, names = archives_of(path, (".parquet",))
    files = [folder / name for name in names] or [path]
    if files[0].exists() and not files[0].is_file():
        raise DatasetError(
            f"{path}: is no file, expected a CSV or Parquet file; class folders are read with dataset.source: folder"
        )
    if files[0].suffix.lower() != ".parquet":
        problems: list[str] = []
        return _listing(path, _csv_table(path, problems), config, problems)
    try:
        with opened(str(files[0])) as file:
            schema = pyarrow.parquet.read_schema(file)
        images = image_columns(schema)
        if config.path_column in images or (images and config.path_column is None and "path" not in schema.names):
            if config.path_column is None and len(images) > 1:
                raise DatasetError(
                    f"{path}: has images in {', '.join(images)}; set dataset.path_column to the one to read"
                )
            column, root = config.path_column or images[0], folder if names else path.parent
            table = _table_of_images(root, names or [path.name], column)
            config = config.model_copy(update={"path_column": column, "root": str(root)})
        elif names:
            raise DatasetError(
                f"{folder}: its Parquet files have no column of images; expected one of bytes, or of a struct with bytes"
            )
        else:
            with opened(str(path)) as file:
                table = pyarrow.parquet.read_table(file)
        problems = []
        return _listing(path, _arrow_table(table, config, problems), config, problems)
    except (pa.ArrowException, OSError) as error:
        reason = "there is no such file" if isinstance(error, NotADirectoryError) else " ".join(str(error).split())
        raise DatasetError(f"{path}: cannot be read as Parquet ({reason})") from None


def manifest(table: Any, path: str | Path, **keys: Any) -> dict[str, Any]:
    """Write a table as a manifest that every command can read, and return the `dataset:` section of a config for it.

    `table` is a DataFrame of pandas or Polars, a pyarrow Table, or a dict of columns; `path` is a Parquet file, written only if
    the table is valid; `keys` are those of the config: `root`, `path_column`, `label_columns`, `label_separator`, ...

    ConfigError with all invalid keys, DatasetError with all invalid rows.
    """
    path = Path(path)
    if path.suffix.lower() != ".parquet":
        raise DatasetError(f"{path}: a table is written as Parquet; give a name that ends in .parquet")
    # Polars's own conversion uses types that can be cast; pyarrow's conversion would keep types of Polars.
    arrow = table.to_arrow() if hasattr(table, "to_arrow") else pa.table(table)
    section = {"source": "manifest", "path": str(path), **keys}
    config = parse({"dataset": section, "backbones": [{"name": "any"}]}, str(path)).dataset
    problems: list[str] = []
    _listing(path, _arrow_table(arrow, config, problems), config, problems)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(arrow, sink)
    make_folder(path.parent)
    write_atomic(path, sink.getvalue())
    return section


def _listing(origin: Path, table: ManifestTable, config: DatasetConfig, problems: list[str]) -> Listing:
    """Check the rows of a table and list their images; DatasetError with all problems, including `problems` from reading it."""
    root = origin.parent if config.root is None else Path(config.root.removeprefix("file://")).expanduser()
    if not is_folder(root):
        raise DatasetError(f"{root}: there is no such folder; set dataset.root to the one that holds the images")
    labelled = config.target != NO_LABELS
    listing = Listing(root, names=config.label_columns if labelled and len(config.label_columns) > 1 else (LABEL,))
    inside = "the manifest's folder" if config.root is None else str(root)
    roots = {f"{address_of(root) or os.path.abspath(root)}/", f"{os.path.realpath(root)}/"}
    several = [kind == "multilabel" for kind in config.kinds]
    # Several columns of a single target hold 0 or 1, never lists.
    lists = any(several) and len(several) == len(config.label_columns)
    separator = config.label_separator or (SEPARATOR if lists else None)
    rows: list[NamedImage] = []
    seen: dict[str, str] = {}
    nothing = [""] * len(table.where)
    places = _places(origin, config, listing, table.header)
    columns = [nothing if place is None else table.column(place) for place in places]
    for where, name, split, group, domain, *labels in zip(table.where, *columns, strict=True):
        split = split.strip()
        name = next((name.removeprefix(start) for start in roots if name.startswith(start)), name)
        if separator is not None:
            taken = separator != SEPARATOR and any(SEPARATOR in label for label in compress(labels, several))
            problems += [f"{where}: a label holds {SEPARATOR!r}, which stands between labels in the index"] * taken
            for place in np.flatnonzero(several).tolist():
                words = map(str.strip, labels[place].split(separator))
                labels[place] = SEPARATOR.join(dict.fromkeys(filter(None, words)))
        labels = labels or [""]
        found = [problem] if (problem := _path_problem(name, inside)) else []
        if labelled and not any(several) and not any(map(str.strip, labels)):
            found.append("the label is empty")
        found += ["a label holds a NUL character"] * any("\0" in label for label in labels)
        name = "/".join(part for part in name.split("/") if part not in {"", "."})
        if not found and name in seen:
            found.append(f"path {shown(name)!r} is listed before, at {seen[name]}")
        if split.lower() not in ("", *SPLITS):
            found.append(f"unknown split {split!r}, expected train, validation, test or {EXCLUDED}")
        if not domain.strip() and config.domain_column:
            found.append("the domain is empty")
        seen.setdefault(name, where)
        problems += [f"{where}: {problem}" for problem in found]
        label = labels[0] if len(labels) == 1 else tuple(labels)
        rows.append((name, label, SPLITS.get(split.lower(), ""), group, domain))
    unsplit = [split for _, _, split, _, _ in rows].count("")
    if 0 < unsplit < len(rows):
        problems.append(f"{unsplit:,} rows have no split, though others have one")
    if config.domain_column and len(domains := {domain for *_, domain in rows}) == 1:
        problems.append(f"all images are of one domain, {domains.pop()!r}; expected at least 2")
    if problems:
        raise DatasetError(f"{origin}: {number_of(len(problems), 'problem')}", first(problems, MOST_PROBLEMS))
    _find_files(listing, rows)
    return listing


def _places(origin: Path, config: DatasetConfig, listing: Listing, header: Sequence[str]) -> list[int | None]:
    """Return the positions of path, split, group, domain and labels in a row, by exact names or else ignoring case and surrounding spaces;
    None for an absent optional column.
    """
    wanted = [
        ("path_column", config.path_column or "path", True),
        ("split_column", config.split_column or "split", config.split_column is not None),
        ("group_column", config.group_column or "group", config.group_column is not None),
        ("domain", config.domain_column, bool(config.domain_column)),
        *(("label_columns", name, True) for name in config.label_columns if config.target != NO_LABELS),
    ]
    found: list[int | None] = []
    problems = []
    for key, name, needed in wanted:
        places = [place for place, column in enumerate(header) if column == name] or [
            place for place, column in enumerate(header) if column.strip().lower() == name.strip().lower()
        ]
        if len(places) > 1:
            problems.append(f"column {name!r} appears {len(places)} times; set dataset.{key} to a unique name")
        elif not places and needed:
            problems.append(f"there is no column {name!r}{guess(name, header)}; set dataset.{key} to its name")
        found.append(places[0] if places else None)
    if problems:
        columns = f"its columns are {', '.join(header) or 'none'}"
        raise DatasetError(f"{origin}: {number_of(len(problems), 'problem')}", [*problems, columns])
    others = [name.strip() for place, name in enumerate(header) if place not in found]
    if others:
        listing.warnings.append(f"{origin}: columns not used: {', '.join(others)}")
    return found


def _path_problem(name: str, inside: str) -> str | None:
    """Return why a path in a manifest must not be opened; None if it may."""
    parts = name.split("/")
    if {*parts} <= {"", "."}:
        return f"path {shown(name)!r} names no file"
    if "\\" in name or "\0" in name:
        return f"path {shown(name)!r} has a backslash or a NUL character; write it with '/'"
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
        return f"path {shown(name)!r} is not inside {inside}; set dataset.root to the folder that holds all images"
    return None


def _csv_table(path: Path, problems: list[str]) -> ManifestTable:
    """Read a CSV file; rows of a different length than the header are added to `problems`."""
    line, where, rows = 1, list[str](), list[list[str]]()
    try:
        with io.TextIOWrapper(opened(str(path)), encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first_line.count), strict=True)
            header = next(reader, [])
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    where.append(f"line {line}")
                    rows.append(row)
                elif row:
                    told = f"{number_of(len(row), 'value')}, expected {len(header)}; quote values that hold a comma"
                    problems.append(f"line {line}: {told}")
                line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} line {line}: is no CSV in UTF-8 ({error})") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or 'there is no such file'})") from None
    return ManifestTable(header, where, lambda place: [row[place] for row in rows])


def _arrow_table(table: Any, config: DatasetConfig, problems: list[str]) -> ManifestTable:
    """Read a pyarrow Table; lists of labels are joined, and labels that contain the separator are added to `problems`."""
    separator = config.label_separator or SEPARATOR

    def texts_of(place: int) -> list[str]:
        column = table.column(place)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = column.cast(pa.list_(pa.string()))
            if pc.any(pc.match_substring(column.combine_chunks().flatten(), separator)).as_py():
                name = table.column_names[place]
                problems.append(
                    f"a label of column {name!r} holds {separator!r}; set dataset.label_separator to what none holds"
                )
            column = pc.binary_join(column, separator)
        return column.cast(pa.large_string()).fill_null("").to_pylist()  # type: ignore[no-any-return]

    return ManifestTable(table.column_names, [f"row {number + 1}" for number in range(len(table))], texts_of)


def _table_of_images(folder: Path, names: Sequence[str], column: str) -> Any:
    """Return the columns of Parquet files with images as one Arrow table, with the images' paths in place of their bytes.

    Class numbers become names if the files have Hugging Face metadata with names; if every file
    is named like a split, a split column is added.
    """
    parts = []
    for name, split in zip(names, splits_of(names), strict=True):
        place = f"{address_of(folder) or folder}/{name}"
        with opened(place) as file:
            source = pyarrow.parquet.ParquetFile(file)
            images = image_columns(source.schema_arrow)
            table = source.read(columns=[each for each in source.schema_arrow.names if each not in images])
            features = json.loads((source.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        for title, about in features.get("info", {}).get("features", {}).items():
            if title in table.column_names:
                table = table.set_column(table.column_names.index(title), title, _named(table[title], about))
        members = [each for each in open_archive(place).members if each.rpartition("/")[0] in ("", column)]
        paths = pa.array([f"{name}/{member}" for member in members], pa.large_string())
        table = pa.table({**{title: table[title] for title in table.column_names}, column: paths})
        if split and "split" not in table.column_names:
            table = table.append_column("split", pa.array([split] * len(table)))
        parts.append(table)
    return pa.concat_tables(parts, promote_options="permissive")


def _named(column: Any, about: Any) -> Any:
    """Return a column of class numbers, or of lists of them, as the names in its description; unchanged if there are none."""
    inner = about.get("feature", about) if isinstance(about, dict) else about
    if not isinstance(inner, dict) or not inner.get("names"):
        return column
    name = dict(enumerate(inner["names"])).get
    return pa.array([[*map(name, cell)] if isinstance(cell, list) else name(cell) for cell in column.to_pylist()])


def _find_files(listing: Listing, rows: Sequence[NamedImage]) -> None:
    """Add rows whose file exists to the listing as images, the others as failures."""
    look = _whereabouts(listing.root)
    for row in rows:
        try:
            found = look(row[0])
        except (FileNotFoundError, NotADirectoryError):
            found = Refused("missing", "there is no such file")
        except (OSError, UnicodeEncodeError) as error:
            found = Refused("unreadable", f"it cannot be read: {getattr(error, 'strerror', None) or error}")
        if isinstance(found, Refused):
            listing.pass_over(row[0], *found)
        else:
            listing.images.append((*row, *found))


def _whereabouts(root: Path) -> Callable[[str], Stat | Refused]:
    """Return a function from a path below a root, possibly remote or in archives, to its `Stat` or a refusal; folders are listed once."""
    address = address_of(root)
    inside = address or os.path.realpath(root)
    listed, real = cache(entries), cache(os.path.realpath)

    def look(path: str) -> Stat | Refused:
        full = f"{inside}/{path}"
        parent, _, name = full.rpartition("/")
        try:
            about = None if address else os.lstat(full)
        except NotADirectoryError:
            about = None
        if about is None:
            there = listed(parent).get(name, Refused("missing", "there is no such file"))
            return there or Refused("unreadable", "it is a folder")
        place = real(parent)
        if stat.S_ISLNK(about.st_mode):
            place, about = os.path.realpath(full), os.stat(full)
        if os.path.commonpath([place, inside]) != inside:
            return Refused("unreadable", "it is reached by a symbolic link that leaves the manifest's folder")
        return stat_of(about) if stat.S_ISREG(about.st_mode) else Refused("unreadable", "it is not a regular file")

    return look
