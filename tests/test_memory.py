"""The process's memory: the allocator setting can be refused, and lack of memory is recognised."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from pipeline.io.process import available_bytes, is_out_of_memory, keep_freed_memory


def test_the_allocator_is_left_alone_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHEADS_NO_MALLOPT", "1")
    assert not keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_allocator_takes_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYHEADS_NO_MALLOPT", raising=False)
    assert keep_freed_memory()


def test_running_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("sizes do not match"))
    assert not is_out_of_memory(KeyError("out of memory"))


def machine(root: Path) -> Path:
    """Write what Linux says of a machine with 8,000,000 kB free."""
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    return root


def group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_192_000_000),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 0\n"}, 8_192_000_000),
        ({"memory.max": "3000", "memory.current": "1000", "memory.stat": "anon 1\ninactive_file 400\n"}, 2400),
        ({"memory.max": "300", "memory.current": "1000", "memory.stat": "anon 1\ninactive_file 400\n"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "3000",
                "memory/memory.usage_in_bytes": "1000",
                "memory/memory.stat": "total_inactive_file 100\n",
            },
            2100,
        ),
    ],
    ids=["machine", "container without limit", "container", "full container", "container of version 1"],
)
def test_free_memory_is_the_machines_or_the_containers(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_bytes(group(machine(tmp_path), files)) == expected


def test_free_memory_is_half_of_all_where_nothing_says_more(tmp_path: Path) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_bytes(tmp_path) == total // 2
