"""The wheel and the sdist, built and installed as pip does it, run from an empty folder: `make dist`. The build asks pip for hatchling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from photos import make_photos

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    return folder


def test_both_hold_what_is_needed_and_no_more(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "manyheads.py",
        "pipeline",
        wheel.name.rsplit("-", 3)[0] + ".dist-info",
    }
    assert {"pipeline/report/templates/page.html", "pipeline/embed/bundled/bundled.safetensors"} < set(names)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "manyheads.py",
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "configs/folder.yaml",
        "tests/conftest.py",
    } < held
    assert not any(name.startswith((".venv", "artifacts", "dist")) for name in held)


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_runs_from_an_empty_folder(kind: str, built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    program = tmp_path / "venv" / "bin"
    (package,) = built.glob(kind)
    subprocess.run([program / "pip", "install", "--quiet", "--no-deps", str(package)], check=True)
    # What it depends on is what these tests run with; of manyheads itself its own is found first.
    (place,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (place / "shared.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    here = tmp_path / "empty"
    make_photos(here / "photos")
    given = {**os.environ, "PYTHONPATH": ""}
    run = [
        program / "manyheads",
        "photos",
        "--set",
        "tuning.trials=2",
        "--set",
        "tuning.folds=3",
        "--set",
        "heads=[ridge]",
    ]
    said = subprocess.run(run, cwd=here, env=given, check=True, capture_output=True, text=True).stdout
    assert "  label photos  manyheads predict artifacts/photos PHOTOS --output labels.csv" in said.splitlines()
    code = (
        "import json, manyheads, pipeline; run = manyheads.Run('artifacts/photos'); "
        "print(json.dumps([manyheads.__file__, pipeline.__file__, len(run.leaderboard), run.report().stat().st_size]))"
    )
    out = subprocess.run(
        [program / "python", "-c", code], cwd=here, env=given, check=True, capture_output=True, text=True
    )
    module, package_file, rows, size = json.loads(out.stdout)
    assert module.startswith(str(place))
    assert package_file.startswith(str(place))
    assert rows == 4
    assert size > 50_000
