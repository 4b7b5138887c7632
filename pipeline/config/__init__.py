"""One experiment: a YAML file turned into a frozen, typed `Config`, whose paths are relative to the working folder.

sections.py   the allowed keys: dataset, backbones, extraction, heads, tuning, finetune
reading.py    YAML file and `--set` -> Config, all problems reported at once; keys of earlier versions
"""

from pipeline.config.reading import Overrides, dump_yaml, load, parse, read_yaml
from pipeline.config.sections import (
    ARCHIVES,
    LOCAL_DIR,
    NO_LABELS,
    OWN,
    TIMM_NAMES,
    TIMM_PREFIX,
    WEIGHTS_FILES,
    BackboneConfig,
    Config,
    DatasetConfig,
    ExtractionConfig,
    FinetuneConfig,
    HeadConfig,
    Names,
    PreprocessingConfig,
    Scalar,
    TuningConfig,
    checked_device,
    guess,
    names_code,
    names_timm,
    names_vectors,
    source_of,
    unknown,
)
