import math

import pytest
import torch

from umiad.nn.image_loss import cross_entropy, dice_loss, structural_similarity


def pair(seed=0, *, noise=0.1):
    rng = torch.Generator().manual_seed(seed)
    first = torch.rand(3, 1, 40, 50, generator=rng, dtype=torch.float64)
    return first, (first + noise * torch.randn(first.shape, generator=rng, dtype=torch.float64)).clamp(0, 1)


def test_similarity_equals_that_of_monai():
    from monai.losses import SSIMLoss

    first, second = pair()
    expected = 1 - SSIMLoss(2, kernel_type="gaussian", win_size=11)(first.float(), second.float())
    assert float(structural_similarity(first, second)) == pytest.approx(float(expected), abs=1e-5)


def test_similarity_of_constant_images_by_hand():
    first, second = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(structural_similarity(first, second)) == pytest.approx(expected, rel=1e-3)


def test_similarity_is_one_for_equal_images_symmetric_and_falls_with_noise():
    first, second = pair()
    assert float(structural_similarity(first, first)) == pytest.approx(1)
    assert torch.allclose(structural_similarity(first, second), structural_similarity(second, first))
    first, third = pair(noise=0.3)
    assert structural_similarity(first, third) < structural_similarity(first, second) < 1


@pytest.mark.parametrize("value", [0.0, 1e3, -1e6])
def test_similarity_is_finite_far_from_its_range(value):
    images = torch.full((2, 1, 64, 64), value, requires_grad=True)
    found = structural_similarity(images, torch.zeros(2, 1, 64, 64))
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(images.grad).all()


def test_dice_by_hand():
    logits = torch.tensor([0.0, 0.0, 1e3, -1e3]).reshape(1, 1, 2, 2)
    masks = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 2, 2)
    # probabilities 1/2, 1/2, 1, 0: both 3/2, sums 2 and 2
    assert float(dice_loss(logits, masks)) == pytest.approx(1 - (3 + 1) / (4 + 1))


def test_dice_where_nothing_is_and_nothing_is_found():
    empty = torch.zeros(1, 1, 8, 8)
    assert float(dice_loss(empty - 1e3, empty)) == 0
    assert float(dice_loss(empty + 1e3, empty)) == pytest.approx(1 - 1 / 65)
    assert float(dice_loss(empty - 1e3, empty + 1)) == pytest.approx(1 - 1 / 65)
    assert float(dice_loss(empty + 1e3, empty + 1)) == 0


def test_dice_weighs_images_alike():
    logits = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :2, :2] = 1
    masks[1, :, :, 2:] = 1
    single = [float(dice_loss(logits[k : k + 1], masks[k : k + 1])) for k in (0, 1)]
    assert float(dice_loss(logits, masks)) == pytest.approx(sum(single) / 2, rel=1e-5)


def test_cross_entropy_by_hand():
    logits = torch.tensor([0.0, 2.0, -1.0]).reshape(1, 1, 1, 3)
    masks = torch.tensor([1.0, 1.0, 0.0]).reshape(1, 1, 1, 3)
    expected = (math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 3
    assert float(cross_entropy(logits, masks)) == pytest.approx(expected, rel=1e-5)
    assert float(cross_entropy(1e4 * (2 * masks - 1), masks)) == 0  # and no overflow
