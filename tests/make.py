"""Builders for tests: small image files and sets. Import as `from make import ...`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image

from umiad.phantoms import write_phantoms
from umiad.types import Image


def grey_array(size: tuple[int, int] = (64, 64), seed: int = 0) -> np.ndarray:
    """A smooth ramp with noise, uint8 [H,W]; another seed, another image."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(40, 140, size[0]), np.linspace(0, 60, size[1]))
    return np.clip(ramp + rng.normal(0, 12, size), 0, 255).astype(np.uint8)


def save_array(path: Path, array: np.ndarray) -> Path:
    """Write an array as an image file, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)
    return path


def grey_png(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """Write one 8-bit grey PNG."""
    return save_array(path, grey_array(size, seed))


def mask_png(
    path: Path, size: tuple[int, int] = (64, 64), box: tuple[int, int, int, int] | None = None
) -> Path:
    """Write one mask, white inside box = (x0, y0, x1, y1), empty without a box."""
    mask = np.zeros(size, dtype=np.uint8)
    if box is not None:
        mask[box[1] : box[3], box[0] : box[2]] = 255
    return save_array(path, mask)


def blob_image(size: int = 64, *, seed: int = 0, blob: bool = False, name: str = "blob") -> Image:
    """A grey `Image` in memory; with `blob` a bright disc sits off its centre."""
    pixels = grey_array((size, size), seed).astype(np.float32) / 255
    if blob:
        rows, columns = np.indices((size, size))
        pixels[(rows - 0.4 * size) ** 2 + (columns - 0.6 * size) ** 2 < (0.12 * size) ** 2] = 1.0
    return Image(pixels[None], name)


def folder_of_images(
    root: Path, n: int, *, size: tuple[int, int] = (64, 64), prefix: str = "case"
) -> list[Path]:
    """Write `n` different grey PNGs below `root`; returns their paths in order."""
    return [grey_png(root / f"{prefix}_{index:03d}.png", size, seed=index) for index in range(n)]


def tiny_set(root: Path, n_normal: int = 12, n_abnormal: int = 4, size: int = 64, seed: int = 0) -> Path:
    """A phantom set with normal/, abnormal/, masks/; returns its folder."""
    return write_phantoms(root, n_normal=n_normal, n_abnormal=n_abnormal, size=size, seed=seed)


def busi_like(root: Path, n_per_class: int = 3) -> Path:
    """benign/, malignant/, normal/ with BUSI's names; `benign (1)` has two masks, normal masks are empty."""
    for number, kind in enumerate(("benign", "malignant", "normal")):
        for index in range(1, n_per_class + 1):
            stem = f"{kind} ({index})"
            grey_png(root / kind / f"{stem}.png", seed=100 * number + index)
            box = None if kind == "normal" else (8, 8, 24, 24)
            mask_png(root / kind / f"{stem}_mask.png", box=box)
    mask_png(root / "benign" / "benign (1)_mask_1.png", box=(40, 40, 50, 50))
    return root


def dicom_file(path: Path, stored: np.ndarray, **elements: object) -> Path:
    """Write an uncompressed grey DICOM; `stored` unsigned [H,W] or [N,H,W], `elements` by keyword."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    bits = 8 * stored.dtype.itemsize
    data.Rows, data.Columns = stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits, bits - 1, 0
    if stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.PatientName, data.PatientID = "DOE^JANE", "4711"
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def nifti_file(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a volume [X,Y,Z] as .nii or .nii.gz; without an affine, 1 mm voxels along RAS+."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)
    return path
