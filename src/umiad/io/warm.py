"""Load what decoders load late, while files may still be opened."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from io import BytesIO

import numpy as np


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

    for name in ("pydicom.charset", "pydicom.encaps", "pydicom.pixels.processing", "pydicom.sr.codedict"):
        import_module(name)
    for name in ("pylibjpeg", "openjpeg", "rle", "umiad.io.dicom"):
        with suppress(ImportError):
            import_module(name)
    for each in vars(decoders).values():
        if isinstance(each, decoders.base.Decoder):
            _ = each.available_plugins
    _ = pydicom.config.settings


def nifti() -> None:
    """nibabel, and the reader."""
    import nibabel

    import_module("umiad.io.nifti")
    nibabel.Nifti1Image(np.zeros((2, 2, 2), dtype=np.float32), np.eye(4)).get_fdata()
