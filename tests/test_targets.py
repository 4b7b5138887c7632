"""Targets: labels become y, and predictions become cells; metrics and heads say which kinds they serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import TuningConfig
from pipeline.data import DatasetIndex
from pipeline.data.targets import TARGETS, Classification
from pipeline.errors import UnfittedError
from pipeline.evaluation import METRICS
from pipeline.heads import HEADS, TABLES
from pipeline.io.digests import content_digest, digests_from_hex
from pipeline.stages.train_heads.task import Embedding, Task


def index_of(labels: list[str]) -> DatasetIndex:
    texts: NDArray[np.object_] = np.array(labels, dtype=object)
    paths = np.array([f"{row}.png" for row in range(len(labels))], dtype=object)
    digests = digests_from_hex(content_digest(path.encode()).hex() for path in paths)
    return DatasetIndex(
        Path(), paths, texts, np.full(len(labels), "train", dtype=object), None, digests, np.ones(len(labels), int)
    )


def test_labels_become_their_places_among_the_sorted_classes() -> None:
    index = index_of(["cat", "ant", "cat", "bee"])
    target = Classification.of(index)
    assert (target.classes, target.width) == (("ant", "bee", "cat"), 3)
    assert target.encode(index).tolist() == [2, 0, 2, 1]
    assert target.encode(index_of(["bee"])).tolist() == [1]  # also of a part that lacks a class
    assert target.strata(target.encode(index)).tolist() == [2, 0, 2, 1]
    with pytest.raises(KeyError, match="dog"):
        target.encode(index_of(["dog"]))


def test_one_class_alone_cannot_be_told_from_others() -> None:
    target = Classification(("ant", "bee"))
    assert target.problem(np.array([0, 1])) is None
    assert target.problem(np.array([1, 1])) == "the training images are of 1 class; a classifier needs at least 2"


def test_cells_are_as_many_as_their_names_whatever_is_known() -> None:
    target = Classification(("ant", "bee", "cat"))
    assert target.csv_columns(2) == ["label", "probability", "label_2", "probability_2"]
    assert target.csv_cells("bee", [0.2, 0.5, 0.3], 2) == ["bee", "0.500000", "cat", "0.300000"]
    assert target.csv_cells("bee", None, 2) == ["bee", "", "", ""]
    assert target.csv_cells(None, None, 9) == [""] * len(target.csv_columns(9)) == [""] * 6


def test_metrics_and_heads_serve_kinds_that_there_are() -> None:
    served = [row.targets for row in (*METRICS.values(), *HEADS.values())]
    assert all(kinds and set(kinds) <= set(TARGETS) for kinds in served)


def test_a_head_for_another_kind_of_target_is_left_out_and_told_why() -> None:
    y, index = np.array([0, 1]), index_of(["a", "b"])
    task = Task(Classification(("a", "b")), index, index, y, y, (), None, "key")
    embedding = Embedding((TABLES["classification"].guess(y, 2),), task, TuningConfig())
    embedding.require(HEADS["ridge"])
    with pytest.raises(
        UnfittedError, match=r"^head ridge: serves regression and ranking, and the target is classification$"
    ):
        embedding.require(replace(HEADS["ridge"], targets=("regression", "ranking")))
