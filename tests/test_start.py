"""From photos to a leaderboard in one line, in a terminal and in Python; a leaderboard made again; a budget for the search."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from photos import make_photos

import manyheads
from pipeline import cli
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import BUDGET, LEADERBOARD, Artifacts, read_document, write_document
from pipeline.stages import fit, settings, similar, train_heads
from pipeline.stages.train_heads import Pass, next_trials

SMALL: dict[str, Any] = {
    "backbones": [{"name": "squeezenet1_1", "preprocessing": {"resize": 32, "crop": 32}}],
    "baselines": ["majority", "pixels"],
    "heads": ["ridge", "nearest_centroid"],
    "tuning": {"trials": 2, "folds": 3},
}
"""What makes a run one of seconds."""


# ---- commands are functions, by the same words


def test_heads_asks_for_what_to_work_on() -> None:
    with pytest.raises(ConfigError, match="heads: give the path of a config, of an output folder or of images"):
        manyheads.heads()


@pytest.mark.parametrize("command", [*cli.COMMANDS, *cli.STORE], ids=lambda command: command.name)
def test_a_command_is_told_where_its_function_is(command: click.Command) -> None:
    store = command in cli.STORE
    function = inspect.signature(getattr(manyheads.store if store else manyheads, str(command.name))).parameters
    for place, each in enumerate(each for each in command.params if each.name != "overrides"):
        taken = function[str(each.name)]
        if isinstance(each, click.Option):
            assert (each.help or "").endswith("."), each.name
            unset = () if each.multiple else False if each.is_flag else None
            assert taken.default in (each.default, unset)
        else:  # an option that no line of the docstring tells of would be one
            assert taken.default is taken.empty or place == 0, f"{each.name} has no line in the docstring"


def test_the_help_lists_the_commands_as_one_comes_to_need_them() -> None:
    said = CliRunner().invoke(cli.cli, ["--help"]).output.partition("Commands:")[2]
    shown = re.findall(r"^  (\w+) ", said, re.MULTILINE)
    assert shown == [str(command.name) for command in cli.COMMANDS] + ["store"]
    assert shown[:5] == ["fit", "check", "features", "embed", "heads"]


def test_the_words_of_a_command_reach_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(similar, "run", lambda images, place, **options: given.update(options, place=place) or [])
    said = CliRunner().invoke(
        cli.cli, ["similar", "a.jpg", "b", "--in", "there", "--count", "3", "-o", "o.csv", "--trust"]
    )
    assert said.exit_code == 0, said.output
    expected = {"place": Path("there"), "count": 3, "output": Path("o.csv"), "trust": True, "embedding": None}
    assert given == expected
    for wrong in (["--count", "0"], ["--engine", "ray"], []):
        assert CliRunner().invoke(cli.cli, ["similar", *wrong]).exit_code == 2


def test_the_module_shows_what_it_has() -> None:
    assert " ".join(dir(manyheads)).startswith(
        "Classifier Config Embedder PipelineError Regressor Run advise backbones best_estimator check "
    )
    assert {name for name in dir(manyheads) if not hasattr(manyheads, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'featurs'"):
        _ = manyheads.featurs


def test_what_is_said_besides_changes_keys_and_not_sections(experiment: Config) -> None:
    changed = settings.load(experiment, {"tuning": {"trials": 5}, "dataset__max_pixels": 7, "output": Path("there")})
    assert (changed.tuning.trials, changed.tuning.folds, changed.dataset.max_pixels, changed.output) == (
        5,
        3,
        7,
        "there",
    )
    assert changed.dataset.path == experiment.dataset.path
    assert settings.load(experiment) is experiment
    found = settings.load(experiment.output)
    assert (found.dataset, found.output) == (experiment.dataset, experiment.output)
    with pytest.raises(ConfigError, match="unknown key, did you mean 'trials'"):
        settings.load(experiment, {"tuning__trails": 5})


# ---- one line


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("start") / "photos", per_class=9)


@pytest.fixture(scope="module")
def run(photos: Path) -> Any:
    return manyheads.fit(photos, output=photos.parent / "output", **SMALL)


def test_one_line_gives_a_table_a_page_and_predictions(run: Any, photos: Path) -> None:
    board = read_leaderboard(run.output)
    table = run.leaderboard
    assert table["head"].tolist() == [row.head for row in board.rows]
    assert table["cv_accuracy"].tolist() == [row.cv_mean for row in board.rows]
    assert table["best"].tolist() == [True] + [False] * (len(board.rows) - 1)
    assert table.loc[table["recommended"], "head"].tolist() == [board.row(board.recommendation.recommended).head]  # type: ignore[union-attr]
    said = run.predict(
        [photos / "leaf", photos / "土" / "00.png"], top=2, trust=True, output=str(photos.parent / "said.csv")
    )
    assert said.columns.tolist() == ["path", "status", "label", "probability", "label_2", "probability_2"]
    assert said["label"].tolist() == ["leaf"] * 9 + ["土"]
    assert said["probability"].between(0.34, 1).all()
    assert run.best_estimator_.predict([photos / "leaf" / "00.png"]).tolist() == ["leaf"]
    assert run.report() == run.output / "report.html"
    assert repr(run).startswith(f"Run('{run.output}': 4 rows, best {board.best.key})")
    assert repr(manyheads.Run(run.output)) == repr(run)


def test_a_second_run_does_nothing_twice(run: Any, photos: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in sorted(run.output.rglob("*.skops"))}
    page = run.report().stat().st_mtime_ns
    assert manyheads.fit(photos, output=run.output, **SMALL) == run
    assert {path: path.stat().st_mtime_ns for path in sorted(run.output.rglob("*.skops"))} == files
    assert run.report().stat().st_mtime_ns == page


def test_in_a_terminal_it_looks_tunes_and_says_what_next(
    run: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    found = CliRunner().invoke(cli.cli, ["fit", str(run.output), "--open"], standalone_mode=False)
    assert found.exit_code == 0, found.exception
    lines = found.stdout.splitlines()
    assert lines[:3] == [
        "2 heads: ridge, nearest_centroid",
        "1 backbone: squeezenet1_1 (random)",
        "27 images in 3 classes: 21 train, 6 test",
    ]
    assert "4 of 4 rows were finished before and kept." in lines
    assert sum("report.html" in line for line in lines) == sum("manyheads predict" in line for line in lines) == 1
    assert lines[-8:-6] == [
        "What next",
        f"  look          {run.output / 'report.html'} {lines[-7].partition('.html ')[2]}",
    ]
    assert lines[-6] == f"  label photos  manyheads predict {run.output} PHOTOS --output labels.csv"
    assert shown == [(run.output / "report.html").as_uri()]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["heds"],
            ["heds: there is no such command, file or folder, did you mean 'heads'?; expected a command (fit, "],
        ),
        (["phots"], ["did you mean 'photos'?"]),
        (["empty"], ["empty: holds no class folders"]),
        (["photos/leaf"], ["photos/leaf: holds no class folders (9 images at its top)"]),
        (
            ["fit", "nowhere"],
            ["nowhere: there is no such file or folder", "one folder per class"],
        ),
        (["photos", "--target", "price"], ["--target price: names a column of a manifest"]),
        (["photos", "--budget", "soon"], ["tuning.budget: expected a time above 0 such as '90s'", "got 'soon'"]),
        (["photos/leaf/00.png"], ["is not a config, which is YAML with keys"]),
    ],
)
def test_what_cannot_be_is_told_at_once(
    given: list[str], told: list[str], photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos.parent / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr(sys, "argv", ["manyheads", *given])
    monkeypatch.setattr(cli, "_log_to_stderr", lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(said.splitlines()) <= 2
    for text in told:
        assert text in said
    assert not (photos.parent / "artifacts").exists() or given[0] == "empty"


def test_options_and_images_come_before_or_after_one_another(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    monkeypatch.chdir(photos.parent)
    assert cli.full(["photos", "--open"]) == ["fit", "photos", "--open"]
    assert cli.full(["--open", "photos"]) == ["fit", "--open", "photos"]
    assert cli.full(["heads", "photos"]) == ["heads", "photos"]
    assert cli.full([]) == []
    assert cli.full(["--version"]) == ["--version"]


def test_the_column_of_a_manifest_is_the_target(photos: Path) -> None:
    rows = [f"photos/{label}/{number:02d}.png,{label}" for label in ("leaf", "土") for number in range(9)]
    manifest = photos.parent / "kinds.csv"
    manifest.write_text("\n".join(["path,kind", *rows]), encoding="utf-8")
    made = fit.settings_of(manifest, SMALL, ["kind"], "10m")
    assert (made.output, made.tuning.budget_seconds) == ("artifacts/kinds", 600)
    assert manyheads.check(made)[2].startswith("18 images in 2 classes: ")
    with pytest.raises(
        manyheads.PipelineError, match=r"no column 'label'.*\n.*path, kind; --target COLUMN says which column"
    ):
        manyheads.fit(manifest, output=photos.parent / "kinds", **SMALL)


# ---- the heads there are


def test_the_heads_are_listed_without_a_config() -> None:
    said = CliRunner().invoke(cli.cli, ["heads", "--list"])
    assert said.exit_code == 0
    assert said.output.splitlines() == manyheads.heads(list=True)
    (knn, *_) = [line.split() for line in said.output.splitlines() if line.startswith("knn ")]
    assert " ".join(knn) == "knn yes yes n_neighbors 1 to 64 (log), weights uniform/distance, metric euclidean/cosine"
    assert [line for line in said.output.splitlines() if line.startswith("==")] == [
        "== classification ==",
        "== multilabel ==",
        "== regression ==",
    ]


# ---- a leaderboard made again


@pytest.fixture
def copied(experiment: Config, tmp_path: Path) -> Config:
    output = Path(shutil.copytree(experiment.output, tmp_path / "output"))
    stores = str(Artifacts(experiment.output).stores)
    return experiment.model_copy(update={"output": str(output), "store": stores})


def without_stores(said: str) -> list[str]:
    """Lines, but for those on the stores, to which other tests of this process add images."""
    return [line for line in said.splitlines() if not line.startswith("  made with stores: ")]


def test_an_unchanged_experiment_gives_every_number_again(experiment: Config) -> None:
    before = {path: path.read_bytes() for path in Path(experiment.output).rglob("*") if path.is_file()}
    said = CliRunner().invoke(cli.cli, ["replay", experiment.output], standalone_mode=False)
    assert said.return_value == 0
    (line,) = without_stores(said.stdout)
    told = re.fullmatch(r"(.*): reproduced, all (\d+) numbers equal", line)
    assert told is not None
    assert told[1] == experiment.output
    assert int(told[2]) > 100
    assert {path: path.read_bytes() for path in Path(experiment.output).rglob("*") if path.is_file()} == before


def test_a_number_that_is_not_what_the_features_give_is_named(copied: Config) -> None:
    path = Artifacts(copied.output).leaderboard
    document = read_document(path, LEADERBOARD)
    row = document["rows"][-1]
    name, was = f"{row['embedding']}/{row['head']}", row["test"]["accuracy"]
    row["test"]["accuracy"] = was + 0.125
    row["fit_seconds"] = 1000.0
    document["provenance"] |= {"seed": 7, "machine": "an abacus"}
    document["provenance"]["versions"]["numpy"] = "1.0"
    write_document(path, LEADERBOARD, {key: value for key, value in document.items() if key != "digest"})
    said = CliRunner().invoke(cli.cli, ["replay", copied.output], standalone_mode=False)
    assert said.return_value == 1
    first, *lines = without_stores(said.stdout)
    assert first.startswith(f"{copied.output}: 1 difference, ")
    assert lines[0] == f"  {name}: test.accuracy: was {was + 0.125}, is {was}"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "  made with seed 7",
        "  made with versions: numpy 1.0",
        "  made with machine an abacus",
    ]


def test_rows_that_only_one_has_are_named(copied: Config) -> None:
    found = manyheads.replay(copied, heads=["logistic_regression"])[0]
    assert any(line.endswith("head: was nearest_centroid, is absent") for line in found.differences)


# ---- a budget


@pytest.mark.parametrize(
    ("passes", "limit", "expected"),
    [
        ([], 1, 1),
        ([Pass(1, 10, 4)], 1000, 16),  # there is time for all
        ([Pass(1, 10, 4)], 40, 6),  # 30 left, of which 6 are no trials, 4 for each
        ([Pass(1, 10, 4)], 23, None),  # one trial more is not worth it
        ([Pass(1, 10, 4)], 5, None),  # spent
        ([Pass(1, 10, 4), Pass(6, 12, 6)], 60, 16),  # six together were cheaper than one told
        ([Pass(1, 10, 4), Pass(16, 12, 6)], 1000, None),
    ],
)
def test_so_many_trials_are_next(passes: list[Pass], limit: float, expected: int | None) -> None:
    assert next_trials(passes, 16, limit) == expected


def test_a_budget_treats_every_row_alike_and_is_told(copied: Config) -> None:
    brief = settings.load(copied, {"tuning.budget": "0.001s"})
    cut = train_heads.run(brief)
    assert {row.trials for row in cut.leaderboard.rows} == {1}
    (note,) = [note for note in cut.leaderboard.notes() if "budget" in note]
    assert note.startswith("The budget of 0.001s cut the search: 1 of 3 trials for every row, in ")
    assert "no row can have less than one" in note
    assert cut.reused == 1, "the guess that looks at no image has one trial anyway"
    again = train_heads.run(brief)
    assert again.reused == len(again.leaderboard.rows)
    assert [row.cv_mean for row in again.leaderboard.rows] == [row.cv_mean for row in cut.leaderboard.rows]
    plain = train_heads.run(settings.load(copied, {"tuning.trials": 1}))
    assert plain.reused == len(plain.leaderboard.rows), "a config with so many trials is the same search"
    measured = read_document(cut.files.budget, BUDGET)
    write_document(cut.files.budget, BUDGET, {"key": measured["key"], "passes": [[1, 9, 9], [2, 9, 9]]})
    more = train_heads.run(brief).leaderboard
    assert {row.trials for row in more.rows if not row.constant} == {2}, "what was measured is not measured again"
    assert any("2 of 3 trials for every row, in 18 s." in note for note in more.notes())


def test_a_budget_with_time_for_all_changes_nothing(copied: Config, experiment: Config) -> None:
    found = train_heads.run(settings.load(copied, {"tuning.budget": "1h"})).leaderboard
    before = read_leaderboard(Path(experiment.output))
    assert [(row.key, row.cv_scores, row.trials) for row in found.rows] == [
        (row.key, row.cv_scores, row.trials) for row in before.rows
    ]
    assert not any("budget" in note for note in found.notes())
    assert np.isfinite([row.cv_mean for row in found.rows]).all()
