"""The report page of an experiment, its charts for papers, and comparisons of experiments, all from saved artifacts.

`build` and `refresh` take the output folder and return the page's path; both raise PipelineError where the leaderboard is missing
or of another version. With several targets each has its own page, and the folder's page is an overview. matplotlib is imported
only when something is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.evaluation.leaderboard import Leaderboard, read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import REPORT, Artifacts, made_by, read_document
from pipeline.io.digests import file_digest, fingerprint

PAGE = "report.html"
RECORD = "report.json"


def build(output: Path) -> Path:
    """Write `report.html`, `plots/*.png` and `audit/*.csv`."""
    return refresh(output, anew=True)


def refresh(output: Path, anew: bool = False) -> Path:
    """Write the report files if they or their inputs have changed, or in any case if `anew`."""
    output = Path(output)
    each = Artifacts(output).each_target()
    made = {} if "" in each else {name: refresh(folder, anew) for name, folder in each.items()}
    if not anew and not made and is_current(output):
        return output / PAGE
    from pipeline.report import page

    return page.build_overview(output, made) if made else page.build(output)


def is_current(output: Path) -> bool:
    """Whether the inputs and files recorded in `report.json` are unchanged."""
    try:
        record = read_document(output / RECORD, REPORT)
        made = digests(output, map(output.joinpath, record["files"]))
    except (PipelineError, OSError, KeyError, TypeError):
        return False
    return bool(record["files"] == made and record.get("inputs") == digest_inputs(output))


def digest_inputs(output: Path) -> str:
    """Return one digest of all inputs of a page: the saved results and the version of the program.

    The leaderboard's date is ignored, because a run with nothing to do updates it.
    """
    board = read_leaderboard(output)
    record = json.loads(board.to_json())
    record["provenance"].pop("date", None)
    record.pop("digest")
    return fingerprint([record, digests(output, filter(Path.is_file, _sources(output, board))), made_by()])


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the digests of files by their paths below a folder."""
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _sources(output: Path, board: Leaderboard) -> Iterator[Path]:
    """Yield the page's input files besides the leaderboard; features.json stands for the features, whose digests it has."""
    files = Artifacts(output)
    yield from (files.features, files.audit, files.few_shot, files.advice, files.mistakes, files.layers)
    yield from sorted(files.dataset.glob("*.csv"))
    for row in board.rows:
        yield files.trials(row.embedding, row.head)
        if row.bundle is not None:
            yield output / row.bundle / FILE_NAME
