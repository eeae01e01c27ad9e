import pytest
import torch

from umiad.nn.noise import coarse_noise, foreground

EDGE, CELLS, STD = 128, 16, 0.2


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=200, *, edge=EDGE, seed=0, std=STD, cells=CELLS):
    return coarse_noise(torch.zeros(count, 1, edge, edge), std=std, cells=cells, rng=rng(seed))


def correlation(first, second):
    return float((first * second).mean() / (first.square().mean() * second.square().mean()).sqrt())


def test_the_mean_is_zero_and_the_scale_is_that_of_the_nodes():
    found = noise()
    nodes = 200 * CELLS * CELLS  # independent numbers
    assert abs(float(found.mean())) < 4 * STD / nodes**0.5
    assert 0.6 * STD < float(found.std()) < 0.8 * STD  # weaker between nodes: two thirds per axis, on average
    assert float(found.abs().max()) > 3 * STD


def test_the_noise_is_coarse():
    """Neighbouring pixels are alike, pixels further apart than two nodes have nothing to do with each other."""
    found, node = noise(), EDGE // CELLS
    for axis in (-2, -1):
        assert correlation(found, found.roll(1, axis)) > 0.9
        assert 0.05 < correlation(found, found.roll(node, axis)) < 0.5
        for far in (3 * node, 5 * node):
            assert abs(correlation(found, found.roll(far, axis))) < 0.05


def test_finer_grids_give_finer_noise():
    by_cells = [correlation(n, n.roll(4, -1)) for n in (noise(cells=cells) for cells in (8, 16, 32))]
    assert by_cells[0] > by_cells[1] > by_cells[2]


def test_every_pixel_is_a_node_at_times():
    spread = noise(2000, edge=64, cells=4).std(0)
    assert float(spread.min()) > 0.85 * float(spread.mean())
    assert float(spread.max()) < 1.15 * float(spread.mean())


def test_each_image_has_its_own_noise_and_shift():
    found = noise(3)
    assert abs(correlation(found[0], found[1])) < 0.5
    seams = [int(image[0].diff(dim=1).abs().mean(0).argmax()) for image in noise(6, std=1.0)]
    assert len(set(seams)) > 1  # where the two ends of the grid meet


def test_the_generator_decides_and_global_states_do_not():
    before = torch.get_rng_state()
    assert torch.equal(noise(2, seed=5), noise(2, seed=5))
    assert not torch.equal(noise(2, seed=5), noise(2, seed=6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(noise(2, std=0.4), 2 * noise(2, std=0.2))


def test_images_need_not_be_square():
    found = coarse_noise(torch.zeros(2, 1, 64, 96, dtype=torch.float64), std=1.0, cells=8, rng=rng())
    assert found.shape == (2, 1, 64, 96)
    assert found.dtype == torch.float64


def disc(edge=EDGE, *, background=0.1, inside=0.6):
    axis = torch.arange(edge) - edge / 2
    within = (axis[:, None] ** 2 + axis**2).sqrt() < edge / 4
    return within, torch.where(within, inside, background)[None, None]


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (100.0, -30.0)])
def test_the_foreground_is_what_is_brighter_whatever_the_scale(scale, offset):
    within, image = disc()
    found = foreground(image * scale + offset, level=0.5)[0, 0]
    assert float((found == within).float().mean()) > 0.99
    surely = torch.nn.functional.max_pool2d(within[None].float(), 9, 1, 4)[0] == 0
    assert not found[surely].any()


def test_dark_speckle_in_tissue_is_foreground_and_bright_specks_outside_are_not():
    within, image = disc(background=0.0)
    image = image.clone()
    image[0, 0, 64, 64] = 0.0
    image[0, 0, 5, 5] = 0.3
    found = foreground(image, level=0.05)[0, 0]
    assert found[64, 64]
    assert not found[5, 5]
    assert not found[within.logical_not()].float().mean() > 0.1


@pytest.mark.parametrize("value", [0.0, 0.3, -7.7])
def test_a_constant_image_has_no_foreground(value):
    assert not foreground(torch.full((2, 1, 64, 64), value), level=0.0).any()


def test_each_image_is_its_own_measure():
    _, image = disc()
    both = foreground(torch.cat([image, 64 * image]), level=0.2)  # a power of two: no other rounding
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[:1], foreground(image, level=0.2))
