import numpy as np
import pytest
import torch

from umiad.config import Preprocessing
from umiad.nn.pixels import MEAN, STD, grey
from umiad.preprocess import to_input
from umiad.types import Image


def test_the_constants_are_those_of_the_preprocessing():
    assert (Preprocessing().mean, Preprocessing().std) == (MEAN, STD)


def test_grey_undoes_the_preprocessing():
    pixels = np.random.default_rng(0).uniform(size=(1, 64, 64)).astype(np.float32)
    images = torch.from_numpy(to_input(Image(pixels, "a"), Preprocessing(size=64)))[None]
    assert grey(images).shape == (1, 1, 64, 64)
    np.testing.assert_allclose(grey(images)[0].numpy(), pixels, atol=1e-6)


@pytest.mark.parametrize("edge", [32, 64])
def test_grey_is_reduced_by_area(edge):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    step = 64 // edge
    blocks = grey(images).reshape(2, 1, edge, step, edge, step).mean((3, 5))
    torch.testing.assert_close(grey(images, edge), blocks, atol=1e-6, rtol=0)


def test_grey_keeps_the_type_and_has_no_gradient():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    assert grey(images).dtype == torch.float64
    assert not grey(images).requires_grad
