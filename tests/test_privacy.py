"""No command opens a connection or leaves anything in the home folder, in a fresh process that refuses every socket."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from photos import make_photos

ROOT = Path(__file__).parents[1]

GUARD = """
import os, sys

REFUSED = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind",
           "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}

def refuse(event, arguments):
    if event in REFUSED and not (hasattr(arguments[0], "family") and arguments[0].family.name == "AF_UNIX"):
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{event} {arguments} by {sys.argv}\\n")
        raise OSError("no connection is allowed here")

sys.addaudithook(refuse)
"""
"""Python imports it before anything else in every process, as `sitecustomize`; a forked one inherits it."""

COMMANDS = """
import sys
from pipeline.cli import cli

def run(*arguments):
    cli.main(arguments, standalone_mode=False)

for command in ("check", "features", "heads", "report", "status", "finetune"):
    run(command, "config.yaml")
run("predict", "output", "photos", "--output", "labels.csv")
print(*sorted(name for name in ("openvino", "timm", "torch", "matplotlib") if name in sys.modules))
"""

CONFIG = """
output: output
dataset: {source: folder, path: photos}
backbones: [{name: regnet_small, weights: bundled}]
baselines: [majority, pixels]
extraction: {device: cpu, precision: fp32, engine: ENGINE}
heads: [logistic_regression]
tuning: {trials: 2, folds: 3}
finetune: {validation_fraction: 0.4, steps: 2, batch_size: 8}
"""


def guarded(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a folder with an empty home, outside of what is known as continuous integration."""
    (folder / "home").mkdir()
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in {"CI", "TF_BUILD", "JENKINS_URL"}}
    own = {
        "HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join([str(folder / "guard"), str(ROOT)]),
        "ATTEMPTS": str(folder / "attempts"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its list of fonts is all that it would put into the home folder
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=kept | own, capture_output=True, text=True, check=False
    )


def attempts(folder: Path) -> str:
    path = folder / "attempts"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def test_no_command_opens_a_connection_or_writes_to_the_home_folder(tmp_path: Path) -> None:
    engine = "openvino" if importlib.util.find_spec("openvino") else "torch"
    make_photos(tmp_path / "photos", per_class=8)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("ENGINE", engine), encoding="utf-8")
    done = guarded(COMMANDS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("openvino" in done.stdout.splitlines()[-1]) is (engine == "openvino")
    assert "timm" not in done.stdout.splitlines()[-1], "imported only where one of its networks is used"
    assert (tmp_path / "labels.csv").read_text(encoding="utf-8").count("\n") == 25
    assert attempts(tmp_path) == ""
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import threading, urllib.request as r\nt = threading.Thread(target=r.urlopen, args=('http://a.test',)); t.start(); t.join()",
        "import multiprocessing as m, socket\np = m.get_context('fork').Process(target=socket.getaddrinfo, args=('a.test', 80)); p.start(); p.join()",
        "import subprocess as s, sys\ns.run([sys.executable, '-c', 'import socket; socket.gethostbyname(\"a.test\")'])",
    ],
    ids=["process", "thread", "fork", "child"],
)
def test_the_guard_sees_an_attempt_wherever_it_is_made(code: str, tmp_path: Path) -> None:
    guarded(code, tmp_path)
    assert attempts(tmp_path).startswith("socket.")


def test_openvino_that_the_user_imported_reports_nothing_of_ours(tmp_path: Path) -> None:
    """One attempt is that of the user's own import."""
    pytest.importorskip("openvino_telemetry")
    code = """
import openvino, openvino_telemetry
from pipeline.embed.engines import import_openvino
assert import_openvino() is openvino
for number in range(3):
    openvino_telemetry.Telemetry().send_event("ovc", "conversion_result", str(number))
"""
    done = guarded(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert attempts(tmp_path).count("socket.") == 1
