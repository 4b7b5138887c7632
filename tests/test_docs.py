"""The README and the pages of docs cannot rot: commands are run, and every target, option, file and link they name exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from photos import make_photos

from pipeline.cli import COMMANDS, STORE, cli, full
from pipeline.config import DatasetConfig
from pipeline.data.manifest import list_manifest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


README = ROOT / "README.md"
RUN = [
    README,
    *(ROOT / "docs" / f"{name}.md" for name in ("photos", "looking", "fewshot", "finetuning", "adding-a-head")),
]
"""The pages whose commands are run, as a reader goes through them."""

SMALL = {
    "fit": ("tuning.trials=2", "tuning.folds=3", "heads=[logistic_regression]"),
    "heads": ("tuning.trials=2", "tuning.folds=3", "heads=[logistic_regression]"),
    "finetune": (
        "finetune.steps=4",
        "finetune.batch_size=8",
        "finetune.validation_fraction=0.4",
    ),
}
"""What replaces minutes in the pages' commands."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line and not line.startswith("#")]


def test_the_pages_have_commands() -> None:
    for page in RUN:
        assert any(line.startswith("manyheads ") for line in commands(page)), page.name
    assert {"make heads", "make test"} <= set(commands(README))


def test_the_readme_fits_two_screens() -> None:
    assert read(README).count("\n") <= 110


@pytest.mark.parametrize("line", sorted({line for page in RUN for line in commands(page) if line.startswith("make ")}))
def test_every_make_target_exists(line: str) -> None:
    subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def shortened(arguments: list[str]) -> list[str]:
    """A page's command on 36 small photos instead of the reader's own or the digits."""
    if "configs/digits.yaml" in arguments:
        arguments = [*arguments, "--set", "dataset={source: folder, path: photos}", "--set", "output=artifacts/digits"]
    given = {arguments[place + 1].partition("=")[0] for place, word in enumerate(arguments) if word == "--set"}
    for change in SMALL.get(arguments[0], ()):
        if change.partition("=")[0] not in given:
            arguments = [*arguments, "--set", change]
    return ["photos" if word == "artifacts/digits/images" else word for word in arguments]


def test_every_command_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty folder with the reader's photos, our configs, and the example head beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYHEADS_NO_MALLOPT", "1")  # a process of many tests is no command
    make_photos(tmp_path / "photos")
    make_photos(tmp_path / "new", per_class=3, seed=1)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (module,) = [block for page in RUN for block in blocks(page, "python") if block.startswith("# my_heads.py")]
    (tmp_path / "configs" / "my_heads.py").write_text(module, encoding="utf-8")
    done = set()
    for line in (line for page in RUN for line in commands(page) if line.startswith("manyheads ")):
        arguments = tuple(shortened(full(shlex.split(line)[1:])))
        if arguments not in done:
            result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
            assert result.exit_code == 0, f"{line}\n{result.output}"
        done.add(arguments)
    for code in blocks(README, "python"):
        exec(code.replace('"artifacts/photos")', '"artifacts/photos", tuning__trials=2, heads=["ridge"])'), {})
    for name in ("labels.csv", "digits.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8").count("\n") == 37


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook works
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", 4)
    fast = "from pipeline.report import material\nmaterial.umap_is_installed = lambda: False"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fast))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    (page,) = tmp_path.rglob("report.html")
    assert page.parent.name == "photos"
    said = "".join(str(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "Run('artifacts/photos': 5 rows, best " in said
    assert str(tmp_path) not in said


LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(read(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_leads_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(read(README))}
    assert {f"docs/{page.name}" for page in PAGES} <= linked


def test_the_readmes_figures_are_those_of_the_pages() -> None:
    (told,) = re.findall(r"## What makes it different\n(.*?)\n## ", read(README), re.DOTALL)
    pages = " ".join(read(page) for page in PAGES)
    figures = re.findall(r"\d+\.\d(?: % \[[^]]*\]| %| times)?|\d+ %|\d,\d{3}", told)
    assert len(figures) >= 5
    assert [figure for figure in figures if figure not in pages] == []


def named(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that begins a line, and what is left of the line."""
    found, *rest = words
    command = cli.commands["fit" if found == "photos" else found]
    return named_in_group(command, rest) if isinstance(command, click.Group) else (command, rest)


def named_in_group(group: click.Group, words: list[str]) -> tuple[click.Command, list[str]]:
    return (group.commands[words[0]], words[1:]) if words else (group, [])


@pytest.mark.parametrize("command", [*COMMANDS, *STORE], ids=lambda command: command.name)
def test_every_command_has_help_with_an_example_that_parses(command: click.Command) -> None:
    if command.hidden:
        return
    (example,) = re.findall(r"Example: manyheads (.*)", command.help or "")
    found, arguments = named(shlex.split(example))
    assert found is command
    command.make_context(command.name, arguments, resilient_parsing=False)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_command_that_a_page_mentions_exists(page: Path) -> None:
    for line in set(re.findall(r"`manyheads ((?:store )?[a-z]+)", read(page))):
        assert not named(line.split())[0].hidden, f"{line} is an old name"


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_a_page_names_no_config_that_is_not_there(page: Path) -> None:
    for name in re.findall(r"`(configs/[a-z0-9_/]+\.yaml)`", read(page)):
        assert (ROOT / name).is_file()


def test_the_page_on_manifests_is_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = read(ROOT / "docs" / "manifests.md")
    for section in re.findall(r"```yaml\ndataset:\n(.*?)```", page, re.DOTALL):
        DatasetConfig(**yaml.safe_load(section))
    for path in ("cranes/0001.jpg", "gulls/0002.jpg"):
        (tmp_path / "photos" / path).parent.mkdir(parents=True)
        (tmp_path / "photos" / path).write_bytes(b"\xff\xd8\xff")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    listing = list_manifest(Path("birds.parquet"), DatasetConfig(**found["section"]))
    assert [image[:2] for image in listing.images] == [("cranes/0001.jpg", "crane"), ("gulls/0002.jpg", "gull")]
