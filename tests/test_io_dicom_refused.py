"""DICOM files that are damaged, hostile or of no use, what an error must not tell, and the files of pydicom."""

import logging
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_files
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from make_dicom import (
    PATIENT,
    RAMP,
    compressed,
    deflated,
    dicom,
    element,
    grey,
    image,
    jpeg,
    meta,
    nested,
    pixel_data,
    plain_data_set,
    refused,
    shown,
    source,
)
from umiad.errors import InputError
from umiad.io.dicom import open_dicom

SR = "1.2.840.10008.5.1.4.1.1.88.11"
PDF = "1.2.840.10008.5.1.4.1.1.104.1"
RT_PLAN = "1.2.840.10008.5.1.4.1.1.481.5"

# ---- what must be refused


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 132, b"\0" * 128 + b"DICM", b"<html>" * 99, b"DICM", b"\xff" * 999]
)
def test_I13_what_is_no_dicom_file_is_refused(content):
    refused(content, "no PixelData")


@pytest.mark.parametrize(
    ("uid", "name"),
    [(SR, "Basic Text SR Storage"), (PDF, "Encapsulated PDF Storage"), (RT_PLAN, "RT Plan Storage")],
)
def test_I12_sr_pdf_rt_are_named(uid, name):
    refused(dicom(tail=b"", SOPClassUID=uid), f"has no PixelData (SOPClassUID: {name}), expected an image")


def test_I12_pixel_data_missing():
    refused(dicom(tail=b""), "has no PixelData (SOPClassUID: Ultrasound Image Storage)")
    private = refused(dicom(tail=b"", SOPClassUID="1.2.3.99"), "has no PixelData, expected")
    assert "1.2.3.99" not in str(private)


@pytest.mark.parametrize(("number", "keyword"), [(8, "FloatPixelData"), (9, "DoubleFloatPixelData")])
def test_I12_float_pixels(number, keyword):
    floats = pixel_data(bytes(8 * 35), number=number, vr=b"OF" if number == 8 else b"OD")
    refused(dicom(tail=floats, drop=("BitsStored", "HighBit")), f"has {keyword}, expected PixelData")


def test_I12_pixel_data_empty():
    refused(dicom(tail=pixel_data(b"")), "PixelData is empty, expected 35")
    refused(compressed([], RLELossless, NumberOfFrames=2), "PixelData holds 0 compressed fragments")


def test_I12_pixel_data_one_byte_short():
    even = RAMP[:4].astype(np.uint8)
    refused(dicom(even, tail=pixel_data(even.tobytes()[:-1], pad=False)), "has 27 bytes, expected 28")
    refused(dicom(tail=pixel_data(RAMP.tobytes()[:-1])), "PixelData has 34 bytes, expected 35")
    refused(dicom()[:-1], "PixelData declares 36 bytes, the file holds 35")


def test_I12_pixel_data_one_byte_long_only_as_padding():
    assert np.array_equal(grey(dicom(tail=pixel_data(RAMP.tobytes() + b"\0"))), shown(RAMP, 0, 255))
    assert np.array_equal(grey(dicom(tail=pixel_data(RAMP.tobytes(), pad=False))), shown(RAMP, 0, 255))
    even = RAMP[:4]
    refused(dicom(even, tail=pixel_data(even.tobytes() + b"\0", pad=False)), "has 29 bytes, expected 28")


def test_I12_pixel_data_with_more_padding_is_noted():
    found = image(dicom(tail=pixel_data(RAMP.tobytes() + bytes(65))))
    assert found.notes == ("PixelData is 64 bytes longer than its frames; they were ignored",)


def test_I12_too_short_for_the_frames_is_never_filled():
    refused(dicom(NumberOfFrames=3), "PixelData has 36 bytes, expected 105")
    refused(compressed([b"\0\0"], RLELossless, NumberOfFrames=3), "PixelData holds 1 compressed fragments")


def test_I12_fragments_that_end_too_early():
    good = compressed([jpeg(RAMP)], JPEGBaseline8Bit)
    for cut in (4, 8, 20, 60):
        refused(good[:-cut], "PixelData ends within")
    assert image(good).size == (5, 7)


def test_I12_a_million_frames():
    refused(
        dicom(NumberOfFrames=1_000_000),
        "declares 1000000 frames (NumberOfFrames), which exceeds the ceiling of 512",
    )


def test_I12_rows_65535():
    error = refused(
        dicom(Rows=65535, Columns=65535), "declares 65535 x 65535 = 4294836225 pixels (Rows x Columns)"
    )
    assert "exceeds the ceiling of 40000000" in error.reason
    refused(dicom(Rows=65535), "PixelData has 36 bytes, expected 458745")
    refused(dicom(), "declares 5 x 7 = 35 pixels", max_pixels=34)
    refused(dicom(), "expected at least 6 on each edge", min_edge=6)


def test_I8_declared_bytes_above_the_ceiling():
    many = dicom(Rows=6000, Columns=6000, NumberOfFrames=20)
    refused(many, "declares 720000000 bytes of pixels, which exceeds the ceiling of 536870912")


@pytest.mark.parametrize(
    ("elements", "match"),
    [
        ({"drop": ("Rows",)}, "Rows is missing"),
        ({"Rows": 0}, "Rows is 0"),
        ({"Columns": [3, 4]}, "Columns has 2 values"),
        ({"Columns": element("Columns", "LO", "DOE^JANE")}, "Columns holds a value that is no number"),
        ({"drop": ("BitsAllocated", "HighBit")}, "BitsAllocated is missing"),
        ({"BitsAllocated": 12}, "BitsAllocated is 12, expected 1, 8, 16 or 32"),
        ({"BitsStored": 9, "HighBit": 8}, "BitsStored is 9"),
        ({"PixelRepresentation": 2}, "PixelRepresentation is 2"),
        ({"drop": ("PixelRepresentation",)}, "PixelRepresentation is missing"),
        (
            {"NumberOfFrames": element("NumberOfFrames", "LO", "1A")},
            "NumberOfFrames holds a value that is no number",
        ),
        ({"NumberOfFrames": element("NumberOfFrames", "LO", "1.5")}, "NumberOfFrames is 1.5"),
        ({"ModalityLUTSequence": element("ModalityLUTSequence", "LO", "DOE^JANE")}, "ModalityLUTSequence"),
    ],
)
def test_I12_header_that_is_damaged(elements, match):
    assert "JANE" not in str(refused(dicom(**elements), match))


@pytest.mark.parametrize("depth", [300, 10_000])
def test_I12_nesting(depth):
    refused(dicom(tail=nested(depth)), "sequences (SQ, items (FFFE,E000)) are nested too deeply")


def test_I12_nesting_that_is_harmless_is_read():
    assert np.array_equal(grey(dicom(tail=nested(5))), shown(RAMP, 0, 255))


def test_deflated_is_bit_equal_to_plain():
    content = deflated(plain_data_set())
    assert np.array_equal(grey(content), shown(RAMP, 0, 255))
    refused(content[:-4], "is deflated, but its data set cannot be inflated")
    refused(meta(DeflatedExplicitVRLittleEndian) + b"\xff" * 50, "cannot be inflated")


def bomb(mebibytes):
    """Deflate has a largest ratio of about 1000; one compressed MiB is repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    mebibyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return meta(DeflatedExplicitVRLittleEndian) + mebibyte * mebibytes + b"\x03\x00"


@pytest.mark.parametrize("limits", [{}, {"max_ratio": 10**6}, {"max_inflated": 1 << 20}])
def test_I8_deflated_bomb_is_counted_while_inflating(limits):
    content = bomb(600)
    assert len(content) < 1 << 20
    tracemalloc.start()
    try:
        error = refused(content, "which exceeds the ceiling", **limits)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert "counted while inflating" in error.reason


def test_I8_a_small_deflated_bomb_is_refused_beyond_64_mib():
    refused(bomb(65), "is deflated and grows to more than 67108864 bytes, which exceeds the ceiling")


def test_a_deflated_sparse_mask_is_read():
    mask = np.zeros((64, 512, 512), np.uint8)
    mask[20, 100:140, 90:130] = 255
    content = deflated(plain_data_set(stored=mask, NumberOfFrames=64))
    assert mask.nbytes > 500 * len(content)
    for number in (0, 20, 63):
        assert np.array_equal(grey(content, frame=number), shown(mask[number], 0, 255))


def test_I8_deflated_bomb_whose_meta_information_is_written_with_implicit_vr():
    """pydicom reads such meta information too, and would inflate without a ceiling."""
    content = bomb(600)
    start = content.index(b"\x02\x00\x10\x00UI")
    uid = content[start + 8 : start + 8 + content[start + 6]]
    implicit = b"\x02\x00\x10\x00" + len(uid).to_bytes(4, "little") + uid
    rest = content[start + 8 + len(uid) :]
    refused(bytes(128) + b"DICM" + implicit + rest, "which exceeds the ceiling")


def test_I1_prefixes_of_good_files_never_give_invented_pixels():
    plain, packed = dicom(RAMP.astype(np.uint16)), compressed([jpeg(RAMP)], JPEGBaseline8Bit)
    for content in (plain, packed, deflated(plain_data_set())):
        for cut in np.linspace(0, len(content) - 1, 64).astype(int):
            with pytest.raises(InputError):
                image(content[:cut])


# ---- privacy

MISUSED = [
    *("Rows", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"),
    *("PhotometricInterpretation", "VOILUTSequence", "ModalityLUTSequence", "PixelSpacing", "SOPClassUID"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SequenceOfUltrasoundRegions"),
    "ExtendedOffsetTable",
]


def hostile():
    """Files with patient data, each wrong in one way; some hold patient data where numbers belong."""
    everywhere = {keyword: element(keyword, "LO", "DOE^JANE") for keyword in MISUSED}
    for keyword, value in everywhere.items():
        yield keyword, dicom(**(PATIENT | {keyword: value}))
    window = {"WindowCenter": 5, "WindowWidth": 6}
    yield "VOILUTFunction", dicom(**PATIENT, **window, VOILUTFunction="DOE^JANE")
    yield "no pixels", dicom(tail=b"", **PATIENT)
    yield "no pixels, SOPClassUID", dicom(tail=b"", **(PATIENT | {"SOPClassUID": "DOE^JANE"}))
    yield "short", dicom(tail=pixel_data(b"JANE"), **PATIENT)
    yield "frames", dicom(NumberOfFrames=10**6, **PATIENT)
    yield "syntax", bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI\x08\x00DOE^JANE" + dicom(**PATIENT)[160:]
    for syntax in (RLELossless, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless):
        yield syntax.name, compressed([b"DOE^JANE" * 20], syntax, **PATIENT)
    yield "nested", dicom(tail=nested(300, dicom(**PATIENT)), **PATIENT)
    yield "deflated", meta(DeflatedExplicitVRLittleEndian) + b"DOE^JANE"
    yield "palette", dicom(**PATIENT, PhotometricInterpretation="PALETTE COLOR")
    yield "cut", dicom(**PATIENT)[:200]


@pytest.mark.parametrize(("name", "content"), [pytest.param(n, c, id=n) for n, c in hostile()])
def test_patient_values_never_leave_the_file(name, content, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    said = []
    for window in ("file", "full"):
        try:
            found = image(content, window, key=b"k")
            said += [repr(found), *found.notes]
        except InputError as error:
            chain = [error, error.__cause__]
            said += [str(each) for each in chain] + [error.reason, error.hint]
    said += [caplog.text, *capfd.readouterr()]
    for secret in ("DOE", "JANE", "SECRET77", "19610203", "ACC4711"):
        assert secret not in "\n".join(said)


def test_pydicoms_warnings_stay_silent_and_errors_are_one_kind():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image(dicom(tail=pixel_data(RAMP.tobytes() + bytes(65)), SOPClassUID="1.02.3"))
    assert logging.getLogger("pydicom").propagate


def test_out_of_memory_becomes_one_error(monkeypatch):
    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr("umiad.io.dicom.read_layout", no_memory)
    refused(dicom(), "needs more memory to decode than the ceiling allows")


# ---- files of others


def files():
    return sorted(path for name in get_testdata_files() if (path := Path(name)).is_file())


@pytest.mark.parametrize("path", files(), ids=lambda path: "-".join(path.parts[-2:]))
def test_I2_every_test_file_of_pydicom_is_an_image_or_one_error(path):
    try:
        stack = open_dicom(path.read_bytes(), source())
        found = [stack.frame(0), stack.frame(stack.count - 1)]
    except InputError:
        return
    for each in found:
        assert each.pixels.dtype == np.float32
        assert each.pixels.shape[0] in (1, 3)
        assert 0 <= each.pixels.min() <= each.pixels.max() <= 1
