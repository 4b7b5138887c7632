"""Imports that cost more than they are worth: what a library loads and this package never uses is left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def instead(stand_ins: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Let an import find stand-ins for modules, or with None an ImportError; modules that are loaded already stay."""
    added = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(added)  # type: ignore[arg-type]  # None is Python's own way to say that there is no such module
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
