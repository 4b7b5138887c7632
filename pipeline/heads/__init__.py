"""Heads: the classifiers that are put on frozen features, one row each in a table.

A head is data: its name, how to build its scikit-learn pipeline from a seed, and the space its parameters are searched
in. The scaler sits inside the pipeline, so every fold fits its own. To add one, add a row to `HEADS`, or name a `Head`
of your own in the config as `package.module:ATTRIBUTE`.
"""

from pipeline.heads.choosing import held_at, resolve, resolve_all
from pipeline.heads.head import (
    Categorical,
    Dimension,
    Head,
    Integer,
    Layer,
    Params,
    Real,
    as_layer,
    configure,
    identity,
)
from pipeline.heads.table import FOR_PHOTOS, HEADS, KNN, LOGISTIC_REGRESSION, RIDGE, TABLES

__all__ = [
    "FOR_PHOTOS",
    "HEADS",
    "KNN",
    "LOGISTIC_REGRESSION",
    "RIDGE",
    "TABLES",
    "Categorical",
    "Dimension",
    "Head",
    "Integer",
    "Layer",
    "Params",
    "Real",
    "as_layer",
    "configure",
    "held_at",
    "identity",
    "resolve",
    "resolve_all",
]
