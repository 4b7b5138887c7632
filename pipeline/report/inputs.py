"""What a report page was made of, so that a page whose material did not change is not made again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline
from pipeline.data import DatasetIndex
from pipeline.errors import PipelineError
from pipeline.evaluation.audit import read_hashes
from pipeline.evaluation.leaderboard.table import read_leaderboard
from pipeline.experiment import REPORT, Artifacts, read_document, write_document
from pipeline.io.digests import bytes_digest, file_digest, fingerprint

PAGE = "report.html"
LIBRARIES = ("matplotlib", "numpy", "Pillow", "scikit-learn", "scipy", "umap-learn")
"""What draws and reckons; with umap-learn the map is another."""

CODE = ("*.py", "report/*.css", "report/*.js", "report/*.html")


def is_current(output: Path) -> bool:
    """Whether everything that `write_record` wrote down is as it was then: what the page was made of, and what was made.

    Raises
    ------
    PipelineError
        When there is no leaderboard.
    """
    try:
        record = read_document(_record(output), REPORT)
        made = {name: file_digest(output / name) for name in record["files"]}
    except (PipelineError, OSError, KeyError, TypeError):
        return False
    return bool(record["files"] == made and record.get("inputs") == digest_inputs(output))


def write_record(output: Path, inputs: str, files: Iterable[Path]) -> None:
    """Write down in `report.json` what the page was made of, by `digest_inputs`, and the digests of the files that were made."""
    made = {path.relative_to(output).as_posix(): file_digest(path) for path in files}
    write_document(_record(output), REPORT, {"inputs": inputs, "files": made})


def _record(output: Path) -> Path:
    return output / "report.json"


def digest_inputs(output: Path) -> str:
    """Return one digest of all that goes into a page: saved results, the code, the libraries.

    The date of the leaderboard does not count: a run that had nothing to do writes a new one.
    """
    board = json.loads(read_leaderboard(output).to_json())
    board["provenance"].pop("date", None)
    board.pop("digest")
    found = {path.relative_to(output).as_posix(): _digest(path) for path in _sources(output)}
    root = Path(pipeline.__file__).parent
    code = {str(path.relative_to(root)): file_digest(path) for kind in CODE for path in sorted(root.rglob(kind))}
    return fingerprint([board, found, _hashes(output), code, {name: _version(name) for name in LIBRARIES}])


def _hashes(output: Path) -> str | None:
    """The digest of the perceptual hashes of this experiment's images; the store has others' as well."""
    files = Artifacts(output)
    try:
        return bytes_digest(read_hashes(files, DatasetIndex.read(files.dataset).digests).tobytes())
    except PipelineError:
        return None


def _sources(output: Path) -> Iterator[Path]:
    """The files beside the leaderboard that the page is made of; the features are named by their digest in features.json."""
    files = Artifacts(output)
    yield from (files.features, *sorted(files.dataset.glob("*.csv")))
    for row in read_leaderboard(output).rows:
        yield files.trials(row.embedding, row.head)
        if row.bundle is not None:
            yield output / row.bundle / "predictions.npz"


def _digest(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
