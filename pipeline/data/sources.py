"""The sources of images: how a `DatasetConfig` becomes a listing."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import NO_LABELS, DatasetConfig
from pipeline.data.folder import list_folder
from pipeline.data.listing import Listing
from pipeline.data.manifest import list_manifest
from pipeline.data.written import digit_images, images_folder, torchvision_manifest
from pipeline.errors import DatasetError


def list_source(config: DatasetConfig, folder: Path) -> Listing:
    """List the images of the configured source; `folder` is where the index is kept.

    Raises
    ------
    DatasetError
        When the source is not there or not laid out as it should be.
    """
    path = Path((config.path or "").removeprefix("file://")).expanduser()
    if config.source == "folder":
        return list_folder(path, config.follow_symlinks, config.target != NO_LABELS)
    if config.source == "manifest":
        return list_manifest(path, config)
    if config.source == "torchvision":
        return list_manifest(torchvision_manifest(config.name or "", path), config)
    if config.path is not None:
        raise DatasetError(
            "dataset.source 'digits' takes no dataset.path; for your own images say dataset.source: folder (or manifest)"
        )
    return list_folder(digit_images(folder.parent / "images"))


def needs_download(config: DatasetConfig) -> bool:
    """Whether listing the images means a download first."""
    path = Path(config.path or "").expanduser()
    return config.source == "torchvision" and not images_folder(config.name or "", path).exists()
