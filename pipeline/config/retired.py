"""Keys that an earlier version had: what became of each, told to whoever still has it in a config.

A key with the value that changed nothing is passed over: files that this package wrote name every key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "finetune.training.replicas": Retired(1, "is gone: torch's own threads share a step's work; remove it"),
    "finetune.training.average_top": Retired(
        0, "is gone: no soup of weights is made; remove it, and set ema for an average"
    ),
    "finetune.training.sizes": Retired([], "is gone: images have the size of the weights' preprocessing; remove it"),
    "finetune.training.cooldown": Retired(0.4, "is gone with the schedule trapezoid; remove it"),
    "finetune.interpolate": Retired(
        True, "is gone: the weights between hand-over and result are always tried; remove it"
    ),
    "finetune.training.optimizer": Retired("adamw", "is gone: it is AdamW; remove it"),
    "finetune.training.momentum": Retired(0.9, "is gone with the optimizer sgd; remove it"),
    "finetune.training.schedule": Retired("cosine", "is gone: the rate falls by a cosine after the warm-up; remove it"),
    "finetune.training.cutmix": Retired(0.0, "is gone; remove it, and set mixup"),
    "finetune.training.range_test": Retired(False, "is gone: no rate is looked for; remove it, and set rate"),
    "finetune.training.dropout": Retired(0.0, "is gone; remove it: weight_decay, label_smoothing and mixup are left"),
    "tuning.device": Retired("auto", "is gone: heads are searched on the processor; remove it"),
}
"""Section and key -> what became of it."""

VALUES: Final[Mapping[tuple[str, str], str]] = {
    ("extraction.decode", "gpu"): "is gone: the processor decodes; set it to standard, or fast for large photos",
}
"""Section and key, and a value that is gone -> what became of it."""


def without_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it was read, less the retired keys whose value meant what happens now."""
    kept = dict(raw)
    for path, key in KEYS.items():
        kept = _without(kept, path.split("."), key.default)
    return kept


def _without(section: dict[str, Any], path: Sequence[str], default: object) -> dict[str, Any]:
    name, *rest = path
    if rest and isinstance(section.get(name), dict):
        return {**section, name: _without(section[name], rest, default)}
    if not rest and name in section and section[name] == default:
        return {other: value for other, value in section.items() if other != name}
    return section
