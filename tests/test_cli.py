"""The command line: exit codes, one line per mistake, and no traceback but for bugs of ours."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str, before: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = (
        f"{before}\nimport sys\nsys.argv = ['manyheads', *{list(arguments)!r}]\nfrom pipeline.cli import main\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False, timeout=600
    )


def test_a_mistake_in_the_config_is_told_in_a_line_each_with_exit_code_2(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "output: x\nbackbones: [{name: resnet18, wights: random}]\nheads: [{nam: knn}]\n", encoding="utf-8"
    )
    done = run("heads", str(config))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {config}: 3 problems",
        "  backbones.0.wights: unknown key, did you mean 'weights'?; allowed: name, weights, layers, pooling, arguments, preprocessing",
        "  heads.0.name: missing, expected a value",
        "  heads.0.nam: unknown key, did you mean 'name'?; allowed: name, space, class_weight",
    ]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run(
        "features", "configs/folder.yaml", "--set", f"dataset.path={tmp_path}/none", "--set", f"output={tmp_path}/o"
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {tmp_path}/none")


@pytest.mark.parametrize("arguments", [("nonsense",), ("heads", "--nonsense"), ("predict",)])
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_cannot_show_a_class_name_is_no_traceback(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import cli
    from pipeline.stages import check

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    monkeypatch.setattr(sys, "argv", ["manyheads", "check", str(ROOT / "configs/digits.yaml")])
    monkeypatch.setattr(check, "run", lambda config: ["  猫: 10 train"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert written.getvalue().decode("utf-8") in {"  \\u732b: 10 train\n", "  猫: 10 train\n"}


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    bug = "import pipeline.stages.check\ndef broken(config): raise RuntimeError('a bug')\npipeline.stages.check.run = broken"
    done = run("check", before=bug)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: a bug\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_exit_code_and_one_line(number: signal.Signals, code: int) -> None:
    stop = f"import os, pipeline.stages.check\npipeline.stages.check.run = lambda config: os.kill(os.getpid(), {int(number)}) or [1]"
    # A job in the background is started with SIGINT ignored, and so would these tests be.
    listen = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    done = run("check", before=listen + stop)
    assert done.returncode == code
    assert done.stderr.lstrip() == (
        "error: stopped; what was finished is kept, and features, heads and finetune go on from there\n"
    )


def test_a_check_that_finds_something_is_exit_code_1() -> None:
    found = (
        "import pipeline.stages.maintenance as m\n"
        "class Check:\n"
        "    ok = False\n"
        "    def lines(self): return ['one: DAMAGED']\n"
        "m.verify = lambda config, full, sample: [Check()]"
    )
    done = run("verify", before=found)
    assert (done.returncode, done.stdout) == (1, "one: DAMAGED\n")


def test_a_folder_that_refuses_is_one_line_with_exit_code_2() -> None:
    refuse = (
        "import errno, os, pipeline.stages.check\n"
        "def refused(config): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'out/report.html')\n"
        "pipeline.stages.check.run = refused"
    )
    done = run("check", before=refuse)
    assert done.returncode == 2
    assert done.stderr == (
        "error: out/report.html: cannot be used (No space left on device); free some space there, or write to another place\n"
    )


def test_a_file_of_ours_that_is_missing_is_a_bug_and_keeps_its_traceback() -> None:
    done = run(
        "check", before="import pipeline.stages.check\npipeline.stages.check.run = lambda config: open('nowhere')"
    )
    assert done.returncode == 1
    assert done.stderr.endswith("FileNotFoundError: [Errno 2] No such file or directory: 'nowhere'\n")


def test_finetune_asks_for_the_place_of_its_copy_before_it_trains(tmp_path: Path) -> None:
    trained = f"import pipeline.stages.finetune\npipeline.stages.finetune.run = lambda config: open({str(tmp_path / 'trained')!r}, 'w')"
    (tmp_path / "file").write_text("")
    done = run("finetune", "--output", str(tmp_path / "file" / "w.safetensors"), before=trained)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/file: cannot be used (Not a directory)")
    assert not (tmp_path / "trained").exists()


def test_a_command_that_left_the_package_says_where_it_is() -> None:
    assert "pretrain" not in run("--help").stdout
    done = run("pretrain", "configs/pretraining/bundled.yaml", "--set", "seed=1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "Error: pretrain is a script of the source repository now: "
        "python configs/pretraining/pretrain.py configs/pretraining/bundled.yaml"
    )
