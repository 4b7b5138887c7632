"""Paths: in a config file they are relative to its folder, given with `--set` to the folder the command is run in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.features import WEIGHTS_FILES
from pipeline.errors import ConfigError


def seen_from_here(raw: dict[str, Any], file: Path) -> None:
    """Rewrite the paths of a config file so that they hold in the working folder.

    Raises
    ------
    ConfigError
        For every path that leads nowhere from the file's folder, but somewhere from the working folder, as up to 0.1.
    """
    problems = []
    for section, key, where in _paths(raw):
        given = section[key]
        place = Path(os.path.abspath(file.parent / given))
        section[key] = str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)
        if not os.path.exists(section[key]) and os.path.exists(given):
            right = os.path.relpath(given, file.parent)
            problems.append(f"{where}: {given!r} is relative to the working folder, expected {right!r}")
    if problems:
        raise ConfigError(f"{file}: paths in a config are relative to the folder the config is in", problems)


def seen_from(raw: dict[str, Any], folder: Path) -> None:
    """Rewrite paths that hold in the working folder for a config file in another folder."""
    for section, key, _ in _paths(raw):
        section[key] = os.path.relpath(section[key], folder)


def _paths(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield every relative path in a config that may hold anything: its section, its key, and both for a message."""
    dataset, backbones = raw.get("dataset"), raw.get("backbones")
    places: list[tuple[Any, str, str]] = [
        (raw, "output", "output"),
        (raw, "store", "store"),
        (dataset, "path", "dataset.path"),
    ]
    for number, section in enumerate(backbones if isinstance(backbones, list) else []):
        if isinstance(section, dict) and str(section.get("weights")).endswith(WEIGHTS_FILES):
            places.append((section, "weights", f"backbones.{number}.weights"))
    for section, key, where in places:
        path = section.get(key) if isinstance(section, dict) else None
        if isinstance(path, str) and path and not os.path.isabs(os.path.expanduser(path)):
            yield section, key, where
