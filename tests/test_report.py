"""The leaderboard keeps what it was given and is won by cross-validation; the page holds everything and asks for nothing."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from documents import board_of, rewrite
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_experiment import (
    CLASSES,
    COPY,
    EMBEDDING,
    FLIPPED,
    ORIGINAL,
    OUTLIER,
    built_experiment,
    material,
    row,
    section,
    words,
)

from pipeline import evaluation as metrics
from pipeline import report
from pipeline.data.classes import Classification
from pipeline.errors import PipelineError
from pipeline.evaluation import HeadPredictions, Predictions, audit
from pipeline.evaluation.comparison import rank_over_datasets
from pipeline.evaluation.leaderboard import Leaderboard, Leaks, Nested, Seeds, read_leaderboard, recommend
from pipeline.evaluation.leaderboard.recommendation import effects
from pipeline.evaluation.leaderboard.rows import nested_choice
from pipeline.experiment import Artifacts
from pipeline.report import material as materials
from pipeline.report import pictures
from pipeline.report.charts import ranking_chart, tuning_chart
from pipeline.report.drawing import SCREEN, to_png, to_svg
from pipeline.report.material import Material, gather
from pipeline.report.page import render
from pipeline.report.several import compare

ROOT = Path(__file__).parents[1]


# Leaderboard


def test_best_is_chosen_by_cross_validation_and_never_by_the_test():
    board = Leaderboard((row("ridge", 0.90, correct=99), row("rbf_svm", 0.91, correct=50)))
    assert board.best.head == "rbf_svm"
    assert [item.head for item in board.rows] == ["rbf_svm", "ridge"]


def test_of_two_equal_rows_the_simpler_wins():
    board = Leaderboard((row("rbf_svm", 0.9, simplicity=5), row("ridge", 0.9, simplicity=1)))
    assert board.best.head == "ridge"


def test_rows_on_other_images_are_ranked_apart_and_never_win():
    """A fine-tuned network's rows come in a table of their own, however high their cross-validation is."""
    frozen = row("ridge", 0.90), row("knn", 0.80), row("most_frequent", 0.3, embedding="majority", baseline=True)
    new = {"embedding": "tuned", "unseen_rows": 50, "task": "b"}
    apart = row("ridge", 0.99, **new), row("knn", 0.98, **new)
    told = row("ridge", 0.995, embedding="other", unseen_rows=40, chose_rows=40, task="c")
    board = Leaderboard((told, *apart, *frozen))
    assert board.best.key == "resnet18-penultimate/ridge"
    assert [item.cv_mean for item in board.ranked] == [0.90, 0.80, 0.3]
    assert [[item.cv_mean for item in rows] for rows in board.apart] == [[0.995], [0.99, 0.98]]
    assert board.rows == (*board.ranked, told, *apart)
    main, *tables = board.to_markdown().split("## Ranked apart, on other images")
    assert "tuned" not in main
    assert len(tables) == 2
    assert "99.5" not in tables[0]
    assert "All of them chose the network's weights" in tables[0]
    assert "99.0 ± 1.0" in tables[1]
    assert "\\*" not in "".join(tables)
    assert board.to_text().count("Ranked apart, on other images: heads on a fine-tuned network") == 2
    page = section("leaderboard", material(board.rows))
    assert page.count("<table>") == 3
    assert "99.5" not in page
    assert board_of(board.to_json()) == board
    saved = Leaderboard((dataclasses.replace(apart[0], bundle="heads/tuned/ridge"), *frozen))
    assert (
        "To label with a row that is ranked separately, give `manyheads predict` its folder, heads/tuned/ridge."
        in saved.notes()
    )
    # Where there is no other backbone the fine-tuned one's rows are compared, and the guess stands apart.
    assert Leaderboard((*apart, frozen[2])).best == apart[0]
    assert Leaderboard((*apart, frozen[2])).apart == ((frozen[2],),)


def test_json_gives_the_same_leaderboard_back():
    rows = (row("ridge", 0.90), row("knn", 0.85, test=None), row("mlp", 0.8, embed_seconds=0.01, dim=512))
    board = Leaderboard(rows, {"seed": np.int64(3), "scoring": "accuracy", "nan": float("nan"), "list": (1, 2)})
    back = board_of(board.to_json())
    assert back.to_json() == board.to_json()
    assert back.rows[1:] == tuple(dataclasses.replace(item, params={"C": 0.5, "k": 3}) for item in board.rows[1:])
    assert back.provenance == {"seed": 3, "scoring": "accuracy", "nan": None, "list": [1, 2]}
    json.loads(board.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_foreign_or_newer_leaderboard_is_refused():
    with pytest.raises(PipelineError, match="it holds a list, expected an object; run `manyheads heads` again"):
        board_of("[1, 2]")
    newer = json.dumps({"format": "manyheads leaderboard", "version": 9, "rows": []})
    with pytest.raises(PipelineError, match="version 9, expected 'manyheads leaderboard' version 1"):
        board_of(newer)
    changed = Leaderboard((row("ridge", 0.9),)).to_json().replace('"cv_mean": 0.9', '"cv_mean": 1.9')
    with pytest.raises(PipelineError) as caught:
        board_of(changed)
    assert str(caught.value) == (
        "leaderboard.json: is damaged: its content is not the one that its digest names; run `manyheads heads` again"
    )


def test_untrained_and_baseline_rows_are_marked_plainly_everywhere():
    board = Leaderboard(
        (row("ridge", 0.90, untrained=True), row("logistic_regression", 0.8, embedding="hog", baseline=True))
    )
    for text in (board.to_text(), board.to_markdown()):
        assert re.search(r"ridge.*untrained", text)
        assert re.search(r"logistic_regression.*baseline", text)
        assert "the backbone has random weights" in text
        assert "No trained backbone beats the untrained row resnet18-penultimate/ridge" in text


def test_markdown_is_a_table_with_the_interval():
    text = Leaderboard((row("ridge", 0.9),)).to_markdown()
    low, high = metrics.wilson(90, 100)
    assert f"90.0 [{100 * low:.1f}, {100 * high:.1f}]" in text
    header, line = [part for part in text.splitlines() if part.startswith("|")][:2]
    assert header.count("|") == line.count("|") == 13


def test_a_loss_is_shown_as_users_know_it_with_its_name():
    rows = (row("knn", -1.26, cv_std=0.2), row("ridge", -0.351, cv_std=0.012))
    board = Leaderboard(rows, {"scoring": "log_loss"})
    assert board.best.head == "ridge"
    text = board.to_text()
    assert "  0.351 ± 0.012" in text
    assert "-0." not in text
    assert "-1." not in text
    assert "CV log loss" in text.splitlines()[0]
    assert "ridge (log loss 0.351 ± 0.012, lower is better)" in text
    assert "| CV log loss |" in re.sub(" +", " ", board.to_markdown())


@pytest.mark.parametrize(("scoring", "name"), [("accuracy", "accuracy"), ("macro_f1", "macro F1")])
def test_the_score_that_was_tuned_is_named_in_the_heading_and_with_the_best(scoring: str, name: str):
    board = Leaderboard((row("ridge", 0.783),), {"scoring": scoring})
    assert f"CV {name} " in board.to_text().splitlines()[0]
    for text in (board.to_text(), board.to_markdown()):
        assert f"Best by cross-validation: resnet18-penultimate/ridge ({name} 78.3 ± 1.0). Test" in text


def test_an_unknown_row_and_an_empty_leaderboard():
    with pytest.raises(KeyError):
        Leaderboard(()).row("a/b")
    with pytest.raises(PipelineError, match="no rows"):
        _ = Leaderboard(()).best


# Recommendation and page


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_experiment(tmp_path_factory.getbasetemp() / "experiment")


@pytest.fixture(scope="session")
def gathered(experiment: Path) -> Material:
    return gather(experiment)


@pytest.fixture
def copy(experiment: Path, tmp_path: Path) -> Path:
    shutil.copytree(Artifacts(experiment).stores, tmp_path / "features")
    return Path(shutil.copytree(experiment, tmp_path / "copy"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their charts, which take longest."""
    monkeypatch.setattr("pipeline.report.page.to_svg", lambda chart, name: "")


@pytest.fixture(scope="session")
def page(experiment: Path) -> str:
    return (experiment / "report.html").read_text(encoding="utf-8")


def test_the_recommendation_survives_json_and_names_the_group(experiment: Path):
    board = read_leaderboard(experiment)
    assert board.recommendation is not None
    assert {item.key for item in board.recommendation.differences} == {item.key for item in board.rows}
    assert "majority/most_frequent" not in board.recommendation.no_evidence
    assert board.best.key in board.recommendation.no_evidence
    assert board.recommendation.recommended in board.recommendation.no_evidence
    assert board.recommendation.optimism is not None
    assert board.recommendation.optimism.candidates == 3
    assert board.recommendation.trial_optimism is not None
    assert board_of(board.to_json()) == board
    assert board.recommendation.reason in board.to_text()


def judged(
    output: Path,
    heads: dict[str, np.ndarray],
    y: np.ndarray,
    scoring: str = "accuracy",
    losses: dict[str, np.ndarray] | None = None,
    changes: dict[str, dict[str, object]] | None = None,
    units: np.ndarray | None = None,
) -> Leaderboard:
    """Write what these heads said out of fold, in five folds, and judge them; the same answers for the test."""
    metric, folds, names = metrics.METRICS[scoring], np.arange(len(y)) % 5, ("a", "b", "c")
    rows = []
    for place, (head, guess) in enumerate(heads.items()):
        own = None
        if losses is not None:
            own = np.tile((1 - np.exp(-losses[head]))[:, None] / 2, 3)
            own[np.arange(len(y)), y] = np.exp(-losses[head])
        answers = Predictions(y, guess, own)
        fold_scores = tuple(metric.score(answers.rows(np.flatnonzero(folds == fold))) for fold in range(5))
        told = np.full((len(y), 3), 0.1) + 0.7 * np.eye(3)[guess]
        part = Predictions(y, guess, told, units, np.arange(len(y)).astype(str), target=Classification(names))
        folder = output / "heads" / head
        folder.mkdir(parents=True, exist_ok=True)
        held_out = dataclasses.replace(part, folds=folds, scores=own)
        (folder / "predictions.npz").write_bytes(HeadPredictions(part, held_out).to_bytes())
        fields = {"cv_scores": fold_scores, "bundle": f"heads/{head}", "simplicity": place, "embed_seconds": 0.01}
        mean = metric.score(answers)
        rows.append(row(head, mean, cv_std=0.02, **{**fields, **(changes or {}).get(head, {})}))
    return recommend(Leaderboard(tuple(rows), {"scoring": scoring, "seed": 0}), output)


def flipped(y: np.ndarray, *rows: range) -> np.ndarray:
    guess = y.copy()
    for part in rows:
        guess[list(part)] = (guess[list(part)] + 1) % 3
    return guess


def test_the_cheapest_row_that_is_as_good_is_recommended_whatever_the_clock_said(tmp_path: Path):
    """Each is wrong on 40 of 2,000 images, on nearly the same ones: an interval within half of the errors, a point, shows that."""
    y = np.arange(2000) % 3
    heads = {"simple": flipped(y, range(1, 41)), "cheap": flipped(y, range(2, 42)), "best": flipped(y, range(40))}
    changes = {"best": {"cv_mean": 0.98001}, "cheap": {"baseline": True, "simplicity": 9}}
    board = judged(tmp_path, heads, y, changes=changes)
    assert board.recommendation is not None
    assert board.recommendation.recommended.endswith("/cheap")
    assert re.fullmatch(
        r"Use resnet18-penultimate/cheap; 3 rows are as good as 2,000 images can show, and it is the simplest and cheapest of those "
        r"shown to be at most 1 points worse than the best, resnet18-penultimate/best \(\+0\.0 points in favour of the best, 95 % "
        r"interval -\d\.\d to \+\d\.\d\)\.",
        board.recommendation.reason,
    )
    busy = {"embed_seconds": 9.0, "predict_seconds": 9.0, "fit_seconds": 9.0}
    for slowed in ("simple", "cheap", "best"):
        slow = {"best": changes["best"], slowed: {**changes["best"], **busy} if slowed == "best" else busy}
        even = judged(tmp_path, heads, y, changes=slow)
        assert even.recommendation is not None
        assert even.recommendation.recommended.endswith("/simple")
    # A prediction is made with the best row where nothing else is said.
    assert "for the recommended one give it heads/simple in there" in even.to_text()


def test_with_few_images_the_best_score_is_recommended_and_not_the_simplest_row(tmp_path: Path):
    """Nine points behind on 85 images is no evidence of a difference, and none of equality either."""
    y = np.arange(85) % 3
    heads = {"pixels": flipped(y, range(31)), "knn": flipped(y, range(20, 43))}
    board = judged(tmp_path, heads, y)
    assert board.recommendation is not None
    assert len(board.recommendation.no_evidence) == 2
    assert board.recommendation.recommended == board.best.key == "resnet18-penultimate/knn"
    assert board.recommendation.reason.startswith(
        "Use resnet18-penultimate/knn; 2 rows are as good as 85 images can show. It scores best, and that the simplest and cheapest "
        "of them, resnet18-penultimate/pixels, is at most 5 points worse is not shown (+9.4 points in favour of the best, 95 % "
        "interval -"
    )
    assert f"\n{board.recommendation.reason}\n" in board.to_text()
    assert "manyheads predict" not in board.to_text()


def test_images_of_a_group_are_one_witness_and_are_counted_as_such(tmp_path: Path):
    """Seventy more right answers of 360 are evidence, unless they are those of two groups of twelve."""
    y = np.arange(360) % 3
    heads = {"simple": flipped(y, range(100)), "knn": flipped(y, range(30))}
    alone = judged(tmp_path, heads, y)
    together = judged(tmp_path, heads, y, units=np.arange(360) // 30)
    assert alone.recommendation is not None
    assert together.recommendation is not None
    assert alone.recommendation.no_evidence == (alone.best.key,)
    assert (
        alone.recommendation.reason
        == "Use resnet18-penultimate/knn; every other row is worse by more than chance explains."
    )
    assert len(together.recommendation.no_evidence) == 2
    assert "2 rows are as good as 360 images of 12 groups can show" in together.recommendation.reason
    assert together.recommendation.optimism is not None
    assert together.recommendation.optimism.interval[0] < alone.recommendation.optimism.interval[0] - 0.02


def test_where_a_constant_guess_may_be_as_good_it_is_not_recommended_for_being_simple(tmp_path: Path):
    y = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2])
    heads = {"most_frequent": np.zeros(11, dtype=np.int64), "knn": flipped(y, range(3))}
    guess = {"most_frequent": {"embedding": "majority", "baseline": True, "simplicity": -1, "embed_seconds": None}}
    board = judged(tmp_path, heads, y, changes=guess)
    assert board.recommendation is not None
    assert board.recommendation.recommended == "resnet18-penultimate/knn"
    assert board.recommendation.reason == (
        "Use resnet18-penultimate/knn for want of evidence: 11 images do not show that any row is better than a constant guess."
    )
    many = judged(tmp_path, {head: np.tile(guess, 20) for head, guess in heads.items()}, np.tile(y, 20), changes=guess)
    assert many.recommendation is not None
    assert (
        many.recommendation.reason
        == "Use resnet18-penultimate/knn; every other row is worse by more than chance explains."
    )


def test_the_recommendation_speaks_of_the_score_that_was_tuned(tmp_path: Path):
    """Blunt labels nothing as the rare class: right on more images than careful, which finds them, and worse by macro F1."""
    y = np.repeat([0, 1], [900, 60])
    y = y[np.random.default_rng(0).permutation(960)]
    careful, blunt = y.copy(), np.zeros(960, dtype=np.int64)
    careful[np.flatnonzero(y == 0)[:50]], careful[np.flatnonzero(y == 1)[:12]] = 1, 0
    heads = {"blunt": blunt, "careful": careful}
    by_accuracy, by_f1 = (judged(tmp_path, heads, y, scoring) for scoring in ("accuracy", "macro_f1"))
    assert by_accuracy.recommendation is not None
    assert by_f1.recommendation is not None
    assert by_accuracy.recommendation.recommended.endswith("/blunt")
    assert by_f1.recommendation.recommended.endswith("/careful")
    f1 = [metrics.scores(Predictions(y, heads[head]))["macro_f1"] for head in heads]
    gap = next(item for item in by_f1.recommendation.differences if item.key.endswith("/blunt"))
    assert gap.difference == pytest.approx(f1[1] - f1[0])
    assert gap.test is not None
    assert gap.test.difference == pytest.approx(f1[1] - f1[0])
    assert by_f1.recommendation.optimism is not None
    assert by_f1.recommendation.optimism.apparent == pytest.approx(f1[1])
    assert "flatters its cross-validation macro F1 by about" in by_f1.to_text()


def test_a_recommendation_by_log_loss_is_of_the_probabilities_that_were_searched(tmp_path: Path):
    y, rng = np.arange(600) % 3, np.random.default_rng(0)
    losses = {"knn": rng.uniform(0.6, 1.8, 600), "ridge": rng.uniform(0.1, 0.5, 600)}
    board = judged(tmp_path, dict.fromkeys(losses, flipped(y, range(30))), y, "log_loss", losses)
    assert board.best.head == "ridge"
    assert board.recommendation is not None
    assert board.recommendation.recommended == board.best.key
    behind = next(item for item in board.recommendation.differences if item.key.endswith("/knn"))
    assert not behind.no_evidence
    assert behind.difference == pytest.approx(losses["knn"].mean() - losses["ridge"].mean())
    assert board.recommendation.optimism is not None
    assert board.recommendation.optimism.apparent == pytest.approx(-losses["ridge"].mean())
    assert "flatters its cross-validation log loss by about 0.000 nats." in board.to_text()


def test_what_picking_a_trial_adds_is_said_of_the_trials_it_is_known_of(tmp_path: Path):
    y = np.arange(300) % 3
    heads = {"ridge": flipped(y, range(20)), "knn": flipped(y, range(60))}
    trials = {
        "finished": {"event": "trial", "status": "ok", "fold_scores": [0.9, 0.8, 0.9, 0.9, 0.9]},
        "too": {"event": "trial", "status": "ok", "fold_scores": [0.8, 0.84, 0.8, 0.8, 0.8]},
        "stopped": {"event": "trial", "status": "stopped", "fold_scores": [0.5, 0.5, None, None, None]},
    }
    texts = {}
    for kinds in (("finished", "too"), ("finished", "too", "stopped"), ("finished", "stopped")):
        path = Artifacts(tmp_path).trials("resnet18-penultimate", "ridge")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({**trials[kind], "number": n}) + "\n" for n, kind in enumerate(kinds)))
        board = judged(tmp_path, heads, y, changes={"ridge": {"trials": len(kinds)}})
        texts[kinds] = next(line for line in board.notes() if line.startswith("Picking"))
        assert board_of(board.to_json()).recommendation == board.recommendation
    all_of_them, some, one = texts.values()
    assert all_of_them.endswith("points, picking the best of its 2 trials by about 0.8.")
    assert some.endswith("its 3 trials by at least about 0.8.")
    assert one.endswith("points.")  # of one trial nothing is known


@pytest.mark.usefixtures("undrawn")
def test_without_predictions_there_is_no_recommendation_but_a_page(copy: Path):
    for path in copy.rglob("predictions.npz"):
        path.unlink()
    board = recommend(read_leaderboard(copy), copy)
    assert board.recommendation is None
    Artifacts(copy).leaderboard.write_text(board.to_json(), encoding="utf-8")
    text = render(gather(copy))
    assert "The best row left no predictions" in text
    assert 'id="map"' in text


@pytest.mark.usefixtures("undrawn")
def test_without_images_features_or_trials_the_page_says_what_is_missing(copy: Path):
    shutil.rmtree(Artifacts(copy).stores)
    features = json.loads((copy / "features.json").read_text())
    rewrite(copy / "features.json", {**features, "stores": []})  # which also says where the copy was made of
    shutil.rmtree(copy / "trials")
    text = render(gather(copy))
    assert "the features cannot be read" in text
    assert 'id="map"' not in text
    assert 'id="near-duplicates"' in text
    shutil.rmtree(copy / "dataset")
    (copy / "audit.json").unlink()
    text = render(gather(copy))
    assert "the index cannot be read" in text
    assert "No near-duplicates and outliers are shown:" in text
    assert "audit.json: missing; run `manyheads heads` first" in html.unescape(text)
    assert "Worst mistakes" in text


def test_of_many_images_a_stratified_part_is_looked_at(experiment: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(materials, "MOST_IMAGES", 90)
    found = gather(experiment)
    assert "use 90 of 180 images" in " ".join(found.missing)
    assert found.map is not None
    assert found.index is not None
    labels = found.index.labels[found.map.rows].astype(str)
    assert sorted(np.unique(labels, return_counts=True)[1]) == [29, 30, 31]


def test_without_a_leaderboard_the_user_is_told_what_to_run(tmp_path: Path):
    with pytest.raises(PipelineError, match="run `manyheads heads` first"):
        report.build(tmp_path)


class Addresses(HTMLParser):
    """Collects what a page would fetch, and checks that every element is closed."""

    VOID = frozenset({"meta", "link", "br", "img", "use", "path", "rect", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(page: str):
    parser = Addresses()
    parser.feed(page)
    assert parser.open == []
    assert parser.found
    assert all(address.startswith(("data:", "#")) for address in parser.found)
    assert "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert "default-src 'none'" in page
    assert len(page) < 3_000_000


def test_page_has_every_section_and_chart(page: str):
    for name in (
        "leaderboard",
        "difference",
        "tuning",
        "classes",
        "calibration",
        "cost",
        "map",
        "mistakes",
        "labels",
        "near-duplicates",
        "outliers",
        "reproduce",
    ):
        assert f' id="{name}">' in page
    for chart in ("leaderboard", "differences", "tuning", "confusion", "reliability", "learning_curve", "cost", "map"):
        assert f'data-chart="{chart}"' in page


def test_labels_cannot_become_markup(page: str):
    assert "<b>bee</b>" not in page
    assert "&lt;b&gt;bee&lt;/b&gt; &amp; &#39;co&#39;" in page
    assert "猫 $5" in page


def test_page_shows_what_was_planted(experiment: Path, page: str):
    """A flipped label, a copy from train in test, an outlier: each is in its section and its table."""
    labels, copies, outliers = (
        (experiment / "audit" / f"{name}.csv").read_text(encoding="utf-8")
        for name in ("label_issues", "near_duplicates", "outliers")
    )
    assert f"{FLIPPED},猫 $5,ant" in labels
    assert copies.splitlines()[1].startswith(f"{COPY},{ORIGINAL}")
    assert "1 across splits" in page
    assert OUTLIER in outliers


def test_what_more_labels_bring_is_said_of_the_users_own_labels(gathered: Material, page: str):
    """Of 120 training images the curve can only measure up to 96; twice the labels are 240 all the same."""
    curve = gathered.curve
    assert curve is not None
    assert curve.points[-1].size == 96
    assert [item.size for item in curve.forecast] == [240, 480]
    assert f"Measured with ridge on {EMBEDDING}, in each of five draws" in page
    assert "With twice your 120 labelled training images, about" in page
    assert f"is to be expected of ridge on {EMBEDDING}." in page


def test_leaks_stand_above_the_table(gathered: Material, page: str):
    board = gathered.leaderboard
    best = board.best
    leaks = Leaks(EMBEDDING, 180, 3, 60, 0, 120, {best.key: 0.5}, {})
    leaking = dataclasses.replace(board, leaks=leaks)
    assert board_of(leaking.to_json()) == leaking
    line = (
        f"Leak: 3 of 60 test images are nearly the same as a training image; on the other test images {best.key} has "
        f"accuracy 50.0 % in place of {100 * best.test.accuracy:.1f} %."
    )
    page = section("leaderboard", dataclasses.replace(gathered, leaderboard=leaking))
    for text, table in ((page, "<table>"), (leaking.to_text(), "embedding "), (leaking.to_markdown(), "| embedding")):
        assert (
            text.index(line) < text.index("same `group`, a column of a manifest (path,label,group)") < text.index(table)
        )
    none = dataclasses.replace(board, leaks=dataclasses.replace(leaks, test=0))
    assert not any(text.startswith("Leak") for text in none.warnings())
    assert none.to_text() == dataclasses.replace(board, leaks=None).to_text()


# The first screen, neighbours, cards


def test_the_first_screen_says_what_to_use_how_sure_that_is_and_what_to_do_next(gathered: Material, page: str):
    board, issues = gathered.leaderboard, gathered.label_issues.found
    top = words(page.split('<section class="part" id="leaderboard">')[0].split("<body>")[1])
    row = board.row(board.recommendation.recommended)
    assert f"Use {row.head} on {row.embedding}; " in top
    assert f"Label new images manyheads predict {gathered.output} IMAGES --output labels.csv" in top
    assert f"Look at {len(issues)} suspicious label" in top
    assert f"manyheads clean {gathered.output} --output cleaned.csv" in top
    assert f"manyheads pick UNLABELLED --in {gathered.output}" in top
    assert (
        "Keep copies on one side 1 of 60 test images is nearly the same as a training image, so the test is easier"
        in top
    )
    recalls = {item.label: item for item in metrics.per_class(gathered.best.test)}
    worst = min(recalls.values(), key=lambda item: item.recall)
    right = round(worst.recall * worst.support)
    assert re.search(rf"Label more of (.*?) It is known least: {right} of {worst.support} test images are right", top)
    assert (
        f"With twice as many, ridge is expected to be right on about {100 * gathered.curve.forecast[0].predicted:.1f} %"
        in top
    )
    assert (
        f"Try another network No network of this leaderboard does better than what needs none; others may. manyheads shortlist {gathered.output}"
        in top
    )


def test_every_link_of_the_page_leads_somewhere(page: str):
    ids = set(re.findall(r'\bid="([^"]*)"', page))
    links = set(re.findall(r'<a href="#([^"]*)"', page))
    assert {"labels", "near-duplicates", "classes", "cost", "map"} <= links <= ids


def test_a_head_has_one_spelling_on_the_whole_page(page: str):
    assert "logistic_regression" in words(page)
    assert "logistic regression" not in words(page).lower()
    assert "nearest centroid" not in words(page)


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="images">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_images_have_their_nearest_neighbours_and_what_was_said_of_them(gathered: Material, page: str):
    data, view, best = data_of(page), gathered.view, gathered.best
    assert view is not None
    assert best is not None
    place = {path: number for number, path in enumerate(data["paths"])}
    assert data["paths"][data["near"][place[COPY]][0]] == ORIGINAL
    X = audit.project(view.features)
    for path in data["paths"][::37]:
        away = np.linalg.norm(X - X[view.images.paths.tolist().index(path)], axis=1)
        nearest = view.images.paths[np.argsort(away, kind="stable")[1:7]].tolist()
        assert [data["paths"][number] for number in data["near"][place[path]]] == nearest
    for part in (best.test, best.out_of_fold):
        for path, said, right in zip(part.paths.tolist(), part.predicted.tolist(), part.correct.tolist(), strict=True):
            assert (data["said"][place[path]], data["right"][place[path]]) == (said, int(right))
    assert [data["classes"][codes[0]] for codes in data["codes"]] == data["labels"]


def test_a_page_carries_so_many_images_at_most_and_says_so(gathered: Material, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(materials, "MOST_DOTS", 40)
    monkeypatch.setattr(pictures, "MOST_INSIDE", 70)
    found = dataclasses.replace(gathered)
    data = pictures.carried(found, [COPY, OUTLIER])
    assert data is not None
    assert data["dots"] == 40 == len(found.map.rows)
    assert len(data["paths"]) == len(set(data["paths"])) <= 70
    assert {COPY, OUTLIER, ORIGINAL} <= set(data["paths"])
    assert data["total"] == 180
    assert max(max(near) for near in data["near"]) < len(data["paths"])


def test_umap_draws_the_map_where_it_is_installed_and_the_page_says_which(
    gathered: Material, monkeypatch: pytest.MonkeyPatch
):
    assert gathered.map.method == "PCA"
    assert "PCA of all 180 images" in words(section("map", gathered))
    given = {}

    class Umap:
        def __init__(self, **options: object) -> None:
            given.update(options)

        def fit_transform(self, X: np.ndarray) -> np.ndarray:
            return X[:, [1, 0]].astype(np.float64)

    monkeypatch.setattr(materials, "umap_is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    other = dataclasses.replace(gathered)
    assert other.map.method == "UMAP"
    assert given == {"random_state": 0, "n_jobs": 1}
    assert np.array_equal(other.map.points, gathered.map.points[:, [1, 0]])
    assert "UMAP of all 180 images" in words(section("map", other))


def test_a_card_beside_each_bundle_says_what_it_is_from_stored_facts(gathered: Material):
    board = gathered.leaderboard
    texts = {
        row.key: (gathered.output / row.bundle / "MODEL_CARD.md").read_text(encoding="utf-8") for row in board.rows
    }
    text, best = texts[board.best.key], board.best
    low, high = (100 * end for end in best.test.interval)
    for said in (
        f"# Model card: `{best.head}` on `{best.embedding}`",
        "which of 3 classes an image belongs to",
        "Its network is untrained",
        "120 training and 60 test images",
        f"| accuracy, % | {100 * best.test.accuracy:.1f} [{low:.1f}, {high:.1f}] |",
        f"accuracy {100 * best.cv_mean:.1f} ± {100 * best.cv_std:.1f}",
        "no licence applies",
        f"manyheads predict {gathered.output} IMAGES --output labels.csv",
        "runs no code when it is loaded",
        "- Leak: 1 of 60 test images is nearly the same as a training image",
        str(board.provenance["index"])[:16],
    ):
        assert said in text
    counts = re.findall(r"^\| (.*) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert [name for name, *_ in counts] == sorted(CLASSES)
    assert sum(int(train) for _, train, _ in counts) == 120
    assert "a baseline, not a model" in texts["majority/most_frequent"]
    other = next(row for row in board.rows if row.key not in (best.key, "majority/most_frequent"))
    assert f"manyheads predict {gathered.output / other.bundle} IMAGES" in texts[other.key]


def test_ids_are_unique_and_colours_follow_the_theme(page: str):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(svgs) == 8
    for svg in svgs:
        assert "#0102" not in svg
        assert "var(--ink)" in svg or "var(--muted)" in svg or "var(--c0)" in svg
        for target in re.findall(r'href="#([^"]*)"', svg):
            assert f'id="{target}"' in svg


def test_plots_for_papers_are_written(experiment: Path):
    plots = sorted(path.name for path in (experiment / "plots").iterdir())
    assert "leaderboard.png" in plots
    assert len(plots) == 8
    assert all((experiment / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_map_data_names_every_dot(page: str):
    data = data_of(page)
    assert data["dots"] == len(data["paths"]) == len(data["codes"]) == len(data["near"]) == 180
    assert data["classes"] == sorted(CLASSES)
    map_svg = next(svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if 'data-chart="map"' in svg)
    assert map_svg.count("<use") == 180


def test_ranking_chart_draws_names_and_the_critical_difference():
    ranking = rank_over_datasets(np.random.default_rng(0).uniform(size=(8, 3)) + np.array([0.0, 0.1, 1.0]))
    svg = to_svg(partial(ranking_chart, ranking=ranking, names=["ridge", "knn", "rbf_svm"]), "ranks")
    assert f"critical difference {ranking.critical_difference:.2f}" in svg
    assert all(name in svg for name in ("ridge", "knn", "rbf_svm"))
    assert to_png(partial(ranking_chart, ranking=ranking, names=["a", "b", "c"])).startswith(b"\x89PNG")


def test_uneven_classes_are_shown_with_and_without_prior_correction(gathered: Material):
    board, found = gathered.leaderboard, gathered.best
    assert found is not None
    # Class 0 has 4 images in 5 and everything unsure is given to it; the probabilities know better.
    y = np.repeat([0, 1], [80, 20])
    p = np.zeros((100, 3))
    p[:80] = [0.95, 0.05, 0]
    p[80:] = [0.6, 0.4, 0]
    part = Predictions(y, 0 * y, p, None, np.arange(100).astype(str), np.arange(100) % 4, target=found.test.target)
    uneven = dataclasses.replace(found, out_of_fold=part, test=dataclasses.replace(part, folds=None))
    before, after = effects(board, uneven)
    assert before.out_of_fold["balanced_accuracy"] == 0.5
    assert after.out_of_fold["balanced_accuracy"] == 1.0
    assert after.test is not None
    assert after.test["macro_f1"] == 1.0
    assert effects(board, found) == ()
    text = section("classes", dataclasses.replace(gathered, predictions={board.best.key: uneven}))
    assert "Uneven classes" in text
    assert "prior correction: every class taken as equally likely" in text


def test_the_learning_curve_keeps_groups_and_copies_on_one_side(gathered: Material):
    index = gathered.index
    assert index is not None
    people = np.array([f"person {number // 6}" for number in range(len(index))], dtype=object)
    grouped = dataclasses.replace(index, groups=people)
    for draw in range(5):
        rest, held = materials._held_apart(grouped, draw)
        assert sorted([*rest, *held]) == list(range(len(index)))
        assert not set(people[rest]) & set(people[held])
        assert 0.1 < len(held) / len(index) < 0.3
        labels = materials._held_apart(index, draw)[1]
        assert np.unique(index.labels[labels].astype(str), return_counts=True)[1].tolist() == [12, 12, 12]


# Several experiments


def write_board(folder: Path, accuracy: dict[str, int], strategy: str = "bayes", task: str = "") -> Path:
    folder.mkdir(parents=True)
    rows = tuple(row(head, 0.9, correct=correct) for head, correct in accuracy.items())
    board = Leaderboard(rows, {"config": {"tuning": {"strategy": strategy}}, "task": task})
    Artifacts(folder).leaderboard.write_text(board.to_json(), encoding="utf-8")
    for head in accuracy:
        path = Artifacts(folder).trials("resnet18-penultimate", head)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            {"event": "trial", "number": number, "status": "ok", "mean": 0.8, "fold_scores": [0.8]}
            for number in range(16)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_rows_are_ranked_over_several_experiments(tmp_path: Path):
    outputs = [
        write_board(tmp_path / f"data{i}", {"ridge": 90 + i, "knn": 80 + i, "mlp": 85}, task=str(i)) for i in range(4)
    ]
    text, diagram = compare(outputs, tmp_path / "several")
    assert text == (tmp_path / "several" / "ranks.md").read_text(encoding="utf-8")
    assert average_ranks(text)["resnet18-penultimate/ridge"] == 1.0
    assert "4 data sets" in text
    assert "critical difference" in text
    assert diagram == f"diagram  {tmp_path / 'several' / 'ranks.png'}"
    assert (tmp_path / "several" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    other = write_board(tmp_path / "other", {"ridge": 90}, task="other")
    with pytest.raises(PipelineError, match="2 experiments with 1 rows in common; ranking needs at least 2"):
        compare([outputs[0], other], tmp_path / "several")


def average_ranks(text: str) -> dict[str, float]:
    return {key: float(rank) for rank, key in re.findall(r"\| *(\d\.\d+) +\| (\S+) ", text)}


def test_several_experiments_are_ranked_by_the_score_that_was_tuned(tmp_path: Path):
    """Ridge labels more images right; knn has the lower loss everywhere."""
    outputs = [write_board(tmp_path / f"data{i}", {"ridge": 90 + i, "knn": 80 + i}) for i in range(3)]
    losses = {"ridge": 0.6, "knn": 0.4}
    for number, output in enumerate(outputs):
        board = read_leaderboard(output)
        rows = tuple(
            dataclasses.replace(
                item,
                cv_mean=-losses[item.head],
                test=dataclasses.replace(item.test, values={**item.test.values, "log_loss": losses[item.head]}),
            )
            for item in board.rows
        )
        board = Leaderboard(rows, {**board.provenance, "scoring": "log_loss", "task": str(number)})
        Artifacts(output).leaderboard.write_text(board.to_json(), encoding="utf-8")
    text, _ = compare(outputs, tmp_path / "several")
    assert average_ranks(text) == {"resnet18-penultimate/knn": 1.0, "resnet18-penultimate/ridge": 2.0}
    assert "- 3 data sets, ranked by log loss on the test images; Friedman" in text
    other = write_board(tmp_path / "accuracy", {"ridge": 90, "knn": 80})
    with pytest.raises(PipelineError) as caught:
        compare([outputs[0], other], tmp_path)
    assert str(caught.value) == (
        "the experiments were tuned for different scores; run them with the same tuning.scoring\n"
        f"  {outputs[0]}: log_loss\n  {other}: accuracy"
    )


def test_compare_ranks_several_data_sets_and_draws_searches_on_one(tmp_path: Path):
    outputs = [write_board(tmp_path / name, {"ridge": 90, "knn": 80}, name) for name in ("bayes", "random", "grid")]
    assert compare(outputs, tmp_path / "one") == [
        f"plot     {tmp_path / 'one' / 'search.png'} (resnet18-penultimate/knn)"
    ]
    assert (tmp_path / "one" / "search.png").read_bytes().startswith(b"\x89PNG")
    for number, output in enumerate(outputs):
        board = dataclasses.replace(read_leaderboard(output), provenance={"task": str(number)})
        Artifacts(output).leaderboard.write_text(board.to_json(), encoding="utf-8")
    assert "3 data sets" in "\n".join(compare(outputs, tmp_path / "several"))
    with pytest.raises(
        PipelineError, match="has no trials of a/b; its rows are resnet18-penultimate/knn, resnet18-penultimate/ridge"
    ):
        compare(outputs, tmp_path, "a/b")
    with pytest.raises(PipelineError, match="1 experiment given; a comparison needs at least 2 output folders"):
        compare(outputs[:1], tmp_path)


# Repeats on request


def test_nested_and_seeds_are_columns_only_on_request_and_survive_json():
    plain = Leaderboard((row("ridge", 0.9), row("knn", 0.8)))
    assert "nested" not in plain.to_text()
    rows = (
        row("ridge", 0.9, nested=Nested((0.95, 0.80), (0.70, 0.90)), seeds=Seeds((3, 4), (0.90, 0.94), (0.8, 0.9))),
        row("knn", 0.8, nested=Nested((0.90, 0.85), (0.88, 0.60)), seeds=Seeds((3, 4), (0.80, 0.80), (0.8, 0.9))),
    )
    board = Leaderboard(rows)
    back = board_of(board.to_json())
    assert [(item.nested, item.seeds) for item in back.rows] == [(item.nested, item.seeds) for item in board.rows]
    # In the first outer fold the inner scores choose ridge, in the second knn; ridge's 0.90 there is not looked at.
    chosen = nested_choice(rows)
    assert chosen is not None
    assert chosen.outer == (0.70, 0.60)
    text = board.to_text()
    assert "gives 65.0 [0.0, 100.0], the unbiased score" in text  # two folds tell little, but no score is above 100
    assert "92.0 ± 2.8" in text
    assert "gives 65.0 [" in text
    assert "seeds 3 to 4" in text
    for made in (text, board.to_markdown(), section("leaderboard", material(rows))):
        assert "80.0 [" in made


@pytest.mark.parametrize(("name", "count"), [("{}", 2), ("x" * 90 + "{}", 12)])
def test_long_names_do_not_squeeze_the_tuning_curves(name: str, count: int) -> None:
    trials = tuple({"mean": 0.5 + 0.01 * trial} for trial in range(12))
    drawn = tuning_chart(SCREEN, {name.format(row): trials for row in range(count)}, "accuracy")
    FigureCanvasAgg(drawn).draw()
    (axes,), (legend,) = drawn.axes, drawn.legends
    place = axes.get_position()
    assert place.width > 0.75
    assert place.height * drawn.get_figheight() > 2.2
    box = legend.get_window_extent().transformed(drawn.transFigure.inverted())
    assert box.x0 >= 0
    assert box.x1 <= 1.01
    assert 0 <= box.y0 < box.y1 < place.y0


# ---- work that did not change


def stamps(output: Path) -> dict[str, int]:
    made = [output / "report.html", *(output / "plots").iterdir(), *(output / "audit").iterdir()]
    return {path.name: path.stat().st_mtime_ns for path in made}


def test_a_page_whose_material_did_not_change_is_not_made_again(copy: Path):
    before = stamps(copy)
    record = json.loads((copy / "leaderboard.json").read_text())
    record["provenance"]["date"] = "2027-01-01T00:00:00+00:00"  # what a run with nothing to do writes
    rewrite(copy / "leaderboard.json", record)
    assert report.refresh(copy) == copy / "report.html"
    assert stamps(copy) == before


def test_a_page_is_made_again_when_anything_it_is_made_of_or_any_of_it_changed(copy: Path, experiment: Path, page: str):
    """And is the same page as before."""
    head = f"heads/{EMBEDDING}/logistic_regression"
    changed = ("dataset/index.csv", "features.json", "audit.json", f"trials/{EMBEDDING}/logistic_regression.jsonl")
    gone = (f"{head}/predictions.npz", f"{head}/MODEL_CARD.md", "report.html", "audit/outliers.csv", "report.json")
    for name in ("leaderboard.json", *changed, *gone, "plots/confusion.png"):
        assert report.is_current(copy), name
        before = (copy / name).read_bytes()
        if name == "leaderboard.json":
            record = json.loads(before)
            record["provenance"]["notes"] = ["a head was left out"]
            rewrite(copy / name, record)
        elif name in changed:
            (copy / name).write_bytes(before + b"\n")
        else:
            (copy / name).unlink()
        assert not report.is_current(copy), name
        if not name.startswith("plots"):
            (copy / name).write_bytes(before)
    before = stamps(copy)
    report.refresh(copy)
    assert all(stamp > before.get(made, 0) for made, stamp in stamps(copy).items())
    assert (copy / "plots" / "confusion.png").is_file()
    assert (copy / "report.html").read_text(encoding="utf-8").replace(str(copy), str(experiment)) == page
    assert report.is_current(copy)
