"""The page speaks of the score that was tuned: its name and its unit, whichever it is, and never a per cent of a loss."""

from __future__ import annotations

import html
import re
import shutil
from functools import partial

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_experiment import built_experiment, material, row, section, squares, words
from sklearn.metrics import roc_auc_score

from pipeline.evaluation import METRICS, Difference, Optimism, Paired, Predictions, scores
from pipeline.evaluation.leaderboard import Leaderboard, Recommendation, read_leaderboard
from pipeline.report.charts import difference_chart, tuning_chart
from pipeline.report.drawing import SCREEN, to_svg
from pipeline.report.material import gather
from pipeline.report.page import render
from pipeline.stages import train_heads

OTHERS = ("macro_f1", "log_loss")
SHOWN = ("accuracy", *OTHERS)
NAMES = {name: metric.title for name, metric in METRICS.items() if name != "accuracy"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Leaderboard, str]]:
    """The leaderboard and the page for each score, of heads that were tuned for it on the same features."""
    folder = tmp_path_factory.getbasetemp() / "experiment"
    output, found = built_experiment(folder), {}
    for scoring in SHOWN:
        if scoring != "accuracy":
            copy = shutil.copytree(output, tmp_path_factory.mktemp(scoring) / "copy")
            train_heads.run(squares(folder, scoring).model_copy(update={"output": str(copy)}))
            (copy / "features.json").unlink()  # what is drawn of features is the same for all
            found[scoring] = (read_leaderboard(copy), render(gather(copy)))
        else:
            found[scoring] = (read_leaderboard(output), (output / "report.html").read_text(encoding="utf-8"))
    return found


def headers(page: str, name: str) -> list[str]:
    found = re.search(rf'aria-label="{name}".*?<thead>(.*?)</thead>', page, flags=re.DOTALL)
    assert found is not None
    return [words(cell) for cell in re.findall(r"<th.*?</th>", found.group(1))]


def tips(page: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r'data-tip="([^"]*)"', page)]


def test_of_accuracy_the_page_says_what_it_always_said(pages):
    board, page = pages["accuracy"]
    text, best = words(page), board.best.test
    assert best is not None
    low, high = (100 * end for end in best.interval)
    for said in (
        f"Use {board.best.head} on {board.best.embedding}; the best by cross-validation Its test accuracy",
        f"Its test accuracy {100 * best.accuracy:.1f} % {low:.1f} to {high:.1f} {best.correct} of {best.n} right, 95 % interval",
        "of 3 rows may be as good as the best Of 100 images",
        f"Of 100 images like these it labels about {100 * best.accuracy:.0f} right. 60 test images show that it is between {low:.0f} and {high:.0f}",
        f"Use {board.recommendation.recommended} ; 2 rows are as good as 120 images can show.",
        "± is the standard deviation of the folds' scores, not an interval of the score.",
        "Ordered by cross-validation on the training images; test images choose nothing.",
        "All rows are compared on the same images. An interval that reaches 0",
        "accuracy, %: ● test — its 95 % interval | cross-validation",
        "accuracy, points from the best row, out of fold",
        f"Picking the best of 3 rows: {100 * board.best.cv_mean:.1f} % out of fold as measured, about ",
        "accuracy, cross-validation, %",
    ):
        assert said in text
    assert headers(page, "Leaderboard")[1] == "Cross-validation, %"
    assert headers(page, "Searches")[1] == "Best cross-validation, %"
    paired = headers(page, "Paired tests")
    assert (paired[0], paired[4]) == ("Best minus this row, percentage points", "p, McNemar and Holm")
    assert any(re.search(r"/nearest_centroid: accuracy [+-]\d+\.\d points \[", tip) for tip in tips(page))
    assert "<h3>Accuracy</h3>" in page
    assert "<h3>Behind the best, out of fold</h3>" in page
    assert 'aria-label="Test accuracy and cross-validation of every row"' in page


@pytest.mark.parametrize("scoring", OTHERS)
def test_the_page_names_another_score_wherever_it_shows_it(pages, scoring: str):
    (board, page), name = pages[scoring], NAMES[scoring]
    text, loss = words(page), scoring == "log_loss"
    assert f"the best by cross-validated {name} " in text
    assert f"may be as good as the best by {name}" in text
    assert f"Its test {name}{', lower is better' if loss else ''} " in text
    assert "Its test accuracy" not in text
    assert f"Ordered by cross-validated {name}{', the lowest first,' if loss else ''} on the training images" in text
    assert f"compared on the same images in {name}, the score that was tuned" in text
    assert f"<h3>Behind the best by {name}, out of fold</h3>" in page
    assert "<h3>Test accuracy</h3>" in page
    assert "accuracy, %: ● test — its 95 % interval" in text
    assert "| cross-validation" not in text
    assert 'aria-label="Test accuracy of every row"' in page
    assert headers(page, "Leaderboard")[1] == f"Cross-validation, {name}{'' if loss else ', %'}"
    assert headers(page, "Searches")[1] == f"Best cross-validation, {name}{'' if loss else ', %'}"
    paired = headers(page, "Paired tests")
    assert paired[0] == (
        "This row's log loss minus the best row's, nats" if loss else f"Best minus this row, {name}, percentage points"
    )
    assert paired[4] == "p, randomisation and Holm"
    assert "McNemar" not in text
    assert ("Lower log loss is better, and is further up." in text) == loss
    assert any(f"cross-validation {name} {board.metric.text(board.best.cv_mean)}" in tip for tip in tips(page))


@pytest.mark.parametrize("scoring", SHOWN)
def test_the_card_has_the_best_rows_test_score_in_the_score_that_was_tuned(pages, scoring: str):
    board, page = pages[scoring]
    test = board.best.test
    assert test is not None
    value, (low, high) = test[scoring], test.intervals[scoring]
    said = (
        f"{value:.3f} {low:.3f} to {high:.3f}"
        if scoring == "log_loss"
        else f"{100 * value:.1f} % {100 * low:.1f} to {100 * high:.1f}"
    )
    card = next(part for part in page.split('<div class="card">') if "Its test " in part)
    assert said in words(card)


def card_of(item, scoring: str) -> str:
    page = render(material([item], provenance={"scoring": scoring}))
    return words(next(part for part in page.split('<div class="card">') if "Its test " in part))


def test_a_score_without_a_column_of_its_own_is_on_the_card_too():
    rng, metric = np.random.default_rng(0), METRICS["roc_auc"]
    y, p = np.array(["a", "b", "c"] * 30), rng.dirichlet(np.ones(3), 90)
    p[np.arange(90), np.arange(90) % 3] += 0.5
    p /= p.sum(axis=1, keepdims=True)
    test = scores(Predictions(np.arange(90) % 3, p.argmax(axis=1), p), metric=metric)
    value, (low, high) = test["roc_auc"], test.intervals["roc_auc"]
    assert value == pytest.approx(roc_auc_score(y, p, multi_class="ovr"))
    assert low < value < high
    card = card_of(row("ridge", 0.9, test=test), "roc_auc")
    assert card.startswith(f"Its test ROC AUC {100 * value:.1f} % {100 * low:.1f} to {100 * high:.1f} 95 % interval; ")


def test_without_probabilities_the_card_has_the_test_accuracy_and_says_so():
    assert row("ridge", -0.3).test["log_loss"] is None
    card = card_of(row("ridge", -0.3), "log_loss")
    assert card.startswith("Its test accuracy 90.0 % ")


def test_a_log_loss_is_never_a_percentage_nor_below_nought(pages):
    board, page = pages["log_loss"]
    text = words(page)
    for item in board.rows:
        assert f"{-100 * item.cv_mean:.1f}" not in re.findall(r"cross-validation log loss (\S+)", " ".join(tips(page)))
        assert f"{-item.cv_mean:.3f} ± {item.cv_std:.3f}" in text
        assert f'data-v="{-item.cv_mean:.10g}"' in page
        assert f"-{-item.cv_mean:.3f}" not in text
    recommendation = board.recommendation
    assert recommendation is not None
    assert recommendation.optimism is not None
    low, high = (-end for end in reversed(recommendation.optimism.interval))
    assert (
        f"Picking the best of {recommendation.optimism.candidates} rows: log loss {-recommendation.optimism.apparent:.3f} out of fold as measured, "
        f"about {-recommendation.optimism.corrected:.3f} ({low:.3f} to {high:.3f}) once the luck of having been picked is taken off."
    ) in text
    assert not re.search(r"log loss \S+ %|nats? ?%|minus log loss", text + " ".join(tips(page)))


def behind(scoring: str) -> tuple[Difference, dict]:
    """One row that is a little worse than the best, as far as the score's unit goes."""
    item = Difference("net/knn", 0.0312, (-0.0104, 0.0728), 0.2, True)
    return item, {"net/knn": row("knn", 0.8, embedding="net")}


@pytest.mark.parametrize(
    ("scoring", "tip", "label"),
    [
        ("accuracy", "accuracy -3.1 points [-7.3, +1.0]", "accuracy, points from the best row, out of fold"),
        ("macro_f1", "macro F1 -3.1 points [-7.3, +1.0]", "macro F1, points from the best row, out of fold"),
        (
            "balanced_accuracy",
            "balanced accuracy -3.1 points [-7.3, +1.0]",
            "balanced accuracy, points from the best row, out of fold",
        ),
        ("log_loss", "log loss +0.031 nats [-0.010, +0.073]", "log loss, nats above the best row's, out of fold"),
    ],
)
def test_worse_is_left_and_a_loss_that_is_worse_is_higher(scoring: str, tip: str, label: str):
    item, rows = behind(scoring)
    chart = partial(difference_chart, differences=[item], rows=rows, scoring=scoring)
    assert f"net/knn: {tip}, p = 0.200, no evidence of a difference" in tips(to_svg(chart, "differences"))
    drawn = chart(SCREEN)
    FigureCanvasAgg(drawn).draw()
    (axes,) = drawn.axes
    assert axes.get_xlabel() == label
    (dot,) = (line for line in axes.lines if line.get_marker() == "o")
    assert dot.get_xdata()[0] < 0
    low, high = axes.get_xlim()
    numbers = [
        float(tick.get_text().replace("−", "-"))
        for tick, place in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
        if low <= place <= high
    ]
    assert numbers == sorted(numbers, reverse=scoring == "log_loss")
    # The label may not be cut off.
    box = axes.xaxis.label.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= drawn.bbox.width


@pytest.mark.parametrize("scoring", ["accuracy", "macro_f1", "log_loss", "mae", "r2", "hamming_loss"])
def test_the_tuning_curve_is_in_the_unit_of_the_score_and_rises(scoring: str):
    loss = METRICS[scoring].lower_is_better
    means = (-0.5, -0.3, -0.4) if loss else (0.5, 0.7, 0.6)
    chart = partial(tuning_chart, searches={"knn": tuple({"mean": mean} for mean in means)}, scoring=scoring)
    title = NAMES.get(scoring, "accuracy")
    numbers = {"log_loss": "0.300", "mae": "0.300", "r2": "0.700"}
    share = "30.0 %" if loss else "70.0 %"
    assert f"knn: best {title} {numbers.get(scoring, share)} after 3 trials" in tips(to_svg(chart, "tuning"))
    drawn = chart(SCREEN)
    FigureCanvasAgg(drawn).draw()
    (axes,) = drawn.axes
    assert axes.get_ylabel() == f"{title}, cross-validation{'' if scoring in numbers else ', %'}"
    curve = axes.lines[0].get_ydata()
    assert curve[-1] > curve[0]
    ticks = [float(tick.get_text().replace("−", "-")) for tick in axes.get_yticklabels()]
    assert min(ticks) >= 0
    assert ticks == sorted(ticks, reverse=loss)


def test_the_paired_table_counts_for_the_best_row_in_the_scores_own_unit():
    rows = (row("ridge", -0.2), row("knn", -0.3))
    paired = Paired(0.1, (-np.inf, 0.25), 0.04)
    gap = Difference(rows[1].key, 0.1, (0.02, 0.18), 0.01, False, paired, None)
    best = Difference(rows[0].key, 0.0, (0.0, 0.0), 1.0, True)
    found = material(
        rows, provenance={"scoring": "log_loss"}, recommendation=Recommendation((best, gap), rows[0].key, "")
    )
    text = words(section("difference", found))
    assert "+0.100 [+0.020, +0.180] 0.010 +0.100 [-∞, +0.250] 0.040" in text


@pytest.mark.parametrize(
    ("trials", "luck", "finished", "said"),
    [
        (8, 0.0123, 8, " Picking the best of its 8 trials adds about {} of such luck."),
        (8, 0.0123, None, " Picking the best of its 8 trials adds about {} of such luck."),
        (8, 0.0123, 3, " Picking the best of its 8 trials adds at least about {} of such luck."),
        (8, None, 1, ""),
        (1, 0.0, 1, ""),
    ],
)
@pytest.mark.parametrize(("scoring", "amount"), [("accuracy", "1.2 points"), ("log_loss", "0.012 nats")])
def test_the_luck_of_the_trials_is_said_of_those_it_is_known_of(trials, luck, finished, said, scoring, amount):
    best = row("ridge", 0.9, trials=trials)
    recommendation = Recommendation((), best.key, "", Optimism(2, 0.9, 0.89, (0.8, 0.95)), luck, finished)
    text = words(section("difference", material([best], None, {"scoring": scoring}, None, recommendation)))
    assert text.partition("once the luck of having been picked is taken off.")[2] == said.format(amount)


def test_the_note_on_components_does_not_promise_more_than_a_fold_has():
    board = Leaderboard((row("ridge", 0.9, embedding="net", components=64),))
    assert (
        "Heads work on principal components, found within each fold's training images: up to 64 of net; "
        "fewer where a fold has fewer training images."
    ) in board.notes()
