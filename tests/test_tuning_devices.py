"""Linear heads on a device of torch: what numpy finds, and on the processor again where the device will not do."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_tuning_solvers import GRIDS, network, problem_of

from pipeline import config as configuration
from pipeline.config import TuningConfig
from pipeline.errors import ConfigError, HeadError
from pipeline.heads import HEADS
from pipeline.tuning import devices, linear, make_folds, tune
from pipeline.tuning.evaluators import EVALUATORS

LINEAR = ["logistic_regression", "linear_svm", "ridge"]
NO_GPU = not torch.cuda.is_available()
GPU = pytest.param("cuda", marks=pytest.mark.skipif(NO_GPU, reason="there is no CUDA GPU"))


@pytest.fixture(autouse=True)
def afresh() -> None:
    """A device is chosen once per process otherwise."""
    devices.resolve.cache_clear()


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve nearer to the optimum, to tell what is found from where it stops."""
    monkeypatch.setattr(linear, "LOGISTIC_TOLERANCE", 1e-5)
    monkeypatch.setattr(linear, "HINGE_TOLERANCE", 1e-5)


def evaluated(name: str, problem: Any) -> list[Any]:
    evaluator = EVALUATORS[name]
    made: list[Any] = evaluator.evaluate(problem, 1, evaluator.prepare(problem, 1), GRIDS[name])
    return made


def on(device: str, **settings: Any) -> TuningConfig:
    """A section as the config has it, with a device that only tests may ask for."""
    return TuningConfig(**settings).model_copy(update={"device": device})


@pytest.mark.parametrize("device", ["torch:cpu", GPU])
@pytest.mark.parametrize(("rows", "dim"), [(210, 40), (90, 120)], ids=["tall", "wide"])
@pytest.mark.parametrize(("classes", "class_weight"), [(2, None), (4, None), (4, "balanced")])
@pytest.mark.parametrize("name", LINEAR)
def test_torch_finds_what_numpy_finds(
    name: str, classes: int, class_weight: Any, rows: int, dim: int, device: str, near: None
) -> None:
    problem = problem_of(name, rows, dim, classes, class_weight)
    here, there = evaluated(name, problem), evaluated(name, replace(problem, device=device))
    for place, (own, other) in enumerate(zip(there, here, strict=True)):
        # Under a weak penalty the optimum is flat, and rounding decides where on it a solver stops.
        share = 1e-4 if place < 2 else 3e-3
        assert isinstance(own.scores, np.ndarray)
        assert (own.scores.dtype, own.kind, own.error) == (np.float32, other.kind, None)
        np.testing.assert_allclose(own.scores, other.scores, atol=share * np.abs(other.scores).max())
        assert np.mean(own.predictions != other.predictions) <= 0.01


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("classes", [2, 3])
def test_nothing_is_made_beside_the_device(name: str, classes: int) -> None:
    problem = replace(problem_of(name, 90, 20, classes), device="torch:cpu")
    expected = evaluated(name, problem)
    # Whatever does not name its device is made on one that holds no numbers, and cannot be calculated with.
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
        made = evaluated(name, problem)
    for own, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(own.scores, other.scores)


@pytest.mark.parametrize("device", ["torch:cpu", GPU])
@pytest.mark.parametrize("name", LINEAR)
def test_a_search_chooses_the_same_and_ends_with_a_scikit_learn_head(
    name: str, device: str, tmp_path: Path, near: None
) -> None:
    X, y = network(200, 20, 3)
    arguments = (HEADS[name], X, y, make_folds(y, 3, 0))
    here = tune(*arguments, on("cpu", trials=4, jobs=1), 0, tmp_path / "here.jsonl")
    there = tune(*arguments, on(device, trials=4, jobs=2), 0, tmp_path / "there.jsonl")
    assert [trial.params for trial in there.trials] == [trial.params for trial in here.trials]
    assert there.best.params == here.best.params
    np.testing.assert_array_equal(there.out_of_fold.predictions, here.out_of_fold.predictions)
    assert type(there.pipeline[-1]) is type(here.pipeline[-1])
    np.testing.assert_array_equal(there.pipeline[-1].coef_, here.pipeline[-1].coef_)
    # A search that began on the one goes on on the other.
    again = tune(*arguments, on("cpu", trials=4, jobs=1), 0, tmp_path / "there.jsonl")
    assert again.replayed == sum(score is not None for trial in there.trials for score in trial.fold_scores)
    assert again.best.params == there.best.params


def test_heads_without_such_a_solver_stay_on_the_processor(tmp_path: Path) -> None:
    X, y = network(60, 10, 2)
    tuning = on("cuda:99", trials=1, jobs=1)
    run = tune(HEADS["nearest_centroid"], X, y, make_folds(y, 2, 0), tuning, 0, tmp_path / "trials.jsonl")
    assert run.best.error is None


def test_a_device_that_runs_out_of_memory_leaves_the_search_to_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    X, y = network(200, 20, 3)
    arguments = (HEADS["logistic_regression"], X, y, make_folds(y, 3, 0))
    expected = tune(*arguments, on("cpu", trials=3, jobs=1), 0, tmp_path / "here.jsonl")

    def full(matrix: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with caplog.at_level(logging.WARNING):
        run = tune(*arguments, on("torch:cpu", trials=3, jobs=2), 0, tmp_path / "there.jsonl")
    assert [record.getMessage() for record in caplog.records] == [
        "head logistic_regression: torch:cpu gave up on fold 0 (OutOfMemoryError('CUDA out of memory')); "
        "the search goes on on the processor"
    ]
    assert run.best.fold_scores == expected.best.fold_scores
    assert isinstance(run.pipeline[-1], LogisticRegression)


def test_an_error_that_is_not_the_devices_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = network(60, 10, 2)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(linear, "turn", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        tune(HEADS["ridge"], X, y, make_folds(y, 2, 0), on("torch:cpu", trials=1), 0, tmp_path / "trials.jsonl")


CHOICE = """
import sys
from pipeline.tuning import devices
devices.DRIVERS = ()
assert devices.resolve("auto", True) == "cpu" and devices.resolve("cpu", True) == "cpu"
print("torch" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="drivers are looked for on Linux")
def test_without_a_driver_torch_is_not_even_imported() -> None:
    made = subprocess.run([sys.executable, "-c", CHOICE], capture_output=True, text=True, check=True)
    assert made.stdout == "False\n"


def test_the_choice_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(devices, "DRIVERS", ("/",))
    with caplog.at_level(logging.DEBUG, "pipeline.tuning.devices"):
        chosen = [devices.resolve("auto", False) for _ in range(3)]
    assert chosen == ["cpu"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "linear heads are solved on cpu: the features are too few to be worth a GPU"
    ]
    assert devices.resolve("auto", True) == ("cpu" if NO_GPU else "cuda")


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(HeadError) as caught:
        devices.resolve("cuda:99", False)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert str(caught.value) == (
        f"tuning.device: 'cuda:99' is not available here: torch sees {found} CUDA GPUs, counted from 0; set it to 'auto' or 'cpu'"
    )


def test_the_config_knows_the_devices() -> None:
    assert TuningConfig().device == "auto"
    assert TuningConfig(device="cuda:1").device == "cuda:1"
    raw = {"output": "o", "backbones": [{"name": "resnet18"}], "heads": ["knn"], "tuning": {"device": "torch:cpu"}}
    with pytest.raises(ConfigError) as caught:
        configuration.parse(raw, "test")
    assert caught.value.problems[0].startswith("tuning.device: ")
