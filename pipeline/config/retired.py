"""Keys that an earlier version had: what became of each, told to whoever still has it in a config.

A key with the value that changed nothing is passed over: files that this package wrote name every key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple


class Retired(NamedTuple):
    """A key that is gone."""

    default: object
    """The value that meant what happens now."""
    told: str
    """What became of it and what to do instead."""


KEYS: Final[Mapping[str, Retired]] = {
    "extraction.processes": Retired(
        "auto", "is gone: one process uses all processors and one GPU; remove it, and name a GPU with extraction.device"
    ),
    "tuning.device": Retired("auto", "is gone: heads are searched on the processor; remove it"),
}
"""Section and key -> what became of it."""

VALUES: Final[Mapping[tuple[str, str], str]] = {
    ("extraction.decode", "gpu"): "is gone: the processor decodes; set it to standard, or fast for large photos"
}
"""Section and key, and a value that is gone -> what became of it."""


def without_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it was read, less the retired keys whose value meant what happens now."""
    kept = dict(raw)
    for path, key in KEYS.items():
        section, _, name = path.rpartition(".")
        found = kept.get(section)
        if isinstance(found, dict) and name in found and found[name] == key.default:
            kept[section] = {other: value for other, value in found.items() if other != name}
    return kept
