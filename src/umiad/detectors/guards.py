"""Guards that every detector puts around its public calls: shape, fitted or not, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from umiad.errors import InputError, ModelFileError, NotFittedError


def check_images(images: Tensor, *, size: int) -> None:
    """Raise InputError unless `images` is [B,3,size,size] with B >= 1, naming both shapes."""
    if images.ndim != 4 or images.shape[0] < 1 or tuple(images.shape[1:]) != (3, size, size):
        raise InputError("images", f"shape {tuple(images.shape)}, expected [B,3,{size},{size}] with B >= 1")


def check_fitted(*, fitted: bool, name: str) -> None:
    """Raise NotFittedError unless `fitted`."""
    if not fitted:
        raise NotFittedError(f"{name} is not fitted: call fit first, or load a saved model")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every submodule's own mode is restored afterwards.

    A graph that is traced for export knows no inference mode: there it is `no_grad`, which computes the same.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad() if torch.compiler.is_exporting() else torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, name: str) -> None:
    """Raise ModelFileError naming the first key that is missing, unknown or of another shape."""
    for key in sorted(expected.keys() | state.keys()):
        if key not in state:
            raise ModelFileError(f"{name}: tensor {key!r} is missing")
        if key not in expected:
            raise ModelFileError(f"{name}: tensor {key!r} is not part of this model")
        if state[key].shape != expected[key].shape:
            found, wanted = tuple(state[key].shape), tuple(expected[key].shape)
            raise ModelFileError(f"{name}: tensor {key!r} has shape {found}, expected {wanted}")
