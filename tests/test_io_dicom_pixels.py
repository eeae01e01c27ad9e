"""Grey values and colours of DICOM files; every golden array is computed by hand."""

import numpy as np
import pytest
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from make_dicom import (
    RAMP,
    colour,
    dicom,
    element,
    grey,
    image,
    lut,
    pixel_data,
    refused,
    shown,
    source,
    upright,
    ybr_to_rgb,
)
from umiad.io.dicom import open_dicom

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


def rgb_file(raw, *, stored=COLOUR, **elements):
    bits = 8 * stored.dtype.itemsize
    size = {"Rows": 6, "Columns": 8, "SamplesPerPixel": 3, "BitsAllocated": bits, "BitsStored": bits}
    settings = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "PixelRepresentation": 0}
    return dicom(tail=pixel_data(raw.tobytes()), **(size | settings | elements))


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_I11_planar_rgb(planar, dtype):
    stored = COLOUR.astype(dtype) * (1 if dtype == np.uint8 else 257)
    raw = np.moveaxis(stored, 2, 0).copy() if planar else stored
    content = rgb_file(raw, stored=stored, PlanarConfiguration=planar, WindowCenter=1, WindowWidth=1)
    assert np.array_equal(colour(content), upright(COLOUR).astype(np.float32) / np.float32(255))
    assert image(content).mode == "RGB"


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
