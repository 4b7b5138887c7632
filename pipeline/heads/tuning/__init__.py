"""Tuning: search a head's parameters by cross-validation, with the same folds and budget for every head.

A search gets a round of points from a strategy, fits them on the folds, sends back the scores, and repeats. Every finished fit is
written to a journal, so a killed search resumes where it stopped and ends with the same result.
"""

from pipeline.heads.tuning.evaluation import working_memory, works_on_disk
from pipeline.heads.tuning.features import FeatureMatrix, Projections, blocks, on_disk, part
from pipeline.heads.tuning.folds import Folds, growing, make_folds
from pipeline.heads.tuning.journal import seconds_of_trials
from pipeline.heads.tuning.last_fit import refit
from pipeline.heads.tuning.room import limited, memory_needed, memory_needed_on_disk
from pipeline.heads.tuning.search import TuningRun, check, fits_of, tune
from pipeline.heads.tuning.strategies import neighbours, require

__all__ = [
    "FeatureMatrix",
    "Folds",
    "Projections",
    "TuningRun",
    "blocks",
    "check",
    "fits_of",
    "growing",
    "limited",
    "make_folds",
    "memory_needed",
    "memory_needed_on_disk",
    "neighbours",
    "on_disk",
    "part",
    "refit",
    "require",
    "seconds_of_trials",
    "tune",
    "working_memory",
    "works_on_disk",
]
