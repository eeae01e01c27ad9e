"""Load what decoders load late, while files may still be opened."""

from __future__ import annotations

import codecs
import gzip
from contextlib import suppress
from importlib import import_module
from io import BytesIO

import numpy as np

from umiad.io.source import Source


def raster() -> None:
    """Pillow with the four formats, each used once in both directions."""
    import PIL.Image
    import PIL.ImageCms

    PIL.Image.init()
    for kind, mode in (("PNG", "RGBA"), ("JPEG", "CMYK"), ("TIFF", "L"), ("BMP", "RGB")):
        content = BytesIO()
        PIL.Image.new(mode, (8, 8)).save(content, format=kind)
        picture = PIL.Image.open(content)
        picture.getexif()
        picture.convert("RGB").resize((4, 4))


def dicom() -> None:
    """Everything of pydicom, and every decoder that is installed."""
    raster()
    import pydicom
    import pydicom.pixels.decoders as decoders

    for name in (
        "numpy.ma",
        "pydicom.charset",
        "pydicom.encaps",
        "pydicom.pixels.processing",
        "pydicom.sr.codedict",
    ):
        import_module(name)
    for name in ("pylibjpeg", "openjpeg", "umiad.io.dicom"):
        with suppress(ImportError):
            import_module(name)
    for name in pydicom.charset.python_encoding.values():
        codecs.lookup(name)
    for each in vars(decoders).values():
        if isinstance(each, decoders.base.Decoder):
            _ = each.available_plugins
    _ = pydicom.config.settings


def nifti() -> None:
    """The reader and nibabel, used once in every way."""
    import nibabel

    from umiad.io.nifti import open_nifti, open_nifti_mask

    import_module("numpy.ma")  # NumPy imports it when it first sorts or counts
    content = nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4)).to_bytes()
    for kind, stored in (("NIfTI", content), ("NIfTI.gz", gzip.compress(content))):
        for open_file in (open_nifti, open_nifti_mask):
            open_file(stored, Source("sample", kind, window="percentile")).frame(0)
