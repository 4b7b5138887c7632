"""Odd files: their pixels are what the file says, or the reason is why they are refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from odd_images import Samples, chunk, png, tiff
from PIL import Image

from pipeline.images import ImageProblem, content_key, decode, kind_of
from pipeline.images.decoding import reads_heic
from pipeline.io.digests import content_digest

RNG = np.random.default_rng(0)
SHAPE = (7, 13)


def samples(bits: int, count: int = 1) -> Samples:
    return RNG.integers(0, 2**bits, (*SHAPE, count))


def to_8_bits(values: Samples, bits: int) -> NDArray[np.int64]:
    """The grey levels of values, in three channels where there is one."""
    levels = np.round(values * 255 / (2**bits - 1)).astype(np.int64)
    return np.repeat(levels, 3, axis=2) if levels.shape[2] == 1 else levels


def check(data: bytes, expected: NDArray[np.int64], within: int = 0) -> None:
    found = decode(data, max_pixels=10_000).astype(np.int64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= within


def refused(data: bytes) -> tuple[str, str]:
    with pytest.raises(ImageProblem) as caught:
        decode(data, max_pixels=10_000)
    return caught.value.status, caught.value.reason


class TestTiff:
    @pytest.mark.parametrize("compression", [1, 8])
    @pytest.mark.parametrize("white_is_zero", [False, True])
    @pytest.mark.parametrize(("bits", "orders"), [(1, "<>"), (2, "<>"), (4, "<>"), (8, "<>"), (12, "<"), (16, "<>")])
    def test_grey_of_every_depth(self, bits: int, orders: str, white_is_zero: bool, compression: int) -> None:
        for order in orders:
            values = samples(bits)
            data = tiff(values, bits, 0 if white_is_zero else 1, order, compression=compression)
            if white_is_zero and (bits == 12 or (bits == 16 and order == ">")):
                status, reason = refused(data)
                assert status == "unsupported_format"
                assert reason.startswith(f"a TIFF of 1 x {bits} bits (photometric 0, ")
                continue
            levels = to_8_bits(values, bits)
            check(data, 255 - levels if white_is_zero else levels)

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_colour_in_every_layout_gives_its_pixels_or_is_refused(self, order: str) -> None:
        for bits, separate, compression in ((8, False, 1), (8, True, 1), (16, False, 1), (16, True, 8)):
            values = samples(bits, 3)
            check(tiff(values, bits, 2, order, separate, compression), values >> (bits - 8))
        assert refused(tiff(samples(16, 3), 16, 2, order, separate=True)) == (
            "unsupported_format",
            "a TIFF of 3 x 16 bits (photometric 2, compression 1, in separate planes) is not read; save it as PNG, or in RGB with 8 bits",
        )
        cmyk = samples(8, 4)
        expected = np.round((255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255).astype(np.int64)
        check(tiff(cmyk, 8, 5, order), expected, within=1)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (tiff(samples(12), 12, 1, ">"), "a TIFF of 1 x 12 bits (photometric 1, compression 1)"),
            (tiff(samples(12, 3), 12, 2), "a TIFF of 3 x 12 bits (photometric 2, compression 1)"),
            (tiff(samples(16, 2), 16, 1), "a TIFF of 2 x 16 bits (photometric 1, compression 1)"),
            (tiff(samples(8, 4), 8, 2, separate=True, tags=[(338, [1])]), "a TIFF of 4 x 8 bits (photometric 2, compression 1, in separate planes)"),
            (tiff(samples(8), 8, 1, tags=[(339, [2])]), "a TIFF of 1 x 8 bits (photometric 1, compression 1, signed)"),
            (tiff(samples(16, 3), 16, 2, tags=[(339, [2] * 3)]), "a TIFF of 3 x 16 bits (photometric 2, compression 1, signed)"),
            (tiff(samples(8, 3), 8, 2, compression=34887), "a TIFF of 3 x 8 bits (photometric 2, compression 34887)"),
            (tiff(samples(16), 16, 32803), "a TIFF of 1 x 16 bits (photometric 32803, compression 1)"),
        ],
    )  # fmt: skip
    def test_what_pillow_does_not_read_is_named(self, data: bytes, reason: str) -> None:
        assert refused(data) == (
            "unsupported_format",
            f"{reason} is not read; save it as PNG, or in RGB with 8 bits",
        )

    def test_signed_pixels_have_no_known_brightness(self) -> None:
        assert refused(tiff(samples(15), 16, 1, tags=[(339, [2])])) == (
            "unsupported_format",
            "it has 32-bit, floating or signed pixels, whose brightness range is not known; save it with 8 or 16 bits",
        )

    @pytest.mark.parametrize("tags", [[(50706, [1, 4, 0, 0])], [(254, [1])]])
    def test_a_raw_file_is_not_taken_for_the_small_picture_in_it(self, tags: list[tuple[int, list[int]]]) -> None:
        status, reason = refused(tiff(samples(8, 3), 8, 2, tags=tags))
        assert (status, reason) == (
            "unsupported_format",
            "it is a camera's raw file, or begins with a preview; save the photo as JPEG or PNG",
        )

    def test_libtiff_does_not_write_to_the_terminal(self, capfd: pytest.CaptureFixture[str]) -> None:
        status, reason = refused(tiff(samples(8, 3), 8, 2, compression=5))
        assert (status, reason) == ("unreadable", "it is a TIFF image, and damaged (decoder error -2)")
        assert capfd.readouterr() == ("", "")


class TestPng:
    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_a_transparent_grey_is_white_and_no_other(self, bits: int, interlaced: bool) -> None:
        values = samples(bits)
        colour = 2**bits - 1 if bits < 8 else int(values[0, 0, 0])
        expected = np.where(values == colour, 255, to_8_bits(np.where(values == colour, 0, values), bits))
        check(png(values, bits, 0, chunk(b"tRNS", struct.pack(">H", colour)), interlaced=interlaced), expected)

    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize("bits", [8, 16])
    def test_a_transparent_colour_is_white_and_no_other(self, bits: int, interlaced: bool) -> None:
        values = samples(bits, 3)
        colour = values[0, 0].copy()
        values[-1, -1], values[3, 3] = colour, colour ^ [1, 0, 0]
        expected = values >> (bits - 8)
        expected[0, 0] = expected[-1, -1] = 255
        check(png(values, bits, 2, chunk(b"tRNS", struct.pack(">3H", *colour)), interlaced=interlaced), expected)

    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize(("bits", "colour", "count"), [(8, 4, 2), (16, 4, 2), (8, 6, 4), (16, 6, 4)])
    def test_alpha_of_both_depths_is_put_on_white(self, bits: int, colour: int, count: int, interlaced: bool) -> None:
        values = samples(bits, count)
        levels = values >> (bits - 8)
        alpha = levels[..., -1:] / 255
        expected = np.round(levels[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.int64)
        check(png(values, bits, colour, interlaced=interlaced), np.broadcast_to(expected, (*SHAPE, 3)), within=1)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_a_palette_with_transparency(self, bits: int) -> None:
        values, palette, alpha = samples(bits), RNG.integers(0, 256, (2**bits, 3)), RNG.integers(0, 256, 2**bits)
        extra = chunk(b"PLTE", palette.astype("u1").tobytes()) + chunk(b"tRNS", alpha.astype("u1").tobytes())
        share = alpha[values] / 255
        expected = np.round(palette[values[..., 0]] * share + 255 * (1 - share)).astype(np.int64)
        check(png(values, bits, 3, extra), expected, within=1)

    @pytest.mark.parametrize(
        "extra",
        [
            chunk(b"tEXt", b"a\0b", checksum=1),
            chunk(b"gAMA", struct.pack(">I", 45455), checksum=1),
            chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1_100_000)),
            chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 1_100_000)),
            chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 1_100_000)),
            chunk(b"pHYs", b"x"),
            chunk(b"acTL", b"x"),
        ],
        ids=[
            "text checksum",
            "gamma checksum",
            "large zTXt",
            "large iTXt",
            "large profile",
            "short pHYs",
            "broken acTL",
        ],
    )
    def test_what_is_not_about_the_pixels_costs_no_image(self, extra: bytes) -> None:
        values = samples(8, 3)
        exif = Image.Exif()
        exif[0x0112] = 3
        upright = chunk(b"eXIf", exif.tobytes()[6:])
        check(png(values, 8, 2, before=extra), values)
        check(png(values, 8, 2, after=extra), values)
        check(png(values, 8, 2, before=upright + extra), values[::-1, ::-1])

    def test_a_wrong_checksum_of_what_makes_the_pixels_is_refused(self) -> None:
        transparent = chunk(b"tRNS", struct.pack(">3H", 1, 2, 3), checksum=1)
        assert refused(png(samples(8, 3), 8, 2, before=transparent)) == (
            "unreadable",
            "it is a PNG image, and damaged (broken PNG file (bad header checksum in b'tRNS'))",
        )


class TestJpeg:
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
    def test_missing_data_are_found_behind_an_end_mark(self, mode: str, options: dict[str, int]) -> None:
        noise = Image.fromarray(RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)).convert(mode)
        sink = io.BytesIO()
        noise.save(sink, "JPEG", **options)
        data = sink.getvalue()
        for share in (0.5, 0.6, 0.7):
            status, reason = refused(data[: int(len(data) * share)] + b"\xff\xd9")
            assert status == "truncated"
            assert reason.startswith(
                ("some of its data are missing or damaged (Corrupt JPEG data: ", "its end is missing (")
            )
        whole = np.asarray(noise.convert("RGB"))
        assert decode(data, max_pixels=10_000).shape == whole.shape

    def test_what_does_no_harm_costs_no_image(self) -> None:
        sink = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(sink, "JPEG")
        data = sink.getvalue()
        whole = decode(data, max_pixels=10_000)
        for other in (data + b"junk", data + b"\0" * 100, data[:-2] + b"\x12" * 9 + data[-2:]):
            np.testing.assert_array_equal(decode(other, max_pixels=10_000), whole)


class TestKinds:
    @pytest.mark.parametrize(
        ("start", "name"),
        [
            (b"\xff\xd8\xff\xe0", "a JPEG image"),
            (b"RIFF\x10\0\0\0WEBPVP8 ", "a WebP image"),
            (b"BM" + b"\0" * 12 + b"\x28\0\0\0", "a BMP image"),
            (b"MM\0*\0\0\0\x08", "a TIFF image"),
            (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw file"),
            (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "a HEIC photo"),
            (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif", "an AVIF image"),
            (b"BMW is a car, and no image at all", None),
            (b"", None),
        ],
    )
    def test_content_tells_the_kind(self, start: bytes, name: str | None) -> None:
        kind = kind_of(start)
        assert (kind and kind.name) == name

    def test_avif_is_read(self) -> None:
        y, x = np.mgrid[0:48, 0:64]
        smooth = np.stack([x * 4, y * 5, x + y], axis=2).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(smooth).save(sink, "AVIF", quality=100, subsampling="4:4:4")
        check(sink.getvalue(), smooth.astype(np.int64), within=6)
        assert refused(sink.getvalue()[:-40])[0] == "truncated"

    def test_heic_is_read_with_the_extra_and_the_extra_is_named_without(self) -> None:
        if not reads_heic():
            assert refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == (
                "unsupported_format",
                "it is a HEIC photo; pip install 'manyheads[heic]' has it read, or save it as JPEG or PNG",
            )
            return
        y, x = np.mgrid[0:48, 0:64]
        smooth = np.stack([x * 4, y * 5, x + y], axis=2).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        sink = io.BytesIO()
        Image.fromarray(smooth).save(sink, "HEIF", quality=95, exif=exif.tobytes())
        check(sink.getvalue(), np.rot90(smooth, -1).astype(np.int64), within=25)
        assert refused(sink.getvalue()[:-40])[0] == "truncated"


class TestContentKey:
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_only_files_that_were_read_otherwise_have_a_key_of_their_own(self) -> None:
        transparent = chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
        ordinary = [
            tiff(samples(8, 3), 8, 2),
            tiff(samples(16), 16, 1),
            tiff(samples(8), 8, 0),
            png(samples(16, 3), 16, 2),
            png(samples(8, 3), 8, 2, transparent),
            png(samples(4), 4, 0),
            b"\xff\xd8\xff\xe0",
            b"II*\0 damaged",
            b"",
        ]
        assert [content_key(data) for data in ordinary] == [content_digest(data) for data in ordinary]
        others = [
            tiff(samples(16), 16, 0),
            tiff(samples(12), 12, 1),
            tiff(samples(16, 3), 16, 2, separate=True),
            tiff(samples(8), 8, 1, tags=[(339, [2])]),
            tiff(samples(8, 3), 8, 2, tags=[(254, [1])]),
            png(samples(16, 3), 16, 2, transparent),
            png(samples(4), 4, 0, chunk(b"tRNS", b"\0\1")),
        ]
        assert not {content_key(data) for data in others} & {content_digest(data) for data in others}
        assert len({content_key(data) for data in others}) == len(others)
