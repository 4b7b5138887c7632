"""The README cannot rot: every command in it is run, every target and option it names exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from photos import make_photos

from pipeline.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

BUNDLED = "backbones=[{name: regnet_small, weights: bundled}]"
SMALL = {
    "check": (BUNDLED,),
    "features": (BUNDLED,),
    "heads": (BUNDLED, "tuning.trials=2", "tuning.folds=3", "heads=[logistic_regression]"),
    "finetune": (
        BUNDLED,
        "finetune.training.steps=4",
        "finetune.training.batch_size=8",
        "finetune.validation_fraction=0.4",
    ),
}
"""What replaces a download, and minutes, in the README's commands."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]


def test_the_readme_has_commands() -> None:
    assert sum(line.startswith("manyheads ") for line in commands()) >= 5
    assert {"make heads", "make test"} <= set(commands())


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_every_make_target_exists(line: str) -> None:
    subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def shortened(arguments: list[str]) -> list[str]:
    """A README command on 36 small photos instead of the reader's own or the digits, and without a download."""
    if "configs/digits.yaml" in arguments:
        arguments = [*arguments, "--set", "dataset={source: folder, path: photos}", "--set", "output=artifacts/digits"]
    given = {arguments[place + 1].partition("=")[0] for place, word in enumerate(arguments) if word == "--set"}
    for change in SMALL.get(arguments[0], ()):
        if change.partition("=")[0] not in given:
            arguments = [*arguments, "--set", change]
    return ["photos" if word == "artifacts/digits/images" else word for word in arguments]


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty folder with the reader's photos, our configs, and the example head beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYHEADS_NO_MALLOPT", "1")  # a process of many tests is no command
    make_photos(tmp_path / "photos")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (module,) = [block for block in blocks("python") if block.startswith("# my_heads.py")]
    (tmp_path / "configs" / "my_heads.py").write_text(module, encoding="utf-8")
    for line in commands():
        if line.startswith("manyheads "):
            done = CliRunner().invoke(cli, shortened(shlex.split(line)[1:]), catch_exceptions=False)
            assert done.exit_code == 0, f"{line}\n{done.output}"
    for name in ("labels.csv", "digits.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8").count("\n") == 37


def leaves(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that is shown, with its full name."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from leaves(command, f"{above}{name} ")
        elif not command.hidden:
            yield f"{above}{name}", command


@pytest.mark.parametrize(("name", "command"), leaves(cli), ids=dict(leaves(cli)))
def test_every_command_has_help_with_an_example_that_parses(name: str, command: click.Command) -> None:
    assert command.help
    (example,) = re.findall(r"Example: manyheads (.*)", command.help)
    assert example.startswith(f"{name} ")
    command.make_context(name, shlex.split(example.removeprefix(name)), resilient_parsing=False)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`manyheads ([a-z]+)", README))))
def test_every_command_the_readme_mentions_exists(name: str) -> None:
    assert isinstance(cli.commands.get(name), click.Command)


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys; sys.argv = ['manyheads', '--help']\n"
        "from pipeline.cli import cli\n"
        "cli(standalone_mode=False)\n"
        "print([name for name in ('torch', 'sklearn', 'numpy', 'h5py') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_readme_names_no_file_that_is_not_there() -> None:
    for name in re.findall(r"`(configs/[a-z0-9_/]+\.yaml)`", README):
        assert (ROOT / name).is_file()
