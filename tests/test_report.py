"""The leaderboard keeps what it was given and is won by cross-validation; the page holds everything and asks for nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_experiment import CLASSES, built_experiment, row, write_trials

from pipeline import metrics, report
from pipeline.config import Artifacts
from pipeline.errors import PipelineError
from pipeline.report import Leaderboard, Nested, Seeds, material
from pipeline.report.charts import tuning_chart
from pipeline.report.drawing import SCREEN, to_png, to_svg
from pipeline.report.imbalance import effects
from pipeline.report.material import gather
from pipeline.report.page import render
from pipeline.report.ranks import ranking_chart
from pipeline.report.rows import nested_choice
from pipeline.report.several import compare, rank, searches
from pipeline.report.tables import leaderboard as leaderboard_table

ROOT = Path(__file__).parents[1]


# Leaderboard


def test_best_is_chosen_by_cross_validation_and_never_by_the_test():
    board = Leaderboard((row("ridge", 0.90, correct=99), row("rbf_svm", 0.91, correct=50)))
    assert board.best.head == "rbf_svm"
    assert [item.head for item in board.rows] == ["rbf_svm", "ridge"]


def test_of_two_equal_rows_the_simpler_wins():
    board = Leaderboard((row("rbf_svm", 0.9, simplicity=5), row("ridge", 0.9, simplicity=1)))
    assert board.best.head == "ridge"


def test_json_gives_the_same_leaderboard_back():
    rows = (row("ridge", 0.90), row("knn", 0.85, test=None), row("mlp", 0.8, embed_seconds=0.01, dim=512))
    board = Leaderboard(rows, {"seed": np.int64(3), "scoring": "accuracy", "nan": float("nan"), "list": (1, 2)})
    back = Leaderboard.from_json(board.to_json())
    assert back.to_json() == board.to_json()
    assert back.rows[1:] == tuple(dataclasses.replace(item, params={"C": 0.5, "k": 3}) for item in board.rows[1:])
    assert back.provenance == {"seed": 3, "scoring": "accuracy", "nan": None, "list": [1, 2]}
    json.loads(board.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_foreign_or_newer_leaderboard_is_refused():
    with pytest.raises(PipelineError, match="not a leaderboard; run `manyheads heads` again"):
        Leaderboard.from_json("[1, 2]")
    newer = Leaderboard((row("ridge", 0.9),)).to_json().replace('"version": 1', '"version": 9')
    with pytest.raises(PipelineError, match="version 9, expected 'manyheads leaderboard' version 1"):
        Leaderboard.from_json(newer)


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


def test_log_loss_is_not_shown_as_a_percentage():
    text = Leaderboard((row("ridge", -0.351, cv_std=0.012),), {"scoring": "log_loss"}).to_text()
    assert "-0.351 ± 0.012" in text


def test_an_unknown_row_and_an_empty_leaderboard():
    with pytest.raises(KeyError):
        Leaderboard(()).row("a/b")
    with pytest.raises(PipelineError, match="no rows"):
        _ = Leaderboard(()).best


def test_the_leaderboard_needs_neither_torch_nor_plots():
    code = """
import importlib.abc, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
import pipeline.report, pipeline.metrics
print([name for name in ("torch", "matplotlib", "plotly") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Verdict and page


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_experiment(tmp_path_factory.getbasetemp() / "experiment")


@pytest.fixture
def copy(experiment: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(experiment, tmp_path / "copy"))


@pytest.fixture(scope="session")
def page(experiment: Path) -> str:
    return (experiment / "report.html").read_text(encoding="utf-8")


def board_of(output: Path) -> Leaderboard:
    return Leaderboard.from_json(Artifacts(output).leaderboard.read_text(encoding="utf-8"))


def test_verdict_survives_json_and_names_the_group(experiment: Path):
    board = board_of(experiment)
    assert board.verdict is not None
    assert {item.key for item in board.verdict.differences} == {item.key for item in board.rows}
    assert "majority/most_frequent" not in board.verdict.no_evidence
    assert board.best.key in board.verdict.no_evidence
    assert board.verdict.recommended in board.verdict.no_evidence
    assert board.verdict.optimism is not None
    assert board.verdict.optimism.candidates == 3
    # The second of the two finished trials is worse on every fold.
    assert board.verdict.trial_optimism == 0.0
    assert Leaderboard.from_json(board.to_json()) == board
    assert board.verdict.reason in board.to_text()


def test_the_simplest_of_the_group_is_recommended_and_the_embedding_counts_first(copy: Path):
    board = board_of(copy)
    group = [item for item in board.rows if not item.baseline]
    assert len(group) == 2
    cheap, simple = group[1].key, group[0].key
    rows = tuple(
        dataclasses.replace(
            item, embed_seconds=0.001 if item.key == cheap else 0.1, simplicity=0 if item.key == simple else 9
        )
        for item in board.rows
    )
    judged = report.judge(Leaderboard(rows, board.provenance), copy)
    assert judged.verdict is not None
    if cheap in judged.verdict.no_evidence:
        assert judged.verdict.recommended == cheap
        assert "simplest and cheapest" in judged.verdict.reason


def test_without_predictions_there_is_no_verdict_but_a_page(copy: Path):
    for path in copy.rglob("predictions.npz"):
        path.unlink()
    board = report.judge(board_of(copy), copy)
    assert board.verdict is None
    Artifacts(copy).leaderboard.write_text(board.to_json(), encoding="utf-8")
    text = render(gather(copy))
    assert "The best row left no predictions" in text
    assert 'id="map"' in text


def test_without_images_features_or_trials_the_page_says_what_is_missing(copy: Path):
    shutil.rmtree(copy / "features")
    shutil.rmtree(copy / "trials")
    text = render(gather(copy))
    assert "the features cannot be read" in text
    assert 'id="map"' not in text
    shutil.rmtree(copy / "dataset")
    text = render(gather(copy))
    assert "the index cannot be read" in text
    assert "Worst mistakes" in text


def test_of_many_images_a_stratified_part_is_looked_at(experiment: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(material, "MOST_IMAGES", 90)
    found = gather(experiment)
    assert "look at 90 of 180 images" in " ".join(found.missing)
    assert found.map is not None
    assert found.index is not None
    labels = found.index.labels[found.map.rows].astype(str)
    assert sorted(np.unique(labels, return_counts=True)[1]) == [30, 30, 30]


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
    for section in (
        "leaderboard",
        "difference",
        "tuning",
        "classes",
        "calibration",
        "cost",
        "map",
        "mistakes",
        "labels",
        "copies",
        "outliers",
        "reproduce",
    ):
        assert f'<section id="{section}">' in page
    for chart in ("leaderboard", "differences", "tuning", "confusion", "reliability", "learning_curve", "cost", "map"):
        assert f'data-chart="{chart}"' in page


def test_labels_cannot_become_markup(page: str):
    assert "<b>bee</b>" not in page
    assert "&lt;b&gt;bee&lt;/b&gt; &amp; &#x27;co&#x27;" in page
    assert "猫 $5" in page


def test_page_shows_what_was_planted(experiment: Path, page: str):
    """A flipped label, a copy from train in test, an outlier: each is in its section and its table."""
    labels = (experiment / "doctor" / "suspicious_labels.csv").read_text(encoding="utf-8")
    assert "train/class0/006.png,猫 $5,ant" in labels
    copies = (experiment / "doctor" / "near_duplicates.csv").read_text(encoding="utf-8").splitlines()
    assert copies[1].startswith("test/class0/000.png,train/class0/000.png")
    assert "1 across splits" in page
    assert "test/class0/001.png" in (experiment / "doctor" / "outliers.csv").read_text(encoding="utf-8")


def test_page_is_the_same_when_made_again(experiment: Path, page: str):
    assert render(gather(experiment)) == page


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
    found = re.search(r'<script type="application/json" id="map-data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    data = json.loads(found.group(1))
    assert len(data["paths"]) == len(data["codes"]) == 180
    assert data["classes"] == sorted(CLASSES)
    map_svg = next(svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if 'data-chart="map"' in svg)
    assert map_svg.count("<use") == 180


def test_ranking_chart_draws_names_and_the_critical_difference():
    ranking = metrics.rank_over_datasets(np.random.default_rng(0).uniform(size=(8, 3)) + np.array([0.0, 0.1, 1.0]))
    svg = to_svg(ranking_chart(ranking, ["ridge", "knn", "rbf_svm"]), "ranks")
    assert f"critical difference {ranking.critical_difference:.2f}" in svg
    assert all(name in svg for name in ("ridge", "knn", "rbf_svm"))
    assert to_png(ranking_chart(ranking, ["a", "b", "c"])).startswith(b"\x89PNG")


def test_uneven_classes_are_shown_with_and_without_prior_correction(copy: Path):
    board = board_of(copy)
    path = copy / str(board.best.bundle) / "predictions.npz"
    found = metrics.Predictions.read(path)
    # Class 0 has 4 images in 5 and everything unsure is given to it; the probabilities know better.
    y = np.array([found.classes[0]] * 80 + [found.classes[1]] * 20)
    p = np.zeros((100, 3))
    p[:80] = [0.95, 0.05, 0]
    p[80:] = [0.6, 0.4, 0]
    part = metrics.PredictionSet(
        np.arange(100).astype(str), y, np.array([found.classes[0]] * 100), p, np.arange(100) % 4
    )
    uneven = dataclasses.replace(found, out_of_fold=part, test=dataclasses.replace(part, folds=None))
    before, after = effects(board, uneven)
    assert before.out_of_fold.balanced_accuracy == 0.5
    assert after.out_of_fold.balanced_accuracy == 1.0
    assert after.test is not None
    assert after.test.macro_f1 == 1.0
    assert effects(board, found) == ()
    path.write_bytes(uneven.to_bytes())
    text = render(gather(copy))
    assert "Uneven classes" in text
    assert "prior correction: every class taken as equally likely" in text


def test_the_learning_curve_keeps_groups_and_copies_on_one_side(experiment: Path):
    index = gather(experiment).index
    assert index is not None
    people = np.array([f"person {number // 6}" for number in range(len(index))], dtype=object)
    grouped = dataclasses.replace(index, groups=people)
    for draw in range(5):
        rest, held = material._held_apart(grouped, draw)
        assert sorted([*rest, *held]) == list(range(len(index)))
        assert not set(people[rest]) & set(people[held])
        assert 0.1 < len(held) / len(index) < 0.3
        labels = material._held_apart(index, draw)[1]
        assert np.unique(index.labels[labels].astype(str), return_counts=True)[1].tolist() == [12, 12, 12]


# Several experiments


def write_board(folder: Path, accuracy: dict[str, int], strategy: str = "bayes") -> Path:
    folder.mkdir(parents=True)
    rows = tuple(row(head, 0.9, correct=correct) for head, correct in accuracy.items())
    board = Leaderboard(rows, {"config": {"tuning": {"strategy": strategy}}})
    Artifacts(folder).leaderboard.write_text(board.to_json(), encoding="utf-8")
    for head in accuracy:
        write_trials(Artifacts(folder).trials("resnet18-penultimate", head), (0.8, 0.82, 0.81), 3)
    return folder


def test_rows_are_ranked_over_several_experiments(tmp_path: Path):
    outputs = [write_board(tmp_path / f"data{i}", {"ridge": 90 + i, "knn": 80 + i, "mlp": 85}) for i in range(4)]
    keys, ranking = rank(outputs, tmp_path / "several")
    assert dict(zip(keys, ranking.average_ranks, strict=True))["resnet18-penultimate/ridge"] == 1.0
    text = (tmp_path / "several" / "ranks.md").read_text(encoding="utf-8")
    assert "4 data sets" in text
    assert "critical difference" in text
    assert (tmp_path / "several" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PipelineError, match="1 experiments with 3 rows in common; ranking needs at least 2"):
        rank(outputs[:1], tmp_path / "several")


def test_strategies_are_drawn_side_by_side(tmp_path: Path):
    outputs = [write_board(tmp_path / name, {"ridge": 90}, name) for name in ("bayes", "random", "grid")]
    assert searches(outputs, "resnet18-penultimate/ridge", tmp_path).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PipelineError, match="has no trials of a/b; its rows are resnet18-penultimate/ridge"):
        searches(outputs, "a/b", tmp_path)


def test_compare_ranks_several_data_sets_and_draws_searches_on_one(tmp_path: Path):
    outputs = [write_board(tmp_path / name, {"ridge": 90, "knn": 80}, name) for name in ("bayes", "random", "grid")]
    text = "\n".join(compare(outputs, tmp_path / "one"))
    assert "| row" in text
    assert re.search(r"resnet18-penultimate/ridge \| \*\*90.00\*\* \(16 trials, 0.000 s\)", text)
    assert all(name in text for name in ("bayes", "random", "grid"))
    assert (tmp_path / "one" / "search.png").read_bytes().startswith(b"\x89PNG")
    for number, output in enumerate(outputs):
        board = dataclasses.replace(board_of(output), provenance={"task": str(number)})
        Artifacts(output).leaderboard.write_text(board.to_json(), encoding="utf-8")
    assert "3 data sets" in "\n".join(compare(outputs, tmp_path / "several"))
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
    back = Leaderboard.from_json(board.to_json())
    assert [(item.nested, item.seeds) for item in back.rows] == [(item.nested, item.seeds) for item in board.rows]
    # In the first outer fold the inner scores choose ridge, in the second knn; ridge's 0.90 there is not looked at.
    chosen = nested_choice(rows)
    assert chosen is not None
    assert chosen.outer == (0.70, 0.60)
    text = board.to_text()
    assert "92.0 ± 2.8" in text
    assert "gives 65.0 [" in text
    assert "seeds 3 to 4" in text
    for made in (text, board.to_markdown(), leaderboard_table(board)):
        assert "80.0 [" in made


@pytest.mark.parametrize(
    "name", ["{}", "regnet_small-untrained-trunk_output-grid/logistic_regression {}", "x" * 90 + "{}"]
)
@pytest.mark.parametrize("count", [2, 12])
def test_long_names_do_not_squeeze_the_tuning_curves(name: str, count: int) -> None:
    trials = tuple({"mean": 0.5 + 0.01 * trial} for trial in range(12))
    drawn = tuning_chart({name.format(row): trials for row in range(count)}, "accuracy")(SCREEN)
    FigureCanvasAgg(drawn).draw()
    (axes,), (legend,) = drawn.axes, drawn.legends
    place = axes.get_position()
    assert place.width > 0.75
    assert place.height * drawn.get_figheight() > 2.2
    box = legend.get_window_extent().transformed(drawn.transFigure.inverted())
    assert box.x0 >= 0
    assert box.x1 <= 1.01
    assert 0 <= box.y0 < box.y1 < place.y0
