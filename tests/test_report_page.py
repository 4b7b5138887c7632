"""What the page says beside its charts and in its tables: nothing left out in silence, no two rows or classes called the same."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_experiment import material, row, section, words

from pipeline import evaluation as metrics
from pipeline.data.targets import TARGETS
from pipeline.evaluation import HeadPredictions, Predictions, Scores
from pipeline.evaluation.leaderboard import Nested
from pipeline.report import sections
from pipeline.report.charts import confusion_chart, priced, score_chart
from pipeline.report.drawing import figure, shorten_all, to_svg
from pipeline.report.page import render
from pipeline.report.sections import largest

LONG = tuple(f"a rather long class name number {number:02d}" for number in range(60))


class Table(HTMLParser):
    """The words of every cell that a reader sees, row by row, without any attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()


def trials(count: int = 3):
    return tuple({"mean": 0.5 + 0.01 * number, "status": "ok"} for number in range(count))


# Sections


def test_a_page_has_the_sections_that_serve_its_target():
    assert {target for part in sections.SECTIONS for target in part.targets} == set(TARGETS)
    found = material([row("ridge", 0.9)])
    assert [part.name for part in sections.shown(found)] == ["header", "leaderboard", "difference", "cost", "reproduce"]
    numbers = {
        "target": {
            "kind": "regression",
            "columns": ["age"],
            **dict.fromkeys(("centre", "scale", "low", "high", "half"), ()),
        }
    }
    rows = [row("ridge", -0.9, test=Scores(90, {"mae": 0.95, "r2": 0.5}, {"mae": (0.8, 1.1), "r2": (0.4, 0.6)}))]
    of_numbers = material(rows, provenance={**numbers, "scoring": "mae"})
    assert [part.name for part in sections.shown(of_numbers)] == [
        "header",
        "leaderboard",
        "difference",
        "cost",
        "reproduce",
    ]
    text = words(render(of_numbers))
    assert "Its test MAE, lower is better 0.950 0.800 to 1.10 95 % interval" in text
    assert "Head and embedding Cross-validation, MAE Test MAE [95 %] RMSE R2 Spearman's rho Fit, s Trials" in text
    assert "ridge best resnet18-penultimate 0.900 ± 0.0100 0.950 [0.800, 1.10] – 0.500 – 1.25 16" in text
    assert "90 test images show that its MAE on images like these is between 0.800 and 1.10 (95 % interval)." in text
    assert "MAE: ● test — its 95 % interval | cross-validation" in text
    assert "What does MAE cost?" in text
    assert " classes" not in text


# Names


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["cat", "a very very long class name indeed"], ["cat", "a very v…indeed"]),
        ([LONG[7], LONG[31]], ["…07", "…31"]),
        (
            [f"photograph of a {thing} on a plain background" for thing in ("blue circle", "dark red rectangle")],
            ["…blue circle…", "…dark re…tangle…"],
        ),
        (
            [f"{'abcdefgh' * 3}{sign}{'abcdefgh' * 3}" for sign in "xy"] + ["zz"],
            ["abcdefgh…bcdefgh", "abcdefgh…bcdefgh (2)", "zz"],
        ),
    ],
)
def test_long_names_keep_what_tells_them_apart(names, short):
    assert shorten_all(names, 16) == short


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text("ab -", min_size=1, max_size=14), unique=True, max_size=8), st.integers(4, 10))
def test_different_names_stay_different(names, length):
    assert len(set(shorten_all(names, length))) == len(names)


def test_rows_on_different_embeddings_have_different_labels():
    rows = [row("ridge", 0.9, embedding=f"regnet_small-bundled-{layer}") for layer in ("block_1-grid", "block_2-grid")]
    svg = to_svg(partial(score_chart, rows=rows, group=(), scoring="accuracy"), "leaderboard")
    assert ">…1…</text>" in svg
    assert ">…2…</text>" in svg


# Classes


def confused() -> np.ndarray:
    """Sixty classes of five images; class 2k is taken for 2k + 1 by k mod 6 of its images."""
    matrix = np.diag(np.full(60, 5))
    for place in range(0, 60, 2):
        wrong = place // 2 % 6
        matrix[place, place] -= wrong
        matrix[place, place + 1] += wrong
    return matrix


def test_of_many_classes_the_most_confused_are_drawn_and_the_rest_is_said():
    matrix = confused()
    mistakes = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
    svg = to_svg(partial(confusion_chart, matrix=matrix, classes=LONG), "confusion")
    kept = [int(place) for place in re.findall(r">…(\d\d)</text>", svg)]
    assert len(kept) == 2 * 25
    assert kept[:25] == kept[25:] == sorted(kept[:25])
    assert min(mistakes[kept]) >= max(np.delete(mistakes, kept))
    assert f"{LONG[kept[0]]} taken for" in svg
    assert ">true class: the 25 of 60 with most mistakes</text>" in svg
    assert ">true class</text>" in to_svg(
        partial(confusion_chart, matrix=matrix[:25, :25], classes=LONG[:25]), "confusion"
    )


def test_the_largest_confusions_are_a_table():
    matrix = np.array([[5, 3, 0], [1, 7, 4], [0, 3, 0]])
    found = largest(matrix, ("a", "b", "c"))
    assert [(pair.true, pair.said, pair.count) for pair in found] == [
        ("b", "c", 4),
        ("a", "b", 3),
        ("c", "b", 3),
        ("b", "a", 1),
    ]
    assert [round(pair.share, 3) for pair in found] == [0.333, 0.375, 1.0, 0.083]
    assert largest(np.diag([1, 2]), ("a", "b")) == []
    svg = to_svg(partial(confusion_chart, matrix=confused(), classes=LONG), "confusion")
    assert re.findall(r">(\d)</text>", svg).count("5") > 10


def class_by_class(truth, guess, classes) -> str:
    said = Predictions.of(truth, guess, classes, paths=np.arange(len(truth)).astype(str))
    found = material([row("ridge", 0.9)], predictions=HeadPredictions(said))
    return section("classes", found)


def test_of_many_classes_the_worst_come_first_and_all_are_on_the_page():
    matrix, classes = confused(), (*LONG, "never seen")
    truth = np.repeat(LONG, matrix.sum(axis=1))
    guess = np.concatenate([np.repeat(LONG, counts) for counts in matrix])
    found = metrics.per_class(Predictions.of(truth, guess, classes))
    first, rest = class_by_class(truth, guess, classes).split("<details>")
    worst = Table(first.partition("lowest F1 first")[2]).rows[1:]
    assert "The 15 worst of 61 classes, lowest F1 first" in first
    assert [line[0] for line in worst] == [item.label for item in sorted(found[:60], key=lambda item: item.f1)[:15]]
    assert [line[0] for line in Table(rest).rows[1:]] == [*LONG, "never seen"]
    assert Table(rest).rows[-1] == ["never seen", "0", "–", "–", "–"]
    known = np.isin(truth, LONG[:25])
    few = class_by_class(truth[known], guess[known], LONG[:25])
    assert "<details>" not in few
    assert [line[0] for line in Table(few.partition("<h3>")[2]).rows if len(line) == 5][1:] == list(LONG[:25])


# Rows that a chart leaves out


def test_the_cost_chart_says_which_rows_it_leaves_out_and_why():
    rows = [row(f"head{place}", 0.9, correct=90 - place, embed_seconds=0.01) for place in range(4)]
    rows += [row("hopeless", 0.1, correct=5, embed_seconds=0.01), row("untimed", 0.8), row("untested", 0.7, test=None)]
    assert [item.head for item in priced(rows)] == ["head0", "head1", "head2", "head3"]
    assert cost(rows).endswith(
        "Not drawn: 3 of 7 rows, without a test score or a time per image, or with a very low score."
    )
    assert "Not drawn" not in cost(rows[:4])


def cost(rows) -> str:
    return words(section("cost", material(rows)))


@pytest.mark.parametrize(("count", "said"), [(10, False), (12, True)])
def test_the_tuning_chart_says_how_many_searches_it_leaves_out(count: int, said: bool):
    rows = [row("ridge", 0.9 - 0.01 * place, embedding=f"net{place:02d}") for place in range(count)]
    found = material(rows, {item.key: trials() for item in rows})
    text = section("tuning", found)
    assert set(re.findall(r">(net\d+)/ridge<", text)) == {f"net{place:02d}" for place in range(10)}
    sentence = f"The chart shows the 10 best of {count} searches, one for each colour; the table has all."
    assert (sentence in text) == said
    assert len(Table(text).rows) == count + 1


@pytest.mark.parametrize(("count", "said"), [(30, False), (41, True)])
def test_a_leaderboard_too_long_to_draw_says_so(count: int, said: bool):
    rows = [row(f"head{place}", 0.9 - place / 100) for place in range(count)]
    text = words(section("difference", material(rows)))
    assert ("The charts show the 30 best of 41 rows; the tables have all." in text) == said


# Tables


def test_every_row_of_the_tuning_table_is_named_by_head_and_embedding():
    names = ("resnet18-penultimate", "hog", "pixels")
    rows = [row("logistic_regression", 0.9, embedding=name) for name in names]
    found = Table(section("tuning", material(rows, {item.key: trials() for item in rows})))
    assert [line[0] for line in found.rows[1:]] == [
        f"logistic_regression {name} C = 0.5, k = 3" for name in sorted(names)
    ]


def test_the_score_and_its_interval_are_words_and_come_before_all_but_the_name():
    found = material([row("ridge", 0.9, nested=Nested((0.9, 0.8), (0.7, 0.9)))])
    low, high = metrics.wilson(90, 100)
    header, line = Table(section("leaderboard", found)).rows
    assert header[:4] == ["Head and embedding", "Cross-validation,\xa0%", "Test accuracy,\xa0% [95\xa0%]", "Nested"]
    assert line[0] == "ridge best resnet18-penultimate"
    assert line[1:3] == ["90.0 ± 1.0", f"90.0 [{100 * low:.1f}, {100 * high:.1f}]"]


def test_log_loss_is_never_a_percentage():
    rows = [dataclasses.replace(row("ridge", -0.351), cv_std=0.02)]
    found = material(rows, {rows[0].key: trials()}, {"scoring": "log_loss"})
    header, line = Table(section("tuning", found)).rows
    assert (header[1], line[1]) == ("Best cross-validation, log\xa0loss", "0.351")
    assert "cross-validation log loss 0.351" in section("difference", found)


def test_a_screen_reader_is_told_what_a_cell_belongs_to():
    text = section("leaderboard", material([row("ridge", 0.9)]))
    assert 'role="region" aria-label="Leaderboard" tabindex="0"' in text
    assert text.count('scope="col"') == 8
    assert text.count('scope="row"') == 1
    svg = to_svg(lambda palette: figure(palette, "Test accuracy & more")[0], "leaderboard")
    assert 'role="group" aria-label="Test accuracy &amp; more"' in svg


def test_a_drawing_is_rounded_and_its_tooltips_are_not():
    svg = to_svg(partial(score_chart, rows=[row("ridge", -0.12345)], group=(), scoring="log_loss"), "leaderboard")
    assert "cross-validation log loss 0.123" in svg
    numbers = " ".join(re.findall(r'\b(?:d|x|y|transform)="([^"]*)"', svg))
    assert re.search(r"\.\d\d\b", numbers)
    assert not re.search(r"\.\d{3}", numbers)
    assert "font-family" not in svg
