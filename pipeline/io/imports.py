"""What importing costs and where it looks: parts of libraries that are never used are left out, the user's own modules are found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipeline.errors import PipelineError, first_line


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


def look_in(folder: Path) -> None:
    """Let the user's own modules be found in a folder too, after all that is installed; worker processes look there as well."""
    name = str(folder.absolute())
    if name not in sys.path:
        sys.path.append(name)


def users_module(name: str, asked: str, kind: type[PipelineError]) -> ModuleType:
    """Import a module of the user's own; an error of this kind, which begins with what was asked for, where that fails."""
    try:
        look_in(Path())
        return importlib.import_module(name)
    except Exception as error:  # a user's module may fail at import in any way
        raise kind(
            f"{asked}: module {name!r} cannot be imported ({type(error).__name__}: {first_line(error)}); it must be installed, or "
            "lie beside the config or in the folder the command is run in"
        ) from error
