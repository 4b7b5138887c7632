"""Few examples: the draw keeps its promises, every method is what its name says, and the verdict is what the intervals show."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from documents import rewrite
from report_experiment import material, row, section, words
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from pipeline.cli import cli
from pipeline.config import Config, dump_yaml
from pipeline.errors import DatasetError, PipelineError
from pipeline.evaluation import fewshot
from pipeline.evaluation.fewshot import EpisodePlan, FewShot, LabelledFeatures, divide, draw, points_of
from pipeline.experiment import FEWSHOT, Artifacts, read_record, write_record
from pipeline.stages import fewshot as stage
from pipeline.stages.maintenance import verify_files

WAYS, SHOTS, QUERIES = 3, 4, 5


def rows(count: int, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Rows of length 1 in classes one behind the other, each with a mean of its own."""
    rng = np.random.default_rng(seed)
    X = rng.normal(0, 1, (WAYS, count, dim)) + 0.8 * np.random.default_rng(9).normal(0, 1, (WAYS, 1, dim))
    X = X.reshape(-1, dim)
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def task():
    """Support, queries and y of one episode."""
    return rows(SHOTS), rows(QUERIES, seed=1), np.repeat(np.arange(WAYS), SHOTS)


def scores(method, task) -> np.ndarray:
    support, query, _ = task
    return method(fewshot.products(support[None], query[None], WAYS))[0]


# The draw


def test_an_episode_has_as_many_images_of_each_class_as_asked_and_none_twice():
    y = np.repeat(np.arange(6), [20, 9, 30, 8, 25, 9])
    images = LabelledFeatures(np.zeros((len(y), 1), np.float32), y)
    episodes = draw(images, images.classes_of(9), 3, 4, 5, 50, np.random.default_rng(0))
    assert episodes is not None
    for support, query in zip(episodes.support, episodes.query, strict=True):
        assert len({*support, *query}) == 27
        drawn, labels = y[support].reshape(3, 4), y[query].reshape(3, 5)
        assert (drawn == drawn[:, :1]).all()
        assert (labels == drawn[:, :1]).all()
        assert len({*drawn[:, 0]} - {3}) == 3


def test_groups_are_never_in_support_and_queries_at_once():
    y, units = np.tile(np.arange(4), 30), np.repeat(np.arange(20), 6)
    images = LabelledFeatures(np.zeros((120, 1), np.float32), y, units)
    episodes = draw(images, np.arange(4), 2, 3, 4, 40, np.random.default_rng(0))
    assert episodes is not None
    for support, query in zip(episodes.support, episodes.query, strict=True):
        assert not {*units[support]} & {*units[query]}
    one_group = dataclasses.replace(images, units=np.where(y == 2, 0, units))
    assert draw(one_group, np.arange(4), 4, 1, 1, 1, np.random.default_rng(0)) is None


def test_classes_to_learn_on_and_classes_to_be_tested_on_are_disjoint_and_all_are_tested():
    parts = divide(np.arange(10), 5, np.random.default_rng(0))
    for part in parts:
        assert sorted([*part.base, *part.held_out, *part.novel]) == list(range(10))
        assert (len(part.base), len(part.held_out), len(part.novel)) == (3, 2, 5)
    assert {*np.concatenate([part.novel for part in parts])} == set(range(10))
    (alone,) = divide(np.arange(8), 5, np.random.default_rng(0))
    assert (len(alone.base), alone.novel.tolist()) == (0, list(range(8)))


# The methods


def test_logistic_regression_reaches_the_optimum_of_scikit_learn(task):
    support, query, y = (part.astype(np.float64) for part in task)
    exact = LogisticRegression(C=fewshot.C, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(support, y)
    found = scores(lambda given: fewshot.logistic_regression(given, tolerance=1e-9, most=10_000), task)
    np.testing.assert_allclose(found, exact.decision_function(query), atol=1e-4)
    assert (scores(fewshot.logistic_regression, task).argmax(1) == exact.predict(query)).all()


def test_nearest_centroid_is_the_one_of_scikit_learn(task):
    support, query, y = task
    assert (scores(fewshot.nearest_centroid, task).argmax(1) == NearestCentroid().fit(support, y).predict(query)).all()


def test_cosine_prototypes_are_cosines_with_the_mean(task):
    support, query, _ = task
    means = support.reshape(WAYS, SHOTS, -1).mean(axis=1)
    cosines = query @ means.T / np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(scores(fewshot.cosine_prototypes, task), cosines, atol=1e-6)


def test_neighbours_vote_by_the_exponential_of_their_cosine(task, monkeypatch):
    support, query, y = task
    monkeypatch.setattr(fewshot, "NEIGHBOURS", 7)
    by_weight = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp(-d / fewshot.TEMPERATURE))
    found = scores(fewshot.knn, task)
    share = found / found.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share, by_weight.fit(support, y).predict_proba(query), atol=1e-5)


def test_the_inner_loop_is_gradient_descent_on_the_head_and_its_gradient_is_of_second_order(task):
    support, query, y = (torch.from_numpy(part) for part in task)
    scale = torch.full((support.shape[1],), 1.3, dtype=torch.float64, requires_grad=True)
    rates, truth = torch.tensor([0.5, 0.8, 0.3], dtype=torch.float64), torch.eye(WAYS, dtype=torch.float64)[y]
    S, Q = support.double() * scale, query.double() * scale
    head = torch.zeros(S.shape[1], WAYS, dtype=torch.float64, requires_grad=True)
    weights = head
    for rate in rates:
        loss = torch.nn.functional.cross_entropy(S @ weights, y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, weights, create_graph=True)
        weights = weights - rate * slope
    expected = Q @ weights
    found = fewshot.adapted((S @ S.T)[None], (Q @ S.T)[None], truth, rates)[0]
    torch.testing.assert_close(found, expected)
    told = [torch.autograd.grad(said.square().sum(), scale, retain_graph=True)[0] for said in (found, expected)]
    torch.testing.assert_close(*told)


def photos_with_a_nuisance(seed: int = 0) -> LabelledFeatures:
    """12 classes told by 6 features of 46; the others are noise that is the same kind in every class."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(12), 40)
    told = rng.normal(0, 1, (12, 6))[y] + rng.normal(0, 0.5, (len(y), 6))
    return LabelledFeatures(np.hstack([told, rng.normal(0, 1.5, (len(y), 40))]).astype(np.float32), y)


def test_meta_learning_finds_what_classes_have_in_common_and_says_so_beyond_chance():
    found, notes = fewshot.measure(photos_with_a_nuisance(), EpisodePlan(4, 5, 80, 0), 1)
    points = {point.method: point for point in points_of(1, found)}
    assert not notes
    assert points["maml"].ahead_interval[0] > 0.03
    assert abs(points["cosine_prototypes"].ahead) < 0.03


def test_the_seed_decides_everything(monkeypatch):
    monkeypatch.setattr(fewshot, "META_STEPS", 2)
    first, again, other = (
        fewshot.measure(photos_with_a_nuisance(), EpisodePlan(4, 5, 20, seed), 1)[0] for seed in (0, 0, 1)
    )
    assert all((again[name] == first[name]).all() for name in first)
    assert all((other[name] != first[name]).any() for name in first)


def test_what_the_images_do_not_allow_is_said():
    images = photos_with_a_nuisance()
    few = LabelledFeatures(images.X[:240], images.y[:240])
    found, notes = fewshot.measure(few, EpisodePlan(5, 10, 20, 0), 1)
    assert "maml" not in found
    assert notes == ["No MAML: it learns on 4 classes at least beside the 5 of an episode, and 6 have enough images."]
    units = np.where(few.y == 2, 0, np.arange(1, 241))  # all images of one class are of one group
    assert fewshot.measure(LabelledFeatures(few.X, few.y, units), EpisodePlan(5, 10, 20, 0), 1) == (
        {},
        ["K = 1 is left out: the images of a class are in too few groups to part 1 from the rest."],
    )
    assert fewshot.measure(few, EpisodePlan(5, 10, 20, 0), 31) == (
        {},
        ["K = 31 is left out: 0 classes have 31 + 10 images, and 5 are needed."],
    )


# What is said


def result_of(gap: float, spread: float, count: int = 400) -> FewShot:
    """A result in which nearest centroid is ahead of logistic regression by `gap`, give or take."""
    rng = np.random.default_rng(0)
    plain = rng.normal(0.8, 0.05, count)
    noise = rng.normal(0, 1, count)
    other = plain + gap + spread * (noise - noise.mean()) / noise.std()
    points = points_of(5, {"logistic_regression": plain, "nearest_centroid": other})
    return FewShot("net", 5, 15, count, 0, 900, 9, "key", tuple(points), ("A note.",))


@pytest.mark.parametrize(
    ("gap", "spread", "said"),
    [
        (0.002, 0.05, "K = 5: plain logistic_regression is as good: no other is ahead by more than 1 point."),
        (0.03, 0.05, "K = 5: nearest_centroid is better than plain logistic_regression by 3.0 points [2.5, 3.5]."),
        (
            0.002,
            0.2,
            "K = 5: plain logistic_regression is not told apart from others, which may be ahead by up to 2.2 points.",
        ),
    ],
)
def test_logistic_regression_is_as_good_where_the_interval_shows_it(gap, spread, said):
    assert result_of(gap, spread).verdict() == [said]


def test_intervals_cover_the_true_accuracy():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        (point,) = points_of(1, {"logistic_regression": rng.binomial(75, 0.7, 40) / 75})
        inside += point.interval[0] <= 0.7 <= point.interval[1]
    assert 0.92 <= inside / 400 <= 0.98


def test_a_document_comes_back_as_it_was_and_damage_is_told(tmp_path):
    result, path = result_of(0.01, 0.05), tmp_path / "fewshot.json"
    write_record(path, FEWSHOT, result)
    assert read_record(path, FEWSHOT, FewShot) == result
    rewrite(path, json.loads(path.read_text()) | {"points": [{"method": "knn"}]})
    with pytest.raises(
        PipelineError, match=r"it does not hold what its version says .*; run `manyheads fewshot` again"
    ):
        read_record(path, FEWSHOT, FewShot)


def test_the_page_has_the_chart_the_table_and_the_verdict():
    result = result_of(0.03, 0.05)
    shown = dataclasses.replace(material([row("ridge", 0.9)]), few_shot=result)
    html = section("few-shot", shown)
    assert 'data-chart="few_shot"' in html
    text = words(html)
    assert result.verdict()[0] in text
    assert f"nearest_centroid {100 * result.points[1].accuracy:.1f} ± " in text
    assert section("few-shot", material([row("ridge", 0.9)])) == ""


# The stage


@pytest.fixture
def copied(experiment: Config, tmp_path: Path) -> Config:
    output = Path(shutil.copytree(experiment.output, tmp_path / "output"))
    shutil.copytree(Artifacts(experiment.output).stores, tmp_path / "features")
    return experiment.model_copy(update={"output": str(output)})


def test_the_command_measures_once_and_shows_it_on_the_page(copied: Config, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(copied, tmp_path), encoding="utf-8")
    asked = ["fewshot", str(config), *["--shots", "2", "--shots", "1", "--queries", "4", "--episodes", "20"]]
    done = CliRunner().invoke(cli, asked, catch_exceptions=False)
    assert done.exit_code == 0
    assert "3-way, K images per class, 4 queries per class, 20 episodes of 36 images in 3 classes" in done.output
    assert re.search(r"K = 1 +K = 2\n", done.output)
    assert (
        "No MAML: it learns on 4 classes at least beside the 3 of an episode, and 3 have enough images." in done.output
    )
    files = Artifacts(copied.output)
    before = files.few_shot.stat()
    assert stage.run(copied, shots=(1, 2), queries=4, episodes=20).result == read_record(
        files.few_shot, FEWSHOT, FewShot
    )
    assert files.few_shot.stat().st_mtime_ns == before.st_mtime_ns
    assert "How far do a few examples take you?" in (files.root / "report.html").read_text(encoding="utf-8")
    assert verify_files(copied)[0]


def test_what_cannot_be_drawn_is_an_error_that_says_why(copied: Config):
    with pytest.raises(DatasetError, match="episodes of 5 classes are asked for, and there are 3; set --ways"):
        stage.run(copied, ways=5)
    with pytest.raises(DatasetError, match="K = 1 is left out: 0 classes have 1 \\+ 15 images, and 3 are needed"):
        stage.run(copied)
