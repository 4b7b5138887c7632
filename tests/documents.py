"""Documents as a stranger could write them: changed, with a digest that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data import DatasetIndex
from pipeline.evaluation.leaderboard import Leaderboard
from pipeline.evaluation.leaderboard.table import leaderboard_of
from pipeline.experiment import LEADERBOARD, Artifacts, parse_document
from pipeline.io.digests import fingerprint


def rewrite(path: Path, document: dict[str, Any]) -> None:
    """Write a document of an experiment with the digest of its content."""
    document["digest"] = fingerprint({key: value for key, value in document.items() if key != "digest"})
    path.write_text(json.dumps(document), encoding="utf-8")


def write_index(files: Artifacts, index: DatasetIndex) -> None:
    """Write an index, and let the features of the experiment be those of it."""
    index.write(files.dataset)
    document = json.loads(files.features.read_text(encoding="utf-8"))
    rewrite(files.features, document | {"index": index.fingerprint()})


def fingerprint_of_index(files: Artifacts) -> str:
    """Return what features.json says of the index as it is now."""
    return DatasetIndex.read(files.dataset).fingerprint()


def board_of(text: str) -> Leaderboard:
    """Return the leaderboard that a text holds."""
    path = Path("leaderboard.json")
    return leaderboard_of(parse_document(text, LEADERBOARD, path), path)
