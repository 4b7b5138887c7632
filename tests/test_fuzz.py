"""A short run of the fuzz: nothing of a finished experiment gives a wrong result in silence. The long one is in the proofs."""

from __future__ import annotations

from pathlib import Path

from fuzz import fuzz

from pipeline.config import Config

CHOSEN = (
    "features.json",
    "leaderboard.json",
    "audit.json",
    "index.csv",
    "index.json",
    "failures.csv",
    "stat-cache.npz",
    "specs.json",
)


def test_one_change_to_each_file_is_told_or_changes_nothing(experiment: Config, tmp_path: Path) -> None:
    found = fuzz(experiment, tmp_path, 1, 0, lambda name: "pixels" in name or name.endswith(CHOSEN))
    assert found.wrong == []
    assert found.changes == len(found.counts) >= 14
    assert sum(counter["refused"] + counter["warned"] + counter["verified"] for counter in found.counts.values()) >= 10
