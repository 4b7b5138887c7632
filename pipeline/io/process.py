"""The process: available memory, the allocator, out-of-memory errors, package versions, users' modules, progress bars."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.errors import PipelineError, first_line

OPT_OUT = "MANYHEADS_NO_MALLOPT"

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h; -1 as a threshold is never
_TOP_PAD_BYTES = 64 << 20

_CGROUPS = (  # limit, use, statistics, and the statistics' line for file pages that the system can drop
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep freed memory and return whether it does; the variable MANYHEADS_NO_MALLOPT prevents it.

    Otherwise a large network's activations are mapped and unmapped with every batch: 527,000 page faults in one forward pass
    of ResNet-50 at batch 32, none with it, for 80 to 150 MB more memory. It affects the whole process, so commands call it,
    never imports.
    """
    if os.environ.get(OPT_OUT) or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(library.mallopt(option, value) == 1 for option, value in settings)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is out of memory, so that a smaller batch may work; torch raises a RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


@cache
def version(name: str) -> str | None:
    """Return the version of a package, None if it is not installed; cached, as reading takes milliseconds."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_bytes(system: Path = Path("/")) -> int:
    """Return the free memory, in bytes, of the machine or of its container, whichever is less.

    On Linux it is read from /proc and /sys under `system`; elsewhere half of the machine's memory counts as free.
    """
    try:
        fields = dict(line.split(":", 1) for line in (system / "proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([free, *_left_in_containers(system / "sys/fs/cgroup")])


def _left_in_containers(folder: Path) -> list[int]:
    """Return the memory left by control groups of version 2 and 1, if there are any."""
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


@contextmanager
def instead(stand_ins: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Substitute modules that are not loaded yet for imports in the block; None makes their import fail."""
    added = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(added)  # type: ignore[arg-type]  # Python raises ImportError for a module that is None
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def look_in(folder: Path) -> None:
    """Append a folder to the module search path, for users' modules; worker processes inherit it."""
    name = str(folder.absolute())
    if name not in sys.path:
        sys.path.append(name)


def users_module(name: str, asked: str, kind: type[PipelineError]) -> ModuleType:
    """Import a user's module; on failure raise an error of type `kind` whose message begins with `asked`."""
    try:
        look_in(Path())
        return importlib.import_module(name)
    except Exception as error:  # a user's module may fail at import in any way
        raise kind(
            f"{asked}: module {name!r} cannot be imported ({type(error).__name__}: {first_line(error)}); it must be installed, or "
            "lie beside the config or in the folder the command is run in"
        ) from error


Piece = TypeVar("Piece")
LOG_SECONDS = 15.0
"""Seconds between updates of a bar in a log file."""


class Progress:
    """A progress bar."""

    def __init__(self, bar: tqdm[Any], interval: float = LOG_SECONDS) -> None:
        self._bar, self._interval = bar, interval
        self._noted = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Advance the bar by `count`."""
        self._bar.update(count)

    def passed(self, piece: Piece) -> Piece:
        """Advance the bar by one and return the piece; for `map`."""
        self.update()
        return piece

    def note(self, text: str) -> None:
        """Show a short text after the bar, such as the best score so far, even if no piece ends for hours."""
        due = time.monotonic() - self._noted >= self._interval
        if due:
            self._noted = time.monotonic()
        self._bar.set_postfix_str(text, refresh=due)


@contextmanager
def bar(total: int, unit: str, label: str, initial: int = 0, delay: float = 0.0) -> Iterator[Progress]:
    """Show a bar on standard error for `total` pieces of work, `initial` of them done, once the work has taken `delay` seconds."""
    live = sys.stderr.isatty()
    interval = 0.2 if live else LOG_SECONDS
    with tqdm(
        total=total,
        initial=initial,
        unit=f" {unit}",
        desc=label,
        mininterval=interval,
        maxinterval=10.0 if live else LOG_SECONDS,
        dynamic_ncols=live,
        delay=delay,
        disable=total <= initial,
    ) as raw:
        yield Progress(raw, interval)


def size_text(count: int) -> str:
    """Return a number of bytes for people, such as 1.23MB."""
    return str(tqdm.format_sizeof(count, "B"))
