"""Memory: how much there is, an allocator that keeps what it has, and the errors that mean there is no more."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

OPT_OUT = "MANYHEADS_NO_MALLOPT"

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h; -1 as a threshold is never
_TOP_PAD_BYTES = 64 << 20

_CGROUPS = (  # limit, use, statistics, and the statistics' line for file pages that the system can drop
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed memory; say whether it does. MANYHEADS_NO_MALLOPT in the environment prevents it.

    A large network's activations are otherwise mapped and unmapped with every batch: 527,000 page faults in one forward pass
    of ResNet-50 at batch 32, none with it, for 80 to 150 MB more memory. It applies to the whole process, so a command calls
    it, never an import.
    """
    if os.environ.get(OPT_OUT) or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(library.mallopt(option, value) == 1 for option, value in settings)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch may work; torch's own error is a RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def available_bytes(system: Path = Path("/")) -> int:
    """Return the memory that the process can take without swapping: the machine's, or its container's if that is less.

    Linux says it in /proc and /sys, under `system`; elsewhere half of the machine's memory is taken for free.
    """
    try:
        fields = dict(line.split(":", 1) for line in (system / "proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([free, *_left_in_containers(system / "sys/fs/cgroup")])


def _left_in_containers(folder: Path) -> list[int]:
    """What control groups of version 2 and 1 leave, where there are any."""
    left = []
    for limit, use, statistics, droppable in _CGROUPS:
        try:
            allowed = (folder / limit).read_text().strip()
            lines = dict(line.split(maxsplit=1) for line in (folder / statistics).read_text().splitlines())
            if allowed != "max":
                used = int((folder / use).read_text()) - int(lines[droppable])
                left.append(max(0, int(allowed) - used))
        except (OSError, KeyError, ValueError):
            continue
    return left
