"""The output folder of an experiment: the names of its files, and the reader and writer of each file format.

The feature stores are in a folder next to it, which neighbouring experiments share.

A document (JSON) and each line of a journal (JSON lines) carry a digest of their content, which the reader checks; other
files have theirs in the document that names them. Files of release 0.1 have no `made_by` and no digest, and are read without
this check. A digest detects damage; it is no signature.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BundleError, DatasetError, HeadError, PipelineError, StoreError, first_line
from pipeline.io.digests import bytes_digest, canonical_json, fingerprint
from pipeline.io.files import NOT_ORDINARY, read_file, write_text_atomic
from pipeline.io.process import version

log = logging.getLogger(__name__)

MADE_BY = "made_by"
"""The field for the program that wrote a file; files with it have digests too."""
DIGEST = "digest"
LINE_DIGEST = "line_digest"

T = TypeVar("T")

MOST_JSON = 1 << 28
"""Size limit of a document or journal, in bytes."""


STORES = "features"
"""The folder of the feature stores, next to the output folders; up to 0.1 each output folder had its own."""


class Artifacts:
    """The paths of all files of one experiment.

    `store` is the config's folder of feature stores, if it names one.
    """

    def __init__(self, output: str | Path, store: str | Path | None = None) -> None:
        self.root = Path(output)
        self.stores = self.root.parent / STORES if store is None else Path(store)
        """The feature stores, which neighbouring experiments share."""
        self.config = self.root / "config.yaml"
        self.dataset = self.root / "dataset"
        """index.csv, failures.csv and the stat cache."""
        self.specs = self.root / "specs.json"
        """The specs of a config's embeddings, so that a run with nothing to do loads no network."""
        self.features = self.root / "features.json"
        """The results of stage one: one record per embedding, with its store and identity."""
        self.leaderboard = self.root / "leaderboard.json"
        self.leaderboard_md = self.root / "leaderboard.md"
        self.few_shot = self.root / "fewshot.json"
        self.layers = self.root / "layers.json"
        """Comparison of a network's layers, where several are embedded."""
        self.advice = self.root / "advice.json"
        """The recommended next step, with the expected gain and price of each option."""
        self.mistakes = self.root / "mistakes" / "mistakes.json"
        self.budget = self.root / "budget.json"
        """Durations of searches under a time budget."""
        self.audit = self.root / "audit.json"
        """Near-duplicates and outliers found by stage two."""
        self.finetuned = self.root / "finetuned"
        """One folder per fine-tuning."""
        self.refit = self.root / "refit"
        """Heads refitted on more images: an output folder of its own, without a leaderboard."""
        self.refitted = self.root / "refit.json"
        """In that folder: the refitted heads, and the evidence for a new search."""
        self.parts = self.root / "parts"
        """Vectors made by shards or workers, until the stores have them."""
        self.targets = self.root / "targets.json"
        """The names of several targets, each of which is an experiment in its own folder."""

    def store(self, embedding: str, fingerprint: str) -> Path:
        """The feature store of one embedding."""
        return self.stores / f"{embedding}-{fingerprint[:12]}.store"

    def find_store(self, name: str) -> Path:
        """Return the path of the store that a record names."""
        return next(iter(self.find_stores(name)), self.stores / Path(name).name)

    def find_stores(self, name: str) -> list[Path]:
        """Return the existing stores of a name, best first: the experiment may have been moved, or be of release 0.1."""
        places = [self.root / name, *(folder / Path(name).name for folder in self._folders_of_stores())]
        return [place for place in dict.fromkeys(places) if os.path.exists(place)]

    def stores_before(self) -> list[Path]:
        """Return other folders that may have its stores: those of its last run, and its own of release 0.1."""
        return [folder for folder in self._folders_of_stores() if folder != self.stores]

    def _folders_of_stores(self) -> list[Path]:
        """Return the folders in `features.json` (relative to the output folder, and absolute), the config's, and those of release 0.1."""
        told: list[str] = []
        if os.path.lexists(self.features):
            try:
                told = [
                    os.path.realpath(self.root / place)
                    for place in read_document(self.features, FEATURES).get("stores", [])
                ]
            except (PipelineError, OSError, TypeError, ValueError) as error:
                log.warning("%s; where the features were at the last run is not known", error)
        here = os.path.realpath(self.stores)
        last = [self.stores if place == here else Path(place) for place in told]
        return [*last, self.stores, self.root / STORES, self.dataset]

    def seen_from_stores(self) -> str:
        """Return the output folder relative to that of the feature stores: both may be moved together."""
        return os.path.relpath(os.path.realpath(self.root), os.path.realpath(self.stores))

    @property
    def entry(self) -> Path:
        """This experiment's entry in the list of users of the feature stores."""
        return self.stores / "experiments" / f"{fingerprint({'path': self.seen_from_stores()})[:16]}.json"

    def stores_told(self) -> dict[str, Any]:
        """Return the fields of `features.json` on the feature stores: their folder, and the experiment's entry there."""
        place = os.path.realpath(self.stores)
        return {"stores": [os.path.relpath(place, os.path.realpath(self.root)), place], "entry": self.entry.stem}

    def target(self, name: str) -> Path:
        """The output folder of one of several targets."""
        return self.root / "targets" / re.sub(r"[^\w -]", lambda found: f"%{ord(found[0]):02X}", name)

    def each_target(self) -> dict[str, Path]:
        """Return the output folders of the targets by name; a single target has this folder and the name ''.

        PipelineError when the list of them is damaged.
        """
        if not os.path.lexists(self.targets):
            return {"": self.root}
        names = read_document(self.targets, TARGETS).get("targets")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TARGETS.damaged(self.targets, "it does not name the targets")
        return {name: self.target(name) for name in names}

    def trials(self, embedding: str, head: str) -> Path:
        """The journal of one search."""
        return self.root / "trials" / embedding / f"{head}.jsonl"

    def bundle(self, embedding: str, head: str) -> Path:
        """The folder of one saved head."""
        return self.root / "heads" / embedding / head


@dataclass(frozen=True)
class Kind:
    """One file format: its name, its current version, and the advice to users where a file is damaged or missing."""

    format: str
    version: int
    again: str
    missing: str
    error: type[PipelineError] = PipelineError
    older: tuple[int, ...] = ()
    """Older versions that are still read."""

    def damaged(self, path: Path, found: str) -> PipelineError:
        """Return the error for a damaged file."""
        return self.error(f"{path}: is damaged: {found}; {self.again}")


def _made_by_command(what: str, version: int, command: str, **more: Any) -> Kind:
    missing = f"run `manyheads {command}` first"
    return Kind(f"manyheads {what}", version, f"run `manyheads {command}` again", **{"missing": missing, **more})


FEATURES = _made_by_command("features", 3, "features", older=(2,))
SPECS = _made_by_command("specs", 2, "features")
TARGETS = _made_by_command("targets", 1, "features")
LEADERBOARD = _made_by_command("leaderboard", 1, "heads")
BUDGET = _made_by_command("budget", 1, "heads")
AUDIT = _made_by_command("audit", 1, "heads")
LAYERS = _made_by_command("layers", 1, "heads")
PREDICTIONS = _made_by_command("predictions", 2, "heads", error=BundleError)
_FOLDER = "expected an experiment's output folder, in which `manyheads heads` writes bundles, or a bundle's folder"
BUNDLE = _made_by_command("bundle", 1, "heads", missing=_FOLDER, error=BundleError)
ADVICE = _made_by_command("advice", 1, "advise")
MISTAKES = _made_by_command("mistakes", 1, "report --explain")
REPORT = _made_by_command("report", 1, "report")
FINETUNING = _made_by_command("fine-tuning", 2, "finetune")
REFIT = _made_by_command("refit", 1, "refit")
FEWSHOT = _made_by_command("few-shot", 1, "fewshot")
_ANEW = "delete it, and `manyheads {}` makes it anew"
TRIALS = Kind("manyheads trials", 1, _ANEW.format("heads"), "run `manyheads heads` again", HeadError)
INDEX = Kind("manyheads index", 2, _ANEW.format("features"), "run `manyheads features` first", DatasetError, (1,))
_EACH = "run `manyheads features` with each experiment that uses the store"
USER = Kind("manyheads store user", 1, f"{_EACH}, after deleting this file", _EACH, StoreError)
"""A file in the folder of the feature stores: one experiment that uses them."""


def made_by() -> str:
    """Return the name and version of this program, which it writes into every file."""
    return f"manyheads {version('manyheads')}"


# ---- documents: one JSON object


def to_document(kind: Kind, content: Mapping[str, Any]) -> str:
    """Return the text of a document, with values converted by `plain`."""
    document = {"format": kind.format, "version": kind.version, MADE_BY: made_by(), **plain(content)}
    document[DIGEST] = fingerprint(document)
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    # Paths that are not UTF-8 have surrogates, which must be escaped.
    return json.dumps(document, indent=2) + "\n" if re.search("[\ud800-\udfff]", text) else text


def write_document(path: Path, kind: Kind, content: Mapping[str, Any]) -> None:
    """Write a document atomically."""
    write_text_atomic(path, to_document(kind, content))


def read_document(path: Path, kind: Kind) -> dict[str, Any]:
    """Read and check a document.

    PipelineError, of the kind's own type, when it is missing, damaged, or of another format or version; OSError when the system
    cannot read it, which does not mean damage.
    """
    return parse_document(_bytes_of(path, kind), kind, path)


def write_record(path: Path, kind: Kind, record: Any) -> None:
    """Write a dataclass as a document atomically."""
    write_document(path, kind, plain(record))


def read_record(path: Path, kind: Kind, of: type[T]) -> T:
    """Read a dataclass of type `of` that `write_record` wrote; errors are those of `read_document`."""
    document = read_document(path, kind)
    try:
        return cast(T, from_plain(of, {each.name: document[each.name] for each in fields(cast(Any, of))}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise kind.damaged(path, f"it does not hold what its version says ({first_line(error)})") from None


def parse_document(data: bytes | str, kind: Kind, path: Path) -> dict[str, Any]:
    """Check a document's text and return its content; `path` names it in errors, which are those of `read_document`."""
    document = _whole_document(data, kind, path)
    found = (document.get("format"), document.get("version"))
    if found[0] != kind.format or found[1] not in (kind.version, *kind.older):
        raise kind.error(
            f"{path}: is {found[0]!r} version {found[1]!r}, expected {kind.format!r} version {kind.version}; {kind.again}"
        )
    return document


def _whole_document(data: bytes | str, kind: Kind, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(data)
        if not isinstance(document, dict):
            raise kind.damaged(path, f"it holds a {type(document).__name__}, expected an object")
        has_digest = DIGEST in document or MADE_BY in document  # else written by release 0.1
        content = {key: value for key, value in document.items() if key != DIGEST}
        if has_digest and document.get(DIGEST) != fingerprint(content):
            raise kind.damaged(path, "its content is not the one that its digest names")
    except (ValueError, RecursionError) as error:
        raise kind.damaged(path, f"it cannot be read as JSON ({first_line(error)})") from None
    return document


def require_whole(path: Path) -> None:
    """Check a document or journal of any kind and version for damage; PipelineError if it is damaged or missing."""
    kind = Kind("", 0, "run the command that wrote it again", "run the command that writes it")
    if path.suffix == ".jsonl":
        read_lines(path, kind)
    else:
        _whole_document(_bytes_of(path, kind), kind, path)


def _bytes_of(path: Path, kind: Kind, most: int | None = MOST_JSON) -> bytes:
    try:
        return read_file(path, most)
    except (FileNotFoundError, NotADirectoryError):
        folder = "" if path.parent.exists() else f" (there is no folder {path.parent})"
        raise kind.error(f"{path}: missing; {kind.missing}{folder}") from None
    except OSError as error:
        if error.errno not in NOT_ORDINARY:
            raise
        raise kind.error(f"{path}: cannot be read ({error.strerror}); {kind.again}") from None


def plain(value: Any) -> Any:
    """Convert a value for JSON: numpy scalars, arrays and dataclasses become Python's types, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if hasattr(value, "model_dump"):  # a section of a config
        return value.model_dump(mode="json")
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def from_plain(kind: Any, value: Any) -> Any:
    """Undo `plain` for a type: rebuild dataclasses, tuples and mappings by their annotations.

    KeyError, TypeError, ValueError or AttributeError for a value of another type.
    """
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else from_plain(of[0], value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return cast(Any, kind)(**{name: from_plain(hints[name], item) for name, item in value.items()})
    if hasattr(kind, "model_validate_json"):
        return kind.model_validate_json(json.dumps(value))
    if origin is tuple:
        kinds = of[:1] * len(value) if of[-1] is Ellipsis else of
        return tuple(from_plain(each, item) for each, item in zip(kinds, value, strict=True))
    if origin is Mapping:
        return {name: from_plain(of[1], item) for name, item in value.items()}
    return value


# ---- journals: one JSON object per line, each with a digest of itself and all lines before it


@dataclass(frozen=True)
class Lines:
    """The content of a journal: the objects of its valid lines, and where these end."""

    records: tuple[dict[str, Any], ...] = ()
    length: int = 0
    """Bytes of the valid lines."""
    digest: str = ""
    """The digest of all valid lines, to which the next line is chained."""
    rest: bytes = field(default=b"", repr=False)
    """The bytes after the valid lines."""

    @property
    def damaged(self) -> bool:
        """Whether more follows than one incomplete line, which a kill may leave."""
        return b"\n" in self.rest


def to_lines(records: Iterable[Mapping[str, Any]], before: str) -> tuple[bytes, str]:
    """Return the lines of some records and the digest for chaining the next ones; `before` is that of the lines above."""
    lines = []
    for record in records:
        before = _chained(before, record)
        lines.append(canonical_json({**record, LINE_DIGEST: before}) + "\n")
    return "".join(lines).encode("ascii"), before


def parse_lines(data: bytes) -> Lines:
    """Return the valid lines at the beginning of a journal."""
    records: list[dict[str, Any]] = []
    length, digest = 0, ""
    for line in data.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
            if not isinstance(record, dict):
                break
            found = record.pop(LINE_DIGEST, None)
            following = _chained(digest, record)
        except (ValueError, RecursionError):
            break
        old = found is None and MADE_BY not in (records[0] if records else record)  # written by release 0.1
        if not old and found != following:
            break
        records.append(record)
        length, digest = length + len(line), following
    return Lines(tuple(records), length, digest, data[length:])


def read_lines(path: Path, kind: Kind) -> Lines:
    """Read a journal; an incomplete last line, which a kill may leave, is left out.

    PipelineError, of the kind's own type, when it is missing, or a line is damaged.
    """
    lines = parse_lines(_bytes_of(path, kind))
    if lines.damaged:
        raise kind.damaged(path, f"line {len(lines.records) + 1} is not the one that was written")
    return lines


def _chained(before: str, record: Mapping[str, Any]) -> str:
    return bytes_digest((before + canonical_json(record)).encode("ascii"))[:32]


# ---- files that a document names, and archives


def bundle_file(folder: Path, name: str) -> bytes:
    """Return the bytes of a bundle's file, checked against the digest in the bundle's document, if there is one.

    BundleError when the file is missing, or it or the document is damaged.
    """
    path = folder / "bundle.json"
    document = read_document(path, BUNDLE) if os.path.lexists(path) else {}
    digests = document.get("digests", {document.get("file"): document.get("file_digest")})
    digest = digests.get(name) if isinstance(digests, dict) else None
    data = _bytes_of(folder / name, replace(BUNDLE, missing=BUNDLE.again), None)
    if digest is not None and bytes_digest(data) != digest:
        raise BUNDLE.damaged(folder / name, "its digest is not the one in bundle.json")
    return data


MOST_INFLATED = 64 << 20
"""Inflated size that any archive may have, in bytes."""
MOST_RATIO = 200
"""Further inflated size allowed, as a multiple of the archive's; predictions of many equal labels reach half of it."""


def require_modest(data: bytes) -> None:
    """Check the inflated size of a zip archive; ValueError for a zip bomb."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inflated = sum(member.file_size for member in archive.infolist())
    if inflated > MOST_INFLATED + MOST_RATIO * len(data):
        raise ValueError(f"{len(data):,} bytes that would inflate to {inflated:,}")


def parse_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz archive, of any shapes and dtypes; ValueError with a one-line message if it is invalid."""
    try:
        require_modest(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # a damaged or crafted archive can make the readers fail in any way
        raise ValueError(first_line(error)) from None


DIGEST_MARK = b"MHDIGEST"


def with_digest(data: bytes) -> bytes:
    """Append a digest to bytes, for a file that no document names."""
    return data + DIGEST_MARK + bytes.fromhex(bytes_digest(data))


def without_digest(data: bytes) -> bytes:
    """Check and remove the digest that `with_digest` appended; bytes of release 0.1 have none. ValueError for damage."""
    body = data[:-40]
    if data[-40:-32] != DIGEST_MARK:
        return data
    if data != with_digest(body):
        raise ValueError("its digest is not that of its content")
    return body


# ---- cells of CSV files

_RUNS = re.compile(r"[=+\-@\t\r']")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def to_cell(text: str) -> str:
    """Escape a text for a spreadsheet: prefix `'` if its first character would start a formula."""
    return f"'{text}" if _RUNS.match(text) and not _NUMBER.fullmatch(text) else text


def from_cell(cell: str) -> str:
    """Undo `to_cell`."""
    return cell.removeprefix("'")
