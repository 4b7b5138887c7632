"""The process's memory: the allocator setting can be refused, and lack of memory is recognised."""

from __future__ import annotations

import sys

import pytest
import torch

from pipeline.memory import is_out_of_memory, keep_freed_memory


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
