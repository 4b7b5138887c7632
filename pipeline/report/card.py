"""Model cards: what a bundle is, what it was made from and what it is good for, in Markdown beside it, from stored facts alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.errors import PipelineError
from pipeline.experiment import BUNDLE, read_document
from pipeline.report.first import known_least, predict_command
from pipeline.report.material import Material

CARD = "MODEL_CARD.md"


def facts(material: Material) -> dict[str, dict[str, Any]]:
    """Return what the card of each bundle is made of, by its path below the output folder; rows whose bundle is gone have none."""
    board, kinds, found = material.leaderboard, material.kinds, dict[str, dict[str, Any]]()
    classes = () if kinds is None else kinds.classes
    counts = Counter(() if kinds is None else zip(kinds.labels.tolist(), kinds.splits.tolist(), strict=True))
    for row in board.rows:
        try:
            record = read_document(material.output / str(row.bundle) / "bundle.json", BUNDLE)
        except (PipelineError, OSError):
            continue
        said = material.predictions.get(row.key)
        found[f"{row.bundle}/{CARD}"] = {
            "row": row,
            "record": record,
            "spec": (record.get("embedding") or {}).get("spec", {}),
            "weakest": known_least(said.test)[:3] if said and board.target.exclusive else (),
            "counts": [
                (name, counts[name, "train"] + counts[name, "validation"], counts[name, "test"]) for name in classes
            ],
            "unknown": board.provenance.get("unknown", {}).get(row.key),
            "command": predict_command(material.output, row, board.best),
        }
    return found
