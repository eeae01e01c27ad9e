import pytest
import torch

from umiad.errors import InputError
from umiad.nn.fibres import join, neighbourhood


def test_a_neighbourhood_is_the_mean_of_what_lies_inside_the_map():
    features = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    averaged = neighbourhood(features)
    assert averaged.shape == features.shape
    for row in range(4):
        for column in range(5):
            window = features[:, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            # rounding of a sum of at most nine float64 values
            torch.testing.assert_close(averaged[:, :, row, column], window.mean((2, 3)), rtol=1e-12, atol=0)


def test_a_constant_map_keeps_its_value_up_to_the_border():
    torch.testing.assert_close(neighbourhood(torch.full((1, 2, 4, 4), 3.0)), torch.full((1, 2, 4, 4), 3.0))


def test_joining_keeps_the_finest_map_and_interpolates_the_coarser():
    rng = torch.Generator().manual_seed(0)
    fine, coarse = torch.rand(2, 3, 8, 8, generator=rng), torch.rand(2, 5, 4, 4, generator=rng)
    joined = join([fine, coarse])
    assert joined.shape == (2, 8, 8, 8)
    assert torch.equal(joined[:, :3], fine)
    # align_corners=False: the cell (1, 1) lies a quarter of the way from coarse cell 0 to 1 in each direction
    expected = (
        9 * coarse[..., 0, 0] + 3 * coarse[..., 0, 1] + 3 * coarse[..., 1, 0] + coarse[..., 1, 1]
    ) / 16
    torch.testing.assert_close(joined[:, 3:, 1, 1], expected)


def test_one_map_alone_is_left_as_it_is():
    only = torch.rand(1, 2, 4, 4)
    assert torch.equal(join([only]), only)


@pytest.mark.parametrize(
    "maps", [[], [torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4)]]
)
def test_maps_that_cannot_be_joined_are_refused(maps):
    with pytest.raises(InputError, match="all of one B"):
        join(maps)
