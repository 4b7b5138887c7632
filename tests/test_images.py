from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.images import Preprocessing, prepare

RNG = np.random.default_rng(0)


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def presets() -> list[tuple[str, object]]:
    from pipeline.vision import torchvision

    models = torchvision.models
    found = {}
    for name in models.list_models(module=models):
        for weights in models.get_model_weights(name):
            transform = weights.transforms()
            key = (tuple(transform.resize_size), tuple(transform.crop_size), transform.interpolation)
            found.setdefault(key, (f"{weights}", transform))
    return sorted(found.values(), key=lambda pair: pair[0])


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (300, 301), (511, 333), (500, 375), (3, 2), (9, 200)])
def test_prepare_gives_torchvisions_pixels_for_every_weights_preset(size: tuple[int, int]) -> None:
    pytest.importorskip("torch")
    from pipeline.vision import torchvision

    image = photo(*size)
    for name, transform in presets():
        functional = torchvision.transforms.functional
        expected = functional.resize(image, transform.resize_size, interpolation=transform.interpolation)
        expected = functional.center_crop(expected, transform.crop_size)
        mine = prepare(
            image,
            Preprocessing(_plain(transform.resize_size), _plain(transform.crop_size), transform.interpolation.value),
        )
        np.testing.assert_array_equal(mine, np.asarray(expected), err_msg=name)


def _plain(size: list[int]) -> int | tuple[int, int]:
    return size[0] if len(size) == 1 else (size[0], size[1])
