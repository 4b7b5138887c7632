"""The guard that test_docs has every command run under sees what it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest
from guard import attempts, guarded


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
