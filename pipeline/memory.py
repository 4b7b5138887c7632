"""Memory of the process: an allocator that keeps what it has, and the errors that mean there is no more."""

from __future__ import annotations

import ctypes
import os
import sys

OPT_OUT = "MANYHEADS_NO_MALLOPT"

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed memory; say whether it does. MANYHEADS_NO_MALLOPT in the environment prevents it.

    A large network's activations are otherwise mapped and unmapped with every batch: 527,000 page faults in one forward pass
    of ResNet-50 at batch 32, none with it, for 80 to 150 MB more memory. It applies to the whole process, so a command or a
    worker process calls it, never an import.
    """
    if os.environ.get(OPT_OUT) or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(library.mallopt(option, value) == 1 for option, value in settings)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch may work; torch's own error is a RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )
