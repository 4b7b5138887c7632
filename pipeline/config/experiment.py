"""One experiment: all its sections."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from pipeline.config.features import BackboneConfig, DatasetConfig, ExtractionConfig
from pipeline.config.section import BASELINE_NAMES, Baseline, Section, not_empty
from pipeline.config.training import FinetuneConfig
from pipeline.config.tuning import HeadConfig, TuningConfig


class Config(Section):
    """A whole experiment."""

    output: str
    """The folder every artifact of this experiment is written to; `artifacts/NAME` of the data set when not given."""
    store: str | None = None
    """The folder of the feature stores, which several experiments may share; `features` beside `output` when not given."""
    seed: int = Field(0, ge=0, lt=2**32)
    dataset: DatasetConfig = DatasetConfig()
    backbones: tuple[BackboneConfig, ...]
    baselines: tuple[Baseline, ...] = BASELINE_NAMES
    """Cheap rivals in the leaderboard, so that a backbone that does not help is seen not to help."""
    extraction: ExtractionConfig = ExtractionConfig()
    heads: tuple[HeadConfig, ...]
    tuning: TuningConfig = TuningConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="before")
    @classmethod
    def _output_of_the_data(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("output") is not None:
            return raw
        return {**raw, "output": f"artifacts/{_name_of_the_data(raw.get('dataset'))}"}

    @field_validator("backbones", "baselines", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("heads", mode="before")
    @classmethod
    def _bare_names(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return tuple({"name": item} if isinstance(item, str) else item for item in value)

    @field_validator("backbones", "heads")
    @classmethod
    def _at_least_one(cls, value: tuple[Section, ...]) -> tuple[Section, ...]:
        return not_empty(value)

    @model_validator(mode="after")
    def _stores_apart_from_results(self) -> Config:
        output = Path(self.output)
        if os.path.abspath(output) == os.path.abspath(output.parent / "features" if self.store is None else self.store):
            raise ValueError(f"output: {self.output} is the folder of the feature stores; choose another name")
        return self

    @model_validator(mode="after")
    def _nothing_twice(self) -> Config:
        names = [head.name for head in self.heads]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"heads: named more than once: {', '.join(twice)}")
        if len(set(map(str, self.backbones))) < len(self.backbones):
            raise ValueError("backbones: the same backbone is given twice")
        return self


def _name_of_the_data(section: Any) -> str:
    """What a data set is called: its torchvision name, else its folder or its manifest without the ending."""
    found = section if isinstance(section, dict) else {}
    if isinstance(name := found.get("name"), str):
        return Path(name).name
    path = found.get("path")
    if not isinstance(path, str):
        return str(found.get("source", "digits"))
    real = Path(os.path.realpath(os.path.expanduser(path)))
    return (real.stem if real.suffix.lower() in {".csv", ".parquet"} else real.name) or "images"
