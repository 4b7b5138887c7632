"""One experiment: a YAML file turned into a frozen, typed `Config`, whose paths are relative to the working folder.

section.py      what all sections share
features.py     stage one's sections
tuning.py       stage two's
training.py     stage three's
experiment.py   Config: all of them
reading.py      YAML -> Config, every problem at once
paths.py        paths relative to the file
retired.py      keys of earlier versions
"""

from pipeline.config.experiment import Config
from pipeline.config.features import (
    NETWORK_DEVICES,
    WEIGHTS_FILES,
    BackboneConfig,
    DatasetConfig,
    ExtractionConfig,
    PreprocessingConfig,
)
from pipeline.config.reading import dump_yaml, load, parse, read_yaml
from pipeline.config.section import BASELINE_NAMES, Scalar, Section, checked_device, guess
from pipeline.config.training import FinetuneConfig, TrainingConfig, UnfreezeConfig
from pipeline.config.tuning import HeadConfig, TuningConfig

__all__ = [
    "BASELINE_NAMES",
    "NETWORK_DEVICES",
    "WEIGHTS_FILES",
    "BackboneConfig",
    "Config",
    "DatasetConfig",
    "ExtractionConfig",
    "FinetuneConfig",
    "HeadConfig",
    "PreprocessingConfig",
    "Scalar",
    "Section",
    "TrainingConfig",
    "TuningConfig",
    "UnfreezeConfig",
    "checked_device",
    "dump_yaml",
    "guess",
    "load",
    "parse",
    "read_yaml",
]
