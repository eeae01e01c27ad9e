"""DICOM files: compression, frames, spacing, the token of a patient, remarks."""

import hashlib
import hmac
import tracemalloc
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder, get_encoder
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from make_dicom import (
    DELIMITER,
    RAMP,
    UNDEFINED,
    colour,
    compressed,
    dicom,
    element,
    grey,
    image,
    item,
    jpeg,
    meta,
    pixel_data,
    refused,
    shown,
    source,
    upright,
    ybr_to_rgb,
)
from umiad.errors import InputError
from umiad.io.dicom import open_dicom

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
