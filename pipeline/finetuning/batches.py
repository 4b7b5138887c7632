"""Batches: which images a step sees, and how they are changed, as functions of the seed and the step."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config import FinetuneConfig
from pipeline.io.vision import torchvision

SMALLEST_CROP = 0.5
"""Of an image's area."""
MIXES = {"mixup": ("MixUp", 0.2), "cutmix": ("CutMix", 1.0)}
"""torchvision's transform and its alpha, as in torchvision's own training recipes."""


@dataclass(frozen=True)
class Labelled:
    """Images with their classes, in memory or mapped from a file.

    pixels : ndarray of shape (n, height, width, 3), uint8
    labels : ndarray of shape (n,), int64, positions in the sorted classes
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """What is learned from, what weights are chosen on, and how pixels become numbers."""

    train: Labelled
    validation: Labelled
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def rows_at(position: int, count: int, images: int, seed: int) -> NDArray[np.int64]:
    """Return the rows at places `position` to `position + count` of an endless row of shuffled epochs.

    Every epoch holds every image once, and no image waits for a batch that would be short.
    """
    rows: list[NDArray[np.int64]] = []
    while count > 0:
        epoch, start = divmod(position, images)
        order = np.random.default_rng([seed, epoch]).permutation(images)
        taken = order[start : start + count]
        rows.append(taken)
        position += len(taken)
        count -= len(taken)
    return np.concatenate(rows)


def to_float(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 (n, h, w, 3) into normalised float32 (n, 3, h, w), channels last in memory."""
    shift = torch.tensor(mean, device=pixels.device) * 255
    scale = 1.0 / (torch.tensor(std, device=pixels.device) * 255)
    return ((pixels.float() - shift) * scale).permute(0, 3, 1, 2)


def crop_and_flip(images: Tensor, size: int, smallest: float) -> Tensor:
    """Cut a random rectangle out of each image, flip half of them, and bring all to `size` pixels.

    The random resized crop of Szegedy et al. 2014 with area in [smallest, 1] and ratio in [3/4, 4/3], each image its own,
    in one call for the whole batch instead of one per image.
    """
    count = len(images)
    area = torch.empty(count).uniform_(smallest, 1.0)
    ratio = torch.exp(torch.empty(count).uniform_(-1.0, 1.0) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = width * _random_sign(count)
    transform[:, 0, 2] = torch.empty(count).uniform_(-1.0, 1.0) * (1.0 - width)
    transform[:, 1, 1] = height
    transform[:, 1, 2] = torch.empty(count).uniform_(-1.0, 1.0) * (1.0 - height)
    grid = functional.affine_grid(transform, [count, 3, size, size], align_corners=False).to(images.device)
    return functional.grid_sample(images, grid, align_corners=False, padding_mode="reflection")


def augmented(pixels: NDArray[np.uint8], settings: FinetuneConfig, device: torch.device, data: Data) -> Tensor:
    """Return the training view of images (n, size, size, 3): float32 (n, 3, size, size), from torch's global random state."""
    tensor = torch.from_numpy(pixels).to(device)
    if settings.augment == "trivial":
        change = _transforms().TrivialAugmentWide()
        tensor = torch.stack([change(image) for image in tensor.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)
    images = to_float(tensor, data.mean, data.std)
    if settings.augment in ("crop", "trivial"):
        images = crop_and_flip(images, pixels.shape[1], SMALLEST_CROP)
    elif settings.augment == "flip":
        flipped = (_random_sign(len(images)) < 0).to(device).view(-1, 1, 1, 1)
        images = torch.where(flipped, images.flip(3), images)
    return images.contiguous(memory_format=torch.channels_last)


def mixed(images: Tensor, labels: Tensor, settings: FinetuneConfig, classes: int) -> tuple[Tensor, Tensor]:
    """Apply mixup or CutMix to a batch, float32 of shape (n, 3, h, w); the labels, int64 of shape (n,), become probabilities."""
    if settings.mix == "none":
        return images, labels
    names = ("mixup", "cutmix") if settings.mix == "both" else (settings.mix,)
    maker, alpha = MIXES[names[int(torch.randint(len(names), ()).item())]]
    images, labels = getattr(_transforms(), maker)(alpha=alpha, num_classes=classes)(images, labels)
    return images.contiguous(memory_format=torch.channels_last), labels


def _transforms() -> Any:
    """torchvision's v2 transforms, which its own import leaves out."""
    return importlib.import_module(f"{torchvision.__name__}.transforms.v2")


def _random_sign(count: int) -> Tensor:
    return torch.randint(0, 2, (count,)).float() * 2 - 1
