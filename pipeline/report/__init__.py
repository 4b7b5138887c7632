"""The report page of an experiment, its charts for papers, and several experiments side by side, all from saved artifacts.

`build` and `refresh` take the output folder and return the page's path; both raise PipelineError where there is no leaderboard,
or one of another version. Of several targets each has its page, and the folder's is a table of them. matplotlib is imported only
where something is drawn.
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
    """Make `report.html`, `plots/*.png` and `audit/*.csv`."""
    return refresh(output, anew=True)


def refresh(output: Path, anew: bool = False) -> Path:
    """Make them where they, or what they are made of, have changed, or all `anew`."""
    output = Path(output)
    each = Artifacts(output).each_target()
    made = {} if "" in each else {name: refresh(folder, anew) for name, folder in each.items()}
    if not anew and not made and is_current(output):
        return output / PAGE
    from pipeline.report import page

    return page.build_overview(output, made) if made else page.build(output)


def is_current(output: Path) -> bool:
    """Whether all that `report.json` names is as it was then: what the page was made of, and what was made."""
    try:
        record = read_document(output / RECORD, REPORT)
        made = digests(output, map(output.joinpath, record["files"]))
    except (PipelineError, OSError, KeyError, TypeError):
        return False
    return bool(record["files"] == made and record.get("inputs") == digest_inputs(output))


def digest_inputs(output: Path) -> str:
    """Return one digest of all that goes into a page: saved results, and this version of the program.

    The date of the leaderboard does not count: a run that had nothing to do writes a new one.
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
    """The files beside the leaderboard that the page is made of; the features are named by their digest in features.json."""
    files = Artifacts(output)
    yield from (files.features, files.audit, files.few_shot, files.advice, files.mistakes, files.layers)
    yield from sorted(files.dataset.glob("*.csv"))
    for row in board.rows:
        yield files.trials(row.embedding, row.head)
        if row.bundle is not None:
            yield output / row.bundle / FILE_NAME
