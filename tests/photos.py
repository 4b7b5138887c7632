"""Small photos, and the config of an experiment on them that takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import config as configuration
from pipeline.config import Config

PHOTO_CLASSES = {"leaf": (40, 160, 60), "sky, blue": (70, 130, 230), "土": (150, 100, 60)}
PHOTOS_PER_CLASS = 12


def draw_photo(rng: np.random.Generator, height: int = 133, width: int = 100) -> Image.Image:
    """Draw smooth shapes with some noise, as a photo has them; no two are alike."""
    coarse = Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def crop(photo: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut shares of the sides off."""
    width, height = photo.size
    return photo.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def frame(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Take the scene of a photo once more: the camera has moved a little, the light has changed, there is new noise."""
    moved = crop(photo, *rng.uniform(0, 0.03, 4))
    pixels = np.asarray(moved) * rng.uniform(0.95, 1.05) + rng.normal(0, 4, (moved.height, moved.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_photos(folder: Path, per_class: int = PHOTOS_PER_CLASS, seed: int = 0) -> Path:
    """Write a folder of noisy images whose colour tells the class."""
    rng = np.random.default_rng(seed)
    for label, colour in PHOTO_CLASSES.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            noise = rng.normal(0, 45, (20, 24, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number:02d}.png")
    return folder


def small_config(photos: Path, output: Path) -> Config:
    """An experiment that takes seconds."""
    raw = {
        "output": str(output),
        "dataset": {"source": "folder", "path": str(photos)},
        "backbones": [{"name": "squeezenet1_1", "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": ["majority", "pixels"],
        "heads": ["logistic_regression", "nearest_centroid"],
        "tuning": {"strategy": "random", "trials": 3, "folds": 3},
    }
    return configuration.parse(raw, "test")
