"""The command line: exit codes, one line per mistake, and no traceback but for bugs of ours."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from pipeline import cli
from pipeline.stages import check, finetune, maintenance

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Run the command line in this process, which is left as it was: its log, and what signals do."""
    logger = logging.getLogger("pipeline")
    kept = logger.handlers[:], logger.level, logger.propagate
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(ROOT)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["manyheads", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    yield call
    logger.handlers[:], logger.level, logger.propagate = kept
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise error

    return call


def test_a_mistake_in_the_config_is_told_in_a_line_each_with_exit_code_2(
    tmp_path: Path, run: Callable[..., Done]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("output: x\nbackbones: [{name: resnet18, wights: random}]\nheads: [knm]\n", encoding="utf-8")
    done = run("heads", str(config))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: {config}: 2 problems",
        "  backbones.0.wights: unknown key, did you mean 'weights'?; allowed: name, weights, layers, pooling, arguments, "
        "preprocessing, views",
        "  heads.0.name: unknown head 'knm', did you mean 'knn'?; allowed: prototypes, nearest_centroid, ridge, "
        "logistic_regression, lda, linear_svm, decision_tree, knn, cosine_knn, random_forest, rbf_svm, mlp, tabicl, or package.module:ATTRIBUTE",
    ]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, run: Callable[..., Done]) -> None:
    done = run(
        "features", "configs/folder.yaml", "--set", f"dataset.path={tmp_path}/none", "--set", f"output={tmp_path}/o"
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {tmp_path}/none")


@pytest.mark.parametrize("arguments", [("nonsense",), ("heads", "--nonsense"), ("predict",), ("store", "nonsense")])
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], run: Callable[..., Done]) -> None:
    assert run(*arguments).returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_cannot_show_a_class_name_is_no_traceback(
    encoding: str, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    monkeypatch.setattr(check, "run", lambda config: ["  猫: 10 train"])
    assert run("check").returncode == 0
    assert written.getvalue().decode("utf-8") in {"  \\u732b: 10 train\n", "  猫: 10 train\n"}


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "No such file or directory", "nowhere")]
)
def test_a_bug_of_ours_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]
) -> None:
    monkeypatch.setattr(check, "run", raising(error))
    with pytest.raises(type(error)) as caught:
        run("check")
    assert caught.value is error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_exit_code_and_one_line(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]
) -> None:
    # A job in the background is started with SIGINT ignored, and so would these tests be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(check, "run", lambda config: os.kill(os.getpid(), number) or ["not stopped"])
    done = run("check")
    assert done.returncode == code
    assert done.stderr.lstrip() == (
        "error: stopped; what was finished is kept, and features, heads and finetune go on from there\n"
    )


def test_a_check_that_finds_something_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]) -> None:
    found = SimpleNamespace(ok=False, lines=lambda: ["one: DAMAGED"])
    monkeypatch.setattr(maintenance, "verify", lambda config, full, sample: [found])
    assert run("store", "verify") == (1, "one: DAMAGED\n", "")
    old = "note: `manyheads verify` is `manyheads store verify` from now on\n"
    assert run("verify") == (1, "one: DAMAGED\n", old)


def test_the_commands_are_few() -> None:
    assert sum(not command.hidden for command in cli.cli.commands.values()) <= 22


def test_a_folder_that_refuses_is_one_line_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]
) -> None:
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/report.html")
    monkeypatch.setattr(check, "run", raising(refused))
    done = run("check")
    assert done.returncode == 2
    assert done.stderr == (
        "error: out/report.html: cannot be used (No space left on device); free some space there, or write to another place\n"
    )


def test_finetune_asks_for_the_place_of_its_copy_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Done]
) -> None:
    monkeypatch.setattr(finetune, "run", raising(AssertionError("it trained")))
    (tmp_path / "file").write_text("")
    done = run("finetune", "--output", str(tmp_path / "file" / "w.safetensors"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/file: cannot be used (Not a directory)")


def test_a_command_that_left_the_package_says_where_it_is(run: Callable[..., Done]) -> None:
    said = run("--help").stdout
    assert "pretrain" not in said
    assert "..." not in said.partition("Commands:")[2], "a summary is cut"
    done = run("pretrain", "configs/pretraining/bundled.yaml", "--set", "seed=1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "Error: pretrain is a script of the source repository now: "
        "python configs/pretraining/pretrain.py configs/pretraining/bundled.yaml"
    )


def test_a_process_ends_with_the_exit_code_and_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "store", "nonsense"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "Error: No such command 'nonsense'."
    assert "Traceback" not in done.stderr


def test_help_says_what_an_option_is_by_default(run: Callable[..., Done]) -> None:
    words = " ".join(run("fewshot", "--help").stdout.split())
    assert "[default: 15; x>=1]" in words
    assert "1, 2, 5, 10 and 20)." in words
    assert '""' not in run("shortlist", "--help").stdout
