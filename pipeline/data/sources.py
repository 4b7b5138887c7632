"""The sources of images: turn a `DatasetConfig` into a listing.

Data sets without image files are written as PNG files once: scikit-learn's digits, and torchvision's by name.
"""

from __future__ import annotations

import csv
import inspect
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import NO_LABELS, DatasetConfig, guess
from pipeline.data.folder import SPLIT_NAMES, Listing, list_folder
from pipeline.data.manifest import list_manifest
from pipeline.errors import DatasetError
from pipeline.io.files import make_folder, rename
from pipeline.io.process import bar

MANIFEST = "manifest.csv"


def list_source(config: DatasetConfig, folder: Path) -> Listing:
    """List the images of the configured source; `folder` is the folder of the index."""
    path = Path((config.path or "").removeprefix("file://")).expanduser()
    if config.source == "folder":
        return list_folder(path, config.target != NO_LABELS)
    if config.source == "manifest":
        return list_manifest(path, config)
    if config.source == "torchvision":
        return list_manifest(torchvision_manifest(config.name or "", path), config)
    if config.path is not None:
        raise DatasetError(
            "dataset.source 'digits' takes no dataset.path; for your own images say dataset.source: folder (or manifest)"
        )
    return list_folder(written_once(folder.parent / "images", _write_digits))


def needs_download(config: DatasetConfig) -> bool:
    """Whether listing the images requires a download."""
    root = Path(config.path or "").expanduser()
    return config.source == "torchvision" and not _images_folder(config.name or "", root).exists()


def written_once(root: Path, write: Callable[[Path], None]) -> Path:
    """Return `root` after `write` has filled it, using a temporary folder that is renamed when complete.

    A killed run leaves a temporary folder, which the next run replaces.
    """
    if root.exists():
        return root
    unfinished = root.with_name(f".{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished)
    write(unfinished)
    os.sync()  # else a power cut after the rename could leave a complete folder of empty files
    rename(unfinished, root)
    return root


def _write_png(path: Path, image: Image.Image) -> None:
    """Write a file into an unfinished folder; `written_once` syncs all files together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")


def _write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 handwritten digits (8 x 8 grey), one folder per class."""
    from sklearn.datasets import load_digits  # costs a second of imports, needed once

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the source values are 0 to 16
    for number, (pixels, label) in enumerate(zip(grey, bunch.target, strict=True)):
        _write_png(folder / str(label) / f"{number:04d}.png", Image.fromarray(pixels))


def _images_folder(name: str, root: Path) -> Path:
    """Return the folder for the images of a data set."""
    return root / f"{name}-images"


def torchvision_manifest(name: str, root: Path) -> Path:
    """Return the manifest of a torchvision data set below `root`; download and write its images first if needed.

    DatasetError if there is no such data set, its samples are not images with one label each, or it cannot be downloaded.
    """
    images = _images_folder(name, root)
    if not images.exists():
        written_once(images, lambda folder: _write(folder, name, root))
    return images / MANIFEST


def _write(folder: Path, name: str, root: Path) -> None:
    """Write every image of a torchvision data set below a folder, then the manifest, whose presence means that all are written."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    for split, samples in _parts(name, root):
        names = getattr(samples, "classes", None)
        names = names if isinstance(names, list | tuple) else []
        with bar(len(samples), "images", f"writing {name} {split}".rstrip()) as progress:
            for number in range(len(samples)):
                image, target = samples[number][:2]
                if not hasattr(image, "getbands") or not isinstance(target, int):
                    raise DatasetError(f"dataset.name {name!r}: its samples are not an image with one label each")
                path = f"{split}/{number:06d}.png".lstrip("/")
                _write_png(folder / path, image)
                label = names[target] if target < len(names) else str(target)
                writer.writerow([path, label if isinstance(label, str) else ", ".join(map(str, label)), split])
                progress.update()
    (folder / MANIFEST).write_bytes(text.getvalue().encode())


def _parts(name: str, root: Path) -> Iterator[tuple[str, Any]]:
    """Yield each split of a torchvision data set with its samples; the split is '' if it has none."""
    from pipeline.io.vision import torchvision

    make: Any = getattr(torchvision.datasets, name, None)
    about = inspect.signature(make).parameters if inspect.isclass(make) else {}
    if not {"root", "download"} <= {*about}:
        near = guess(name, torchvision.datasets.__all__)
        raise DatasetError(f"dataset.name {name!r}: torchvision has no data set of this name that it downloads{near}")
    asked: list[tuple[str, dict[str, Any]]] = [("", {})]
    if "train" in about:
        asked = [("train", {"train": True}), ("test", {"train": False})]
    elif "split" in about:
        words = ("train", "trainval", "val", "valid", "test")
        asked = [(SPLIT_NAMES.get(word, "train"), {"split": word}) for word in words]
    given = set()
    make_folder(root)
    for split, part in asked:
        if split in given:
            continue
        try:
            samples = make(root=str(root), download=True, **part)
        except ValueError:  # torchvision's answer to a split that this data set does not have
            continue
        except (OSError, RuntimeError, TypeError) as error:
            url, reason = getattr(make, "url", "its files"), " ".join(str(error).split())
            raise DatasetError(
                f"{name} cannot be downloaded ({reason}); fetch {url} yourself, put it into {root} as torchvision.datasets.{name} "
                "describes, and run again"
            ) from None
        given.add(split)
        yield split, samples
