"""The index: which image has which label and is on which side; one CSV file that people and programs can read.

Labels and splits live here and nowhere else, so relabelling or splitting anew costs no embedding. `index.csv` holds the
rows; `index.json` beside it says which format that is, where the images are, and how splits were made.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from pipeline.dataset.units import leakage_units
from pipeline.digests import Digests, bytes_digest, digests_from_hex, digests_to_hex
from pipeline.errors import DatasetError
from pipeline.files import make_folder, write_atomic, write_text_atomic

INDEX_FILE = "index.csv"
INDEX_RECORD = "index.json"
FORMAT = "manyheads index"
VERSION = 1
COLUMNS = ("path", "label", "split", "group", "digest", "size")
SPLITS = ("train", "validation", "test", "excluded")

Texts = NDArray[np.object_]
"""n texts: ndarray of shape (n,), object dtype, each a `str`."""


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """Every image of a data set, sorted by path; n rows.

    `paths`, `labels`, `splits` and `groups` are object arrays of shape (n,) holding `str`; `digests` is uint64 of shape
    (n, 2), `sizes` int64 of shape (n,), in bytes. A split is 'train', 'validation', 'test', or 'excluded' (a copy taken
    out because of a leak). `groups` is None where there are none; '' is an image of no group. Paths are relative to
    `root`, with '/'.
    """

    root: Path
    paths: Texts
    labels: Texts
    splits: Texts
    groups: Texts | None
    digests: Digests
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels, sorted."""
        return tuple(sorted(encode(self.labels)[1]))

    def select(self, *splits: str) -> DatasetIndex:
        """Return the rows of some splits, in the same order.

        Raises
        ------
        ValueError
            For a split that does not exist.
        """
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise ValueError(f"unknown splits {unknown}; there are {SPLITS}")
        return self.rows(np.flatnonzero(np.isin(self.splits.astype(str), splits)))

    def rows(self, rows: NDArray[Any]) -> DatasetIndex:
        """Return some rows, given by number or by a mask."""
        groups = None if self.groups is None else self.groups[rows]
        return DatasetIndex(
            self.root,
            self.paths[rows],
            self.labels[rows],
            self.splits[rows],
            groups,
            self.digests[rows],
            self.sizes[rows],
        )

    def with_splits(self, splits: Texts) -> DatasetIndex:
        """Return the same images, split otherwise."""
        return replace(self, splits=splits)

    def fold_groups(self) -> NDArray[np.int64] | None:
        """Return which images must share a fold: int64 of shape (n,), or None when each may go anywhere.

        Images of one group belong together, and so do copies of one content.
        """
        units = leakage_units(self.digests, self.groups)
        return None if len(units) == 0 or units.max() + 1 == len(units) else units

    def fingerprint(self) -> str:
        """Return the hex digest of every row; where the images lie does not matter."""
        return bytes_digest(_to_csv(self))

    def write(self, folder: Path, made: dict[str, Any] | None = None, source: str = "") -> None:
        """Write index.csv and index.json; `made` says how splits were made, None when the user gave them."""
        make_folder(folder)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "root": str(self.root),
            "source": source,
            "made_splits": made,
        }
        write_text_atomic(folder / INDEX_RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_atomic(folder / INDEX_FILE, _to_csv(self))

    @staticmethod
    def read(folder: Path) -> DatasetIndex:
        """Read the index of a folder.

        Raises
        ------
        DatasetError
            When there is none, or it is not one this version can read.
        """
        record = read_record(folder)
        if record is None:
            raise DatasetError(f"{folder}: has no {INDEX_RECORD}; run `manyheads features` to make the index")
        return DatasetIndex.read_rows(folder, Path(record["root"]))

    @staticmethod
    def read_rows(folder: Path, root: Path) -> DatasetIndex:
        """Read index.csv alone, its images being below `root`."""
        return _from_csv(folder / INDEX_FILE, root)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read what index.json says, or None when there is no such file.

    Raises
    ------
    DatasetError
        When it is of another format or version.
    """
    path = folder / INDEX_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); delete it to have it made anew") from None
    found = (record.get("format"), record.get("version")) if isinstance(record, dict) else (None, None)
    if found != (FORMAT, VERSION) or not isinstance(record.get("root"), str):
        raise DatasetError(f"{path}: is {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version {VERSION}")
    return dict(record)


def encode(texts: Texts) -> tuple[NDArray[np.int64], list[str]]:
    """Return each text's code, int64 of shape (n,), and the distinct texts in order of first appearance."""
    encoded = pa.array(texts, pa.large_string()).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def texts(values: list[str]) -> Texts:
    """Return an object array of shape (n,)."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _to_csv(index: DatasetIndex) -> bytes:
    """Return index.csv: quoted only where some value of the table needs it, so that most files stay easy to read."""
    groups = index.groups if index.groups is not None else np.full(len(index), "", dtype=object)
    columns = [pa.array(column, pa.large_string()) for column in (index.paths, index.labels, index.splits, groups)]
    table = pa.table(
        [*columns, pa.array(digests_to_hex(index.digests), pa.large_string()), pa.array(index.sizes)],
        names=list(COLUMNS),
    )
    special = any(pc.any(pc.match_substring_regex(column, '[",\r\n]')).as_py() for column in columns)
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed" if special else "none")
    sink = io.BytesIO()
    sink.write((",".join(COLUMNS) + "\n").encode())
    pyarrow.csv.write_csv(table, sink, write_options=options)
    return sink.getvalue()


def _from_csv(path: Path, root: Path) -> DatasetIndex:
    types: dict[str, pa.DataType] = {
        name: pa.dictionary(pa.int32(), pa.string()) for name in ("label", "split", "group")
    }
    types |= {"path": pa.string(), "digest": pa.string(), "size": pa.int64()}
    try:
        data = path.read_bytes()
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=b'"' in data),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no index here; run `manyheads features` to make it") from None
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path}: cannot be read ({_one_line(error)}); delete it to have it made anew") from None
    if tuple(table.column_names) != COLUMNS:
        found = ", ".join(table.column_names)
        raise DatasetError(
            f"{path}: has columns {found}, expected {', '.join(COLUMNS)}; delete it to have it made anew"
        )
    return _checked(table, path, root)


def _checked(table: pa.Table, path: Path, root: Path) -> DatasetIndex:
    """Turn the table into an index after checking what the rest of the program relies on."""
    paths = table["path"].to_numpy()
    labels, splits, groups = (_texts_of(table[name]) for name in ("label", "split", "group"))
    problems = [
        f"unknown split {split!r}, expected one of {', '.join(SPLITS)}"
        for split in encode(splits)[1]
        if split not in SPLITS
    ]
    digests = table["digest"]
    if not pc.all(pc.match_substring_regex(digests, "^[0-9a-f]{32}$")).as_py() and len(table):
        problems.append("a digest is not 32 hexadecimal digits")
    if len(table) > 1 and not pc.all(pc.less(table["path"].slice(0, len(table) - 1), table["path"].slice(1))).as_py():
        problems.append("the rows are not sorted by path, or a path is there twice")
    if problems:
        raise DatasetError(f"{path}: is damaged; mend it, or delete it to have it made anew", problems)
    grouped = encode(groups)[1] not in ([], [""])
    return DatasetIndex(
        root,
        paths,
        labels,
        splits,
        groups if grouped else None,
        digests_from_hex(digests.to_pylist()),
        table["size"].to_numpy().astype(np.int64),
    )


def _texts_of(column: pa.ChunkedArray) -> Texts:
    """Return a dictionary-encoded column as texts, equal ones sharing one object."""
    column = column.unify_dictionaries().combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combine_chunks gives one chunk, or a chunked array of none
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    words = texts(column.dictionary.to_pylist())
    return np.asarray(words[column.indices.to_numpy(zero_copy_only=False)], dtype=object)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
