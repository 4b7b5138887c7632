"""Keys and spellings of earlier versions: what became of each, told to whoever still has it in a config.

A key with the value that meant what happens now is passed over: files that this package wrote name every key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from pipeline.config.sections import FinetuneConfig


class Retired(NamedTuple):
    """A key, or a spelling of its value, that is gone."""

    default: object
    """The value that meant what happens now."""
    told: str
    """What became of it and what to do instead."""
    is_old: Callable[[Any], bool] = lambda value: True
    """Whether a value is the old spelling, where the key is still there."""


_MOVED = FinetuneConfig.model_fields.keys() - {"start", "validation_fraction", "unfreeze"}

KEYS: Final[Mapping[str, Retired]] = {
    "extraction.processes": Retired(
        "auto", "is gone: one process uses all processors and one GPU; remove it, and name a GPU with extraction.device"
    ),
    "extraction.decode": Retired(
        None,
        "gpu is gone: the processor decodes; set it to standard, or fast for large photos",
        lambda value: value == "gpu",
    ),
    "tuning.device": Retired("auto", "is gone: heads are searched on the processor; remove it"),
    "finetune.embedding": Retired("best", "is gone: write finetune.start: EMBEDDING"),
    "finetune.head": Retired("best", "is gone: write finetune.start: EMBEDDING/HEAD, or finetune.start: random"),
    "finetune.interpolate": Retired(True, "is gone: the weights between are always tried; remove it"),
    "finetune.unfreeze": Retired(
        [{"start": 0.0, "scope": "all"}],
        "{start: ..., scope: ...} is written as a pair now: [[0, head], [0.2, all]]",
        lambda value: isinstance(value, list) and any(isinstance(step, dict) for step in value),
    ),
    **{
        f"finetune.training.{key}": Retired(FinetuneConfig.model_fields[key].default, f"is finetune.{key} now")
        for key in FinetuneConfig.model_fields
        if key in _MOVED
    },
    "finetune.training.precision": Retired("auto", "is gone: extraction.precision holds for training too"),
    "finetune.training.range_test": Retired(False, "is gone: no rate is looked for; set finetune.rate"),
    "finetune.training.momentum": Retired(0.9, "is gone with the optimizer sgd; remove it"),
    "finetune.training.schedule": Retired("cosine", "is gone: the rate falls along a cosine; remove it"),
    "finetune.training.optimizer": Retired("adamw", "is gone: it is AdamW; remove it"),
    "finetune.training.cutmix": Retired(0.0, "is gone: remove it, and set finetune.mixup"),
    "finetune.training.dropout": Retired(0.0, "is gone: weight_decay, label_smoothing and mixup are left; remove it"),
    "finetune.training.smallest_crop": Retired(0.5, "is gone: crops keep half of the area or more; remove it"),
    "finetune.training.clip_norm": Retired(None, "is gone: lower finetune.rate where the loss is no number"),
    "finetune.training.evaluate_every": Retired("auto", "is gone: a run is evaluated ten times; remove it"),
    "finetune.training.replicas": Retired(1, "is gone: torch's own threads share a step's work; remove it"),
    "finetune.training.average_top": Retired(
        0, "is gone: no soup of weights is made; remove it, and set finetune.ema for an average"
    ),
    "finetune.training.sizes": Retired([], "is gone: images have the size of the weights' preprocessing; remove it"),
    "finetune.training.cooldown": Retired(0.4, "is gone with the schedule trapezoid; remove it"),
    "finetune.training": Retired({}, "is gone: its keys stand in finetune itself", lambda value: value == {}),
}
"""Section and key -> what became of it."""


def without_retired(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a config without retired keys, and a line for each that meant something else than what happens now."""
    kept, problems = copy.deepcopy(dict(raw)), []
    for path, row in KEYS.items():
        *sections, key = path.split(".")
        section: Any = kept
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        old = isinstance(section, dict) and key in section and row.is_old(section[key])
        if old and section.pop(key) != row.default:
            problems.append(f"{path}: {row.told}")
    return kept, problems
