"""The files of an experiment: what is changed is told, what release 0.1 wrote is read, and nothing waits or bursts."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline import config as configuration
from pipeline import experiment
from pipeline.data import DatasetIndex
from pipeline.errors import HeadError, PipelineError
from pipeline.evaluation.leaderboard import read_leaderboard, read_predictions, read_trials
from pipeline.experiment import FEATURES, TRIALS, Artifacts
from pipeline.heads.tuning.journal import Journal
from pipeline.stages import maintenance

GOLDEN = Path(__file__).parent / "golden" / "experiment-0.1.tar.xz"
CONTENT = {"index": "ab", "embeddings": [{"name": "käse", "digest": "12", "rate": 0.25}], "none": None}


def test_a_document_gives_back_what_was_written_and_names_its_maker(tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    experiment.write_document(path, FEATURES, {**CONTENT, "nan": np.float64("nan"), "rows": np.arange(2)})
    found = experiment.read_document(path, FEATURES)
    assert found.pop("made_by") == experiment.made_by()
    assert len(found.pop("digest")) == 64
    whole = {"format": "manyheads features", "version": 3, **CONTENT, "nan": None, "rows": [0, 1]}
    assert found == whole


def test_no_changed_character_and_no_cut_line_of_a_document_is_taken_for_what_was_written(tmp_path: Path) -> None:
    text = experiment.to_document(FEATURES, CONTENT)
    path = tmp_path / "features.json"
    same = experiment.parse_document(text, FEATURES, path)
    lines = text.splitlines(keepends=True)
    changed = [text[:place] + "7" + text[place + 1 :] for place in range(len(text))]
    changed += ["".join(lines[:cut] + lines[cut + 1 :]) for cut in range(len(lines))]
    refused = []
    for other in changed:
        try:
            assert experiment.parse_document(other, FEATURES, path) == same  # a space between two values, say
        except PipelineError as error:
            refused.append(str(error))
    assert len(refused) > 0.7 * len(changed)
    assert all(text.startswith(f"{path}: is damaged: ") for text in refused)
    assert all(text.endswith("; run `manyheads features` again") for text in refused)


def test_a_document_of_another_kind_or_version_is_refused(tmp_path: Path) -> None:
    text = experiment.to_document(experiment.LEADERBOARD, {})
    with pytest.raises(
        PipelineError, match="is 'manyheads leaderboard' version 1, expected 'manyheads features' version 3"
    ):
        experiment.parse_document(text, FEATURES, tmp_path)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("[1]", "it holds a list, expected an object"),
        ("[" * 100_000, "it cannot be read as JSON"),
        ('{"made_by": "x", "digest": "y", "a": 1e999}', "it cannot be read as JSON"),
        ('{"a": ' + "9" * 5000 + "}", "it cannot be read as JSON"),
        (b"\xff\xfe\x00", "it cannot be read as JSON"),
        ("", "it cannot be read as JSON"),
    ],
)
def test_malformed_documents_are_one_line(data: str | bytes, found: str) -> None:
    with pytest.raises(PipelineError) as caught:
        experiment.parse_document(data, FEATURES, Path("features.json"))
    assert str(caught.value).startswith(f"features.json: is damaged: {found}")
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said_of_the_folder_too(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        experiment.read_document(tmp_path / "nowhere" / "features.json", FEATURES)
    assert str(caught.value).endswith(f"first (there is no folder {tmp_path}/nowhere)")
    with pytest.raises(PipelineError, match=r"features\.json: missing; run `manyheads features` first$"):
        experiment.read_document(tmp_path / "features.json", FEATURES)


def test_a_pipe_in_place_of_a_document_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "features.json")
    with pytest.raises(PipelineError) as caught:
        experiment.read_document(tmp_path / "features.json", FEATURES)
    assert str(caught.value) == (
        f"{tmp_path}/features.json: cannot be read (It is not an ordinary file); run `manyheads features` again"
    )


RECORDS = [
    {"format": "manyheads trials", "version": 1, "made_by": "x"},
    *({"event": "trial", "number": n} for n in range(4)),
]


def test_no_changed_character_and_no_cut_line_of_a_journal_is_taken_for_what_was_written() -> None:
    data, _ = experiment.to_lines(RECORDS, "")
    assert list(experiment.parse_lines(data).records) == RECORDS
    lines = data.splitlines(keepends=True)
    changed = [data[:place] + b"7" + data[place + 1 :] for place in range(len(data)) if data[place] != ord("7")]
    changed += [b"".join(lines[:cut] + lines[cut + 1 :]) for cut in range(len(lines))]
    for other in changed:
        found = experiment.parse_lines(other)
        assert list(found.records) == RECORDS[: len(found.records)]
        # What is left out is damage, unless it can be the last line, torn by a kill.
        assert found.damaged or len(found.records) == len(RECORDS) - 1


def test_lines_are_chained_from_one_run_to_the_next(tmp_path: Path) -> None:
    identity = {"seed": 0}
    for number in range(3):
        journal = Journal.open(tmp_path / "trials.jsonl", identity)
        assert [event["number"] for event in journal.events] == list(range(number))
        journal.append([{"event": "trial", "number": number}])
        journal.close()
    lines = experiment.read_lines(tmp_path / "trials.jsonl", TRIALS).records
    assert [line.get("number") for line in lines] == [None, 0, 1, 2]


def test_a_damaged_journal_is_kept_aside_and_the_search_goes_on_from_the_lines_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trials.jsonl"
    journal = Journal.open(path, {"seed": 0})
    journal.append([{"event": "fit", "score": score} for score in (0.5, 0.6, 0.7)])
    journal.close()
    damaged = path.read_bytes().replace(b'"score":0.6', b'"score":0.9')
    path.write_bytes(damaged)
    with pytest.raises(HeadError, match=r"trials.jsonl: is damaged: line 3 is not the one that was written; delete it"):
        experiment.read_lines(path, TRIALS)
    journal = Journal.open(path, {"seed": 0})
    assert [event["score"] for event in journal.events] == [0.5]
    assert "line 3 is damaged; the search resumes from the 2 lines before it" in caplog.text
    journal.append([{"event": "fit", "score": 0.6}])
    journal.close()
    assert (tmp_path / "trials.jsonl.damaged").read_bytes() == damaged
    assert [line.get("score") for line in experiment.read_lines(path, TRIALS).records] == [None, 0.5, 0.6]


def test_a_journal_is_never_opened_through_a_link_and_a_strangers_file_never_cut(tmp_path: Path) -> None:
    diary = tmp_path / "diary.txt"
    diary.write_text("not yours")
    path = tmp_path / "trials.jsonl"
    path.symlink_to(diary)
    with pytest.raises(HeadError, match=r"trials.jsonl: the trials cannot be written to it \(Too many levels"):
        Journal.open(path, {"seed": 0})
    assert diary.read_text() == "not yours"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(HeadError, match="It is not an ordinary file"):
        Journal.open(path, {"seed": 0})
    path.unlink()
    path.write_text("not yours\neither\n")
    Journal.open(path, {"seed": 0}).close()
    assert (tmp_path / "trials.jsonl.damaged").read_text() == "not yours\neither\n"


def test_an_archive_that_inflates_beyond_reason_is_refused() -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        for _ in range(8):
            member.write(bytes(10 << 20))
    with pytest.raises(ValueError, match=r"bytes that would inflate to 83,886,080$"):
        experiment.parse_arrays(sink.getvalue())


def test_a_file_with_its_digest_tells_each_flipped_bit_of_its_content() -> None:
    data = experiment.with_digest(b"weights")
    assert experiment.without_digest(data) == b"weights"
    assert experiment.without_digest(b"of release 0.1") == b"of release 0.1"
    for place in range(7):
        with pytest.raises(ValueError, match="its digest is not that of its content"):
            experiment.without_digest(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@pytest.mark.parametrize("text", ["=1+1", "+a", "-2+3", "@A1", "\tx", "'x", "''", "plain", "-1", "+1.5e-3", "", "5"])
def test_a_cell_is_harmless_and_reads_back(text: str) -> None:
    cell = experiment.to_cell(text)
    assert experiment.from_cell(cell) == text
    assert cell[:1] not in ("=", "@", "\t")
    assert cell[:1] not in ("+", "-") or float(cell) != 0


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment that release 0.1 left, in a folder of its own with its photos."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_an_experiment_of_release_0_1_opens(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden)
    files = Artifacts("output")
    assert "digest" not in json.loads(files.features.read_text(encoding="utf-8"))
    config = configuration.parse(configuration.read_yaml(files.config), "0.1")  # its paths are of the working folder
    X, y, paths, groups = pipeline.load("output", embedding="pixels")
    assert (X.shape, len(y), paths[0], groups) == ((18, 768), 18, "leaf/00.png", None)
    assert len(DatasetIndex.read(files.dataset)) == 18
    board = read_leaderboard(files.root)
    assert len(board.rows) == 4
    assert (
        set(read_predictions(board, files.root))
        == set(read_trials(board, files.root))
        == {row.key for row in board.rows}
    )
    assert all(check.ok for check in maintenance.verify(config, full=True))
    assert maintenance.verify_files(config) == (True, ["other files: ok; 22 documents, journals and files of weights"])
