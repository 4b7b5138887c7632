"""`decode: gpu`: what a GPU is given, what it must agree with, and that the rest goes the processor's way.

Without a GPU a decoder stands in that is libjpeg-turbo's, with its images in the processor's memory; all but nvJPEG is real.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

import pipeline
from pipeline import config as configuration
from pipeline import extract_features
from pipeline.config import Artifacts, Config
from pipeline.embedders import read_records
from pipeline.errors import BackboneError
from pipeline.extract_features import lanes
from pipeline.feed import Feeder, Item, gpu_at_hand
from pipeline.images import GpuDecoder, ImageProblem, Preprocessing, decode, gpu, gpu_decoder, prepare
from pipeline.images.preparing import prepare_tensor

LIMIT = 1_000_000
WAY = Preprocessing(32, 24, decode="gpu")


def waves(width: int, height: int, shift: int = 0) -> Image.Image:
    """Soft colours, as photos have them."""
    y, x = np.mgrid[0:height, 0:width] + shift
    layers = [128 + 100 * np.sin(x / 9 + y / 17), 128 + 100 * np.cos(x / 13 - y / 11), 255 * (y - shift) / height]
    return Image.fromarray(np.stack(layers, axis=2).astype(np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def turned(orientation: int, image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, exif=exif)


class StandIn:
    """libjpeg-turbo in the place of nvJPEG; refuses a batch with bytes that it is told to refuse."""

    def __init__(self, refused: Sequence[bytes] = ()) -> None:
        self.refused = refused
        self.seen: list[list[bytes]] = []

    def __call__(self, contents: Sequence[bytes]) -> list[torch.Tensor]:
        self.seen.append(list(contents))
        if any(data in self.refused for data in contents):
            raise RuntimeError("nvjpegDecodeBatched failed: 3")
        return [torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1) for data in contents]


def through(
    decoder: GpuDecoder | None, folder: Path, names: Sequence[str]
) -> tuple[NDArray[np.uint8], dict[int, ImageProblem]]:
    """The prepared pixels of some files, and the problems."""
    items = [Item(number, name, None, (0, 1)) for number, name in enumerate(names)]
    feeder = Feeder(folder, LIMIT, (WAY, WAY), len(items), 2, decoder)
    (batch,) = feeder.batches(items)
    assert batch.pixels[0] is batch.pixels[1]
    return batch.pixels[0].copy(), batch.problems


def test_a_gpu_prepares_within_one_grey_level_of_exact() -> None:
    generator = np.random.default_rng(0)
    for width, height in ((97, 61), (40, 90), (20, 300), (32, 32)):
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for pixels in (noise, np.asarray(waves(width, height))):
            for way in (
                Preprocessing(32, 24),
                Preprocessing((20, 50), (33, 30)),
                Preprocessing(40, 60, "bicubic"),
                Preprocessing(31, 24, "nearest"),
            ):
                found = prepare_tensor(torch.tensor(pixels).permute(2, 0, 1), way).numpy().astype(int)
                difference = np.abs(found - prepare(pixels, way))
                assert difference.max() <= (0 if way.interpolation == "nearest" else 1)


def test_every_orientation_is_turned_upright_as_the_processor_does(tmp_path: Path) -> None:
    names = []
    for orientation in range(9):
        names.append(f"{orientation}.jpg")
        (tmp_path / names[-1]).write_bytes(turned(orientation, waves(50, 38)))
    stand_in = StandIn()
    found, problems = through(GpuDecoder(stand_in, nullcontext), tmp_path, names)
    expected, _ = through(None, tmp_path, names)
    assert not problems
    assert sum(map(len, stand_in.seen)) == 9
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert len({pixels.tobytes() for pixels in found}) == 8, "0 means nothing, and so does 1"


def test_what_decoders_do_not_agree_on_is_left_to_the_processor(tmp_path: Path) -> None:
    whole = saved(waves(60, 45))
    adobe_rgb = saved(waves(60, 45), keep_rgb=True)
    files = {
        "whole.jpg": whole,
        "grey.jpg": saved(waves(60, 45).convert("L")),
        "padded.jpg": whole + b"\0" * 7,
        "colour.png": saved(waves(60, 45), "PNG"),
        "cmyk.jpg": saved(waves(60, 45).convert("CMYK")),
        "rgb.jpg": adobe_rgb,
        "truncated.jpg": whole[:-200],
        "large.jpg": saved(waves(1100, 1000)),
        "empty.jpg": b"",
        "page.jpg": b"<html></html>\xff\xd9",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    stand_in = StandIn()
    found, problems = through(GpuDecoder(stand_in, nullcontext), tmp_path, list(files))
    expected, same_problems = through(None, tmp_path, list(files))
    given = [data for batch in stand_in.seen for data in batch]
    assert sorted(given, key=len) == sorted([whole, files["grey.jpg"], files["padded.jpg"]], key=len)
    assert {row: (problem.status, str(problem)) for row, problem in problems.items()} == {
        row: (problem.status, str(problem)) for row, problem in same_problems.items()
    }
    assert [list(files)[row] for row in sorted(problems)] == ["truncated.jpg", "large.jpg", "empty.jpg", "page.jpg"]
    good = [row for row in range(len(files)) if row not in problems]
    assert np.abs(found[good].astype(int) - expected[good]).max() <= 1


def test_what_one_image_becomes_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    contents = [saved(waves(60, 45, shift)) for shift in range(6)]
    for number, data in enumerate(contents):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    names = [f"{number}.jpg" for number in range(6)]
    expected, _ = through(GpuDecoder(StandIn(), nullcontext), tmp_path, names)
    picky = StandIn(refused=[contents[2]])
    found, problems = through(GpuDecoder(picky, nullcontext), tmp_path, names)
    assert not problems
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(found[others], expected[others])
    assert [contents[2]] in picky.seen, "tried alone, and then left to the processor"
    assert np.abs(found[2].astype(int) - prepare(decode(contents[2], max_pixels=LIMIT), WAY)).max() == 0


def test_another_shape_than_the_header_says_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(data := saved(waves(60, 45)))

    def half(contents: Sequence[bytes]) -> list[torch.Tensor]:
        return [image[:, ::2] for image in StandIn()(contents)]

    found, _ = through(GpuDecoder(half, nullcontext), tmp_path, ["a.jpg"])
    np.testing.assert_array_equal(found[0], prepare(decode(data, max_pixels=LIMIT), WAY))


def test_only_so_many_pixels_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RUN_PIXELS", 60 * 45 * 2)
    contents = dict(enumerate([saved(waves(60, 45))] * 5 + [saved(waves(90, 90))]))
    stand_in = StandIn()
    made = GpuDecoder(stand_in, nullcontext).prepare(contents, {row: [WAY] for row in contents}, LIMIT)
    assert [len(batch) for batch in stand_in.seen] == [2, 2, 1, 1]
    assert sorted(made) == [(row, WAY) for row in range(6)]


def test_memory_that_runs_out_is_said() -> None:
    def full(contents: Sequence[bytes]) -> list[torch.Tensor]:
        raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")

    with pytest.raises(BackboneError) as error:
        GpuDecoder(full, nullcontext).prepare({0: saved(waves(60, 45))}, {0: [WAY]}, LIMIT)
    assert str(error.value) == (
        "the GPU's memory does not suffice to decode images beside the network; set extraction.decode: standard"
    )


def coarse(contents: Sequence[bytes]) -> list[torch.Tensor]:
    """Another JPEG decoder than the processor's: a coarser transform, and colours that are not smoothed."""
    return [
        torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True)).permute(2, 0, 1)
        for data in contents
    ]


def swapped(contents: Sequence[bytes]) -> list[torch.Tensor]:
    return [image.flip(0) for image in StandIn()(contents)]


def shifted(contents: Sequence[bytes]) -> list[torch.Tensor]:
    return [image.roll(1, 2) for image in StandIn()(contents)]


def missing(contents: Sequence[bytes]) -> list[torch.Tensor]:
    raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\n  more")


def test_a_decoder_is_used_only_if_it_agrees_with_the_processors() -> None:
    for good in (StandIn(), coarse):
        made = GpuDecoder(good, nullcontext)
        assert gpu.checked(made) is made
    for bad, found in (
        (swapped, r"a built-in JPEG differs by \d\d\.\d grey levels on average, at most 2 is allowed"),
        (shifted, r"a built-in JPEG differs by \d\.\d grey levels on average, at most 2 is allowed"),
        (lambda contents: [image[:, 1:] for image in StandIn()(contents)], r"a built-in JPEG has the shape \(170, 251, 3\) there, \(171, 251, 3\) here"),
        (missing, r"nvJPEG is not to be had \(decode_jpegs_cuda: torchvision not compiled with nvJPEG support\)"),
    ):  # fmt: skip
        with pytest.raises(
            BackboneError, match=rf"^extraction.decode is gpu, but {found}; set extraction.decode: standard$"
        ):
            gpu.checked(GpuDecoder(bad, nullcontext))


def experiment(folder: Path, mode: str) -> Config:
    """Twelve photos, one of them a PNG, through a small network and the thumbnails."""
    generator = np.random.default_rng(0)
    for number in range(12):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.{'png' if number == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        tint = generator.integers(0, 256, 3)
        image = Image.fromarray((np.asarray(waves(60, 45, 5 * number)) * 0.5 + tint * 0.5).astype(np.uint8))
        path.write_bytes(saved(image, "PNG" if number == 3 else "JPEG"))
    raw = {
        "output": str(folder / mode),
        "dataset": {"source": "folder", "path": str(folder / "photos")},
        "backbones": [{"name": "squeezenet1_1", "preprocessing": {"resize": 40, "crop": 32}}],
        "baselines": ["pixels"],
        "extraction": {"decode": mode, "device": "cpu", "precision": "fp32", "engine": "torch"},
        "heads": ["nearest_centroid"],
    }
    return configuration.parse(raw, "test")


def test_stage_one_refuses_it_without_a_gpu_and_later_stages_do_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BackboneError) as error:
        extract_features.run(experiment(tmp_path, "gpu"))
    assert str(error.value) == (
        "extraction.decode is gpu, which needs an NVIDIA GPU, and the device is cpu; set extraction.decode: standard"
    )
    caplog.clear()
    assert gpu_at_hand(WAY, "cpu") is None
    assert caplog.messages == [
        "the features were made of images that a GPU had decoded; the processor decodes them here, within 2 grey levels"
    ]
    assert gpu_at_hand(Preprocessing(32, 24, decode="standard"), "cpu") is None


def test_stage_one_embeds_what_the_decoder_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(lanes, "gpu_decoder", lambda device: GpuDecoder(stand_in, nullcontext))
    vectors = {}
    for mode in ("gpu", "standard"):
        config = experiment(tmp_path, mode)
        extract_features.run(config)
        for name in ("squeezenet1_1-random-penultimate", "pixels"):
            vectors[mode, name] = pipeline.load(config.output, embedding=name)
    assert sum(map(len, stand_in.seen)) == 11, "the PNG is for the processor, each JPEG decoded once for both"
    for name in ("squeezenet1_1-random-penultimate", "pixels"):
        mine, theirs = (np.asarray(vectors[mode, name].X) for mode in ("gpu", "standard"))
        cosines = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosines.min() > 0.999
    records = {mode: read_records(Artifacts(tmp_path / mode).features) for mode in ("gpu", "standard")}
    for mine, theirs in zip(records["gpu"], records["standard"], strict=True):
        assert mine.fingerprint != theirs.fingerprint, "the pixels differ a little, and so the features do"


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_nvjpeg_agrees_with_the_processor(tmp_path: Path) -> None:
    names = []
    for number, options in enumerate(({}, {"subsampling": "4:4:4"}, {"progressive": True}, {"quality": 30})):
        names.append(f"{number}.jpg")
        (tmp_path / names[-1]).write_bytes(saved(waves(400 + number, 301, number), **options))
    for orientation in range(1, 9):
        names.append(f"turned{orientation}.jpg")
        (tmp_path / names[-1]).write_bytes(turned(orientation, waves(200, 150)))
    found, problems = through(gpu_decoder("cuda"), tmp_path, names)
    expected, _ = through(None, tmp_path, names)
    assert not problems
    assert np.abs(found.astype(int) - expected).mean(axis=(1, 2, 3)).max() <= gpu.MOST_DIFFERENCE
