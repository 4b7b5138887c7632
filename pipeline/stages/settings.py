"""Settings: a config whose heads, baselines and scores are those of their tables, which no other place names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import config
from pipeline.config import Config, Names
from pipeline.data.targets import TARGETS
from pipeline.embed import baselines
from pipeline.evaluation import METRICS
from pipeline.heads import TABLES


def names() -> Names:
    """Return the words that the tables offer to a config."""
    guesses = tuple(target.constant for target in TARGETS.values())
    return {
        "head": tuple(dict.fromkeys(name for table in TABLES.values() for name in table.heads)),
        "baseline": (*dict.fromkeys(guesses), *baselines.NAMES),
        "score": ("auto", *METRICS),
        "target": ("auto", *TARGETS),
    }


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a config file with `--set a.b=c` overrides applied, and every name in it.

    Raises
    ------
    ConfigError
        With one line for every problem.
    """
    return config.load(path, overrides, names())
