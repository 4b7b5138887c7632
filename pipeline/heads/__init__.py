"""Heads: the models fitted on frozen features, one row each in a table, or your own (docs/adding-a-head.md)."""

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
