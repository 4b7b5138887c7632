"""A fresh process with an empty home folder that refuses every socket and writes down each attempt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib

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

QUICK_PAGES = """
from pipeline.report import material, page
material.umap_is_installed, page.to_png = lambda: False, lambda chart: b""
"""
"""What conftest's fixture of this name does, for a process of its own."""


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
        "TMPDIR": str(folder),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its list of fonts is all that it would put into the home folder
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=kept | own, capture_output=True, text=True, check=False
    )


def attempts(folder: Path) -> str:
    path = folder / "attempts"
    return path.read_text(encoding="utf-8") if path.exists() else ""
