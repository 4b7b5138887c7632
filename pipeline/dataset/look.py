"""A look at the data: what a scan would find, with the index left as it is."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.dataset.report import ScanResult
from pipeline.dataset.scan import scan
from pipeline.dataset.torchvision_source import images_folder

if TYPE_CHECKING:
    from pipeline.config import DatasetConfig

MATERIALISED = ("digits", "torchvision")
"""Sources whose images this program writes itself: they do not change between two scans."""


def look(config: DatasetConfig, seed: int, folder: Path, *, rehash: bool = False) -> ScanResult:
    """Scan as `scan` does, and leave the index in `folder` as it is: two looks say the same.

    Raises
    ------
    DatasetError
        When the data cannot be used as they are.
    """
    if config.source in MATERIALISED:
        return scan(config, seed, folder, rehash=rehash)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, folder.name)
        if folder.is_dir():
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.store"))  # the images' hashes
        return scan(config, seed, copy, rehash=rehash)


def needs_download(config: DatasetConfig) -> bool:
    """Whether a look may mean a download first."""
    return (
        config.source == "torchvision"
        and not images_folder(config.name or "", Path(config.path or "").expanduser()).exists()
    )
