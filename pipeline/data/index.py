"""The index: one readable CSV file that alone defines the label and split of every image.

`index.json` records the format of `index.csv`, the root of the images, how splits were made, and the digest of the rows,
and that of the previous rows: a process may be killed between writing the two files.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from pipeline.config import NO_LABELS
from pipeline.errors import DatasetError
from pipeline.experiment import INDEX, from_cell, read_document, to_cell, write_document
from pipeline.io.digests import Digests, bytes_digest, digests_from_hex, digests_to_hex
from pipeline.io.files import make_folder, read_file, write_atomic
from pipeline.io.remote import address_of

Texts = NDArray[np.object_]
"""An object array of n `str`, shape (n,)."""

RowNumbers = NDArray[np.int64]
"""Row numbers: int64 of shape (n,), -1 for none."""


def texts(values: list[str]) -> Texts:
    """Return an object array of shape (n,)."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def encode(texts: Texts) -> tuple[NDArray[np.int64], list[str]]:
    """Return each text's code, int64 of shape (n,), and the distinct texts in order of first appearance."""
    encoded = pa.array(texts, pa.large_string()).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def content_codes(digests: Digests) -> NDArray[np.int64]:
    """Return a code from 0 up per image, int64 of shape (n,); images with equal content have equal codes."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    codes = np.zeros(len(order), dtype=np.int64)
    codes[order[1:]] = np.cumsum((ordered[1:] != ordered[:-1]).any(axis=1))
    return codes


def leakage_units(digests: Digests, groups: Texts | None) -> NDArray[np.int64]:
    """Return each image's unit, int64 of shape (n,), numbered from 0 up.

    Two images belong to one unit if a chain of shared contents and shared groups connects them. If they were split between
    training and test, the test score would be too good.
    """
    contents = content_codes(digests)
    if groups is None or len(groups) == 0:
        return contents
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    codes, names = encode(groups)
    alone = groups == ""  # an image without a group is its own group
    codes[alone] = len(names) + np.arange(np.count_nonzero(alone))
    ends = codes, contents + codes.max() + 1
    joined = coo_array((np.ones(len(codes), dtype=bool), ends), shape=(ends[1].max() + 1,) * 2)
    units = connected_components(joined, directed=False)[1][codes]
    return np.unique(units, return_inverse=True)[1].astype(np.int64)


def match_texts(old: Texts, new: Texts) -> RowNumbers:
    """Return for each new text the row of the equal old text, int64 of shape (n_new,), or -1; both inputs are sorted and distinct."""
    if np.array_equal(old, new):
        return np.arange(len(new))
    found = pc.index_in(pa.array(new, pa.large_string()), value_set=pa.array(old, pa.large_string()))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]


def match_digests(old: Digests, new: Digests) -> RowNumbers:
    """Return for each new digest, uint64 (n_new, 2), the first row with an equal old digest: int64 of shape (n_new,), -1 for none."""
    codes = content_codes(np.concatenate([old, new]))
    first = np.full(len(codes), -1, dtype=np.int64)
    first[codes[: len(old)][::-1]] = np.arange(len(old))[::-1]
    return first[codes[len(old) :]]


@dataclass(frozen=True)
class Changes:
    """The differences between two states of a data set, as numbers of images."""

    added: int = 0
    changed: int = 0
    renamed: int = 0
    removed: int = 0

    def __str__(self) -> str:
        """Return text such as `3 added, 1 removed`, without zero counts."""
        return ", ".join(f"{count:,} {name}" for name, count in vars(self).items() if count)


def difference(old_paths: Texts, old_digests: Digests, new_paths: Texts, new_digests: Digests) -> Changes:
    """Compare two states by path, object arrays of shape (n,), and content, uint64 of shape (n, 2); paths are sorted.

    A new path whose content was at a removed path is renamed; a path with other content is changed.
    """
    rows = match_texts(old_paths, new_paths)
    known = rows >= 0
    changed = int((old_digests[rows[known]] != new_digests[known]).any(axis=1).sum())
    gone = np.ones(len(old_paths), dtype=bool)
    gone[rows[known]] = False
    n_gone, n_fresh = int(gone.sum()), int((~known).sum())
    codes = content_codes(np.concatenate([old_digests[gone], new_digests[~known]]))
    before, now = (np.bincount(part, minlength=len(codes)) for part in (codes[:n_gone], codes[n_gone:]))
    renamed = int(np.minimum(before, now).sum())
    return Changes(n_fresh - renamed, changed, renamed, n_gone - renamed)


INDEX_FILE = "index.csv"
INDEX_RECORD = "index.json"
BEFORE, LABEL, AFTER = ("path",), "label", ("split", "group", "digest", "size")
"""Columns of index.csv before, for and after the labels; a single label column always has this name, whatever its name in the manifest."""

SEPARATOR = "|"
"""Separates the labels of a multilabel image, whatever the separator in the source."""

DOMAIN = "domain"
"""The last column, if the source has domains."""
EXCLUDED = "excluded"
SPLITS = ("train", "validation", "test", EXCLUDED)

_RUNS = r"^[=+\-@\t\r']"
"""The texts that `to_cell` escapes."""


@dataclass(frozen=True)
class SplitPlan:
    """The parameters of a generated test split: the seed of the order, and the test fraction of each class."""

    seed: int
    test_fraction: float

    def __str__(self) -> str:
        return f"seed {self.seed} and test_fraction {self.test_fraction:g}"


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """Every image of a data set, sorted by path; n rows.

    `paths`, `labels`, `splits` and `groups` are object arrays of shape (n,) holding `str`; `digests` is uint64 of shape
    (n, 2), `sizes` int64 of shape (n,), in bytes. A split is 'train', 'validation', 'test', or 'excluded' (a copy left
    out because of a leak). `groups` is None if there are none; '' is an image without a group. Paths are relative to
    `root`, with '/'. `domains`, like `groups`, holds the origin of each image.

    Labels are the texts of the source. If it has k > 1 label columns, `labels` has shape (n, k) and
    `names` holds their names; '' is an empty cell. A single column is named 'label'.
    """

    root: Path
    paths: Texts
    labels: Texts
    splits: Texts
    groups: Texts | None
    digests: Digests
    sizes: NDArray[np.int64]
    names: tuple[str, ...] = (LABEL,)
    domains: Texts | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The distinct labels of a single column, sorted."""
        return tuple(sorted(encode(self.labels)[1]))

    def column(self, name: str) -> Texts:
        """Return one label column, shape (n,), object (str); KeyError if there is none of that name."""
        if name not in self.names:
            raise KeyError(name)
        return self.labels if self.labels.ndim == 1 else self.labels[:, self.names.index(name)]

    def only(self, *names: str) -> DatasetIndex:
        """Return the same images with some of the label columns; a single one becomes the column 'label'."""
        if len(names) == 1:
            return replace(self, labels=self.column(*names), names=(LABEL,))
        return replace(self, labels=np.column_stack([self.column(name) for name in names]), names=names)

    def has_labels(self, kind: str = "auto") -> NDArray[np.bool_]:
        """Return which images have the labels that a kind of target needs: bool of shape (n,).

        All cells must be filled, except for multilabel targets, where an image may have no labels.
        """
        cells = self.labels.reshape(len(self), len(self.names))
        return np.asarray((cells != "").all(axis=1) | (kind == "multilabel"))

    def by_target(self, kinds: Sequence[str]) -> Iterator[tuple[str, str, DatasetIndex]]:
        """Yield each target's prefix in messages ('' for a single one, else 'NAME: '), its kind, and the images labelled for it.

        kinds : one per label column, or a single one for all columns
        """
        if tuple(kinds) == (NO_LABELS,):
            return
        if len(kinds) == 1:
            yield "", kinds[0], self.rows(self.has_labels(kinds[0]))
            return
        for name, kind in zip(self.names, kinds, strict=True):
            part = self.only(name)
            yield f"{name}: ", kind, part.rows(part.has_labels(kind))

    def said(self, row: int) -> str:
        """Return the labels of an image for display."""
        return ", ".join(np.atleast_1d(self.labels[row]))

    def select(self, *splits: str) -> DatasetIndex:
        """Return the rows of some splits, in the same order; ValueError for an unknown split."""
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise ValueError(f"unknown splits {unknown}; there are {SPLITS}")
        return self.rows(np.flatnonzero(np.isin(self.splits.astype(str), splits)))

    def rows(self, rows: NDArray[Any]) -> DatasetIndex:
        """Return some rows, selected by number (integers of shape (m,)) or by mask (bool of shape (n,))."""
        columns = {name: column[rows] for name, column in vars(self).items() if isinstance(column, np.ndarray)}
        return replace(self, **columns)

    def units(self) -> NDArray[np.int64]:
        """Return which images must stay together: int64 of shape (n,), a number per unit of connected groups and contents."""
        return leakage_units(self.digests, self.groups)

    def fold_groups(self) -> NDArray[np.int64] | None:
        """Return which images must share a fold: int64 of shape (n,), or None if there are no constraints."""
        units = self.units()
        return None if len(units) == 0 or units.max() + 1 == len(units) else units

    def fingerprint(self) -> str:
        """Return the hex digest of all rows; the root of the images does not matter."""
        return bytes_digest(_to_csv(self))

    def write(self, folder: Path, plan: SplitPlan | None = None, source: str = "") -> None:
        """Write index.csv and index.json; `plan` describes the generated test split, None if the user gave the splits."""
        make_folder(folder)
        rows, path = _to_csv(self), folder / INDEX_FILE
        digests = [bytes_digest(rows), *([bytes_digest(path.read_bytes())] if path.is_file() else [])]
        made = None if plan is None else asdict(plan)
        root = address_of(self.root) or str(self.root)
        record = {"root": root, "source": source, "made_splits": made, "rows": digests}
        write_document(folder / INDEX_RECORD, INDEX, record)
        write_atomic(path, rows)

    @staticmethod
    def read(folder: Path) -> DatasetIndex:
        """Read the index of a folder; DatasetError if there is none, or this version cannot read it."""
        found = WrittenIndex.read(folder)
        if found.record is None or found.index is None:
            raise DatasetError(f"{folder}: holds no index; run `manyheads features` to make it")
        if found.edited:
            raise DatasetError(
                f"{found.path}: was edited, or is damaged, since it was written; run `manyheads features`, which keeps its "
                "splits, or delete it to have it made anew"
            )
        return found.index


@dataclass(frozen=True)
class WrittenIndex:
    """The index files in a folder: the record of index.json, and the bytes of index.csv; None for a missing file."""

    path: Path
    record: Mapping[str, Any] | None
    csv: bytes | None

    @staticmethod
    def read(folder: Path) -> WrittenIndex:
        """Read both files; DatasetError if one cannot be read, or index.json is damaged."""
        record, path = read_index_record(folder), folder / INDEX_FILE
        try:
            return WrittenIndex(path, record, read_file(path))
        except FileNotFoundError:
            return WrittenIndex(path, record, None)

    @cached_property
    def digest(self) -> str:
        """The digest of index.csv: the fingerprint of the index unless the file was edited."""
        return bytes_digest(self.csv or b"")

    @property
    def edited(self) -> bool:
        """Whether index.csv differs from the file written with index.json; 0.1 recorded no digest."""
        return self.csv is not None and self.digest not in (self.record or {}).get("rows", [self.digest])

    @property
    def plan(self) -> SplitPlan | None:
        """The plan of the generated test split; None if the user gave the splits, or it is unknown."""
        made = (self.record or {}).get("made_splits")
        return SplitPlan(int(made["seed"]), float(made["test_fraction"])) if made else None

    @cached_property
    def index(self) -> DatasetIndex | None:
        """The index, even if it was edited; DatasetError if it is damaged."""
        record = self.record or {}
        in_cells = record.get("version") != 1  # 0.1 did not escape cells
        return None if self.csv is None else _from_csv(self.path, self.csv, Path(record.get("root", "")), in_cells)


def read_index_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of index.json, or None if there is no such file; DatasetError if it is damaged."""
    path = folder / INDEX_RECORD
    if not os.path.lexists(path):
        return None
    record = read_document(path, INDEX)
    made = record.get("made_splits") or {"seed": 0, "test_fraction": 0.0}
    is_plan = isinstance(made, dict) and {"seed", "test_fraction"} <= {*made}
    if not isinstance(record.get("root"), str) or not is_plan:
        raise INDEX.damaged(path, "it does not say where the images are and how splits were made")
    return record


def _to_csv(index: DatasetIndex) -> bytes:
    """Return index.csv as bytes, with quotes only if some value needs them, so that most files stay easy to read."""
    groups = index.groups if index.groups is not None else np.full(len(index), "", dtype=object)
    labels = [index.column(name) for name in index.names]
    given = [pa.array(column, pa.large_string()) for column in (index.paths, *labels, index.splits, groups)]
    columns = [_to_cells(column) for column in given]
    header = [*BEFORE, *map(to_cell, index.names), *AFTER]
    numbers = [pa.array(digests_to_hex(index.digests), pa.large_string()), pa.array(index.sizes)]
    domains = [] if index.domains is None else [_to_cells(pa.array(index.domains, pa.large_string()))]
    header += [DOMAIN] * len(domains)
    table = pa.table([*columns, *numbers, *domains], names=header)
    special = any(pc.any(pc.match_substring_regex(column, '[",\r\n]')).as_py() for column in (*columns, *domains))
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed" if special else "none")
    sink = io.BytesIO()
    first_line = io.StringIO(newline="")
    csv.writer(first_line, lineterminator="\n").writerow(header)
    sink.write(first_line.getvalue().encode())
    pyarrow.csv.write_csv(table, sink, write_options=options)
    return sink.getvalue()


def _to_cells(column: pa.Array) -> pa.Array:
    """Apply `to_cell` to a column."""
    if not pc.any(pc.match_substring_regex(column, _RUNS)).as_py():
        return column
    return pa.array([None if text is None else to_cell(text) for text in column.to_pylist()], column.type)


def _from_csv(path: Path, data: bytes, root: Path, in_cells: bool) -> DatasetIndex:
    header = next(csv.reader(data[: 1 << 16].decode("utf-8-sig", "replace").splitlines()[:1]), [])
    after = [*AFTER, DOMAIN] if header[-1:] == [DOMAIN] else [*AFTER]
    names = header[len(BEFORE) : -len(after)]
    if header and (header != [*BEFORE, *names, *after] or not names or len(set(names)) < len(names)):
        expected = ", ".join([*BEFORE, LABEL, *AFTER])
        raise DatasetError(
            f"{path}: has columns {', '.join(header)}, expected {expected}; delete it to have it made anew"
        )
    columns = [*BEFORE, *map(str, range(len(names))), *after]  # label columns may have the names of ours
    types: dict[str, pa.DataType] = dict.fromkeys(columns, pa.dictionary(pa.int32(), pa.string()))
    types |= {"path": pa.string(), "digest": pa.string(), "size": pa.int64()}
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(",".join(columns).encode() + b"\n" + data[data.find(b"\n") + 1 :] if header else b""),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=b'"' in data),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path}: cannot be read ({reason}); delete it to have it made anew") from None
    return _checked(table, path, root, names, in_cells)


def _checked(table: pa.Table, path: Path, root: Path, names: Sequence[str], in_cells: bool) -> DatasetIndex:
    """Check a table for all that the rest of the program relies on, and return it as an index."""
    paths = table["path"]
    if in_cells:
        paths = pc.replace_substring_regex(paths, pattern="^'", replacement="")  # as `from_cell`
    columns = [*map(str, range(len(names))), "split", "group", *[DOMAIN] * (DOMAIN in table.column_names)]
    found = {name: _texts_of(table[name], from_cell if in_cells else str) for name in columns}
    labels = [found[str(place)] for place in range(len(names))]
    problems = [
        f"unknown split {split!r}, expected one of {', '.join(SPLITS)}"
        for split in encode(found["split"])[1]
        if split not in SPLITS
    ]
    digests = table["digest"]
    if not pc.all(pc.match_substring_regex(digests, "^[0-9a-f]{32}$")).as_py() and len(table):
        problems.append("a digest is not 32 hexadecimal digits")
    if len(table) > 1 and not pc.all(pc.less(paths.slice(0, len(table) - 1), paths.slice(1))).as_py():
        problems.append("the rows are not sorted by path, or a path is there twice")
    if problems:
        raise DatasetError(f"{path}: is damaged; mend it, or delete it to have it made anew", problems)
    return DatasetIndex(
        root,
        paths.to_numpy(),
        labels[0] if len(names) == 1 else np.column_stack(labels),
        found["split"],
        found["group"] if (found["group"] != "").any() else None,
        digests_from_hex(digests.to_pylist()),
        table["size"].to_numpy().astype(np.int64),
        tuple(name if len(names) > 1 else LABEL for name in map(from_cell, names)),
        found.get(DOMAIN),
    )


def _texts_of(column: pa.ChunkedArray, read: Callable[[str], str]) -> Texts:
    """Return a dictionary-encoded column as texts, with `read` applied to each distinct cell; equal texts share one object."""
    column = column.unify_dictionaries().combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combine_chunks gives one chunk, or a chunked array of none
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    words = texts(list(map(read, column.dictionary.to_pylist())))
    return np.asarray(words[column.indices.to_numpy(zero_copy_only=False)], dtype=object)
