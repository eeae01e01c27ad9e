"""Hostile image files: bombs, lies, disguises, links and names. Each must end as an image or as one InputError.

Everything here is harmless test material: nothing in it executes, and the bombs are small files that only declare, or
inflate to, a great deal. `python attacks/inputs.py FOLDER` writes them all below FOLDER (about 20 MB, on POSIX only).

Ids I5 to I15: modes and odd sizes; bombs; NIfTI and DICOM headers that lie; content against suffix, special files;
links; names. Polyglots, files of two formats at once, are I13.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from attacks import formats as f
from attacks.names import NAMES

__all__ = ["ATTACKS", "OK", "Attack", "killer", "write"]

OK = "ok"
GIB = 1 << 30
SR, PDF, RT = ("1.2.840.10008.5.1.4.1.1." + tail for tail in ("88.11", "104.1", "481.5"))


@dataclass(frozen=True)
class Attack:
    """One hostile file: `make(folder)` writes it below the empty `folder` and returns its path.

    `expect`: OK, or a pattern that the InputError's message must match.
    """

    id: str
    name: str
    make: Callable[[Path], Path]
    expect: str = OK


def write(folder: Path, content: bytes | Callable[[], bytes], name: str | bytes = "scan.png") -> Path:
    """Write bytes (or what a function gives, so that nothing is built before it is wanted)."""
    path = folder / os.fsdecode(name)
    path.write_bytes(content if isinstance(content, bytes) else content())
    return path


def _of(kind: str, table: dict[str, tuple[Callable[[], bytes], str]], name: str) -> Iterator[Attack]:
    for title, (content, expect) in table.items():
        yield Attack(kind, title, partial(write, content=content, name=name), expect)


def _flat(mode: str, size: tuple[int, int], kind: str = "PNG") -> Callable[[], bytes]:
    value = (40, 90, 140, 60)[: len(PIL.Image.new(mode, (1, 1)).getbands())]
    return lambda: f.encoded(PIL.Image.new(mode, size, value[0] if len(value) == 1 else value), kind)


def _ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says YCCK."""
    content = bytearray(_flat("CMYK", (64, 64), "JPEG")())
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


MODES = {
    **{f"{mode} {kind}": (_flat(mode, (64, 64), kind), OK) for mode, kind in (
        ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "TIFF"), ("RGBA", "PNG"), ("LA", "PNG"),
        ("1", "BMP"), ("P", "PNG"), ("I", "TIFF"), ("RGB", "BMP"),
    )},
    "YCCK JPEG": (_ycck, OK),
    "nothing but transparency": (
        lambda: f.encoded(PIL.Image.new("RGBA", (64, 64), (9, 9, 9, 0)), "PNG"),
        OK,
    ),
    "floats above 1": (lambda: f.encoded(np.full((64, 64), 3.0, np.float32), "TIFF"), "expected 0 to 1"),
    "floats that are NaN": (lambda: f.encoded(np.full((64, 64), np.nan, np.float32), "TIFF"), "values nan"),
}  # fmt: skip
SIZES = {f"{w} x {h}": (_flat("L", (w, h)), OK) for w, h in ((1, 1), (1, 64), (64, 1), (2, 2), (31, 31))}


# ---- I8: small files that stand for large ones


def _text_bomb(name: bytes) -> bytes:
    """A good PNG with a text chunk that inflates to 1 GiB."""
    before = {b"zTXt": b"note\0\0", b"iTXt": b"note\0\1\0\0\0", b"iCCP": b"profile\0\0"}[name]
    return f.good_png(extra=f.chunk(name, before + f.zlib_zeros(GIB)))


def _many_texts() -> bytes:
    """A good PNG with 200 chunks that inflate to a little less than Pillow's ceiling for one."""
    packed = b"note\0\0" + f.zlib_zeros((1 << 20) - 1)
    return f.good_png(extra=f.chunk(b"zTXt", packed) * 200)


def _sparse(folder: Path, *, size: int, head: bytes) -> Path:
    """A file of `size` bytes, nearly all of them holes."""
    path = write(folder, head)
    os.truncate(path, size)
    return path


def _bmp(width: int, height: int) -> bytes:
    content = bytearray(_flat("L", (64, 64), "BMP")())
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def _deflated_tiff(edge: int) -> bytes:
    """A complete black TIFF of 1 bit, deflated."""
    data, size = f.zlib_zeros(edge * ((edge + 7) // 8)), (4, 1, edge)
    return f.tiff(data, t256=size, t257=size, t258=(3, 1, 1), t259=(3, 1, 8), t278=size)


def _deflated_dicom(size: int, rows: int = 64) -> bytes:
    head = f.dataset(t00280010=b"US" + struct.pack("<H", rows), pixels=None)
    prefix = head + f.element(0x7FE00010, b"OB", b"", length=size)
    return f.meta(f.DEFLATED) + f.deflated_zeros(size, prefix=prefix)


def _rle_bomb() -> bytes:
    """A frame of 4096 pixels whose segment would unpack to 64 MB."""
    return f.dicom(syntax=f.RLE, pixels=f.fragments(f.rle_frame(b"\x81\0" * (1 << 19))))


def killer(*, scans: int = 2000) -> bytes:
    """A JPEG of 44 kB that keeps its decoder busy for a minute, scan after scan over 36 million pixels."""
    return f.slow_jpeg(6000, scans) + bytes(50_000)  # as long as so many pixels are at least


HUGE = (4, 1, 65535)
BOMBS = {
    "PNG 13000 x 13000, 1 bit": (partial(f.black_png, 13_000), "declares 13000 x 13000"),
    "PNG 30000 x 30000, 1 bit": (partial(f.black_png, 30_000), "declares too many pixels"),
    "PNG 30000 x 30000, 8 bits": (partial(f.black_png, 30_000, bits=8), "declares too many pixels"),
    "PNG 13000 x 13000, RGB": (partial(f.black_png, 13_000, bits=8, colour=2), "declares 13000 x 13000"),
    "PNG 2^31 - 1 wide": (lambda: f.png(2**31 - 1, 1, f.zlib_zeros(GIB)), "declares"),
    "PNG 64 x 64 with 1 GiB of pixels": (lambda: f.png(64, 64, f.zlib_zeros(GIB)), OK),
    "PNG zTXt": (partial(_text_bomb, b"zTXt"), "cannot be decoded as PNG: Decompressed"),
    "PNG iTXt": (partial(_text_bomb, b"iTXt"), "cannot be decoded as PNG: Decompressed"),
    "PNG iCCP": (partial(_text_bomb, b"iCCP"), "cannot be decoded as PNG: Decompressed"),
    "PNG of 200 texts": (_many_texts, "cannot be decoded as PNG: Too much memory"),
    "JPEG header 65535 x 65535": (partial(f.lying_jpeg, 65_535, 65_535), "declares too many pixels"),
    "JPEG header 7000 x 7000": (partial(f.lying_jpeg, 7000, 7000), "declares 7000 x 7000"),
    "JPEG of 2000 scans": (killer, "processor time"),
    "BMP 65535 x 65535": (partial(_bmp, 65_535, 65_535), "declares too many pixels"),
    "BMP -2^31 high": (partial(_bmp, 64, -(2**31)), "declares"),
    "TIFF 13000 x 13000, complete": (partial(_deflated_tiff, 13_000), "declares 13000 x 13000"),
    "TIFF 65535 x 65535": (lambda: f.tiff(t256=HUGE, t257=HUGE), "declares too many pixels"),
    "TIFF of 20000 directories": (partial(f.tiff_chain, 20_000), "holds at least 1000 frames"),
    "TIFF directory that follows itself": (lambda: f.tiff(following=-1), OK),
    "TIFF strip of 4 GB": (lambda: f.tiff(t279=(4, 1, 2**32 - 1)), OK),
    "TIFF strip past the end": (lambda: f.tiff(t273=(4, 1, 2**31)), "TIFF"),
    "TIFF of no rows per strip": (lambda: f.tiff(t278=(4, 1, 0)), "TIFF"),
    "TIFF deflated strip that is short": (lambda: f.tiff(f.zlib_zeros(64), t259=(3, 1, 8)), "TIFF"),
    "TIFF tag of 4 GB": (lambda: f.tiff(t270=(2, 2**32 - 1, 8)), OK),
    "TIFF of 65535 channels": (lambda: f.tiff(t277=(3, 1, 65_535)), "TIFF"),
}  # fmt: skip
SMALL_BOMBS = {
    "deflated DICOM, 1 GiB": (partial(_deflated_dicom, GIB), "counted while inflating"),
    "deflated DICOM, 2 GiB": (partial(_deflated_dicom, 2 * GIB), "counted while inflating"),
    "RLE segment": (_rle_bomb, OK),
    "gzip NIfTI 1 GiB, honest": (
        lambda: f.gzip_zeros(GIB, prefix=f.nifti(dim=[3, 1024, 1024, 512, 1, 1, 1, 1], data=b"")),
        "declares 1024 x 1024 x 512",
    ),
    "gzip NIfTI 1 GiB after small data": (
        lambda: f.gzip_zeros(GIB, prefix=f.nifti()), "times its .* bytes when inflated",
    ),
    "gzip of nothing but 1 GiB": (lambda: f.gzip_zeros(GIB), "is a gzip file"),
}  # fmt: skip


# ---- I9 and I12: headers that lie


def _volume(value: float, *, part: int = 1) -> np.ndarray:
    volume = np.random.default_rng(0).random((32, 32, 4), dtype=np.float32)
    volume.reshape(-1)[::part] = value
    return volume


def _dim(*edges: int) -> Callable[[], bytes]:
    return lambda: f.nifti(dim=[len(edges), *edges, *[1] * (7 - len(edges))])


NIFTI = {
    "some voxels NaN": (lambda: f.nifti(_volume(np.nan, part=9)), "voxels are not finite"),
    "some voxels infinite": (lambda: f.nifti(_volume(np.inf, part=9)), "voxels are not finite"),
    "all voxels NaN": (lambda: f.nifti(_volume(np.nan)), "voxels are not finite"),
    "all zero": (lambda: f.nifti(np.zeros((32, 32, 4), np.int16)), "one value only"),
    "constant": (lambda: f.nifti(_volume(0.5)), "one value only"),
    "4-D": (lambda: f.nifti(np.zeros((32, 32, 4, 3), np.int16)), "holds 3 volumes"),
    "RGB": (lambda: f.nifti(datatype=128, bitpix=24), "RGB colour"),
    "complex": (lambda: f.nifti(datatype=32, bitpix=64), "complex numbers"),
    "unknown type": (lambda: f.nifti(datatype=999), "data type code 999"),
    "bits against type": (lambda: f.nifti(bitpix=8), "8 bits per voxel"),
    "negative pixdim": (lambda: f.nifti(pixdim=[-1, -2, -2, -3, 1, 1, 1, 1]), OK),
    "vox_offset past the end": (lambda: f.nifti(vox_offset=1e6), "NIfTI|end|holds|expected"),
    "vox_offset 2^60": (lambda: f.nifti(vox_offset=2.0**60), "NIfTI|end|holds|expected"),
    "vox_offset NaN": (lambda: f.nifti(vox_offset=np.nan), "start at byte nan"),
    "vox_offset negative": (lambda: f.nifti(vox_offset=-8), "start at byte -8"),
    "dims of 600 x 600 x 416": (_dim(600, 600, 416), "expected|end|holds"),
    "dims of 32767^3": (_dim(32_767, 32_767, 32_767), "the ceiling is"),
    "dims whose product overflows": (_dim(*[32_767] * 7), "holds .* volumes"),
    "dims negative": (_dim(-32, 32, 4), "declares 3 dimensions"),
    "dims none": (_dim(), "declares 0 dimensions"),
    "slope 0": (lambda: f.nifti(scl_slope=0.0), OK),
    "slope infinite": (lambda: f.nifti(scl_slope=np.inf), "scaling"),
    "header alone": (lambda: f.nifti(data=b""), "expected|end|holds"),
}


def _bytes(keyword: int, vr: bytes, value: bytes) -> Callable[[], bytes]:
    return lambda: f.dicom(**{f"t{keyword:08x}": vr + value})


def _pixels(change: int) -> Callable[[], bytes]:
    stored = f.picture().tobytes()
    return lambda: f.dicom(pixels=f.element(0x7FE00010, b"OB", (stored + bytes(9))[: len(stored) + change]))


DICOM = {
    "a good one": (f.dicom, OK),
    "PixelData missing": (lambda: f.dicom(pixels=None), "has no PixelData"),
    "PixelData empty": (lambda: f.dicom(pixels=f.element(0x7FE00010, b"OB", b"")), "PixelData is empty"),
    "PixelData 2 bytes short": (_pixels(-2), "PixelData has 4094 bytes, expected 4096"),
    "PixelData a byte short": (lambda: f.dicom()[:-1], "PixelData declares 4096 bytes, the file holds 4095"),
    "PixelData a byte long": (_pixels(1), OK),
    "PixelData that declares 4 GB": (
        lambda: f.dicom(pixels=f.element(0x7FE00010, b"OB", b"", length=2**32 - 2)), "PixelData declares 4294967294",
    ),
    "a million frames": (_bytes(0x00280008, b"IS", b"1000000"), "NumberOfFrames"),
    "2 frames, data for 1": (_bytes(0x00280008, b"IS", b"2"), "PixelData has 4096 bytes, expected 8192"),
    "frames in words": (_bytes(0x00280008, b"IS", b"many"), "NumberOfFrames"),
    "Rows 65535": (_bytes(0x00280010, b"US", b"\xff\xff"), "PixelData has|Rows"),
    "Rows 0": (_bytes(0x00280010, b"US", bytes(2)), "Rows is 0"),
    "Rows as text": (_bytes(0x00280010, b"LO", b"sixty-four"), "Rows"),
    "BitsAllocated 12": (_bytes(0x00280100, b"US", b"\x0c\0"), "BitsAllocated is 12"),
    "slope 0": (_bytes(0x00281053, b"DS", b"0"), "RescaleSlope is 0"),
    "unknown transfer syntax": (lambda: f.dicom(syntax="1.2.3.4.5"), "TransferSyntaxUID"),
    "JPEG-LS": (lambda: f.dicom(syntax="1.2.840.10008.1.2.4.80"), "JPEG-LS"),
    "JPEG 2000 of nothing": (
        lambda: f.dicom(syntax="1.2.840.10008.1.2.4.90", pixels=f.fragments(b"\xff\x4f\xff\x51" + bytes(60))),
        "declares 0 x 0 x 0",
    ),
    "nesting 300": (lambda: f.dicom(pixels=f.nested(300)), "nested too deeply"),
    "nesting 10000": (lambda: f.dicom(pixels=f.nested(10_000)), "nested too deeply"),
    "element that declares 4 GB": (
        lambda: f.meta(f.EXPLICIT) + f.element(0x00081140, b"SQ", b"", length=2**32 - 2) + f.dataset(), "",
    ),
    "SR": (lambda: f.dicom(kind=SR, pixels=None), "has no PixelData .*SR"),
    "PDF": (lambda: f.dicom(kind=PDF, pixels=None), "has no PixelData .*PDF"),
    "RT plan": (lambda: f.dicom(kind=RT, pixels=None), "has no PixelData .*RT Plan"),
    "meta alone": (lambda: f.meta(f.EXPLICIT), "PixelData"),
    "preamble alone": (lambda: bytes(128) + b"DICM", "PixelData|DICOM"),
}  # fmt: skip


# ---- I13: what is not what its name says


def _zip() -> bytes:
    """An archive of one empty file (APPNOTE 4.3), which readers find from its end."""
    local = struct.pack("<4s5HIIIHH", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6HIIIHHHHHII", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    return local + entry + struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(local), 0)


def _dicom_tiff() -> bytes:
    """DICOM whose preamble is the head of a TIFF; the directory follows the pixels."""
    content = f.dicom(preamble=b"II*\0" + struct.pack("<I", 10_000))
    return content.ljust(10_000, b"\0") + f.tiff()[8 + 4096 :]


FORMATS = {
    "JPEG named .png": (lambda: f.encoded(f.picture(), "JPEG"), "scan.png", OK),
    "DICOM without suffix": (f.dicom, "IM0001", OK),
    "DICOM without preamble": (lambda: f.dicom()[132:], "scan.png", OK),
    "PNG named .nii.gz": (f.good_png, "scan.nii.gz", OK),
    "HTML named .dcm": (lambda: b"<!doctype html><script>alert(1)</script>", "scan.dcm", "no known image format"),
    "SVG named .png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "scan.png", "no known image format"),
    "GIF named .png": (lambda: f.encoded(f.picture(), "GIF"), "scan.png", "no known image format"),
    "PostScript named .png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "scan.png", "no known image format"),
    "pickle named .nii": (lambda: b"\x80\x04N.", "scan.nii", "no known image format"),
    "zero bytes": (lambda: b"", "scan.png", "is empty"),
    "PNG and ZIP": (lambda: f.good_png() + _zip(), "scan.png", OK),
    "DICOM and TIFF": (_dicom_tiff, "scan.tif", OK),
    "DICOM and program": (lambda: f.dicom(preamble=b"MZ\x90\0"), "scan.dcm", OK),
    "DICOM and ELF": (lambda: f.dicom(preamble=b"\x7fELF\2\1\1"), "scan.dcm", OK),
    "JPEG and HTML": (lambda: f.encoded(f.picture(), "JPEG", comment=b"<script>"), "scan.html.jpg", OK),
    "PNG and gzip": (lambda: f.good_png() + f.gzip_zeros(1 << 20), "scan.gz", OK),
    "a PNG without its end": (lambda: f.good_png()[:-12], "scan.png", "PNG"),
    "a PNG of two pictures": (lambda: f.good_png() + f.good_png(), "scan.png", OK),
    "random bytes": (lambda: np.random.default_rng(0).bytes(4096), "scan.png", "no known image format"),
    "magic number alone": (lambda: f.SIGNATURE, "scan.png", "header cannot be read"),
}  # fmt: skip


def _socket(folder: Path) -> Path:
    """A socket; its path is bound from inside the folder, since its length is limited."""
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("scan.png")
    finally:
        os.chdir(here)
        os.close(here)
    return folder / "scan.png"


def _put(make: Callable[[Path], object], name: str = "scan.png") -> Callable[[Path], Path]:
    return lambda folder: [make(folder / name), folder / name][1]  # type: ignore[return-value]


def _chain(path: Path, length: int) -> None:
    write(path.parent, f.good_png(), "link-0")
    for number in range(length):
        os.symlink(f"link-{number}", path.parent / f"link-{number + 1}")
    os.symlink(f"link-{length}", path)


def _special() -> Iterator[Attack]:
    for title, make, expect in (
        ("a folder", os.mkdir, "is a folder"),
        ("a pipe", os.mkfifo, "special file"),
        ("a link to /dev/zero", partial(os.symlink, "/dev/zero"), "special file"),
        ("a link to /dev/stdin", partial(os.symlink, "/dev/stdin"), "special file|is empty|cannot be read|no known"),
        ("a link to a process", partial(os.symlink, "/proc/self/environ"), "is empty|changed|no known|no permission"),
    ):  # fmt: skip
        yield Attack("I13", title, _put(make), expect)
    yield Attack("I13", "a socket", _socket, "special file")
    for size in (65 << 20, 10 << 30):
        sparse = partial(_sparse, size=size, head=f.good_png())
        yield Attack("I8", f"a sparse file of {size} bytes", sparse, "the ceiling is")
    for title, make, expect in (
        ("a link to itself", lambda path: os.symlink(path.name, path), "cannot be read"),
        ("a chain of 20 links", partial(_chain, length=20), OK),
        ("a chain of 50 links", partial(_chain, length=50), "cannot be read"),
        ("a link to nothing", partial(os.symlink, "missing.png"), "no such file"),
        ("a hard link", lambda path: os.link(write(path.parent, f.good_png(), "twin"), path), OK),
    ):
        yield Attack("I14", title, _put(make), expect)


def _all() -> Iterator[Attack]:
    yield from _of("I5", MODES, "scan.png")
    yield from _of("I7", SIZES, "scan.png")
    yield from _of("I8", BOMBS, "scan.png")
    yield from _of("I8", SMALL_BOMBS, "scan")
    yield from _of("I9", NIFTI, "scan.nii")
    yield from _of("I12", DICOM, "scan.dcm")
    for title, (content, name, expect) in FORMATS.items():
        yield Attack("I13", title, partial(write, content=content, name=name), expect)
    yield from _special()
    for raw in NAMES:
        yield Attack("I15", repr(raw[:40]), partial(write, content=f.good_png, name=raw))


ATTACKS: tuple[Attack, ...] = tuple(_all())
"""Every hostile file, by id and name."""


def main(folder: Path) -> None:
    """Write every attack into a numbered folder of its own, and `index.txt` with what is expected of it."""
    lines = []
    for number, attack in enumerate(ATTACKS):
        own = folder / f"{number:03d}-{attack.id}"
        own.mkdir(parents=True)
        attack.make(own)
        lines.append(f"{own.name}\t{attack.name}\t{attack.expect}\n")
    (folder / "index.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python attacks/inputs.py FOLDER")
    main(Path(sys.argv[1]))
