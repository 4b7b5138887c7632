"""The README and the pages of docs cannot rot: commands are run, and every target, option, file and link they name exists."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from guard import QUICK_PAGES, attempts, guarded
from photos import make_photos

from pipeline.cli import COMMANDS, STORE, cli
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

HEADS = ("tuning.trials=2", "tuning.folds=3", "heads=[logistic_regression]")
FINETUNE = ("finetune.steps=4", "finetune.batch_size=8", "finetune.validation_fraction=0.4")
SMALL = {"photos": HEADS, "heads": HEADS, "advise": FINETUNE, "finetune": FINETUNE}
"""What replaces minutes in the pages' commands."""

ENGINE = "openvino" if importlib.util.find_spec("openvino") else "torch"
"""What embeds the digits: of the two, the one that could open a connection."""

DIGITS = (
    "dataset={source: folder, path: photos}",
    "output=artifacts/digits",
    "baselines=[pixels]",
    f"extraction.engine={ENGINE}",
)
"""What makes the digits the reader's photos."""


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
        arguments = [*arguments, *(word for change in DIGITS for word in ("--set", change))]
    given = {arguments[place + 1].partition("=")[0] for place, word in enumerate(arguments) if word == "--set"}
    for change in SMALL.get(arguments[0], ()):
        if change.partition("=")[0] not in given:
            arguments = [*arguments, "--set", change]
    return ["photos" if word == "artifacts/digits/images" else word for word in arguments]


def small_code(code: str) -> str:
    """A page's code, or a cell of the notebook, on less data and with fewer trials; the progress bars are not kept apart."""
    code = code.replace(
        '"artifacts/photos")\n',
        '"artifacts/photos", tuning={"trials": 2, "folds": 3}, heads=["logistic_regression"])\n',
        1,
    )
    return code.removeprefix("%%capture\n").replace("[:200]", "[:60]").replace("tuning__trials=3", "tuning__trials=1")


WALK = f"""
import ast, json, sys
from pathlib import Path
from pipeline.cli import cli, full
{QUICK_PAGES}
found = {{}}
for step in json.loads(Path("steps.json").read_text(encoding="utf-8")):
    print("==", step, flush=True)
    if isinstance(step, list):
        cli.main(full(step), standalone_mode=False)
    else:  # what an expression gives is shown, as in a notebook
        exec(compile(ast.Interactive(ast.parse(step).body), "page", "single"), found)
print("== imported", *sorted({{"openvino", "timm"}} & set(sys.modules)))
"""

OWN_IMPORT = """
try:
    import torchvision  # fails beside a CPU-only torch
except RuntimeError:
    pass
"""

AFTER_OURS = """
import torch, torchvision, torchvision.transforms.v2, torchvision.ops
assert torchvision.models.squeezenet1_1().eval()(torch.zeros(1, 3, 64, 64)).shape[1] == 1000
"""

AS_IT_SAYS = """
assert labels["label"].tolist() == ["leaf"] * 12
assert X.shape[0] == len(y) == 30
"""
"""What is so after the page on Python."""


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one process that did all that the pages say.

    In order, in a folder with the reader's photos, our configs, and the example head beside them; then the notebook. The reader's
    own import of torchvision stands before all that, and works behind it.
    """
    folder = tmp_path_factory.mktemp("pages")
    make_photos(folder / "photos")
    make_photos(folder / "new", per_class=3, seed=1)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (module,) = [block for page in RUN for block in blocks(page, "python") if block.startswith("# my_heads.py")]
    (folder / "configs" / "my_heads.py").write_text(module, encoding="utf-8")
    lines = [line for page in RUN for line in commands(page) if line.startswith("manyheads ")]
    steps: list[Any] = [OWN_IMPORT, *(shortened(shlex.split(line)[1:]) for line in dict.fromkeys(lines))]
    steps.append(["store", "status", "artifacts/photos"])
    steps += [small_code(code) for page in (README, ROOT / "docs" / "python.md") for code in blocks(page, "python")]
    notebook = json.loads(read(ROOT / "docs" / "tour.ipynb"))["cells"]
    steps += [AS_IT_SAYS, *(small_code("".join(cell["source"])) for cell in notebook if cell["cell_type"] == "code")]
    steps.append(AFTER_OURS)
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    done = guarded(WALK, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done.stdout


def test_every_command_of_the_pages_runs(walked: tuple[Path, str]) -> None:
    for name in ("labels.csv", "digits.csv"):
        assert (walked[0] / name).read_text(encoding="utf-8").count("\n") == 37


def test_no_command_opens_a_connection_or_writes_to_the_home_folder(walked: tuple[Path, str]) -> None:
    folder, said = walked
    expected = ["openvino"] if ENGINE == "openvino" else []  # timm is imported only where one of its networks is used
    assert said.splitlines()[-1].split() == ["==", "imported", *expected]
    assert attempts(folder) == ""
    assert list((folder / "home").iterdir()) == []


def test_the_tour_runs(walked: tuple[Path, str]) -> None:
    said = walked[1].partition("== import os")[2]
    assert "Run('artifacts/photos': 5 rows, best " in said
    assert "artifacts/photos/report.html" in said
    assert str(walked[0]) not in said


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
