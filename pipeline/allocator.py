"""Tell glibc's allocator to keep freed memory: a large network's activations are otherwise mapped and unmapped every batch.

Measured with ResNet-50 at batch 32: 527,000 page faults a forward pass without, none with, for 80 to 150 MB more memory.
It applies to the whole process, so a command or a worker process calls it, never an import.
"""

from __future__ import annotations

import ctypes
import os
import sys

OPT_OUT = "MANYHEADS_NO_MALLOPT"

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Make the change where the C library is glibc and MANYHEADS_NO_MALLOPT is not set; say whether it was made."""
    if os.environ.get(OPT_OUT) or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(library.mallopt(option, value) == 1 for option, value in settings)
