"""Settings: a config whose heads, baselines and metrics are checked against their tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline import config
from pipeline.config import Config, Names, Overrides, guess, source_of
from pipeline.data.targets import TARGETS
from pipeline.embed import baselines
from pipeline.embed.published import DEFAULT
from pipeline.errors import ConfigError
from pipeline.evaluation import METRICS
from pipeline.experiment import Artifacts
from pipeline.heads import FOR_PHOTOS, TABLES

MOST_LISTED = 10_000
"""Largest number of neighbouring file names to search for a similar one."""

OF_PHOTOS = {
    "backbones": [DEFAULT.model_dump(mode="json", exclude_defaults=True)],
    "heads": list(FOR_PHOTOS),
}
"""The config of a folder of photos, except for their path."""


def names() -> Names:
    """Return the names of heads, baselines, metrics and targets that a config may use."""
    guesses = tuple(target.constant for target in TARGETS.values())
    return {
        "head": tuple(dict.fromkeys(name for table in TABLES.values() for name in table.known)),
        "baseline": (*dict.fromkeys(guesses), *baselines.NAMES),
        "score": ("auto", *METRICS),
        "target": ("auto", *TARGETS),
    }


def load(given: str | Path | Config, overrides: Overrides = ()) -> Config:
    """Read and validate a config, including the names in it, with overrides applied.

    `given` may be a config file, a `Config`, the output folder of an experiment, which contains its config, or images: a folder of
    class folders, an archive of them or a manifest, with the config of `configs/folder.yaml`. ConfigError with all problems.
    """
    if not isinstance(given, Config):
        given = Path(given).expanduser()
        require_there(given)
        if Artifacts(given).features.exists():  # it may have been moved since
            given = config.load(Artifacts(given).config, (), names()).model_copy(update={"output": str(given)})
    return config.load(given, overrides, names(), OF_PHOTOS)


OF_CONFIG = "a config file, or images: one folder per class, an archive of it, or a manifest (.csv, .parquet)"


def require_there(path: Path, commands: Sequence[str] = (), expected: str = OF_CONFIG) -> None:
    """Raise ConfigError, with a similar name, if nothing is at a path.

    Archives and remote paths are checked by their readers. `commands` are alternatives that the user may have meant.
    """
    if os.path.lexists(path) or source_of(str(path)) is not None:
        return
    near = os.listdir(path.parent)[:MOST_LISTED] if os.access(path.parent, os.R_OK) and path.parent.is_dir() else []
    words = f"a command ({', '.join(commands)}), " if commands else ""
    raise ConfigError(
        f"{path}: there is no such {'command, ' * bool(commands)}file or folder{guess(path.name, [*commands, *near])}; expected "
        f"{words}{expected}"
    )
