"""Writing a data set out as image files, once: a killed run leaves a folder that the next one replaces."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DatasetError
from pipeline.io.files import SYSTEM, create, make_folder, rename, write_all


def materialised(root: Path, write: Callable[[Path], None]) -> Path:
    """Return `root` after `write` has filled it, in a temporary folder that is renamed when it is complete.

    Raises
    ------
    DatasetError
        When the files cannot be written.
    """
    if root.exists():
        return root
    unfinished = root.with_name(f".{root.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        make_folder(unfinished)
        write(unfinished)
        os.sync()  # else a power cut after the rename could leave a complete folder of empty files
        rename(unfinished, root)
    except OSError as error:
        reason = error.strerror or error
        raise DatasetError(
            f"{root}: the images cannot be written here ({reason}); free some space or choose another folder"
        ) from None
    return root


def write_png(path: Path, image: Any) -> None:
    """Write a Pillow image, or an array of shape (h, w) or (h, w, 3), uint8."""
    from PIL import Image

    sink = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(sink, "PNG")
    write_file(path, sink.getvalue())


def write_file(path: Path, data: bytes) -> None:
    """Write a new file of an unfinished folder; `materialised` syncs all of them at once."""
    make_folder(path.parent)
    descriptor = create(path)
    try:
        write_all(descriptor, data)
    finally:
        SYSTEM["close"](descriptor)
