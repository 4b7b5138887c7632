"""The sections of stage two: the heads, and how they are searched."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Scalar, Section


class HeadConfig(Section):
    """One head to tune; a bare name in the YAML is the same as `name:` alone."""

    name: str
    """A built-in head, or `package.module:ATTRIBUTE` naming a `Head` of your own."""
    space: dict[str, tuple[Scalar, ...]] = Field(default_factory=dict)
    """Parameter -> `[low, high]` for a range, the list of choices for a categorical one."""
    class_weight: Literal["balanced"] | None = None

    @field_validator("space", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


_UNITS = {"MB": 10**6, "GB": 10**9}


class TuningConfig(Section):
    """The search: the same strategy, budget and folds for every head."""

    strategy: Literal["bayes", "random", "grid"] = "bayes"
    trials: int = Field(16, ge=1)
    """Trials per head."""
    seconds: float | None = Field(None, gt=0)
    """Time per head instead of a number of trials."""
    folds: int = Field(5, ge=2)
    scoring: Literal["accuracy", "balanced_accuracy", "macro_f1", "log_loss", "roc_auc", "top_5_accuracy"] = "accuracy"
    """What is searched, ranked and compared by; the last three need heads that give probabilities."""
    nested: bool = False
    """Also repeat every search within each fold's training images, for a score that nothing was chosen by: folds times
    the work."""
    seeds: int = Field(1, ge=1, le=100)
    """Searches per head, each with its own folds, by the experiment's seed and those after it: so many times the work."""
    pca: int | float | None = None
    """Principal components that every head works on, found within each fold: a number, or the share of the variance they
    hold, such as 0.95."""
    whiten: bool = False
    """Whether `pca` also gives all components the same variance."""
    jobs: Literal["auto"] | int = "auto"
    """Parallel processes."""
    memory: str = "auto"
    """What the features of one embedding and the work on them may take, such as `2GB` or `500MB`; `auto` is three quarters
    of what is free. Embeddings that need more stay on disk, and only the heads that can work there are tuned."""

    @property
    def memory_bytes(self) -> int | None:
        """The limit in bytes; None for `auto`."""
        return None if self.memory == "auto" else int(float(self.memory[:-2]) * _UNITS[self.memory[-2:]])

    @field_validator("pca", mode="before")
    @classmethod
    def _a_number_or_a_share(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is None or whole or (isinstance(value, float) and 0 < value < 1):
            return value
        raise ValueError(
            f"expected a number of components such as 64, a share of the variance below 1 such as 0.95, or null, got {value!r}"
        )

    @model_validator(mode="after")
    def _whitening_needs_components(self) -> TuningConfig:
        if self.whiten and self.pca is None:
            raise ValueError("whiten: works on principal components; give pca too, such as pca: 64")
        return self

    @field_validator("memory", mode="before")
    @classmethod
    def _a_size(cls, value: Any) -> Any:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", value) if isinstance(value, str) else None
        if value != "auto" and (found is None or not float(found[1])):
            number = re.fullmatch(r"\d*\.?\d+", str(value)) and float(value) > 0
            hint = f"; write '{value}GB' or '{value}MB'" if number else ""
            raise ValueError(f"expected 'auto' or a size above 0 such as '2GB' or '500MB', got {value!r}{hint}")
        return value

    @field_validator("jobs")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("should be 'auto' or a whole number from 1 up")
        return value
