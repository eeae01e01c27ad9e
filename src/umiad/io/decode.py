"""From the bytes of a file of known kind to its images: which reader takes it. Runs in the decoding process."""

from __future__ import annotations

from umiad.errors import InputError
from umiad.io import raster
from umiad.io.files import RASTER_KINDS
from umiad.io.source import TOO_LARGE, Source
from umiad.types import Image, Stack


def open_images(content: bytes, source: Source) -> Stack:
    """The images of a file. Raises InputError for whatever is wrong with it."""
    try:
        if source.kind in RASTER_KINDS:
            image = raster.read_pixels(content, source)
            return Stack(1, lambda _: image)
        if source.kind == "DICOM":
            from umiad.io.dicom import open_dicom

            return open_dicom(content, source)
        from umiad.io.nifti import open_nifti

        return open_nifti(content, source)
    except InputError:
        raise
    except (Exception, RecursionError) as error:
        raise unexpected(error, source) from error


def open_masks(content: bytes, source: Source) -> Stack:
    """The masks of a file, as images of 0 and 1: white in a picture, any label but 0 in a volume."""
    try:
        if source.kind in RASTER_KINDS:
            mask = raster.read_bright(content, source)
            image = Image(mask[None].astype("float32"), source.name)
            return Stack(1, lambda _: image)
        if source.kind == "DICOM":
            raise InputError(source.name, "is a DICOM file, masks are pictures or NIfTI", "save it as PNG")
        from umiad.io.nifti import open_nifti_mask

        return open_nifti_mask(content, source)
    except InputError:
        raise
    except (Exception, RecursionError) as error:
        raise unexpected(error, source) from error


def unexpected(error: BaseException, source: Source) -> InputError:
    """What a reader let slip; its own words may hold a patient's, so only their kind is told."""
    if isinstance(error, MemoryError):
        return InputError(source.name, *TOO_LARGE)
    reason = f"cannot be decoded as {source.kind} ({type(error).__name__})"
    return InputError(source.name, reason, "it is damaged; export it again")
