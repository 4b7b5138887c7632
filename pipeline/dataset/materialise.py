"""Writing a data set out as image files, once: a killed run leaves a folder that the next one replaces."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.errors import DatasetError


def materialised(root: Path, write: Callable[[Path], None]) -> Path:
    """Return `root` after `write` has filled it, in a temporary folder that is renamed when it is complete.

    Raises
    ------
    DatasetError
        When the files cannot be written.
    """
    if root.exists():
        return root
    temporary = root.with_name(f".{root.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        os.sync()  # else a power cut after the rename could leave a complete folder of empty files
        temporary.rename(root)
    except OSError as error:
        raise DatasetError(
            f"{root}: the images cannot be written here ({error.strerror or error}); free some space or choose another folder"
        ) from None
    return root


def write_png(path: Path, pixels: NDArray[Any]) -> None:
    """Write one image of shape (h, w) or (h, w, 3), uint8."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")
