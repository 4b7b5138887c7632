from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from pipeline import images
from pipeline.errors import DatasetError
from pipeline.images import (
    DECODE_MODES,
    DECODE_POLICY,
    NO_IMAGE,
    ImageProblem,
    Preprocessing,
    decode,
    open_file,
    policy_key,
    prepare,
)
from pipeline.io.digests import canonical_json, content_digest

LIMIT = 1_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """Colours that change slowly, so that lossy formats keep them."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) * 127 // width], axis=2).astype(np.uint8)
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def pixels(data: bytes) -> NDArray[np.uint8]:
    found = decode(data, max_pixels=LIMIT)
    assert found.dtype == np.uint8
    assert found.shape[2:] == (3,)
    return found


def problem(data: bytes, max_pixels: int = LIMIT) -> ImageProblem:
    with pytest.raises(ImageProblem) as caught:
        decode(data, max_pixels=max_pixels)
    assert "\n" not in caught.value.reason
    return caught.value


class TestPolicy:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
    def test_lossless_formats_give_their_pixels(self, kind: str) -> None:
        image = photo(17, 9)
        options = {"lossless": True} if kind == "WEBP" else {}
        np.testing.assert_array_equal(pixels(saved(image, kind, **options)), np.asarray(image))

    def test_jpeg_gives_pillows_pixels(self) -> None:
        data = saved(smooth(40, 30), "JPEG", quality=90)
        np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert np.abs(pixels(data).astype(int) - np.asarray(smooth(40, 30))).max() < 12

    @pytest.mark.parametrize("size", [(40, 30), (97, 61), (1, 1), (8, 200)])
    @pytest.mark.parametrize(
        "options",
        [
            {"subsampling": 0},
            {"subsampling": 1},
            {"subsampling": 2},
            {"progressive": True},
            {"optimize": True, "quality": 20},
            {"quality": 100, "subsampling": 0, "keep_rgb": True},
            {"restart_marker_blocks": 2},
        ],
        ids=lambda options: ",".join(options),
    )
    def test_every_kind_of_jpeg_gives_pillows_pixels(self, size: tuple[int, int], options: dict[str, object]) -> None:
        for image in (photo(*size), photo(*size).convert("L"), photo(*size).convert("CMYK")):
            if image.mode != "RGB" and ("subsampling" in options):
                options = {"quality": 80}
            data = saved(image, "JPEG", **options)
            np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))

    def test_a_photo_with_more_pictures_behind_it_gives_the_first(self) -> None:
        data = saved(smooth(40, 30), "MPO", save_all=True, append_images=[photo(40, 30)], quality=90)
        opened = Image.open(io.BytesIO(data))
        assert opened.format == "MPO"
        np.testing.assert_array_equal(pixels(data), np.asarray(opened.convert("RGB")))

    def test_grey_becomes_three_equal_channels(self) -> None:
        grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
        np.testing.assert_array_equal(
            pixels(saved(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, axis=2)
        )
        bits = Image.fromarray(grey > 100)
        assert set(pixels(saved(bits, "PNG")).ravel().tolist()) == {0, 255}

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, kind: str, orientation: int) -> None:
        upright = np.zeros((24, 40, 3), dtype=np.uint8)
        upright[:8, :8] = (250, 10, 10)
        upright[-8:, :8] = (10, 250, 10)
        # How a camera held otherwise would store that scene, by the tag's definition (row 0 is the visual ..., column 0 ...).
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: upright.transpose(1, 0, 2)[::-1],
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: upright.transpose(1, 0, 2)[:, ::-1],
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, object] = (
            {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
        )
        found = pixels(saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
        assert found.shape == upright.shape
        assert np.abs(found.astype(int) - upright).max() <= (40 if kind == "JPEG" else 0)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize(
        "exif",
        [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40, b"x"],
    )
    def test_broken_exif_costs_no_image(self, exif: bytes) -> None:
        assert pixels(saved(smooth(20, 10), "JPEG", exif=exif)).shape == (10, 20, 3)

    @pytest.mark.parametrize("orientation", [0, 9, 77])
    def test_an_orientation_that_does_not_exist_is_upright(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert pixels(saved(smooth(20, 10), "JPEG", exif=exif)).shape == (10, 20, 3)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
    def test_alpha_is_composited_on_white(self, kind: str) -> None:
        rgba = np.zeros((2, 3, 4), dtype=np.uint8)
        rgba[..., 0] = 200
        rgba[..., 3] = [0, 128, 255]
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        found = pixels(saved(Image.fromarray(rgba), kind, **options))
        assert found[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]

    def test_grey_with_alpha_is_composited_on_white(self) -> None:
        found = pixels(
            saved(
                Image.merge("LA", [Image.new("L", (2, 1), 100), Image.fromarray(np.array([[0, 255]], dtype=np.uint8))]),
                "PNG",
            )
        )
        assert found[0].tolist() == [[255] * 3, [100] * 3]

    def test_a_palette_keeps_its_colours_and_its_transparency(self) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.putdata([0, 1, 2])
        assert pixels(saved(image, "PNG"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
        assert pixels(saved(image, "PNG", transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
        assert pixels(saved(image, "PNG", transparency=bytes([255, 255, 0])))[0].tolist() == [
            [255, 0, 0],
            [0, 255, 0],
            [255, 255, 255],
        ]
        assert pixels(saved(image, "GIF", transparency=2))[0].tolist() == [[255, 0, 0], [0, 255, 0], [255, 255, 255]]

    def test_a_transparent_colour_is_white(self) -> None:
        rgb = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
        assert pixels(saved(rgb, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [9, 9, 9]]
        grey = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
        assert pixels(saved(grey, "PNG", transparency=7))[0].tolist() == [[255] * 3, [9] * 3]

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bit_grey_is_scaled_and_not_clipped(self, kind: str) -> None:
        values = np.array([[0, 128, 129, 256, 32768, 65535]], dtype=np.uint16)
        found = pixels(saved(Image.fromarray(values), kind))
        assert found[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
        assert (found == found[..., :1]).all()

    def test_16_bit_big_endian_tiff_is_the_same(self) -> None:
        values = np.array([[0, 300, 65535]], dtype=">u2")
        data = saved(Image.frombytes("I;16B", (3, 1), values.tobytes()), "TIFF")
        assert pixels(data)[0, :, 0].tolist() == [0, 1, 255]

    def test_16_bit_colour_keeps_its_high_byte(self) -> None:
        raw = b"\0" + struct.pack(">6H", 0x1234, 0xFFFF, 0x00FF, 0, 0x8000, 0x7FFF)

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        data = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(raw))
            + chunk(b"IEND", b"")
        )
        assert pixels(data)[0].tolist() == [[0x12, 0xFF, 0x00], [0, 0x80, 0x7F]]

    def test_cmyk_becomes_rgb(self) -> None:
        image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        red = pixels(saved(image, "JPEG", quality=100))[0, 0]
        assert red[0] > 240
        assert red[1] < 15
        assert red[2] < 15

    @pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
    def test_of_several_frames_the_first_counts(self, kind: str) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_32_bit_pixels_are_refused(self, dtype: type) -> None:
        found = problem(saved(Image.fromarray(np.ones((2, 2), dtype=dtype)), "TIFF"))
        assert found.status == "unsupported_format"
        assert found.reason.startswith("it has 32-bit, floating or signed pixels, whose brightness range is not known")

    def test_the_policy_is_plain_data_and_names_the_jpeg_library(self) -> None:
        assert "libjpeg-turbo" in canonical_json(dict(DECODE_POLICY))
        assert policy_key(5) == policy_key(5) != policy_key(6)
        first = Preprocessing(256, 224).identity()
        assert first["decode"] == {**DECODE_POLICY, "mode": "exact"}
        modes = {canonical_json(Preprocessing(256, 224, decode=mode).identity()) for mode in DECODE_MODES}
        assert len(modes) == len(DECODE_MODES) == 3
        assert canonical_json(first) != canonical_json(Preprocessing(256, 224, "bicubic").identity())


class TestProblems:
    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_truncated_files_are_refused(self, kind: str, share: float) -> None:
        data = saved(photo(64, 48), kind)
        assert pixels(data).shape == (48, 64, 3)
        assert problem(data[: int(len(data) * share)]).status in {"truncated", "unreadable"}

    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_file_without_its_last_bytes_never_gives_other_pixels(self, kind: str) -> None:
        data = saved(photo(20, 14), kind)
        whole = pixels(data)
        for cut in range(1, 80):
            try:
                found = pixels(data[:-cut])
            except ImageProblem:
                continue
            np.testing.assert_array_equal(found, whole, err_msg=f"{cut} bytes cut")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF"])
    def test_half_a_file_is_called_truncated(self, kind: str) -> None:
        data = saved(photo(64, 48), kind)
        assert problem(data[: len(data) // 2]).status == "truncated"

    def test_too_many_pixels_are_refused_before_they_are_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = saved(Image.new("L", (300, 200)), "PNG")
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
        found = problem(data, max_pixels=59_999)
        assert (found.status, found.reason) == (
            "too_many_pixels",
            "it has 300 x 200 pixels, dataset.max_pixels allows 59,999",
        )

    @pytest.mark.parametrize("side", [10_000, 14_000])
    def test_bombs_are_refused_without_a_warning(self, side: int) -> None:
        data = saved(Image.new("1", (side, side)), "PNG")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            assert problem(data, max_pixels=64_000_000).status == "too_many_pixels"
        assert caught == []

    def test_a_larger_limit_than_pillows_own_is_obeyed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
        data = saved(Image.new("L", (100, 50)), "PNG")
        assert decode(data, max_pixels=5_000).shape == (50, 100, 3)
        assert problem(data, max_pixels=4_999).status == "too_many_pixels"

    @pytest.mark.parametrize(
        ("data", "status", "reason"),
        [
            (b"", "unreadable", "the file is empty"),
            (b"hello there", "unreadable", NO_IMAGE),
            (b"%PDF-1.7 ...", "unreadable", NO_IMAGE),
            (b"GIF89a", "truncated", None),
            (b"BM" + b"\0" * 50, "unreadable", None),
        ],
    )
    def test_what_is_no_image_is_told_in_plain_words(self, data: bytes, status: str, reason: str | None) -> None:
        found = problem(data)
        assert found.status == status
        assert reason is None or found.reason == reason

    @pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "JPEG2000", "EPS"])
    def test_other_decoders_never_see_a_file(self, kind: str) -> None:
        assert problem(saved(smooth(16, 16), kind)).status in {"unreadable", "unsupported_format"}

    def test_accepting_truncated_files_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with pytest.raises(DatasetError, match="LOAD_TRUNCATED_IMAGES is True: truncated images would pass as whole"):
            decode(saved(photo(4, 4), "PNG"), max_pixels=LIMIT)

    @settings(max_examples=300, deadline=None)
    @given(
        kind=st.sampled_from(FORMATS),
        edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
        cut=st.floats(0, 1),
    )
    def test_damage_of_any_kind_is_a_problem_of_that_image(
        self, kind: str, edits: list[tuple[float, int]], cut: float
    ) -> None:
        data = bytearray(DAMAGED[kind])
        for where, value in edits:
            data[int(where * (len(data) - 1))] = value
        if cut < 0.3:
            del data[int(cut / 0.3 * len(data)) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                assert decode(bytes(data), max_pixels=100_000).shape[2] == 3
            except ImageProblem as error:
                found = error
            else:
                return
        assert found.status in {"unreadable", "truncated", "too_many_pixels", "unsupported_format"}
        assert found.reason


DAMAGED = {kind: saved(smooth(24, 16), kind) for kind in FORMATS}


class TestPrepare:
    @pytest.mark.parametrize("size", [(40, 61), (300, 301), (511, 333), (3, 2), (9, 60)])
    def test_pixels_are_torchvisions_for_every_preset_of_its_weights(self, size: tuple[int, int]) -> None:
        pytest.importorskip("torch")
        from pipeline.io.vision import torchvision

        functional = torchvision.transforms.functional
        image = photo(*size)
        transforms = presets()
        assert len(transforms) > 15
        for transform in [*transforms, *ODD]:
            expected = functional.resize(
                image, list(_tuple(transform.resize)), interpolation=_interpolation(transform.interpolation)
            )
            expected = functional.center_crop(expected, list(_tuple(transform.crop)))
            np.testing.assert_array_equal(
                prepare(np.asarray(image), transform), np.asarray(expected), err_msg=str(transform)
            )

    def test_the_whole_official_transform_is_this_and_a_normalisation(self) -> None:
        torch = pytest.importorskip("torch")
        from pipeline.io.vision import torchvision

        weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
        image = photo(500, 375)
        mine = prepare(np.asarray(image), Preprocessing(232, 224))
        scaled = torch.from_numpy(mine).permute(2, 0, 1).to(torch.float32).div(255)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (weights.mean, weights.std))
        assert torch.equal((scaled - mean) / std, weights(image))

    def test_an_extremely_long_image_takes_no_memory_and_is_nearly_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert prepare(np.asarray(photo(1, 200_000)), Preprocessing(256, 224)).shape == (224, 224, 3)
        for size in ((40, 31), (31, 40), (33, 400)):
            for transform in (
                Preprocessing(64, 48),
                Preprocessing(20, 32),
                Preprocessing((50, 20), 32),
                Preprocessing(64, 64, "bicubic"),
            ):
                exact = prepare(np.asarray(photo(*size)), transform).astype(int)
                monkeypatch.setattr(images.preparing, "MAX_RESIZED_PIXELS", 0)
                near = prepare(np.asarray(photo(*size)), transform)
                monkeypatch.undo()
                difference = np.abs(near - exact)
                assert difference.max() <= (1 if transform.interpolation == "bilinear" else 20)
                assert difference.mean() < 0.5

    def test_the_result_may_be_written_to(self) -> None:
        for mode in DECODE_MODES:
            pixels = np.asarray(photo(8, 8))
            made = prepare(pixels, Preprocessing(8, 8, decode=mode))
            assert made.flags.writeable
            assert not np.shares_memory(made, pixels)

    @pytest.mark.parametrize("size", [(400, 533), (533, 400), (300, 301), (120, 90), (40, 700), (260, 256)])
    def test_standard_is_within_one_grey_level_of_exact(self, size: tuple[int, int]) -> None:
        pytest.importorskip("torch")
        noise = photo(*size)
        for image in (noise, smooth(*size)):
            pixels = np.asarray(image)
            for transform in (
                Preprocessing(256, 224),
                Preprocessing(232, 224),
                Preprocessing((64, 80), 48),
                Preprocessing(40, 60, "bicubic"),
                Preprocessing(256, 224, "nearest"),
            ):
                exact = prepare(pixels, transform).astype(int)
                difference = np.abs(prepare(pixels, replace(transform, decode="standard")) - exact)
                assert difference.max() <= 1
                if image is noise and transform.crop == 224:  # a ramp is full of halves to round
                    assert difference.mean() <= 0.02
                if transform.interpolation == "nearest":
                    assert difference.max() == 0

    def test_fast_is_the_same_for_an_image_that_is_not_much_larger_than_needed(self) -> None:
        pytest.importorskip("torch")
        fast, standard = (Preprocessing(64, 56, decode=mode) for mode in ("fast", "standard"))
        assert (fast.at_least, standard.at_least) == (128, None)
        small, large = (saved(smooth(side, side), "JPEG", quality=90) for side in (255, 1030))
        for data in (small, large):
            mine = prepare(decode(data, max_pixels=10**8, at_least=fast.at_least), fast).astype(int)
            theirs = prepare(decode(data, max_pixels=10**8), standard)
            assert np.abs(mine - theirs).max() <= (0 if data is small else 2)
        assert decode(large, max_pixels=10**8, at_least=128).shape == (129, 129, 3)  # an eighth, rounded up
        assert decode(large, max_pixels=10**8, at_least=129).shape == (258, 258, 3)
        assert decode(saved(smooth(1030, 1030), "PNG"), max_pixels=10**8, at_least=128).shape == (1030, 1030, 3)

    def test_wrong_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="unknown interpolation 'cubic'; there are nearest, bilinear, bicubic"):
            Preprocessing(256, 224, "cubic")
        with pytest.raises(ValueError, match="antialias=False is not supported"):
            Preprocessing(256, 224, antialias=False)
        with pytest.raises(ValueError, match="unknown decode 'quick'; there are exact, standard, fast"):
            Preprocessing(256, 224, decode="quick")


ODD = (
    Preprocessing((50, 20), (30, 40)),
    Preprocessing(20, 33),
    Preprocessing(31, (20, 50), "bicubic"),
    Preprocessing(24, 24, "nearest"),
)


def presets() -> set[Preprocessing]:
    """What torchvision's weights come with."""
    from pipeline.io.vision import torchvision

    found = set()
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            transform = weights.transforms()
            resize, crop = (
                size[0] if len(size) == 1 else tuple(size) for size in (transform.resize_size, transform.crop_size)
            )
            found.add(Preprocessing(resize, crop, transform.interpolation.value, transform.antialias is not False))
    return found


def _tuple(size: int | tuple[int, int]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else size


def _interpolation(name: str) -> object:
    from pipeline.io.vision import torchvision

    return torchvision.transforms.InterpolationMode(name)


class TestOpenFile:
    def test_a_file_below_the_root_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/1.png").write_bytes(b"hello")
        assert open_file(tmp_path, "a/1.png") == b"hello"
        assert open_file(tmp_path, "a/1.png", content_digest(b"hello")) == b"hello"

    @pytest.mark.parametrize("path", ["../secret.txt", "a/../../secret.txt", "link/secret.txt", "file"])
    def test_nothing_outside_the_root_is_read(self, tmp_path: Path, path: str) -> None:
        root = tmp_path / "root"
        (root / "a").mkdir(parents=True)
        (tmp_path / "secret.txt").write_bytes(b"secret")
        (root / "link").symlink_to(tmp_path)
        (root / "file").symlink_to(tmp_path / "secret.txt")
        with pytest.raises(ImageProblem, match="it lies outside") as caught:
            open_file(root, path)
        assert caught.value.status == "unavailable"

    def test_a_link_that_stays_inside_and_a_root_that_is_a_link_are_fine(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        (tmp_path / "root/1.png").write_bytes(b"hello")
        (tmp_path / "root/2.png").symlink_to("1.png")
        (tmp_path / "alias").symlink_to("root")
        assert open_file(tmp_path / "alias", "2.png") == b"hello"

    def test_what_cannot_be_read_is_a_problem(self, tmp_path: Path) -> None:
        with pytest.raises(ImageProblem, match="it cannot be read: No such file or directory"):
            open_file(tmp_path, "1.png")
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ImageProblem, match="it is not a regular file"):
            open_file(tmp_path, "pipe.png")
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(ImageProblem, match="it is not a regular file"):
            open_file(tmp_path, "folder.png")

    def test_other_bytes_than_the_index_knows_are_a_problem(self, tmp_path: Path) -> None:
        (tmp_path / "1.png").write_bytes(b"changed")
        with pytest.raises(ImageProblem, match="it changed after the scan; run again"):
            open_file(tmp_path, "1.png", content_digest(b"before"))

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_file_that_changes_while_it_is_read_is_read_once_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        path = tmp_path / "1.png"
        path.write_bytes(b"old")
        real_fstat = os.fstat
        calls: list[int] = []

        def fstat(descriptor: int) -> os.stat_result:
            calls.append(descriptor)
            result = real_fstat(descriptor)
            if len(calls) in (1, 3)[:times]:  # the first look at the file in each round
                path.write_bytes(b"newer" * len(calls))
            return result

        monkeypatch.setattr(images.reading.os, "fstat", fstat)
        if times == 1:
            assert open_file(tmp_path, "1.png") == b"newer"
        else:
            with pytest.raises(ImageProblem, match="it changes while it is read"):
                open_file(tmp_path, "1.png")


def test_threads_decode_at_once() -> None:
    data = saved(smooth(60, 40), "JPEG")
    expected = pixels(data)
    results: list[bool] = []

    def work() -> None:
        results.extend(bool((pixels(data) == expected).all()) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80
