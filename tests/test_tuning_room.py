"""Heads whose fits take more than copies of the features, kernels and distances, keep within `tuning.memory` too."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn
from test_tuning_solvers import network

from pipeline.config import TuningConfig
from pipeline.data.classes import Classification
from pipeline.heads import HEADS
from pipeline.heads.fast import kernel
from pipeline.heads.tuning import make_folds, tune
from pipeline.heads.tuning.evaluation import Problem, smaller_caches, working_memory
from pipeline.heads.tuning.room import room_for
from pipeline.io import process

LIMITED = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from pipeline.config import TuningConfig
from pipeline.heads import HEADS
from pipeline.heads.tuning import make_folds, tune

folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
y = np.arange(3000) % 3
X = (rng.normal(size=(3000, 32)) + 1.2 * np.eye(3, 32)[y]).astype(np.float32)
folds = make_folds(y, 2, 0)
tuning = TuningConfig(trials=1, jobs=1, folds=2, memory="14MB")
heads = [replace(HEADS["rbf_svm"], defaults={"C": 1.0, "gamma": 0.02}), HEADS["knn"]]
# What libraries keep for themselves is there before the limit is set.
little = np.arange(150)
for head in heads:
    tune(head, X[little], y[little], make_folds(y[little], 2, 0), tuning, 0, folder / f"warm-{head.name}")
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
for limit in (14, 74):
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + limit * 10**6, resource.RLIM_INFINITY))
    tuning = TuningConfig(trials=1, jobs=1, folds=2, memory=f"{limit}MB")
    for head in heads:
        run = tune(head, X, y, folds, tuning, 0, folder / f"{head.name}-{limit}")
        print(f"{head.name}-{limit}", round(run.best.mean, 3), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts allocations on Linux")
def test_kernels_and_distances_stay_within_the_limit(tmp_path: Path) -> None:
    """Features of 0.4 MB; the kernels of a fold take 70 MB, distances and their places 27 MB.

    Within 14 MB they are fitted from the features; within 74 MB there is room for one fold's kernels.
    """
    made = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    assert "no shared work" not in made.stderr
    lines = dict(line.split() for line in made.stdout.splitlines())
    assert list(lines) == ["rbf_svm-14", "knn-14", "rbf_svm-74", "knn-74"]
    assert all(float(score) > 0.5 for score in lines.values())


def test_kernels_too_large_to_be_kept_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "KERNEL_BYTES", 8 * 39**2)
    X, y = network(80, 6, 2)
    tune(HEADS["rbf_svm"], X, y, make_folds(y, 2, 0), TuningConfig(trials=1, folds=2, jobs=1), 0, tmp_path / "trials")
    assert [record.getMessage() for record in caplog.records] == [
        "head rbf_svm: the kernel of 40 training rows takes 0.0 GB, so each trial is fitted from the features, which may "
        "take minutes to hours; leave the head out of `heads` if that is too long"
    ]


@pytest.mark.parametrize(("interval", "shown"), [(0.0, True), (3600.0, False)])
def test_the_fits_of_a_trial_are_counted_before_it_ends(
    interval: float, shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_SECONDS", interval)
    X, y = network(80, 6, 2)
    tune(HEADS["rbf_svm"], X, y, make_folds(y, 2, 0), TuningConfig(trials=1, folds=2, jobs=1), 0, tmp_path / "trials")
    drawn = capsys.readouterr().err.split("\r")
    assert any("0/1" in line and "1 fits" in line for line in drawn) == shown
    assert "2 fits" in drawn[-1]


def test_without_room_for_kernels_each_trial_is_fitted_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    X, y = network(400, 30, 3)
    arguments = (HEADS["rbf_svm"], X, y, make_folds(y, 2, 0))
    runs = []
    for memory in ("1MB", "80MB"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            tuning = TuningConfig(trials=3, folds=2, jobs=1, memory=memory)
            runs.append(tune(*arguments, tuning, 0, tmp_path / memory))
        said = [record.getMessage() for record in caplog.records if "leaves no room" in record.getMessage()]
        assert said == (
            [
                "head rbf_svm: tuning.memory leaves no room for the 1 MB that trials share on a fold; each is fitted separately"
            ]
            if memory == "1MB"
            else []
        )
    assert runs[0].best.params == runs[1].best.params
    np.testing.assert_array_equal(runs[0].out_of_fold.y_pred, runs[1].out_of_fold.y_pred)
    assert runs[0].pipeline[-1].cache_size == 500  # what it was fitted with is no part of the head


def test_kernels_count_when_fits_are_run_at_once() -> None:
    X, y = network(900, 10, 3)
    problem = Problem(HEADS["rbf_svm"], X, y.astype(np.int64), Classification(tuple("abc")), make_folds(y, 3, 0), 0)
    needed = kernel.RBF_SVM.work_bytes(problem)
    pair = np.sort(np.bincount(y))[-2:].sum()
    assert needed == 12 * 600 * 900 + 4 * pair**2
    copies = 5 * X.nbytes
    for jobs in (1, 2, 3):
        limit = X.nbytes + jobs * (copies + needed) + 1000
        room = room_for(problem, TuningConfig(jobs=4, memory=f"{limit / 1e6:.6f}MB"), needed)
        assert room.jobs == jobs
        assert room.work_bytes is not None
        assert needed <= room.work_bytes <= needed + 1000
    tight = room_for(problem, TuningConfig(jobs=4, memory=f"{(X.nbytes + 2 * copies) / 1e6:.6f}MB"), needed)
    assert (tight.jobs, tight.work_bytes) == (2, 0)
    assert room_for(problem, TuningConfig(jobs=4), needed).work_bytes is None


def test_libraries_are_told_what_they_may_take() -> None:
    pipeline = HEADS["rbf_svm"].build(0)
    assert smaller_caches(pipeline, None) == {}
    assert smaller_caches(pipeline, 30_000_000) == {"head__cache_size": 30}
    assert smaller_caches(pipeline, 0) == {"head__cache_size": 1}
    assert smaller_caches(pipeline, 10**10) == {"head__cache_size": 500}
    assert smaller_caches(HEADS["ridge"].build(0), 0) == {}
    before = sklearn.get_config()["working_memory"]
    with working_memory(64 << 20):
        assert sklearn.get_config()["working_memory"] == 32
    with working_memory(None):
        assert sklearn.get_config()["working_memory"] == before
