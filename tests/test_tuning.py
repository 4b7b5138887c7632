"""The search as a whole: the journal, racing, failures, and that a killed search ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import make_classification
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import Pipeline

from pipeline.config import HeadConfig, TuningConfig
from pipeline.errors import HeadError
from pipeline.heads import HEADS, Head, Real, configure, resolve
from pipeline.heads.tuning import check, make_folds, tune
from pipeline.heads.tuning.journal import Journal
from pipeline.io import files


def features(classes: int = 3, rows: int = 200, dim: int = 12, seed: int = 0, spread: float = 0.7):
    X, y = make_classification(
        rows, dim, n_informative=8, n_redundant=2, n_classes=classes, class_sep=spread, flip_y=0.05, random_state=seed
    )
    return X.astype(np.float32), np.array([f"class {label}" for label in y], dtype=object)


def build_lda(seed: int) -> Pipeline:
    return Pipeline([("head", LinearDiscriminantAnalysis(solver="lsqr"))])


LDA = Head("lda", build_lda, {"shrinkage": Real(1e-4, 1, prior="log-uniform")}, {"shrinkage": 0.01}, probabilities=True)


class Counting(ClassifierMixin, BaseEstimator):
    """Reads the class from the first feature and then errs on a set share of rows; counts its fits, and fails or kills where it is told to."""

    fits: list[tuple[float, int]] = []  # noqa: RUF012 - shared on purpose
    stop_after = 10**9
    lock = threading.Lock()

    def __init__(self, value: float = 0.0, fail_above: float = 2.0):
        self.value, self.fail_above = value, fail_above

    def fit(self, X, y):
        if self.value > self.fail_above:
            raise ValueError("the value is\ntoo large")
        with Counting.lock:
            Counting.fits.append((self.value, len(X)))
            if len(Counting.fits) > Counting.stop_after:
                raise KeyboardInterrupt
        self.classes_ = np.unique(y)
        self.rate_ = 1 - abs(self.value - 0.3)
        return self

    def predict(self, X):
        right = np.arange(len(X)) < self.rate_ * len(X)
        code = X[:, 0].astype(int) % len(self.classes_)
        return self.classes_[np.where(right, code, (code + 1) % len(self.classes_))]


def build_counting(fail_above: float, seed: int) -> Pipeline:
    return Pipeline([("head", Counting(fail_above=fail_above))])


def counting(fail_above: float = 2.0) -> Head:
    Counting.fits.clear()
    Counting.stop_after = 10**9
    return Head("counting", partial(build_counting, fail_above), {"value": Real(0.0, 1.0)}, {"value": 0.9})


def summary(run):
    trials = [(t.number, dict(t.params), t.status, t.fold_scores, t.estimate, t.error, t.reason) for t in run.trials]
    return trials, run.best.number, run.out_of_fold.y_pred.tolist()


@pytest.mark.parametrize("name", ["logistic_regression", "ridge", "nearest_centroid", "linear_svm", "rbf_svm"])
def test_a_class_of_one_row_does_not_stop_a_search(name, tmp_path):
    X, y = features(classes=2, rows=60)
    y[0] = "alone"
    run = tune(
        HEADS[name], X, y, make_folds(y, 3, 0), TuningConfig(trials=4, strategy="random"), 0, tmp_path / "trials.jsonl"
    )
    assert {trial.status for trial in run.trials} <= {"ok", "stopped"}
    assert run.out_of_fold.y_pred[0] != list(run.classes).index("alone")
    assert run.out_of_fold.scores.shape == (60, 3)
    assert set(run.pipeline.classes_) == {"alone", "class 0", "class 1"}


def test_two_classes_of_which_one_has_one_row(tmp_path):
    X, _ = features(rows=20)
    y = np.array(["many"] * 19 + ["alone"])
    head = HEADS["logistic_regression"]
    run = tune(head, X, y, make_folds(y, 4, 0), TuningConfig(trials=2), 0, tmp_path / "trials.jsonl")
    assert run.out_of_fold.y_pred.tolist()[-1] == 1
    assert run.best.mean == pytest.approx(0.95)


def test_a_space_whose_parameters_are_all_fixed_has_one_trial(tmp_path):
    X, y = features()
    head = resolve(HeadConfig(name="ridge", space={"alpha": (3.0,)}))
    run = tune(head, X, y, make_folds(y, 3, 0), TuningConfig(trials=8), 0, tmp_path / "trials.jsonl")
    assert len(run.trials) == 1
    assert run.pipeline[-1].alpha == 3.0


def test_log_loss_needs_probabilities(tmp_path):
    tuning = TuningConfig(scoring="log_loss")
    assert check(HEADS["logistic_regression"], tuning) == []
    with pytest.raises(HeadError, match=r"head rbf_svm: tuning\.scoring 'log_loss' needs probabilities"):
        tune(HEADS["rbf_svm"], *features(), (), tuning, 0, tmp_path / "trials.jsonl")


# The search ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_plain_scikit_learn_on_the_same_folds(tmp_path):
    X, y = features()
    folds = make_folds(y, 4, 0)
    run = tune(LDA, X, y, folds, TuningConfig(trials=8), 0, tmp_path / "trials.jsonl")
    own = []
    for train, held_out in folds:
        pipeline = configure(LDA, run.best.params, 0).fit(X[train], y[train])
        own.append(pipeline.score(X[held_out], y[held_out]))
        assert np.array_equal(pipeline.predict(X[held_out]), run.classes[run.out_of_fold.y_pred[held_out]])
        np.testing.assert_allclose(pipeline.predict_proba(X[held_out]), run.out_of_fold.scores[held_out], atol=1e-5)
    assert run.best.fold_scores == pytest.approx(tuple(own))
    assert run.best.mean == pytest.approx(np.mean(own))
    assert run.out_of_fold.kind == "probability"
    assert run.best.mean == max(trial.mean for trial in run.trials if trial.mean is not None)
    full = configure(LDA, run.best.params, 0).fit(X, y)
    assert np.array_equal(full.predict(X), run.pipeline.predict(X))
    assert set(run.pipeline.predict(X)) <= set(y)


def test_the_number_of_jobs_does_not_change_the_result(tmp_path):
    X, y = features()
    folds = make_folds(y, 5, 0)
    for name in ("random_forest", "logistic_regression"):
        head = replace(HEADS[name], fixed={"n_estimators": 8}) if name == "random_forest" else HEADS[name]
        runs = [
            tune(head, X, y, folds, TuningConfig(trials=3, jobs=jobs), 0, tmp_path / f"{name}{jobs}.jsonl")
            for jobs in (1, 3)
        ]
        assert summary(runs[0]) == summary(runs[1])


def test_a_failing_trial_is_recorded_and_the_search_goes_on(tmp_path):
    X, y = features()
    journal = tmp_path / "trials.jsonl"
    run = tune(
        counting(fail_above=0.8), X, y, make_folds(y, 3, 0), TuningConfig(trials=12, strategy="random"), 0, journal
    )
    failed = [trial for trial in run.trials if trial.status == "failed"]
    assert failed[0].number == 0
    assert failed[0].params == {"value": 0.9}
    assert failed[0].error == "ValueError: the value is too large"
    assert failed[0].mean is None
    assert all(trial.params["value"] > 0.8 for trial in failed)
    assert len(run.trials) == 12
    assert run.best.status == "ok"
    events = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert [event["error"] for event in events if event["event"] == "trial"] == [trial.error for trial in run.trials]


def test_features_that_are_no_numbers_are_refused(tmp_path):
    X, y = features()
    X[7, 3] = np.nan
    with pytest.raises(HeadError, match="the features hold NaN or infinity, first within rows 0 to 199;"):
        tune(LDA, X, y, make_folds(y, 3, 0), TuningConfig(trials=2), 0, tmp_path / "trials.jsonl")


def test_a_memory_map_is_as_good_as_an_array(tmp_path):
    X, y = features()
    folds = make_folds(y, 3, 0)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    runs = [
        tune(HEADS["ridge"], rows, y, folds, TuningConfig(trials=2), 0, tmp_path / f"{place}.jsonl")
        for place, rows in enumerate((X, mapped))
    ]
    assert summary(runs[0]) == summary(runs[1])
    assert (tmp_path / "0.jsonl").read_text().splitlines()[0] == (tmp_path / "1.jsonl").read_text().splitlines()[0]


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    X, y = features()

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(files.SYSTEM, "write", full)
    with pytest.raises(HeadError, match=r"trials.jsonl: the trials cannot be written to it \(No space left"):
        tune(LDA, X, y, make_folds(y, 3, 0), TuningConfig(trials=2), 0, tmp_path / "trials.jsonl")


def test_a_search_in_which_everything_fails_says_why(tmp_path):
    X, y = features()
    with pytest.raises(HeadError) as caught:
        tune(counting(fail_above=-1), X, y, make_folds(y, 3, 0), TuningConfig(trials=12), 0, tmp_path / "t.jsonl")
    message, *problems = str(caught.value).splitlines()
    assert message.startswith("head counting: none of ")
    assert [problem.split(" x ")[1] for problem in problems] == ["ValueError: the value is too large"]


def test_warnings_are_counted_and_not_printed(tmp_path, recwarn):
    X, y = features()
    head = replace(HEADS["mlp"], fixed={"max_iter": 2})
    run = tune(head, X, y, make_folds(y, 3, 0), TuningConfig(trials=2), 0, tmp_path / "trials.jsonl")
    assert run.trials[0].warnings == {"ConvergenceWarning": 3}
    assert not [warning for warning in recwarn if "Convergence" in warning.category.__name__]


def test_a_trial_in_a_score_over_classes_has_that_of_all_held_out_answers(tmp_path):
    """Three images of the rare class in five folds: two folds have none, and the mean over folds would pass that by."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [320, 3])
    X = np.stack([y + 0.6 * rng.normal(size=323), rng.normal(size=323)], axis=1).astype(np.float32)
    folds = make_folds(y, 5, 0)
    tuning = TuningConfig(trials=4, strategy="random", scoring="balanced_accuracy")
    run = tune(LDA, X, y, folds, tuning, 0, tmp_path / "trials.jsonl")
    found = run.out_of_fold.y_pred
    assert run.best.mean == pytest.approx(np.mean([np.mean(found[y == code] == code) for code in (0, 1)]))
    assert np.mean(run.best.fold_scores) > run.best.mean + 0.05
    again = tune(LDA, X, y, folds, tuning, 0, tmp_path / "trials.jsonl")
    assert summary(again) == summary(run)
    assert again.replayed == sum(score is not None for trial in run.trials for score in trial.fold_scores)


def test_a_killed_search_in_a_score_over_classes_ends_as_an_uninterrupted_one(tmp_path):
    X, y = features()
    rare = np.where(np.arange(200) < 4, "rare", y)
    arguments = (X, rare, make_folds(rare, 3, 0), TuningConfig(trials=4, strategy="random", scoring="macro_f1"), 0)
    whole = tune(counting(), *arguments, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for kept in (3, len(lines) - 2):
        (tmp_path / "cut.jsonl").write_text("".join(lines[:kept]))
        assert summary(tune(counting(), *arguments, tmp_path / "cut.jsonl")) == summary(whole)


# The journal ---------------------------------------------------------------------------------------------------------


def test_a_finished_search_is_replayed_without_a_fit(tmp_path):
    X, y = features()
    arguments = (X, y, make_folds(y, 3, 0), TuningConfig(trials=4), 0, tmp_path / "trials.jsonl")
    first = tune(counting(), *arguments)
    fits = len(Counting.fits)
    again = tune(counting(), *arguments)
    assert summary(again) == summary(first)
    assert again.replayed == sum(score is not None for trial in first.trials for score in trial.fold_scores)
    assert len(Counting.fits) == 3 + 1  # once more the best on each fold for its predictions, and on all rows
    assert fits == again.replayed + 3 + 1  # the same, as the best is judged on the rows it was fitted on too
    assert again.seconds > first.trials[-1].fit_seconds


@pytest.mark.parametrize("stop_after", [2, 13])
def test_an_interrupted_search_goes_on_and_ends_the_same(stop_after, tmp_path):
    X, y = features()
    folds = make_folds(y, 3, 0)
    tuning = TuningConfig(trials=8)
    whole = tune(counting(), X, y, folds, tuning, 0, tmp_path / "whole.jsonl")
    needed = len(Counting.fits)
    head = counting()
    Counting.stop_after = stop_after
    journal = tmp_path / "trials.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tune(head, X, y, folds, tuning, 0, journal)
    with journal.open("a") as file:
        file.write('{"event":"fit","torn')
    resumed = tune(counting(), X, y, folds, tuning, 0, journal)
    assert summary(resumed) == summary(whole)
    assert resumed.replayed == stop_after
    assert needed - stop_after <= len(Counting.fits) <= needed - stop_after + 3  # the best again, for its predictions
    fits = [event for event in map(json.loads, journal.read_text().splitlines()) if event.get("event") == "fit"]
    assert len({(event["trial"], event["fold"]) for event in fits}) == len(fits) == needed - 3 - 1


def test_another_search_begins_anew_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    X, y = features()
    folds = make_folds(y, 3, 0)
    journal = tmp_path / "trials.jsonl"
    tune(counting(), X, y, folds, TuningConfig(trials=2), 0, journal)
    before = journal.read_text()
    run = tune(counting(), X + 1, y, folds, TuningConfig(trials=2), 1, journal)
    assert run.replayed == 0
    assert "a new search begins, because features, head, seed changed" in caplog.text.replace(
        "features, seed", "features, head, seed"
    )
    assert (tmp_path / "trials.jsonl.old").read_text() == before
    assert tune(counting(), X + 1, y, folds, TuningConfig(trials=2), 1, journal).replayed == 6


HOLDING = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from pipeline.io import files
held = files.open_alone(Path(sys.argv[1]), os.O_APPEND)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_share_a_journal(tmp_path):
    journal = tmp_path / "trials.jsonl"
    Journal.open(journal, {"seed": 0}).close()
    command = [sys.executable, "-c", HOLDING, str(journal), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for seed in (0, 1):  # the same search and another one
            with pytest.raises(HeadError) as caught:
                Journal.open(journal, {"seed": seed})
            assert str(caught.value) == (
                f"{journal}: another process is tuning with this file; wait until it ends, or choose another output folder"
            )
        other.communicate("")
    book = Journal.open(journal, {"seed": 0})
    book.append([{"event": "fit"}])
    book.close()
    assert not list(tmp_path.glob("*.old"))
    assert len(journal.read_text().splitlines()) == 2


def test_a_foreign_file_is_set_aside_and_an_unwritable_place_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    X, y = features()
    journal = tmp_path / "trials.jsonl"
    journal.write_text('{"some": "thing"}\n')
    tune(counting(), X, y, make_folds(y, 3, 0), TuningConfig(trials=1), 0, journal)
    assert "a new search begins, because " in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadError, match="the trials cannot be written to it"):
        tune(counting(), X, y, make_folds(y, 3, 0), TuningConfig(trials=1), 0, tmp_path / "file" / "trials.jsonl")


# Racing --------------------------------------------------------------------------------------------------------------


def test_a_hopeless_trial_is_stopped_and_says_why(tmp_path):
    X, y = features(classes=2, rows=400)
    X[:, 0] = y == "class 1"
    run = tune(
        counting(), X, y, make_folds(y, 5, 0), TuningConfig(trials=12, strategy="random"), 0, tmp_path / "trials.jsonl"
    )
    stopped = [trial for trial in run.trials if trial.status == "stopped"]
    assert stopped
    for trial in stopped:
        assert trial.mean is None
        assert "behind the best after 2 of 5 folds" in trial.reason or "after 4 of 5 folds" in trial.reason
        assert trial.fold_scores[-1] is None
        assert trial.estimate < run.best.mean
