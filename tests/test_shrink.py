import pytest
import torch

from umiad.nn.shrink import shrink, stretch


def test_images_are_reduced_by_their_means():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    found = shrink(images, 2)
    assert found.shape == (2, 3, 2, 2)
    assert found[0, 0, 0, 0] == images[0, 0, :2, :2].mean()
    assert torch.allclose(found.mean((2, 3)), images.mean((2, 3)))


@pytest.mark.parametrize("edge", [None, 4, 8])
def test_images_that_are_small_enough_stay_as_they_are(edge):
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert shrink(images, edge) is images


def test_maps_keep_their_corners():
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = stretch(maps, (9, 7))
    assert found.shape == (2, 3, 9, 7)
    for row in (0, -1):
        for column in (0, -1):
            assert torch.equal(found[..., row, column], maps[..., row, column])
    assert stretch(maps, (4, 5)) is maps
