"""The package says what it is, and its pins agree with its ranges."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def requirements(extra: str) -> list[Requirement]:
    texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [Requirement(text) for text in texts]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_metadata() -> None:
    assert (PROJECT["name"], PROJECT["license"], PROJECT["requires-python"]) == ("manyheads", "MIT", ">=3.11,<3.15")
    assert [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line] == PYTHONS
    assert (ROOT / "pipeline" / "py.typed").is_file()


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_once_within_its_range(python: str) -> None:
    environment = {"python_version": python}
    pinned: dict[str, str] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            name = re.sub(r"[-_.]+", "-", pin.name).lower()
            assert name not in pinned, f"{name} is pinned twice for Python {python}"
            pinned[name] = next(iter(pin.specifier)).version
    for extra in ("", *PROJECT["optional-dependencies"]):
        for requirement in requirements(extra):
            ours = requirement.name == PROJECT["name"]  # extras of ours, which are looked at themselves
            if not ours and (requirement.marker is None or requirement.marker.evaluate(environment)):
                name = re.sub(r"[-_.]+", "-", requirement.name).lower()
                assert name in pinned, f"{requirement} has no pin in constraints.txt"
                assert requirement.specifier.contains(pinned[name]), f"{requirement} does not allow {pinned[name]}"


def test_torch_and_torchvision_are_the_tested_pair() -> None:
    found = {pin.name: str(pin.specifier) for pin in pins() if pin.name.startswith("torch")}
    assert found == {"torch": "==2.13.0", "torchvision": "==0.28.0"}


@pytest.mark.parametrize("command", [["manyheads"], [sys.executable, "-m", "pipeline"]], ids=["script", "module"])
def test_both_ways_to_start_it_are_the_same(command: list[str]) -> None:
    script = Path(sys.executable).parent / "manyheads"
    if command == ["manyheads"]:
        command = [str(script)]
    found = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == f"manyheads, version {metadata.version('manyheads')}\n"
