import math
from dataclasses import fields, replace

import pytest
import torch

from umiad.nn.cutpaste import AREA, ASPECT, CLASSES, JITTER, Piece, paste, patches, scars, three_way

EDGE = 64


def images(count=4, edge=EDGE, seed=3):
    return torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(seed))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def piece(**values):
    """A 4 x 6 patch from (10.5, 20.5) to (40.5, 30.5) that is pasted as it is."""
    base = {
        "height": 4.0,
        "width": 6.0,
        "angle": 0.0,
        "from_y": 10.5,
        "from_x": 20.5,
        "to_y": 40.5,
        "to_x": 30.5,
        "contrast": 1.0,
        "shift": 0.0,
    }
    return Piece(**{name: torch.tensor([value]) for name, value in {**base, **values}.items()})


def test_a_patch_is_copied_pixel_by_pixel():
    [before] = images(1)
    pasted, where = paste(before[None], piece())
    expected = before.clone()
    expected[:, 39:43, 28:34] = before[:, 9:13, 18:24]
    assert torch.allclose(pasted[0], expected, atol=1e-6)
    inside = torch.zeros(EDGE, EDGE, dtype=torch.bool)
    inside[39:43, 28:34] = True
    assert torch.equal(where[0], inside)


def test_a_scar_is_turned():
    before = images(1)
    turn = {"height": 5.0, "width": 3.0, "from_y": 10.0, "from_x": 20.0, "to_y": 40.0, "to_x": 30.0}
    pasted, where = paste(before, piece(**turn, angle=math.pi / 2 - 1e-4))
    rows, columns = where[0].nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (39, 41, 28, 32)
    expected = before[0, :, 8:13, 19:22].rot90(1, (1, 2))  # 5 x 3 lies down as 3 x 5
    assert torch.allclose(pasted[0, :, 39:42, 28:33], expected, atol=1e-6)


def test_jitter_is_relative_to_the_image():
    [before] = images(1)
    pasted, _ = paste(before[None], piece(contrast=1.1, shift=-0.05))
    taken = before[:, 9:13, 18:24]
    mean = taken.mean((1, 2), keepdim=True)
    expected = mean + 1.1 * (taken - mean) - 0.05 * before.std()
    assert torch.allclose(pasted[0, :, 39:43, 28:34], expected, atol=1e-5)


@pytest.mark.parametrize("make", [patches, scars])
def test_only_the_pasted_region_changes(make):
    before = images(16)
    pasted, where = paste(before, make(16, EDGE, rng=rng()))
    outside = ~where[:, None].expand_as(before)
    assert torch.equal(pasted[outside], before[outside])
    changed = (pasted != before).any(1)
    assert bool(changed.flatten(1).any(1).all())
    assert not bool((changed & ~where).any())


@pytest.mark.parametrize("make", [patches, scars])
@pytest.mark.parametrize("edge", [64, 128, 256])
def test_pieces_lie_inside_before_and_after(make, edge):
    drawn = make(500, edge, rng=rng())
    cos, sin = drawn.angle.cos().abs(), drawn.angle.sin().abs()
    high, wide = drawn.height * cos + drawn.width * sin, drawn.height * sin + drawn.width * cos
    for centre, length in (
        (drawn.from_y, drawn.height),
        (drawn.from_x, drawn.width),
        (drawn.to_y, high),
        (drawn.to_x, wide),
    ):
        assert bool((centre - length / 2 >= -0.501).all())
        assert bool((centre + length / 2 <= edge - 0.499).all())
    assert bool(((drawn.contrast - 1).abs() <= JITTER).all())
    assert bool((drawn.shift.abs() <= JITTER).all())


def test_patches_have_the_published_areas_and_shapes():
    drawn = patches(4000, 256, rng=rng())
    share, aspect = drawn.height * drawn.width / 256**2, drawn.height / drawn.width
    assert AREA[0] * 0.95 < float(share.min()) < 0.022
    assert 0.148 < float(share.max()) < AREA[1] * 1.05
    assert ASPECT[0] * 0.95 < float(aspect.min()) < 0.31
    assert 3.2 < float(aspect.max()) < ASPECT[1] * 1.05
    assert 0.45 < float((aspect < 1).float().mean()) < 0.55
    assert not bool(drawn.angle.any())
    assert torch.equal(drawn.height, drawn.height.round())


def test_scars_have_the_published_sizes_at_256_pixels():
    drawn = scars(4000, 256, rng=rng())
    for values, low, high in ((drawn.width, 2, 16), (drawn.height, 10, 25)):
        assert low <= float(values.min()) < low + 0.1
        assert high - 0.1 < float(values.max()) <= high
    assert math.pi / 4 - 0.01 < float(drawn.angle.abs().max()) <= math.pi / 4
    small = scars(4000, 64, rng=rng())
    assert (float(small.width.min()), small.height.max() < 6.3) == (1.0, True)


def test_a_scar_covers_about_its_own_area():
    before = images(200, edge=128)
    drawn = scars(200, 128, rng=rng())
    _, where = paste(before, drawn)
    covered = where.flatten(1).sum(1).float()
    assert float(covered.min()) >= 1
    assert float((covered / (drawn.height * drawn.width)).mean()) == pytest.approx(1, abs=0.05)


def test_three_versions_and_their_labels():
    before = images(5)
    views, labels = three_way(before, rng=rng())
    assert (len(CLASSES), views.shape) == (3, (15, 3, EDGE, EDGE))
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert torch.equal(views[:5], before)
    changed = [(views[n * 5 : n * 5 + 5] != before).any(1).flatten(1).sum(1) for n in (1, 2)]
    assert bool((changed[0] > changed[1]).all())  # a scar is smaller than any patch
    assert not torch.equal(before[0], before[1])


def test_everything_is_drawn_from_the_generator():
    before, state = images(3), torch.get_rng_state()
    first, again, other = (three_way(before, rng=rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before, images(3))


def test_images_do_not_touch_each_other():
    before, drawn = images(3), patches(3, EDGE, rng=rng())
    [middle] = [replace(drawn, **{f.name: getattr(drawn, f.name)[1:2] for f in fields(drawn)})]
    assert torch.allclose(paste(before, drawn)[0][1], paste(before[1:2], middle)[0][0], atol=1e-6)
