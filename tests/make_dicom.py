"""DICOM files for tests, built byte by byte where it matters. Import as `from make_dicom import ...`."""

import re
import warnings
import zlib
from io import BytesIO

import numpy as np
import PIL.Image
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from umiad.errors import InputError
from umiad.io.dicom import open_dicom
from umiad.io.source import Limits, Source

US = "1.2.840.10008.5.1.4.1.1.6.1"
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


def colour(content, bits=8):
    pixels = image(content).pixels
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    return pixels


def upright(planes):
    return np.moveaxis(planes, 2, 0)


def ybr_to_rgb(ybr):
    luma, blue, red = np.moveaxis(ybr.astype(float), 2, 0)
    blue, red = blue - 128, red - 128
    mixed = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return (np.clip(np.rint(mixed), 0, 255) / 255).astype(np.float32)


def jpeg(array, **options):
    stream = BytesIO()
    PIL.Image.fromarray(array).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def nested(depth, patient=b""):
    """Before PixelData: sequences of undefined length within each other."""
    start = b"\x40\x00\x30\xa7SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    end = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    return start * depth + patient + end * depth + pixel_data(RAMP.tobytes())


def deflated(dataset):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return meta(DeflatedExplicitVRLittleEndian) + packer.compress(dataset) + packer.flush()


def plain_data_set(**elements):
    return dicom(**elements)[len(meta(ExplicitVRLittleEndian)) :]
