"""DICOM files, built here byte by byte where it matters; every golden array is computed by hand."""

import hashlib
import hmac
import logging
import re
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pydicom
import pytest
from pydicom.data import get_testdata_files
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder, get_encoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from umiad.errors import InputError
from umiad.io.dicom import open_dicom
from umiad.io.source import Limits, Source

US = "1.2.840.10008.5.1.4.1.1.6.1"
SR = "1.2.840.10008.5.1.4.1.1.88.11"
PDF = "1.2.840.10008.5.1.4.1.1.104.1"
RT_PLAN = "1.2.840.10008.5.1.4.1.1.481.5"
PATIENT = {
    "PatientName": "DOE^JANE",
    "PatientID": "SECRET77",
    "PatientBirthDate": "19610203",
    "AccessionNumber": "ACC4711",
}
UNDEFINED = 0xFFFFFFFF
DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"
RAMP = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7


def dicom(stored=None, *, syntax=ExplicitVRLittleEndian, drop=(), tail=None, **elements):
    """The bytes of a file. `tail`: PixelData as written (tag included) instead of the pixels `stored`."""
    stored = RAMP if stored is None else stored
    bits = 8 * stored.dtype.itemsize
    ds = Dataset()
    defaults = {
        "SOPClassUID": US,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[-2],
        "Columns": stored.shape[-1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in (defaults | elements).items():
            if keyword in drop:
                continue
            if isinstance(value, DataElement):
                ds[value.tag] = value
            else:
                setattr(ds, keyword, value)
        stream = BytesIO()
        implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        pydicom.dcmwrite(stream, ds, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
    if tail is None:
        order = "<" if little else ">"
        tail = pixel_data(stored.astype(stored.dtype.newbyteorder(order)).tobytes(), syntax=syntax)
    return meta(syntax) + stream.getvalue() + tail


def meta(syntax, preamble=b"\0" * 128):
    ds = FileMetaDataset()
    ds.TransferSyntaxUID = syntax
    stream = BytesIO()
    pydicom.filewriter.write_file_meta_info(stream, ds, enforce_standard=False)
    return preamble + b"DICM" + stream.getvalue()


def pixel_data(value, *, syntax=ExplicitVRLittleEndian, length=None, pad=True, vr=b"OW", number=0x10):
    value = value + b"\0" * (pad and len(value) % 2)
    order = "big" if syntax == ExplicitVRBigEndian else "little"
    length = len(value) if length is None else length
    tag = (0x7FE0).to_bytes(2, order) + number.to_bytes(2, order)
    vr = b"" if syntax == ImplicitVRLittleEndian else vr + b"\0\0"
    return tag + vr + length.to_bytes(4, order) + value


def compressed(frames, syntax, **elements):
    """A file whose PixelData holds the encoded frames."""
    return dicom(
        syntax=syntax,
        tail=pixel_data(encapsulate(frames) + DELIMITER, length=UNDEFINED, vr=b"OB", pad=False),
        **elements,
    )


def element(keyword, vr, value):
    """An element with a VR that the dictionary would not give it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DataElement(pydicom.datadict.tag_for_keyword(keyword), vr, value)


def item(**elements):
    ds = Dataset()
    for keyword, value in elements.items():
        if isinstance(value, DataElement):
            ds[value.tag] = value
        else:
            setattr(ds, keyword, value)
    return ds


def lut(descriptor, data, vr="US"):
    """An item of a table sequence."""
    found = item(LUTDescriptor=element("LUTDescriptor", vr, descriptor), ModalityLUTType="HU")
    if data is not None:
        found[0x00283006] = element("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return found


def source(window="file", key=b"", **limits):
    return Source("scan.dcm", "DICOM", Limits(**limits), window, key=key)


def image(content, window="file", frame=0, key=b""):
    return open_dicom(content, source(window, key)).frame(frame)


def grey(content, window="file", frame=0):
    pixels = image(content, window, frame).pixels
    assert pixels.dtype == np.float32
    assert pixels.shape[0] == 1
    assert pixels.flags.c_contiguous
    return pixels[0]


def refused(content, match, window="file", **limits):
    """The one InputError, whose reason matches; the file fails on opening or with its first frame."""
    with pytest.raises(InputError, match=re.escape(match)) as caught:
        open_dicom(content, source(window, **limits)).frame(0)
    assert caught.value.path == "scan.dcm"
    assert caught.value.__cause__ is None
    return caught.value


def shown(values, low, high):
    """The golden linear map, float64 rounded once to float32."""
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32)


# ---- grey values


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32])
def test_I11_no_rescale_no_window_shows_the_full_stored_range(syntax, dtype):
    stored = RAMP.astype(dtype) * (1 if dtype == np.uint8 else 100)
    content = dicom(stored, syntax=syntax)
    if dtype == np.uint8 and syntax == ExplicitVRBigEndian:  # 8-bit pixels in 16-bit words are swapped
        raw = np.frombuffer(RAMP.tobytes() + b"\0", ">u2").astype("<u2").tobytes()
        content = dicom(stored, syntax=syntax, tail=pixel_data(raw, syntax=syntax))
    info = np.iinfo(dtype)
    assert np.array_equal(grey(content), shown(stored, info.min, info.max))
    found = open_dicom(content, source()).frame(0)
    assert (found.mode, found.bits, found.frame, found.name) == ("MONOCHROME2", info.bits, None, "scan.dcm")


def test_I11_monochrome1_equals_its_inverted_twin():
    for window in ("file", "full", "percentile", (90.0, 55.0)):
        one = grey(dicom(PhotometricInterpretation="MONOCHROME1", WindowCenter=100, WindowWidth=77), window)
        two = grey(dicom(WindowCenter=100, WindowWidth=77), window)
        assert np.array_equal(one, np.float32(1) - two)
        assert np.ptp(one) > 0


def test_I11_slope_2_intercept_minus_1000_full_and_windowed():
    stored = np.arange(35, dtype=np.uint16).reshape(5, 7) * 100
    content = dicom(stored, BitsStored=12, RescaleSlope=2, RescaleIntercept=-1000)
    assert np.array_equal(grey(content), shown(stored * 2.0 - 1000, -1000, 7190))
    units = stored * 2.0 - 1000
    golden = np.clip((units - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1).astype(np.float32)
    assert np.array_equal(grey(content, (40.0, 400.0)), golden)


def test_I11_negative_slope_shows_large_values_bright():
    content = dicom(RescaleSlope=-1, RescaleIntercept=0)
    assert np.array_equal(grey(content), shown(-RAMP.astype(float), -255, 0))


@pytest.mark.parametrize("slope", ["0", "0.0", "-0"])
def test_I11_slope_0_is_refused(slope):
    refused(dicom(RescaleSlope=slope), "RescaleSlope is 0")


@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": element("RescaleSlope", "LO", "nan")},
        {"RescaleIntercept": element("RescaleIntercept", "LO", "inf")},
    ],
)
def test_I11_rescale_that_is_not_finite_is_refused(elements):
    refused(dicom(**elements), "no number")


def test_I11_rescale_that_overflows_is_refused():
    refused(dicom(RescaleSlope="1e307"), "RescaleSlope")


def test_I11_modality_lut_sequence():
    table = np.arange(256, dtype=np.uint16)[::-1] * 3 + 5
    content = dicom(ModalityLUTSequence=[lut([256, 0, 16], table.astype(int).tolist())])
    units = table[RAMP].astype(float)
    assert np.array_equal(grey(content), shown(units, 5, 770))
    golden = np.clip((units - 399.5) / 199 + 0.5, 0, 1).astype(np.float32)
    assert np.array_equal(grey(content, (400.0, 200.0)), golden)


@pytest.mark.parametrize(("vr", "first"), [("US", 65534), ("SS", -2)])
def test_I11_modality_lut_outside_its_range_takes_the_nearest_entry(vr, first):
    stored = np.array([[-100, -2], [-1, 50]], np.int16)
    content = dicom(stored, ModalityLUTSequence=[lut([3, first, 16], [10, 20, 40], vr)])
    assert np.array_equal(grey(content), shown(np.array([[10, 10], [20, 40]]), 10, 40))


def test_I11_modality_lut_that_is_constant_is_refused():
    content = dicom(ModalityLUTSequence=[lut([2, 0, 16], [7, 7])])
    refused(content, "ModalityLUTSequence maps every pixel to one number")


@pytest.mark.parametrize("packed", [True, False])
def test_I11_voi_lut_sequence(packed):
    table = (np.arange(256) ** 2 // 256).astype(np.uint8)
    data = table.tobytes() if packed else table.astype(int).tolist()
    content = dicom(VOILUTSequence=[lut([256, 0, 8], data)], WindowCenter=1, WindowWidth=1)
    assert np.array_equal(grey(content), (table[RAMP] / 255).astype(np.float32))


def test_I11_voi_lut_of_signed_values():
    stored = np.array([[-9, -2], [-1, 9]], np.int16)
    golden = (np.array([[0, 0], [1000, 4095]]) / 4095).astype(np.float32)
    assert np.array_equal(
        grey(dicom(stored, VOILUTSequence=[lut([4, 65534, 12], [0, 1000, 2000, 4095])])), golden
    )


@pytest.mark.parametrize(
    ("descriptor", "data", "match"),
    [
        ([4, 0], [0, 1, 2, 3], "LUTDescriptor has 2 values"),
        ([5, 0, 8], [0, 1, 2, 3], "LUTData has 4 entries, expected 5"),
        ([4, 0, 8], [0, 1, 2, 300], "VOILUTSequence holds 300"),
        ([4, 0, 40], [0, 1, 2, 3], "40 bits"),
        ([4, 0, 8], None, "LUTData has 0 entries"),
        ([4, 0, 8], b"\0\1", "LUTData has 2 entries"),
    ],
)
def test_I11_voi_lut_that_is_damaged_is_refused(descriptor, data, match):
    refused(dicom(VOILUTSequence=[lut(descriptor, data)]), match)


def test_I11_window_linear():
    golden = np.clip((RAMP - (100 - 0.5)) / (60 - 1) + 0.5, 0, 1).astype(np.float32)
    for function in ({}, {"VOILUTFunction": "LINEAR"}):
        found = image(dicom(WindowCenter=100, WindowWidth=60, **function))
        assert np.array_equal(found.pixels[0], golden)
        assert found.notes == ()


def test_I11_window_linear_of_width_1_is_a_threshold():
    assert np.array_equal(grey(dicom(WindowCenter=100, WindowWidth=1)), (RAMP > 99.5).astype(np.float32))


def test_I11_window_linear_exact():
    golden = np.clip((RAMP - 100.25) / 60.5 + 0.5, 0, 1).astype(np.float32)
    content = dicom(WindowCenter="100.25", WindowWidth="60.5", VOILUTFunction="LINEAR_EXACT")
    assert np.array_equal(grey(content), golden)


def test_I11_window_sigmoid():
    golden = (1 / (1 + np.exp(-4 * (RAMP.astype(float) - 100) / 60))).astype(np.float32)
    content = dicom(WindowCenter=100, WindowWidth=60, VOILUTFunction="SIGMOID")
    assert np.array_equal(grey(content), golden)
    extreme = grey(dicom(WindowCenter=100, WindowWidth="0.001", VOILUTFunction="SIGMOID"))
    assert set(np.unique(extreme)) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("width", "function", "match"),
    [
        ("0.5", "LINEAR", "WindowWidth is 0.5, expected at least 1"),
        ("0", "LINEAR_EXACT", "WindowWidth is 0, expected above 0"),
        ("-3", "SIGMOID", "WindowWidth is -3"),
        ("9", "CUBIC", "VOILUTFunction is unknown"),
    ],
)
def test_I11_window_that_makes_no_sense_is_refused_unless_ignored(width, function, match):
    content = dicom(WindowCenter=100, WindowWidth=width, VOILUTFunction=function)
    assert "CUBIC" not in str(refused(content, match))
    assert np.array_equal(grey(content, "full"), shown(RAMP, 0, 255))


def test_I11_window_of_several_takes_the_first_and_says_so():
    found = image(dicom(WindowCenter=[100, 5], WindowWidth=[60, 6]))
    assert np.array_equal(found.pixels, image(dicom(WindowCenter=100, WindowWidth=60)).pixels)
    assert found.notes == ("the file has 2 windows; the first was used",)


def test_I11_window_full_ignores_the_file():
    assert np.array_equal(grey(dicom(WindowCenter=100, WindowWidth=60), "full"), shown(RAMP, 0, 255))


def test_I11_window_asked_for_that_makes_no_sense_is_refused():
    refused(dicom(), "the window that was asked for is 0", window=(10.0, 0.0))


def test_I11_window_percentile():
    stored = np.random.default_rng(0).integers(0, 4000, (8, 8)).astype(np.uint16)
    units = stored * 0.5 - 7
    low, high = np.percentile(units, [0.5, 99.5])
    content = dicom(stored, RescaleSlope="0.5", RescaleIntercept="-7", WindowCenter=1, WindowWidth=1)
    assert np.array_equal(grey(content, "percentile"), shown(units, low, high))


def test_I11_window_percentile_of_a_flat_frame_is_black_with_a_note():
    found = image(dicom(np.full((4, 4), 9, np.uint8)), "percentile")
    assert not found.pixels.any()
    assert "percentiles are equal" in found.notes[0]


def test_I11_no_window_and_little_of_the_range_used_is_noted():
    dark = dicom(RAMP.astype(np.uint16))
    (note,) = image(dark).notes
    assert note.startswith(
        "the file has no window: its full stored range of 16 bits was mapped to 0..1; --window"
    )
    assert image(dark, "full").notes == ()
    assert image(dicom(RAMP)).notes == ()
    assert image(dicom(np.full((4, 4), 9, np.uint8))).notes == ()


def test_I11_signed():
    stored = (RAMP.astype(np.int16) - 100) * 50
    content = dicom(stored, RescaleSlope=1, RescaleIntercept=-24)
    assert np.array_equal(grey(content), shown(stored - 24.0, -32768 - 24, 32767 - 24))


@pytest.mark.parametrize("signed", [False, True])
def test_I11_12_in_16_with_garbage_above(signed):
    values = np.arange(35).reshape(5, 7) * 100 - (1700 if signed else 0)
    garbage = np.random.default_rng(1).integers(0, 16, (5, 7)) << 12
    stored = ((values & 0xFFF) | garbage).astype(np.uint16)
    content = dicom(stored, BitsStored=12, PixelRepresentation=int(signed))
    low = -2048 if signed else 0
    assert np.array_equal(grey(content), shown(values, low, low + 4095))


def test_I11_high_bit_above_bits_stored_shifts_the_pixels():
    values = np.arange(35).reshape(5, 7) * 100
    stored = ((values << 4) | 0xB).astype(np.uint16)
    assert np.array_equal(grey(dicom(stored, BitsStored=12, HighBit=15)), shown(values, 0, 4095))


def test_I11_high_bit_that_does_not_fit_is_refused():
    refused(dicom(BitsStored=8, HighBit=9), "HighBit is 9, expected one whole number 7 to 7")


def test_I11_one_bit_segmentation_of_several_frames():
    bits = np.random.default_rng(2).integers(0, 2, (3, 5, 7)).astype(np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    content = dicom(bits, tail=pixel_data(packed), NumberOfFrames=3, BitsAllocated=1, BitsStored=1, HighBit=0)
    for number in range(3):
        assert np.array_equal(grey(content, frame=number), bits[number].astype(np.float32))


def test_32_bit_pixels_are_exact():
    stored = np.array([[0, 2**32 - 1], [123456789, 2**31]], np.uint32)
    content = dicom(stored)
    assert np.array_equal(grey(content), shown(stored, 0, 2**32 - 1))
    assert np.array_equal(grey(content, (123456789.0, 1.0)), (stored > 123456788.5).astype(np.float32))


# ---- colour

COLOUR = np.random.default_rng(3).integers(0, 256, (6, 8, 3)).astype(np.uint8)


def colour(content, bits=8):
    pixels = image(content).pixels
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    return pixels


def rgb_file(raw, *, stored=COLOUR, **elements):
    bits = 8 * stored.dtype.itemsize
    size = {"Rows": 6, "Columns": 8, "SamplesPerPixel": 3, "BitsAllocated": bits, "BitsStored": bits}
    settings = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "PixelRepresentation": 0}
    return dicom(tail=pixel_data(raw.tobytes()), **(size | settings | elements))


def upright(planes):
    return np.moveaxis(planes, 2, 0)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_I11_planar_rgb(planar, dtype):
    stored = COLOUR.astype(dtype) * (1 if dtype == np.uint8 else 257)
    raw = np.moveaxis(stored, 2, 0).copy() if planar else stored
    content = rgb_file(raw, stored=stored, PlanarConfiguration=planar, WindowCenter=1, WindowWidth=1)
    assert np.array_equal(colour(content), upright(COLOUR).astype(np.float32) / np.float32(255))
    assert image(content).mode == "RGB"


def ybr_to_rgb(ybr):
    luma, blue, red = np.moveaxis(ybr.astype(float), 2, 0)
    blue, red = blue - 128, red - 128
    mixed = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return (np.clip(np.rint(mixed), 0, 255) / 255).astype(np.float32)


def test_I11_ybr_full():
    content = rgb_file(COLOUR, PhotometricInterpretation="YBR_FULL")
    assert np.array_equal(colour(content), ybr_to_rgb(COLOUR))


def test_I11_ybr_full_422_uncompressed():
    raw = np.empty((6, 4, 4), np.uint8)
    raw[..., :2] = COLOUR[..., 0].reshape(6, 4, 2)
    raw[..., 2:] = COLOUR[:, ::2, 1:]
    full = COLOUR.copy()
    full[..., 1:] = np.repeat(COLOUR[:, ::2, 1:], 2, axis=1)
    content = rgb_file(raw, PhotometricInterpretation="YBR_FULL_422")
    assert np.array_equal(colour(content), ybr_to_rgb(full))
    assert image(content).mode == "YBR_FULL_422"


def test_I11_ybr_full_422_that_is_not_subsampled_is_refused():
    refused(
        rgb_file(COLOUR, PhotometricInterpretation="YBR_FULL_422"), "PixelData has 144 bytes, expected 96"
    )
    odd = rgb_file(COLOUR[:, :7], PhotometricInterpretation="YBR_FULL_422", Columns=7)
    refused(odd, "even number of Columns")


def palette(tables, bits, first=0, segmented=False):
    count = len(tables[0])
    found = {}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        found[f"{name}PaletteColorLookupTableDescriptor"] = [count % 65536, first, bits]
        data = np.asarray(table, np.uint8 if bits == 8 else np.uint16).tobytes()
        found[f"{name}PaletteColorLookupTableData"] = data + b"\0" * (len(data) % 2)
    return found | {"PhotometricInterpretation": "PALETTE COLOR"}


@pytest.mark.parametrize("bits", [8, 16])
def test_I11_palette(bits):
    rng = np.random.default_rng(4)
    tables = rng.integers(0, 2**bits, (3, 200))
    golden = tables[:, np.clip(RAMP.astype(int) - 10, 0, 199)].astype(np.float32) / np.float32(2**bits - 1)
    content = dicom(**palette(tables, bits, first=10))
    assert np.array_equal(colour(content), golden)
    assert (image(content).mode, image(content).bits) == ("PALETTE COLOR", 8)


def test_I11_palette_of_16_bits_that_holds_8_is_read_as_8_with_a_note():
    tables = np.stack([np.arange(256)] * 3)
    found = image(dicom(**palette(tables, 16)))
    assert np.array_equal(found.pixels[0], RAMP.astype(np.float32) / np.float32(255))
    assert "palette says 16 bits" in found.notes[0]


def test_I11_palette_segmented():
    elements = palette(np.zeros((3, 256)), 16)
    segments = np.array([0, 2, 100, 200, 1, 254, 51000], "<u2").tobytes()
    for name in ("Red", "Green", "Blue"):
        del elements[f"{name}PaletteColorLookupTableData"]
        elements[f"Segmented{name}PaletteColorLookupTableData"] = segments
    table = np.concatenate([[100], np.rint(np.linspace(200, 51000, 255))])
    golden = (table / 65535).astype(np.float32)[RAMP]
    assert np.array_equal(colour(dicom(**elements)), np.stack([golden] * 3))
    elements["SegmentedRedPaletteColorLookupTableData"] = np.array([2, 2, 0, 0], "<u2").tobytes()
    refused(dicom(**elements), "segment that is not supported")
    elements["SegmentedRedPaletteColorLookupTableData"] = segments[:8]
    refused(dicom(**elements), "has 2 entries, expected 256")


def test_I11_palette_that_is_missing_or_too_short_is_refused():
    refused(
        dicom(PhotometricInterpretation="PALETTE COLOR"), "RedPaletteColorLookupTableDescriptor has 0 values"
    )
    short = palette(np.zeros((3, 256)), 8) | {"GreenPaletteColorLookupTableData": b"\0\0"}
    refused(dicom(**short), "GreenPaletteColorLookupTableData has 2 entries, expected 256")
    odd = palette(np.zeros((3, 256)), 8) | {"BluePaletteColorLookupTableDescriptor": [256, 0, 12]}
    refused(dicom(**odd), "says 12 bits, expected 8 or 16")


@pytest.mark.parametrize(
    ("value", "match"), [("CMYK", "CMYK (retired)"), ("PINK", "is unknown"), ("", "is missing")]
)
def test_I11_photometric_interpretation_that_is_unknown_is_refused(value, match):
    error = refused(dicom(PhotometricInterpretation=value), f"PhotometricInterpretation {match[:0]}")
    assert match in str(error)
    assert "PINK" not in str(error)


def test_samples_must_fit_the_photometric_interpretation():
    refused(
        dicom(SamplesPerPixel=3, PlanarConfiguration=0), "SamplesPerPixel is 3, expected 1 for MONOCHROME2"
    )
    refused(rgb_file(COLOUR, PixelRepresentation=1), "PixelRepresentation is 1")


# ---- compression


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_rle_is_bit_equal_to_uncompressed(dtype):
    stored = np.repeat(np.random.default_rng(5).integers(-9, 999, (3, 9, 4)), 4, axis=2).astype(dtype)
    size = {"Rows": 9, "Columns": 16, "BitsAllocated": stored.itemsize * 8, "BitsStored": stored.itemsize * 8}
    size |= {"PixelRepresentation": int(dtype == np.int16), "NumberOfFrames": 3}
    encode = get_encoder(RLELossless).encode
    options = {
        "rows": 9,
        "columns": 16,
        "samples_per_pixel": 1,
        "bits_allocated": stored.itemsize * 8,
        "bits_stored": stored.itemsize * 8,
        "pixel_representation": int(dtype == np.int16),
        "photometric_interpretation": "MONOCHROME2",
        "number_of_frames": 1,
    }
    frames = [encode(frame, encoding_plugin="pydicom", **options) for frame in stored]
    content = compressed(frames, RLELossless, **size)
    plain = dicom(stored, NumberOfFrames=3)
    for number in range(3):
        assert np.array_equal(grey(content, frame=number), grey(plain, frame=number))


def test_rle_that_is_damaged_is_refused():
    size = {"Rows": 5, "Columns": 7}
    good = np.array([1, 64, *[0] * 14], "<u4").tobytes() + b"\x21" + RAMP.tobytes()[:34]
    refused(compressed([good], RLELossless, **size), "an RLE segment holds 34 bytes, expected 35")
    two = np.array([2, 64, 66, *[0] * 13], "<u4").tobytes() + bytes(8)
    refused(compressed([two], RLELossless, **size), "does not declare 1 segments")
    refused(compressed([b"\1\0\0\0"], RLELossless, **size), "does not declare 1 segments")


def test_rle_bomb_stops_at_the_size_of_the_frame():
    bomb = np.array([1, 64, *[0] * 14], "<u4").tobytes() + b"\x81\x07" * 500_000
    content = compressed([bomb], RLELossless, Rows=5, Columns=7)
    tracemalloc.start()
    try:
        assert np.array_equal(grey(content), np.full((5, 7), np.float32(7) / np.float32(255)))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def has_openjpeg():
    return "pylibjpeg" in get_decoder(JPEG2000Lossless).available_plugins


@pytest.mark.skipif(not has_openjpeg(), reason="pylibjpeg-openjpeg is not installed")
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "RGB", "YBR_RCT"])
def test_jpeg2000_is_bit_equal_to_uncompressed(photometric):
    rng = np.random.default_rng(6)
    samples = 1 if photometric == "MONOCHROME2" else 3
    shape, dtype = ((32, 40), np.int16) if samples == 1 else ((32, 40, 3), np.uint8)
    stored = rng.integers(0, 200, shape).astype(dtype) - dtype(100 if samples == 1 else 0)
    layout = {"Rows": 32, "Columns": 40, "BitsAllocated": stored.itemsize * 8, "SamplesPerPixel": samples}
    layout |= {"BitsStored": 12 if samples == 1 else 8, "PixelRepresentation": int(samples == 1)}
    frame = get_encoder(JPEG2000Lossless).encode(
        stored,
        encoding_plugin="pylibjpeg",
        rows=32,
        columns=40,
        samples_per_pixel=samples,
        bits_allocated=layout["BitsAllocated"],
        bits_stored=layout["BitsStored"],
        pixel_representation=layout["PixelRepresentation"],
        photometric_interpretation=photometric,
        number_of_frames=1,
        planar_configuration=0,
    )
    content = compressed([frame], JPEG2000Lossless, PhotometricInterpretation=photometric, **layout)
    if samples == 1:
        assert np.array_equal(grey(content), shown(stored, -2048, 2047))
        wrong = compressed([frame], JPEG2000Lossless, **(layout | {"Rows": 31}))
        refused(
            wrong,
            "the compressed frame declares 32 x 40 x 1 (rows, columns, components), expected 31 x 40 x 1",
        )
        refused(
            compressed([frame], JPEG2000Lossless, **(layout | {"BitsStored": 5})), "BitsStored 5 cannot hold"
        )
        narrow = compressed([frame], JPEG2000Lossless, **(layout | {"BitsAllocated": 8, "BitsStored": 8}))
        refused(narrow, "the JPEG 2000 frame has 12 bits")
    else:
        assert np.array_equal(colour(content), upright(stored).astype(np.float32) / np.float32(255))


def test_jpeg2000_without_its_decoder_names_the_extra(monkeypatch):
    monkeypatch.setattr(get_decoder(JPEG2000Lossless), "_available", {"gdcm": None, "pillow": None})
    error = refused(compressed([b"\0\0"], JPEG2000Lossless), "JPEG 2000 Image Compression (Lossless Only)")
    assert "pip install 'umiad[dicom]'" in error.hint


def jpeg(array, **options):
    stream = BytesIO()
    PIL.Image.fromarray(array).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def smooth():
    rows, columns = np.mgrid[0:16, 0:24]
    return np.stack([rows * 9, columns * 8, rows + columns], axis=2).astype(np.uint8)


@pytest.mark.parametrize("says", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("options", [{"subsampling": 1}, {"keep_rgb": True}])
def test_jpeg_baseline_colours_follow_the_codestream(says, options):
    encoded = jpeg(smooth(), **options)
    with PIL.Image.open(BytesIO(encoded)) as picture:
        golden = np.asarray(picture.convert("RGB"))
    size = {"Rows": 16, "Columns": 24, "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    content = compressed([encoded], JPEGBaseline8Bit, PhotometricInterpretation=says, **size)
    assert np.array_equal(colour(content), upright(golden).astype(np.float32) / np.float32(255))
    assert np.abs(colour(content) * 255 - upright(smooth())).max() < 12  # and those are the true colours


def test_jpeg_baseline_without_markers_follows_the_photometric_interpretation():
    """Without JFIF and Adobe markers only the header knows; libjpeg would always convert from YCbCr."""
    encoded = jpeg(smooth(), subsampling=0)
    assert encoded[2:4] == b"\xff\xe0"
    bare = encoded[:2] + encoded[4 + int.from_bytes(encoded[4:6], "big") :]
    size = {"Rows": 16, "Columns": 24, "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    converted = colour(compressed([bare], JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL", **size))
    assert np.abs(converted * 255 - upright(smooth())).max() < 12
    kept = colour(compressed([bare], JPEGBaseline8Bit, PhotometricInterpretation="RGB", **size))
    assert np.abs(ybr_to_rgb(np.rint(np.moveaxis(kept, 0, 2) * 255)) - converted).max() <= 2 / 255


def test_jpeg_baseline_frame_of_another_size_is_refused_before_it_is_decoded():
    encoded = jpeg(np.zeros((2000, 2000), np.uint8))
    refused(compressed([encoded], JPEGBaseline8Bit), "declares 2000 x 2000 x 1 (rows, columns, components)")


def test_jpeg_baseline_that_is_truncated_is_refused():
    encoded = jpeg(np.random.default_rng(7).integers(0, 255, (64, 64)).astype(np.uint8))
    refused(
        compressed([encoded[: len(encoded) // 2]], JPEGBaseline8Bit, Rows=64, Columns=64), "cannot be decoded"
    )


def test_jpeg_of_12_bits_and_jpeg_ls_have_no_decoder():
    twelve = compressed([b"\0\0"], JPEGBaseline8Bit, BitsAllocated=16, BitsStored=12)
    refused(twelve, "JPEG Baseline (Process 1) with 12 bits, expected 8")
    error = refused(compressed([b"\0\0"], JPEGLSLossless), "JPEG-LS Lossless Image Compression")
    assert "no permissively licensed decoder is packaged" in error.reason


@pytest.mark.parametrize(
    ("syntax", "match"),
    [
        ("1.2.3.4.5", "the unknown 1.2.3.4.5 (TransferSyntaxUID), there is no decoder for it"),
        (
            "1.2.840.10008.1.2.4.100",
            "MPEG2 Main Profile / Main Level (TransferSyntaxUID), there is no decoder",
        ),
        ("1.2.840.10008.1.2.4.70", "JPEG Lossless, Non-Hierarchical"),
    ],
)
def test_I12_unknown_transfer_syntax(syntax, match):
    refused(compressed([b"\0\0"], syntax), match)


def test_gdcm_is_never_chosen(monkeypatch):
    """Even where it is the only plugin that is installed."""

    def never(*arguments):
        raise AssertionError("GDCM was used")

    for syntax in (JPEG2000Lossless, JPEGBaseline8Bit, RLELossless, JPEGLSLossless):
        monkeypatch.setattr(get_decoder(syntax), "_available", {"gdcm": never})
        with pytest.raises(InputError):
            image(compressed([b"\0" * 80], syntax))


def test_compressed_pixels_that_say_they_are_uncompressed_are_refused_and_the_reverse():
    plain = dicom(tail=pixel_data(encapsulate([b"\0\0"]) + DELIMITER, length=UNDEFINED, pad=False))
    refused(plain, "PixelData is encapsulated")
    refused(dicom(syntax=RLELossless), "PixelData ends within its compressed fragments")


# ---- frames


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_I10_frame_k_is_bit_equal_and_frames_are_counted(dtype):
    stored = np.random.default_rng(8).integers(0, 255, (5, 3, 5)).astype(dtype)
    stack = open_dicom(dicom(stored, NumberOfFrames=5), source())
    assert (stack.count, stack.single, stack.geometry) == (5, False, None)
    for number in (3, 0, 4):
        frame = stack.frame(number)
        assert np.array_equal(frame.pixels[0], shown(stored[number], 0, np.iinfo(dtype).max))
        assert frame.frame == number
    for number in (-1, 5):
        with pytest.raises(InputError, match="its frames are 0 to 4"):
            stack.frame(number)


@pytest.mark.parametrize(
    "elements", [{}, {"NumberOfFrames": 1}, {"NumberOfFrames": 0}, {"NumberOfFrames": None}]
)
def test_I10_a_file_of_one_frame_is_single(elements):
    stack = open_dicom(dicom(**elements), source())
    assert (stack.count, stack.single) == (1, True)
    assert stack.frame(0).frame is None


def test_I10_only_the_frame_asked_for_is_decoded():
    frames = [
        jpeg(np.full((8, 8), 40, np.uint8)),
        b"\xff\xd8 broken \xff\xd9",
        jpeg(np.full((8, 8), 200, np.uint8)),
    ]
    stack = open_dicom(compressed(frames, JPEGBaseline8Bit, Rows=8, Columns=8, NumberOfFrames=3), source())
    assert abs(stack.frame(0).pixels.mean() - 40 / 255) < 0.01
    assert abs(stack.frame(2).pixels.mean() - 200 / 255) < 0.01
    with pytest.raises(InputError, match="cannot be decoded"):
        stack.frame(1)


def test_I10_enhanced_multi_frame_has_its_own_rescale_window_and_spacing():
    def groups(slope, centre, spacing):
        return item(
            PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=-10)],
            FrameVOILUTSequence=[item(WindowCenter=centre, WindowWidth=101)],
            PixelMeasuresSequence=[item(PixelSpacing=[spacing, 0.5])],
        )

    stored = np.stack([RAMP, RAMP]).astype(np.uint16)
    shared = dicom(stored, NumberOfFrames=2, SharedFunctionalGroupsSequence=[groups(2, 150, 0.25)])
    golden = np.clip((RAMP * 2.0 - 10 - 149.5) / 100 + 0.5, 0, 1).astype(np.float32)
    assert np.array_equal(grey(shared, frame=1), golden)
    assert image(shared, frame=1).spacing == (0.25, 0.5)
    each = dicom(
        stored,
        NumberOfFrames=2,
        PerFrameFunctionalGroupsSequence=[groups(2, 150, 0.25), groups(3, 90, 0.75)],
        SharedFunctionalGroupsSequence=[groups(7, 7, 7)],
    )
    assert np.array_equal(grey(each, frame=0), golden)
    other = np.clip((RAMP * 3.0 - 10 - 89.5) / 100 + 0.5, 0, 1).astype(np.float32)
    assert np.array_equal(grey(each, frame=1), other)
    assert image(each, frame=1).spacing == (0.75, 0.5)


# ---- spacing, patient, remarks


def region(x=0.05, y=0.04, units=3):
    return item(
        PhysicalUnitsXDirection=units, PhysicalUnitsYDirection=units, PhysicalDeltaX=x, PhysicalDeltaY=y
    )


@pytest.mark.parametrize(
    ("elements", "spacing", "note"),
    [
        ({}, None, ""),
        ({"PixelSpacing": [0.4, 0.5], "ImagerPixelSpacing": [9, 9]}, (0.4, 0.5), ""),
        (
            {"ImagerPixelSpacing": [0.14, 0.15]},
            (0.14, 0.15),
            "(ImagerPixelSpacing) was measured at the detector",
        ),
        (
            {"NominalScannedPixelSpacing": [0.1, 0.2]},
            (0.1, 0.2),
            "(NominalScannedPixelSpacing) was measured on",
        ),
        ({"SequenceOfUltrasoundRegions": [region()]}, (0.4, 0.5), ""),
        ({"SequenceOfUltrasoundRegions": [region(), region()]}, (0.4, 0.5), ""),
        ({"SequenceOfUltrasoundRegions": [region(), region(x=0.07)]}, None, "different sizes"),
        ({"SequenceOfUltrasoundRegions": [region(units=4)]}, None, "not in centimetres"),
        ({"SequenceOfUltrasoundRegions": []}, None, ""),
        ({"PixelSpacing": [0, 0.5]}, None, "two numbers above 0"),
        ({"PixelSpacing": [0.5, -1]}, None, "two numbers above 0"),
        (
            {"PixelSpacing": element("PixelSpacing", "LO", "nan")},
            None,
            "PixelSpacing holds a value that is no number",
        ),
        ({"PixelSpacing": element("PixelSpacing", "LO", "DOE^JANE")}, None, "no number"),
        ({"ImagerPixelSpacing": 0.5}, None, "two numbers above 0"),
    ],
)
def test_spacing_from_each_source(elements, spacing, note):
    found = image(dicom(**elements))
    assert found.spacing == (None if spacing is None else pytest.approx(spacing, rel=1e-12))
    assert "JANE" not in str(found.notes)
    assert (note in found.notes[0]) if note else (found.notes == ())


def test_patient_token_is_keyed_and_equal_for_one_patient():
    content = dicom(PatientID="P1 ", IssuerOfPatientID="HOSP")
    token = image(content, key=b"k").patient
    assert token == hmac.new(b"k", b"P1\0HOSP", hashlib.sha256).hexdigest()[:16]
    assert image(dicom(PatientID="P1"), key=b"k").patient not in ("", token)
    assert image(content, key=b"other").patient != token
    assert image(content).patient == ""
    assert image(dicom(PatientID="", IssuerOfPatientID="HOSP"), key=b"k").patient == ""
    assert image(dicom(), key=b"k").patient == ""
    assert token not in repr(image(content, key=b"k"))


def test_burned_in_text_is_noted():
    assert image(dicom(BurnedInAnnotation="YES")).notes == (
        "the file says that text is burnt into its pixels",
    )
    assert image(dicom(BurnedInAnnotation="NO")).notes == ()


@pytest.mark.parametrize("magic", [b"MZ", b"\x7fELF"])
def test_preamble_that_looks_like_a_program_is_noted(magic):
    content = magic.ljust(128, b"\0") + dicom()[128:]
    assert image(content).notes == ("the preamble looks like a program; never run this file",)


def test_I13_a_file_without_preamble_is_read():
    bare = dicom()[132:]
    assert np.array_equal(grey(bare), shown(RAMP, 0, 255))
    nothing_said = dicom()[len(meta(ExplicitVRLittleEndian)) :]
    assert np.array_equal(grey(nothing_said), shown(RAMP, 0, 255))


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


def nested(depth, patient=b""):
    """Before PixelData: sequences of undefined length within each other."""
    start = b"\x40\x00\x30\xa7SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    end = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    return start * depth + patient + end * depth + pixel_data(RAMP.tobytes())


@pytest.mark.parametrize("depth", [300, 10_000])
def test_I12_nesting(depth):
    refused(dicom(tail=nested(depth)), "sequences (SQ, items (FFFE,E000)) are nested too deeply")


def test_I12_nesting_that_is_harmless_is_read():
    assert np.array_equal(grey(dicom(tail=nested(5))), shown(RAMP, 0, 255))


def deflated(dataset):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return meta(DeflatedExplicitVRLittleEndian) + packer.compress(dataset) + packer.flush()


def plain_data_set(**elements):
    return dicom(**elements)[len(meta(ExplicitVRLittleEndian)) :]


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
    refused(dicom(), "there is not enough memory to decode it")


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
