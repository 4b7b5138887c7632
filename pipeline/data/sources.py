"""The sources of images, one row each: how a `DatasetConfig` becomes a listing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.digits import digit_images
from pipeline.data.folder import list_folder
from pipeline.data.listing import Listing
from pipeline.data.manifest import list_manifest
from pipeline.data.torchvision_source import images_folder, torchvision_manifest
from pipeline.errors import DatasetError

if TYPE_CHECKING:
    from pipeline.config import DatasetConfig


def _digits(config: DatasetConfig, folder: Path) -> Listing:
    if config.path is not None:
        raise DatasetError(
            "dataset.source 'digits' takes no dataset.path; for your own images say dataset.source: folder (or manifest)"
        )
    return list_folder(digit_images(folder.parent / "images"))


def _path(config: DatasetConfig) -> Path:
    return Path(config.path or "").expanduser()


def _folder(config: DatasetConfig, folder: Path) -> Listing:
    return list_folder(_path(config), config.follow_symlinks)


def _manifest(config: DatasetConfig, folder: Path) -> Listing:
    return list_manifest(_path(config), config.follow_symlinks)


def _torchvision(config: DatasetConfig, folder: Path) -> Listing:
    return list_manifest(torchvision_manifest(config.name or "", _path(config)))


SOURCES: Mapping[str, Callable[[DatasetConfig, Path], Listing]] = {
    "digits": _digits,
    "folder": _folder,
    "manifest": _manifest,
    "torchvision": _torchvision,
}


def list_source(config: DatasetConfig, folder: Path) -> Listing:
    """List the images of the configured source; `folder` is where the index is kept.

    Raises
    ------
    DatasetError
        When the source is not there or not laid out as it should be.
    """
    return SOURCES[config.source](config, folder)


def needs_download(config: DatasetConfig) -> bool:
    """Whether listing the images means a download first."""
    return config.source == "torchvision" and not images_folder(config.name or "", _path(config)).exists()
