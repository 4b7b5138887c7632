"""Tuning: search a head's parameters by cross-validation, the same folds and budget for every head.

A search asks for a round of points, fits them on the folds, tells the scores, and asks again. Every fit is written to a
journal as it ends, so a killed search goes on where it was and ends with the same result.
"""

from pipeline.data.classes import expand_scores
from pipeline.heads.tuning.evaluation import working_memory, works_on_disk
from pipeline.heads.tuning.events import seconds_of_trials
from pipeline.heads.tuning.features import Features, blocks, on_disk, part
from pipeline.heads.tuning.folds import Folds, make_folds
from pipeline.heads.tuning.last_fit import refit
from pipeline.heads.tuning.projection import Projections
from pipeline.heads.tuning.records import Trial, TuningRun
from pipeline.heads.tuning.room import limited, memory_needed, memory_needed_on_disk
from pipeline.heads.tuning.search import check, tune
from pipeline.heads.tuning.stored import fit_folds, growing, held_at, neighbours
from pipeline.heads.tuning.strategies import require

__all__ = [
    "Features",
    "Folds",
    "Projections",
    "Trial",
    "TuningRun",
    "blocks",
    "check",
    "expand_scores",
    "fit_folds",
    "growing",
    "held_at",
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
