"""Baselines: what their numbers mean, and that they need no torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.embed import baselines
from pipeline.embed.records import EmbeddingRecord, open_record
from pipeline.errors import BackboneError
from pipeline.images import prepare


def test_pixels_are_the_thumbnail_in_colour() -> None:
    made = baselines.load("pixels")
    image = Image.new("RGB", (40, 80), (255, 0, 51))
    (vectors,) = made.embed(prepare(np.asarray(image), made.preprocessing)[None])
    assert vectors.shape == (1, made.specs[0].dim) == (1, 768)
    np.testing.assert_allclose(vectors.reshape(16, 16, 3), np.broadcast_to([1.0, 0.0, 0.2], (16, 16, 3)), rtol=1e-6)


def test_pixels_show_the_whole_image_and_not_its_centre() -> None:
    made = baselines.load("pixels")
    tall = Image.new("RGB", (20, 100), (0, 0, 0))
    tall.paste((255, 255, 255), (0, 0, 20, 10))  # only the top tenth is white
    (vectors,) = made.embed(prepare(np.asarray(tall), made.preprocessing)[None])
    assert vectors.reshape(16, 16, 3)[0].min() > 0.9
    assert vectors.reshape(16, 16, 3)[4:].max() == 0


def test_hog_tells_directions_apart_and_not_brightness() -> None:
    made = baselines.load("hog")
    x = np.arange(64)
    stripes = np.broadcast_to(((x // 4) % 2 * 200)[None, :, None], (64, 64, 3)).astype(np.uint8)
    batch = np.stack([stripes, stripes.transpose(1, 0, 2), stripes // 2])
    (vectors,) = made.embed(batch)
    assert vectors.shape == (3, made.specs[0].dim) == (3, 1764)
    assert vectors.dtype == np.float32
    upright, lying, darker = vectors
    np.testing.assert_allclose(darker, upright, atol=1e-5)
    assert np.linalg.norm(upright - lying) > 0.5 * np.linalg.norm(upright)


@pytest.mark.parametrize("name", ["pixels", "hog"])
def test_a_vector_depends_on_its_image_alone(name: str) -> None:
    made = baselines.load(name)
    height, width = made.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    (together,) = made.embed(pixels)
    np.testing.assert_array_equal(np.concatenate([made.embed(pixels[i : i + 1])[0] for i in range(5)]), together)
    assert made.probe[0].shape == (4, made.specs[0].dim)


def test_the_two_have_identities_of_their_own() -> None:
    pixels, hog = baselines.load("pixels").specs[0], baselines.load("hog").specs[0]
    assert (pixels.kind, pixels.untrained) == ("baseline", False)
    assert pixels.fingerprint() != hog.fingerprint()
    assert hog.identity()["arguments"]["orientations"] == 9


def test_features_of_images_decoded_in_a_way_that_is_gone_are_refused_in_a_line() -> None:
    spec = baselines.load("pixels").specs[0]
    decode = {**spec.preprocessing["decode"], "mode": "gpu"}
    made = replace(spec, preprocessing={**spec.preprocessing, "decode": decode})
    with pytest.raises(BackboneError) as caught:
        open_record(EmbeddingRecord("pixels", made, "pixels.store", "", None, 0), "cpu")
    assert str(caught.value) == "pixels: images are no longer decoded by 'gpu'; run `manyheads features` again"
