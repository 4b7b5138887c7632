"""What a report page was made of, so that a page whose material did not change is not made again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pipeline
from pipeline.errors import PipelineError
from pipeline.evaluation.leaderboard.table import Leaderboard, read_leaderboard
from pipeline.experiment import REPORT, Artifacts, read_document, write_document
from pipeline.io.digests import file_digest, fingerprint

PAGE = "report.html"
RECORD = "report.json"
LIBRARIES = ("Jinja2", "matplotlib", "numpy", "Pillow", "scikit-learn", "scipy", "umap-learn")
"""What draws and reckons; the last need not be there."""

CODE = ("*.py", "report/templates/*")


def is_current(output: Path) -> bool:
    """Whether everything that `write_record` wrote down is as it was then: what the page was made of, and what was made."""
    try:
        record = read_document(output / RECORD, REPORT)
        made = {name: file_digest(output / name) for name in record["files"]}
    except (PipelineError, OSError, KeyError, TypeError):
        return False
    return bool(record["files"] == made and record.get("inputs") == digest_inputs(output))


def write_record(output: Path, inputs: str, files: Iterable[Path]) -> None:
    """Write down in `report.json` what the page was made of, by `digest_inputs`, and the digests of the files that were made."""
    made = _digests(output, files)
    write_document(output / RECORD, REPORT, {"inputs": inputs, "files": made})


def digest_inputs(output: Path) -> str:
    """Return one digest of all that goes into a page: saved results, the code, the libraries.

    The date of the leaderboard does not count: a run that had nothing to do writes a new one.
    """
    board = read_leaderboard(output)
    record = json.loads(board.to_json())
    record["provenance"].pop("date", None)
    record.pop("digest")
    sources, root = [path for path in _sources(output, board) if path.is_file()], Path(pipeline.__file__).parent
    code = [path for kind in CODE for path in sorted(root.rglob(kind))]
    libraries = {name: _version(name) for name in LIBRARIES}
    return fingerprint([record, _digests(output, sources), _digests(root, code), libraries])


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _sources(output: Path, board: Leaderboard) -> Iterator[Path]:
    """The files beside the leaderboard that the page is made of; the features are named by their digest in features.json."""
    files = Artifacts(output)
    yield from (
        files.features,
        files.audit,
        files.few_shot,
        files.advice,
        files.layers,
        *sorted(files.dataset.glob("*.csv")),
    )
    for row in board.rows:
        yield files.trials(row.embedding, row.head)
        if row.bundle is not None:
            yield output / row.bundle / "predictions.npz"
