from __future__ import annotations

import gzip
import os
import socket
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from make import grey_array, grey_png, mask_png, save_array
from umiad.errors import InputError
from umiad.io import Limits, kind_of_file, looks_like_image, raster, read_image, read_mask
from umiad.types import Image

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"
STEP8 = 1 / 255  # one step of 8 bits; decoding must be better than that
HERE = Limits(isolated=False)  # decode in this process, where a test can put faults
EXACT = 1e-6  # float32 rounding of values in 0..1


def encoded(picture: PIL.Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png16(samples: np.ndarray, colour_type: int, extra: bytes = b"") -> bytes:
    """A PNG with 16 bits per channel, [H,W,C], which Pillow itself cannot write in colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def declared_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


# --- depth and modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_ramp_keeps_its_depth(tmp_path: Path, kind: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = read_image(stored(tmp_path / "ramp", encoded(PIL.Image.fromarray(ramp), kind)))
    assert image.pixels.dtype == np.float32
    assert image.bits == 16
    assert len(np.unique(image.pixels)) == 65536
    # float32 holds 24 bits, so the error is far below one step of 16 bits
    assert np.abs(image.pixels[0].astype(np.float64) - ramp / 65535).max() < 0.01 / 65535


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=">u2").reshape(256, 256)
    image = read_image(stored(tmp_path / "ramp", encoded(PIL.Image.fromarray(ramp), "TIFF")))
    np.testing.assert_allclose(image.pixels[0], ramp / 65535, atol=EXACT)


def test_16_bit_colour_is_reduced_and_says_so(tmp_path: Path) -> None:
    samples = np.arange(48).reshape(4, 4, 3) * 1300
    image = read_image(stored(tmp_path / "a.png", png16(samples, 2)))
    assert image.bits == 16
    assert any("reduced to 8" in note for note in image.notes)
    np.testing.assert_allclose(np.moveaxis(image.pixels, 0, 2), samples / 65535, atol=STEP8)


def test_32_bit_integers_up_to_16_bits_are_read(tmp_path: Path) -> None:
    array = np.array([[0, 1000], [30000, 65535]], dtype=np.int32)
    image = read_image(save_array(tmp_path / "a.tif", array))
    np.testing.assert_allclose(image.pixels[0], array / 65535, atol=EXACT)
    assert (image.mode, image.bits) == ("I", 32)


@pytest.mark.parametrize("worst", [65536, -1])
def test_32_bit_integers_of_unknown_range_are_refused(tmp_path: Path, worst: int) -> None:
    path = save_array(tmp_path / "a.tif", np.array([[0, worst]], dtype=np.int32))
    with pytest.raises(InputError, match=r"32-bit integer values .* expected 0 to 65535"):
        read_image(path)


def test_float_tiff_in_range_is_kept_as_it_is(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((5, 7), dtype=np.float32)
    image = read_image(save_array(tmp_path / "a.tif", array))
    np.testing.assert_array_equal(image.pixels[0], array)


@pytest.mark.parametrize("worst", [1.5, -0.1, np.nan, np.inf])
def test_float_tiff_out_of_range_is_refused(tmp_path: Path, worst: float) -> None:
    path = save_array(tmp_path / "a.tif", np.array([[0.5, worst]], dtype=np.float32))
    with pytest.raises(InputError, match="floating-point values"):
        read_image(path)


def picture_of(mode: str) -> PIL.Image.Image:
    return PIL.Image.new(mode, (4, 3), {"1": 1, "L": 51, "P": 0}.get(mode, (10, 20, 30, 40)[: len(mode)]))


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("1", "PNG", [1.0]),
        ("1", "BMP", [1.0]),
        ("L", "PNG", [0.2]),
        ("L", "BMP", [0.2]),
        ("L", "TIFF", [0.2]),
        ("RGB", "PNG", [10 / 255, 20 / 255, 30 / 255]),
        ("RGB", "BMP", [10 / 255, 20 / 255, 30 / 255]),
        ("RGB", "TIFF", [10 / 255, 20 / 255, 30 / 255]),
        ("RGBA", "PNG", [10 / 255 * 40 / 255, 20 / 255 * 40 / 255, 30 / 255 * 40 / 255]),
        ("RGBA", "TIFF", [10 / 255 * 40 / 255, 20 / 255 * 40 / 255, 30 / 255 * 40 / 255]),
        ("LA", "PNG", [10 / 255 * 20 / 255]),
        ("CMYK", "TIFF", [245 / 255 * 215 / 255, 235 / 255 * 215 / 255, 225 / 255 * 215 / 255]),
        ("CMYK", "JPEG", [245 / 255 * 215 / 255, 235 / 255 * 215 / 255, 225 / 255 * 215 / 255]),
    ],
)
def test_golden_values_of_each_mode(tmp_path: Path, mode: str, kind: str, expected: list[float]) -> None:
    image = read_image(stored(tmp_path / "a", encoded(picture_of(mode), kind)))
    assert image.pixels.shape == (len(expected), 3, 4)
    np.testing.assert_allclose(image.pixels[:, 1, 1], expected, atol=STEP8)
    np.testing.assert_array_equal(image.pixels[:, 0, 0], image.pixels[:, 2, 3])


@pytest.mark.parametrize(("mode", "kind"), [("YCbCr", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF")])
def test_other_colour_spaces_become_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    image = read_image(stored(tmp_path / "a", encoded(PIL.Image.new(mode, (8, 8), (128, 128, 128)), kind)))
    assert image.pixels.shape == (3, 8, 8)
    assert float(np.ptp(image.pixels)) < 0.05  # chroma 128 is neutral; LAB rounds and has its own white


def test_palette_without_and_with_transparency(tmp_path: Path) -> None:
    picture = PIL.Image.new("P", (4, 2), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    picture.putpixel((0, 0), 2)
    plain = read_image(stored(tmp_path / "a.png", encoded(picture, "PNG")))
    keyed = read_image(stored(tmp_path / "b.png", encoded(picture, "PNG", transparency=1)))
    assert plain.mode == keyed.mode == "P"
    np.testing.assert_array_equal(plain.pixels[:, 1, 1], [1, 0, 0])
    np.testing.assert_array_equal(keyed.pixels[:, 1, 1], [0, 0, 0])
    np.testing.assert_array_equal(keyed.pixels[:, 0, 0], [0, 0, 1])
    assert plain.notes == ()
    assert keyed.notes == ("transparent pixels were composited on black",)


def test_palette_with_alpha_in_tiff(tmp_path: Path) -> None:
    picture = PIL.Image.new("RGBA", (4, 4), (200, 100, 50, 128)).convert("PA")
    image = read_image(stored(tmp_path / "a.tif", encoded(picture, "TIFF")))
    assert image.pixels.shape == (3, 4, 4)
    assert float(image.pixels.max()) <= 200 / 255 * 129 / 255


@pytest.mark.parametrize(
    ("mode", "value", "key"), [("L", 60, 60), ("RGB", (9, 8, 7), (9, 8, 7)), ("1", 1, 1)]
)
def test_a_transparent_key_colour_becomes_black(
    tmp_path: Path, mode: str, value: int | tuple[int, ...], key: int | tuple[int, ...]
) -> None:
    picture = PIL.Image.new(mode, (4, 4), value)
    image = read_image(stored(tmp_path / "a.png", encoded(picture, "PNG", transparency=key)))
    assert float(image.pixels.max()) == 0.0


def test_a_key_colour_of_16_bit_grey_and_colour(tmp_path: Path) -> None:
    grey = np.full((2, 3, 1), 40000)
    grey[0, 0] = 1234
    key = chunk(b"tRNS", struct.pack(">H", 40000))
    image = read_image(stored(tmp_path / "g.png", png16(grey, 0, key)))
    assert np.count_nonzero(image.pixels) == 1
    colour = np.full((2, 3, 3), 40000)
    colour[1, 2] = 0xFFFF
    key = chunk(b"tRNS", struct.pack(">HHH", 40000, 40000, 40000))
    image = read_image(stored(tmp_path / "c.png", png16(colour, 2, key)))
    assert np.count_nonzero(image.pixels) == 3


def test_a_key_colour_of_4_bit_grey_is_compared_in_4_bits(tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)) + chunk(
        b"tRNS", struct.pack(">H", 5)
    )
    body = header + chunk(b"IDAT", zlib.compress(b"\0\x05\x5f")) + chunk(b"IEND", b"")
    image = read_image(stored(tmp_path / "a.png", b"\x89PNG\r\n\x1a\n" + body))
    np.testing.assert_array_equal(image.pixels[0], [[0, 0, 0, 1]])  # stored 0, 5, 5, 15
    assert image.bits == 4


def test_opaque_alpha_changes_nothing_and_is_not_remarked(tmp_path: Path) -> None:
    image = read_image(
        stored(tmp_path / "a.png", encoded(PIL.Image.new("RGBA", (4, 4), (9, 9, 9, 255)), "PNG"))
    )
    assert image.notes == ()
    np.testing.assert_allclose(image.pixels, 9 / 255, atol=EXACT)


def test_image_tells_name_size_mode_and_bits(tmp_path: Path) -> None:
    path = grey_png(tmp_path / "scan; rm -rf ü.png", (40, 50))
    image = read_image(str(path))
    assert (image.name, image.size, image.mode, image.bits) == (str(path), (40, 50), "L", 8)
    assert image.pixels.flags.c_contiguous
    np.testing.assert_allclose(image.pixels[0], grey_array((40, 50)) / 255, atol=EXACT)


# --- orientation -----------------------------------------------------------------------------------------


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The stored array that EXIF `orientation` (EXIF 2.32, section 4.6.4) turns into `upright`."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_of_image_and_mask(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = grey_array((20, 30))
    picture = PIL.Image.fromarray(np.ascontiguousarray(stored_as(upright, orientation)))
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = stored(tmp_path / "a", encoded(picture, kind, exif=exif))
    np.testing.assert_array_equal(np.round(read_image(path).pixels[0] * 255), upright)
    np.testing.assert_array_equal(read_mask([path], size=(20, 30)), upright > 127)


def test_exif_orientation_of_jpeg(tmp_path: Path) -> None:
    picture = PIL.Image.new("L", (64, 32))
    picture.paste(255, (0, 0, 64, 8))  # top edge white; orientation 6 turns it to the right
    exif = picture.getexif()
    exif[0x0112] = 6
    pixels = read_image(stored(tmp_path / "a.jpg", encoded(picture, "JPEG", exif=exif))).pixels[0]
    assert pixels.shape == (64, 32)
    assert pixels[:, -4:].min() > 0.9
    assert pixels[:, :16].max() < 0.1


def test_damaged_exif_counts_as_upright_with_a_note(tmp_path: Path) -> None:
    content = encoded(PIL.Image.new("L", (64, 32), 9), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff")
    image = read_image(stored(tmp_path / "a.jpg", content))
    assert image.size == (32, 64)
    assert any("metadata are damaged" in note for note in image.notes)


def test_exif_that_makes_the_decoder_fail_counts_as_upright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise struct.error("unpack requires a buffer")

    path = grey_png(tmp_path / "a.png", (40, 50))
    monkeypatch.setattr(PIL.Image.Image, "getexif", broken)
    image = read_image(path, limits=HERE)
    assert image.size == (40, 50)
    assert any("taken as upright" in note for note in image.notes)


def test_unknown_orientation_counts_as_upright(tmp_path: Path) -> None:
    picture = PIL.Image.new("L", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = 77
    assert read_image(stored(tmp_path / "a.png", encoded(picture, "PNG", exif=exif))).size == (4, 6)


# --- what a file is --------------------------------------------------------------------------------------


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    png = stored(tmp_path / "a.jpg", encoded(PIL.Image.new("L", (4, 4), 7), "PNG"))
    none = stored(tmp_path / "noname", encoded(PIL.Image.new("L", (4, 4), 7), "JPEG"))
    assert read_image(png).size == read_image(none).size == (4, 4)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (bytes(128) + b"DICM" + bytes(300), "DICOM"),
        (b"II*\0" + bytes(124) + b"DICM" + bytes(300), "DICOM"),
        (struct.pack("<HHcc", 8, 5, b"C", b"S") + struct.pack("<H", 10) + b"ISO_IR 100", "DICOM"),
        (struct.pack("<HHI", 8, 0, 4) + bytes(12), "DICOM"),
        (struct.pack("<i", 348) + bytes(340) + b"n+1\0" + bytes(10), "NIfTI"),
        (struct.pack("<i", 540) + b"n+2\0\r\n\x1a\n" + bytes(540), "NIfTI"),
        (gzip.compress(struct.pack("<i", 348) + bytes(340) + b"n+1\0" + bytes(10), mtime=0), "NIfTI.gz"),
        (gzip.compress(b"hello", mtime=0), "gzip"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip"),
        (b"\x08\x00 is how this text starts", ""),
    ],
)
def test_I13_content_decides_what_a_file_is(tmp_path: Path, content: bytes, kind: str) -> None:
    path = stored(tmp_path / "scan.png", content)
    assert kind_of_file(path) == kind
    named = {"DICOM": "PixelData|DICOM", "gzip": "is a gzip file", "": "no known image format"}
    with pytest.raises(InputError, match=named.get(kind, "declares 0 dimensions|NIfTI")):
        read_image(path)


@pytest.mark.parametrize(
    "content", [b"x", b"BM but only a text that starts like that", b"GIF89a" + bytes(50), b"<html></html>"]
)
def test_unknown_content_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="no known image format"):
        read_image(stored(tmp_path / "a.png", content))


def test_looks_like_image(tmp_path: Path) -> None:
    assert looks_like_image(stored(tmp_path / "damaged.PNG", b"nothing"))
    assert looks_like_image(tmp_path / "missing.tiff")
    assert looks_like_image(stored(tmp_path / "noname", encoded(PIL.Image.new("L", (4, 4)), "BMP")))
    assert not looks_like_image(stored(tmp_path / "notes.txt", b"hello"))
    assert looks_like_image(stored(tmp_path / "scan", bytes(128) + b"DICM" + bytes(300)))
    assert looks_like_image(tmp_path / "missing.nii.gz")
    assert not looks_like_image(stored(tmp_path / "empty", b""))
    assert not looks_like_image(tmp_path / "missing")
    (tmp_path / "folder.png").mkdir()
    assert not looks_like_image(tmp_path / "folder.png")


# --- files that cannot be used ---------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        read_image(tmp_path / "a.png")
    assert caught.value.path == str(tmp_path / "a.png")
    assert caught.value.hint


def test_folder_empty_file_and_path_with_nul(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="is empty"):
        read_image(stored(tmp_path / "a.png", b""))
    with pytest.raises(InputError, match="cannot be read"):
        read_image("a\0.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path / ("a" * 300))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
@pytest.mark.timeout(20)
def test_pipes_sockets_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "link.png"):
        with pytest.raises(InputError, match="special file"):
            read_image(tmp_path / name)
    assert not looks_like_image(Path("/dev/zero"))
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the length of a socket's path is limited
        try:
            server.bind("s.png")
        finally:
            os.chdir(here)
    with pytest.raises(InputError, match="special file"):
        read_image(tmp_path / "s.png")


def test_links_to_files_are_followed_and_loops_refused(tmp_path: Path) -> None:
    grey_png(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert read_image(tmp_path / "link.png").size == (64, 64)
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path / "loop.png")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = grey_png(tmp_path / "a.png")

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="no permission"):
        read_image(path)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = grey_png(tmp_path / "a.png")
    truth = os.fstat

    def longer(handle: int) -> os.stat_result:
        found = list(truth(handle))
        found[6] += 10
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", longer)
    with pytest.raises(InputError, match="changed while it was read"):
        read_image(path)


def test_ceilings(tmp_path: Path) -> None:
    path = grey_png(tmp_path / "a.png", (40, 50))
    size = path.stat().st_size
    assert read_image(path, limits=Limits(max_bytes=size, max_pixels=2000, min_edge=40)).size == (40, 50)
    with pytest.raises(InputError, match=f"has {size} bytes, the ceiling is {size - 1} bytes"):
        read_image(path, limits=Limits(max_bytes=size - 1))
    with pytest.raises(InputError, match="declares 50 x 40 = 2000 pixels, the ceiling is 1999"):
        read_image(path, limits=Limits(max_pixels=1999))
    with pytest.raises(InputError, match="has 40 x 50 pixels, expected at least 41 on each edge"):
        read_image(path, limits=Limits(min_edge=41))


@pytest.mark.parametrize("edge", [7000, 13_000, 30_000, 2**31 - 1])
def test_bombs_are_refused_by_their_declared_size(
    tmp_path: Path, edge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("decoded before the ceiling was checked")

    monkeypatch.setattr(PIL.Image.Image, "load", never)
    with pytest.raises(InputError, match="declares"):
        read_image(stored(tmp_path / "a.png", declared_png(edge, edge)))


def test_jpeg_header_bomb(tmp_path: Path) -> None:
    content = bytearray(encoded(PIL.Image.new("L", (8, 8)), "JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(InputError, match="declares"):
        read_image(stored(tmp_path / "a.jpg", bytes(content)))


@pytest.mark.parametrize(("kind", "count"), [("TIFF", 3), ("PNG", 2)])
def test_several_frames_are_refused_with_their_count(tmp_path: Path, kind: str, count: int) -> None:
    frames = [PIL.Image.fromarray(grey_array((8, 8), seed)) for seed in range(count)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=f"holds {count} frames"):
        read_image(stored(tmp_path / "a", content))


def test_counting_frames_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster, "_MOST_FRAMES", 3)
    frame = PIL.Image.new("L", (4, 4))
    content = encoded(frame, "TIFF", save_all=True, append_images=[frame] * 6)
    with pytest.raises(InputError, match="at least 3 frames"):
        read_image(stored(tmp_path / "a.tif", content), limits=HERE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_prefixes_are_refused_or_complete(tmp_path: Path, kind: str) -> None:
    content = encoded(PIL.Image.fromarray(grey_array((48, 40))), kind)
    path = tmp_path / "a"
    whole = read_image(stored(path, content)).pixels
    for cut in np.linspace(0, len(content) - 1, 64).astype(int):
        stored(path, content[:cut])
        try:
            pixels = read_image(path).pixels
        except InputError:
            continue
        np.testing.assert_array_equal(pixels, whole)


def test_bad_checksum_is_refused(tmp_path: Path) -> None:
    content = bytearray(encoded(PIL.Image.fromarray(grey_array((48, 40))), "PNG"))
    start = content.rindex(b"IEND") - 8  # the last byte of IDAT's checksum lies before IEND's length
    content[start + 3] ^= 1
    with pytest.raises(InputError, match="cannot be decoded as PNG"):
        read_image(stored(tmp_path / "a.png", bytes(content)))


@pytest.mark.parametrize(
    "error",
    [
        OSError("x"),
        SyntaxError("x"),
        ValueError("x"),
        struct.error("x"),
        OverflowError("x"),
        ZeroDivisionError(),
        IndexError("x"),
        KeyError("x"),
        NotImplementedError("x"),
        RecursionError("x"),
        MemoryError(),
        PIL.Image.DecompressionBombError("x"),
        PIL.UnidentifiedImageError("x"),
    ],
)
def test_whatever_a_decoder_raises_becomes_one_input_error(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    path = grey_png(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image.Image, "load", broken)
    with pytest.raises(InputError) as caught:
        read_image(path, limits=HERE)
    assert caught.value.path == str(path)
    assert caught.value.reason
    assert caught.value.hint
    assert caught.value.__cause__ is error


def test_a_truncated_tiff_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_array(tmp_path / "a.tif", grey_array((8, 8)))
    truth = PIL.Image.Image.getexif

    def warned(picture: PIL.Image.Image) -> PIL.Image.Exif:
        warnings.warn("Truncated File Read", UserWarning, stacklevel=2)
        return truth(picture)

    monkeypatch.setattr(PIL.Image.Image, "getexif", warned)
    with pytest.raises(InputError, match="truncated TIFF"):
        read_image(path, limits=HERE)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]), data=st.data())
def test_mutants_give_an_image_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    content = bytearray(encoded(PIL.Image.fromarray(grey_array((16, 16))), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = stored(tmp_path_factory.getbasetemp() / "mutant", bytes(content))
    assert_sound(outcome(path), path)


def outcome(path: Path) -> Image | InputError:
    try:
        return read_image(path)
    except InputError as error:
        return error


def assert_sound(found: Image | InputError, path: Path) -> None:
    if isinstance(found, InputError):
        assert found.path == str(path)
        assert found.reason
        return
    assert found.pixels.dtype == np.float32
    assert found.pixels.ndim == 3
    assert found.pixels.shape[0] in (1, 3)
    assert found.pixels.min() >= 0
    assert found.pixels.max() <= 1


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not CORPORA.is_dir(), reason="the corpora do not lie beside the repository")
@pytest.mark.parametrize("folder", ["png_suite", "fuzz_png", "fuzz_jpeg", "fuzz_tiff", "fuzz_bmp", "nifti"])
def test_corpora_give_an_image_or_an_input_error(folder: str) -> None:
    files = [path for path in (CORPORA / folder).iterdir() if path.is_file()]
    assert files
    for path in files:
        found = outcome(path)
        assert_sound(found, path)
        damaged = path.name.split("__")[-1].startswith("x")  # PngSuite's name for a corrupt file
        assert not (damaged and isinstance(found, Image)), f"{path.name} is damaged, but was read"


# --- masks -----------------------------------------------------------------------------------------------


def test_masks_are_united(tmp_path: Path) -> None:
    one = mask_png(tmp_path / "a_mask.png", box=(0, 0, 10, 10))
    two = mask_png(tmp_path / "a_mask_1.png", box=(20, 30, 25, 40))
    mask = read_mask([one, two], size=(64, 64))
    assert mask.dtype == bool
    assert mask.sum() == 100 + 50
    assert mask[35, 22]
    assert not mask[22, 35]


def test_masks_are_cut_above_half(tmp_path: Path) -> None:
    path = save_array(tmp_path / "m.png", np.array([[0, 1, 127, 128, 255]], dtype=np.uint8))
    np.testing.assert_array_equal(read_mask([path]), [[False, False, False, True, True]])


def test_mask_takes_the_brightest_channel_and_ignores_alpha(tmp_path: Path) -> None:
    colour = np.zeros((2, 3, 4), dtype=np.uint8)
    colour[0, 1] = (255, 0, 0, 0)
    path = save_array(tmp_path / "m.png", colour)
    np.testing.assert_array_equal(read_mask([path]), [[False, True, False], [False, False, False]])


def test_16_bit_and_1_bit_masks(tmp_path: Path) -> None:
    deep = save_array(tmp_path / "a.png", np.array([[0, 30000, 40000]], dtype=np.uint16))
    flat = save_array(tmp_path / "b.png", np.array([[True, False, False]]))
    np.testing.assert_array_equal(read_mask([deep]), [[False, False, True]])
    np.testing.assert_array_equal(read_mask([deep, flat]), [[True, False, True]])


def test_label_numbers_do_not_silently_give_an_empty_mask(tmp_path: Path) -> None:
    path = save_array(tmp_path / "m.png", np.array([[0, 1, 2]], dtype=np.uint8))
    with pytest.raises(InputError, match="not as a label number"):
        read_mask([path])


def test_mask_of_another_size_names_both(tmp_path: Path) -> None:
    one, two = mask_png(tmp_path / "a.png", (40, 50)), mask_png(tmp_path / "b.png", (41, 50))
    with pytest.raises(InputError, match=r"40 x 50 pixels .* expected 50 x 40 as its image"):
        read_mask([one], size=(50, 40))
    with pytest.raises(InputError, match=r"41 x 50 pixels .* expected 40 x 50 as the first mask") as caught:
        read_mask([one, two])
    assert caught.value.path == str(two)


def test_no_masks_are_an_empty_mask(tmp_path: Path) -> None:
    assert read_mask([], size=(3, 4)).shape == (3, 4)
    assert not read_mask([], size=(3, 4)).any()
    assert not read_mask([mask_png(tmp_path / "a.png")]).any()
    with pytest.raises(InputError, match="no mask files and no size"):
        read_mask([])


def test_unreadable_mask_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_mask([tmp_path / "m.png"])
    with pytest.raises(InputError, match="no known image format"):
        read_mask([stored(tmp_path / "m.png", b"text")])
