"""Batches: the images and the augmentation of each step, as functions of the seed and the step; and the loss."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import FinetuneConfig
from pipeline.io.vision import torchvision

SMALLEST_CROP = 0.5
"""The smallest crop, as a fraction of an image's area."""

Score = tuple[float, float]
"""Accuracy on the validation images, and minus the loss as a tie-breaker: higher is better."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with their labels, in memory or mapped from a file.

    pixels : ndarray of shape (n, height, width, 3), uint8
    y : ndarray of shape (n,), int64, class codes
    entering : cached inputs of the lowest trained stage, of shape (n, ...), or None; used in place of the pixels
    """

    pixels: NDArray[np.uint8]
    y: NDArray[np.int64]
    entering: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """Training images, validation images to choose weights on, and the normalisation of pixels."""

    train: LabelledImages
    validation: LabelledImages
    width: int
    """Outputs of the network per image, one per class."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    below: tuple[nn.Module, ...] = ()
    """Modules skipped for images with `entering`, which holds their output."""
    balanced: bool = False
    """Whether classes are weighted equally, regardless of their number of images."""


def rows_at(position: int, count: int, images: int, seed: int) -> NDArray[np.int64]:
    """Return rows `position` to `position + count` of an endless sequence of shuffled epochs: int64 of shape (count,).

    Every epoch contains every image once, and batches may span two epochs, so that none is short.
    """
    first, last = position // images, (position + count - 1) // images
    epochs = [np.random.default_rng([seed, epoch]).permutation(images) for epoch in range(first, last + 1)]
    return np.concatenate(epochs)[position - first * images :][:count]


def to_float(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Convert uint8 (n, h, w, 3) to normalised float32 (n, 3, h, w), channels last in memory."""
    shift = torch.tensor(mean, device=pixels.device) * 255
    scale = 1.0 / (torch.tensor(std, device=pixels.device) * 255)
    return ((pixels.float() - shift) * scale).permute(0, 3, 1, 2)


def augmented(pixels: NDArray[np.uint8], settings: FinetuneConfig, device: torch.device, data: Data) -> Tensor:
    """Return augmented training images, uint8 (n, h, w, 3), using torch's global random state: float32 (n, 3, height, width).

    Height and width are the images' own, or scaled so that the shorter is `size`.
    """
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    whole: tuple[int, int] = pixels.shape[1:3]
    shape = tuple(round(side * (settings.size or min(whole)) / min(whole)) for side in whole)
    if settings.augment != "none" or shape != whole:
        v2 = importlib.import_module(f"{torchvision.__name__}.transforms.v2")  # torchvision does not import it
        flip, smaller = v2.RandomHorizontalFlip(), v2.Resize(shape)
        crop = v2.RandomResizedCrop(shape, scale=(SMALLEST_CROP, 1.0))
        ways = {
            "none": [smaller],
            "flip": [smaller, flip],
            "crop": [crop, flip],
            "trivial": [v2.TrivialAugmentWide(), crop, flip],
        }
        change = v2.Compose(ways[settings.augment])
        images = torch.stack([change(image) for image in images])
    return to_float(images.permute(0, 2, 3, 1), data.mean, data.std).contiguous(memory_format=torch.channels_last)


# ---- the loss and the score of a network's outputs, float32 of shape (n, `Data.width`)


def loss_of(logits: Tensor, y: Tensor, data: Data) -> Tensor:
    """Return the mean cross-entropy for classes, int64 (n,).

    If classes are balanced, each has weight n / (n_classes * n_class), as in scikit-learn.
    """
    weights = None
    if data.balanced:
        counts = np.maximum(np.bincount(data.train.y, minlength=data.width), 1)
        weights = torch.tensor(len(data.train) / (data.width * counts), dtype=torch.float32, device=logits.device)
    return functional.cross_entropy(logits, y, weights)


def score_of(logits: Tensor, y: Tensor) -> Score:
    """Return accuracy and minus the loss for classes, int64 (n,)."""
    accuracy = (logits.argmax(1) == y).double().mean().item()
    return accuracy, -functional.cross_entropy(logits.double(), y).item()
