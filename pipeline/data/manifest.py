"""A manifest: a CSV or Parquet file that lists `path,label[,split][,group]`, paths relative to its own folder."""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.data.failures import noticed, shown
from pipeline.data.listing import SPLIT_NAMES, Listing
from pipeline.errors import DatasetError, first
from pipeline.images import stat_of

COLUMNS = ("path", "label", "split", "group")
REQUIRED = ("path", "label")
MOST_PROBLEMS = 50
"""Lines shown of one error."""

LONGEST_PATH = 4096

Row = tuple[str, Mapping[str, str]]
"""Where a row stands ('line 7'), and its values by column."""


def list_manifest(path: Path, follow_symlinks: bool = False) -> Listing:
    """List the images that a manifest names; files that are missing are failures.

    Raises
    ------
    DatasetError
        When the manifest cannot be read, or has rows that cannot be meant, each named with its line.
    """
    _require_file(path)
    listing = Listing(path.parent)
    splits: list[str] = []
    groups: list[str] = []
    problems: list[str] = []
    rows = _parquet_rows(path, listing) if path.suffix.lower() == ".parquet" else _csv_rows(path, listing, problems)
    seen: dict[str, str] = {}
    unsplit: list[str] = []
    for where, values in rows:
        name, label, split = values["path"], values["label"], values.get("split", "").strip()
        found = [*_path_problems(name), *_label_problems(label)]
        name = "/".join(part for part in name.split("/") if part not in {"", "."})
        if not found and name in seen:
            found.append(f"path {shown(name)!r} is listed before, at {seen[name]}")
        if split and split.lower() not in SPLIT_NAMES:
            found.append(f"unknown split {split!r}, expected train, validation or test")
        seen.setdefault(name, where)
        problems += [f"{where}: {problem}" for problem in found]
        if not split and not found:
            unsplit.append(where)
        listing.paths.append(name)
        listing.labels.append(label)
        splits.append(SPLIT_NAMES.get(split.lower(), ""))
        groups.append(values.get("group", ""))
    if any(splits):
        listing.splits = splits
        problems += [f"{where}: no split, though other rows have one" for where in unsplit]
    if any(groups):
        listing.groups = groups
    _refuse(path, problems)
    _find_files(listing, follow_symlinks)
    return listing


def _path_problems(name: str) -> list[str]:
    """What makes a path from a file one that must not be opened."""
    if not name:
        return ["the path is empty"]
    if "\0" in name:
        return ["the path holds a NUL character"]
    if "\\" in name:
        return [f"path {shown(name)!r} has a backslash; write it with '/'"]
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return [f"path {shown(name)!r} is absolute; give it relative to the manifest's folder"]
    parts = name.split("/")
    if ".." in parts:
        return [f"path {shown(name)!r} leaves the manifest's folder by '..'"]
    if all(part in {"", "."} for part in parts):
        return [f"path {shown(name)!r} is a folder"]
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_PATH:
        return [f"a path of more than {LONGEST_PATH:,} bytes"]
    return []


def _label_problems(label: str) -> list[str]:
    if not label.strip():
        return ["the label is empty"]
    return ["the label holds a NUL character"] if "\0" in label else []


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise DatasetError(f"{path}: {len(problems):,} {plural}", first(problems, MOST_PROBLEMS))


def _require_file(path: Path) -> None:
    if not path.exists():
        raise DatasetError(
            f"{path}: there is no such manifest; set dataset.path to a CSV or Parquet file with columns path,label"
        )
    if path.is_dir():
        raise DatasetError(
            f"{path}: is a folder, expected a CSV or Parquet file; class folders are read with dataset.source: folder"
        )
    if not path.is_file():
        raise DatasetError(f"{path}: is a pipe or device, expected a CSV or Parquet file")


def _csv_rows(path: Path, listing: Listing, problems: list[str]) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
            columns = _columns(next(reader, []), path, listing)
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(columns):
                    yield f"line {line}", dict(zip(columns, row, strict=True))
                elif row:
                    plural = "value" if len(row) == 1 else "values"
                    problems.append(
                        f"line {line}: {len(row)} {plural}, expected {len(columns)}; quote values that hold a comma"
                    )
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 text (byte {error.start:,}); save it as CSV UTF-8") from None
    except csv.Error as error:
        raise DatasetError(f"{path} line {reader.line_num}: is not CSV ({error})") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None


def _parquet_rows(path: Path, listing: Listing) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        columns = _columns(table.column_names, path, listing)
        texts = {
            name: table.column(place).cast(pa.large_string()).fill_null("").to_pylist()
            for place, name in enumerate(columns)
            if name in COLUMNS
        }
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())})") from None
    for number in range(table.num_rows):
        yield f"row {number + 1}", {name: values[number] for name, values in texts.items()}


def _columns(header: Sequence[str], path: Path, listing: Listing) -> list[str]:
    """Return the columns' names in lower case, after checking them."""
    columns = [name.strip().lower() for name in header]
    missing = [name for name in REQUIRED if name not in columns]
    twice = sorted({name for name in columns if name in COLUMNS and columns.count(name) > 1})
    if missing or twice:
        wrong = (
            f"has no column {' and no column '.join(missing)}" if missing else f"has column {', '.join(twice)} twice"
        )
        found = ", ".join(name.strip() for name in header) or "nothing"
        raise DatasetError(
            f"{path}: {wrong}; the first line says {found}, expected path,label and, if you like, split,group"
        )
    others = [name for name in columns if name not in COLUMNS]
    if others:
        listing.warnings.append(f"{path}: columns not used: {', '.join(others)}")
    return columns


def _find_files(listing: Listing, follow_symlinks: bool) -> None:
    """Keep the rows whose file is there; the others are failures."""
    inside = os.path.realpath(listing.root)
    folders: dict[str, str | None] = {}
    kept = []
    for row, path in enumerate(listing.paths):
        full = f"{inside}/{path}"
        parent = os.path.dirname(full)
        if parent not in folders:
            folders[parent] = _link_problem(inside, parent, follow_symlinks)
        status, problem = "unreadable", folders[parent]
        try:
            found = os.lstat(full)
            if problem is None and stat.S_ISLNK(found.st_mode):
                problem = _link_problem(inside, full, follow_symlinks)
                found = os.stat(full)
            if problem is None and not stat.S_ISREG(found.st_mode):
                problem = "it is not a regular file"
        except (FileNotFoundError, NotADirectoryError):
            status, problem = "missing", "there is no such file"
        except (OSError, UnicodeEncodeError) as error:
            problem = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
        if problem is None:
            kept.append(row)
            listing.stats.append(stat_of(found))
        else:
            listing.entries.append(noticed(path, status, problem))
            listing.stats.append((0, 0, 0))
    listing.keep(kept)


def _link_problem(inside: str, path: str, follow_symlinks: bool) -> str | None:
    """Say why a path that is reached by a symbolic link is not read."""
    real = os.path.realpath(path)
    if real == path:
        return None
    if os.path.commonpath([real, inside]) != inside:
        return "it is reached by a symbolic link that leaves the manifest's folder"
    if not follow_symlinks:
        return "it is reached by a symbolic link; dataset.follow_symlinks: true allows those that stay inside"
    return None
