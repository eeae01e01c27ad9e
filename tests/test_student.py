import pytest
import torch
from torch.nn import functional as F

from umiad.config import TINY
from umiad.nn.encoder import Pyramid
from umiad.nn.student import Student, context_distance, mine, next_margin


def unit_maps(seed, shape=(2, 5, 3, 4)):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(maps, dim=1)


def gram_loss(found, wanted):
    """As published: with the N x N matrices themselves."""
    return float((found @ found.T - wanted @ wanted.T).square().mean())


def test_the_context_distance_equals_that_of_the_gram_matrices():
    found, wanted = (each.movedim(1, -1).flatten(0, 2) for each in (unit_maps(0), unit_maps(1)))
    assert float(context_distance(found, wanted)) == pytest.approx(gram_loss(found, wanted), rel=1e-12)
    for few in (1, 2):
        expected = gram_loss(found[:few], wanted[:few])
        assert float(context_distance(found[:few], wanted[:few])) == pytest.approx(expected, abs=1e-14)


def test_the_context_distance_by_hand():
    found = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # Gram matrix [[1, 0], [0, 1]]
    wanted = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [[1, 0.6], [0.6, 1]]
    assert float(context_distance(found, wanted)) == pytest.approx(2 * 0.36 / 4)


def test_the_context_distance_of_a_common_rotation_is_zero():
    wanted = unit_maps(0).movedim(1, -1).flatten(0, 2)
    rotation = torch.linalg.qr(unit_maps(3, (1, 5, 1, 5)).reshape(5, 5)).Q
    assert float(context_distance(wanted @ rotation, wanted)) == pytest.approx(0, abs=1e-14)


def test_the_context_distance_keeps_its_precision_in_float32_where_fibres_are_almost_equal():
    wanted = unit_maps(0, (4, 16, 8, 8)).movedim(1, -1).flatten(0, 2)
    error = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = F.normalize(wanted.float().double() + 1e-3 * error, dim=1)
    single = float(context_distance(found.float(), wanted.float()))
    assert single == pytest.approx(gram_loss(found.float().double(), wanted.float().double()), rel=1e-4)


def test_the_gradient_of_the_context_distance():
    wanted = unit_maps(0, (1, 3, 2, 2)).movedim(1, -1).flatten(0, 2)
    found = unit_maps(1, (1, 3, 2, 2)).movedim(1, -1).flatten(0, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: context_distance(f, wanted), found)


def test_the_margin_recursion_by_hand():
    distances = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)  # mean 3, std sqrt(14 / 3)
    expected = 0.01 * 0.5 + 0.99 * (3 + 2 * (14 / 3) ** 0.5)
    margin = next_margin(distances.requires_grad_(), torch.tensor(0.5, dtype=torch.float64), beta=2.0)
    assert float(margin) == pytest.approx(expected, rel=1e-12)
    assert not margin.requires_grad


def test_the_margin_of_a_single_position_has_no_spread():
    margin = next_margin(torch.tensor([[[0.5]]]), torch.tensor(1.0), beta=2.0)
    assert float(margin) == pytest.approx(0.01 + 0.99 * 0.5)


def test_the_losses_are_those_of_the_positions_beyond_the_margin():
    found, wanted = unit_maps(0), unit_maps(1)
    previous = torch.tensor(0.3, dtype=torch.float64)
    mined = mine(found, wanted, previous, beta=0.5)
    distances = (found - wanted).square().sum(1)
    margin = 0.01 * 0.3 + 0.99 * (distances.mean() + 0.5 * distances.std())
    hard = (distances >= margin).flatten()
    assert 1 < int(hard.sum()) < len(hard)
    fibres = [each.movedim(1, -1).flatten(0, 2)[hard] for each in (found, wanted)]
    assert float(mined.margin) == pytest.approx(float(margin), rel=1e-12)
    assert float(mined.distance) == pytest.approx(float(distances.flatten()[hard].mean()), rel=1e-12)
    assert float(mined.context) == pytest.approx(gram_loss(*fibres), rel=1e-10)
    assert float(mined.share) == pytest.approx(float(hard.double().mean()), rel=1e-6)


@pytest.mark.parametrize("previous", [0.0, 100.0])
def test_where_no_position_reaches_the_margin_the_hardest_is_kept(previous):
    found, wanted = unit_maps(0), unit_maps(1)
    found.requires_grad_()
    mined = mine(found, wanted, torch.tensor(previous, dtype=torch.float64), beta=50.0)
    distances = (found - wanted).square().sum(1).detach()
    assert float(mined.margin) > float(distances.max())
    assert float(mined.distance.detach()) == float(distances.max())
    assert float(mined.share) == pytest.approx(1 / distances.numel())
    assert float(mined.context.detach()) == pytest.approx(0, abs=1e-14)  # one fibre of length 1
    mined.distance.backward()
    assert int((found.grad.abs().sum(1) > 0).sum()) == 1


def test_equal_maps_have_no_loss_and_a_finite_gradient():
    wanted = unit_maps(0)
    found = wanted.clone().requires_grad_()
    mined = mine(found, wanted, torch.tensor(0.0, dtype=torch.float64), beta=2.0)
    assert [float(v.detach()) for v in (mined.distance, mined.context, mined.share)] == [0, 0, 1]
    (mined.distance + mined.context).backward()
    assert torch.equal(found.grad, torch.zeros_like(found))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_student_is_the_pyramid_with_trainable_weights(depth):
    student = Student(TINY, depth=depth, seed=5)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert all(p.requires_grad for p in student.parameters())
    assert all(part.training for part in student.modules())
    expected = Pyramid(None, seed=5, backbone=TINY, depth=depth)(images, depth=depth)
    found = student.eval()(images)
    for got, wanted in zip(found, expected, strict=True):  # the pyramid runs folded
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    sum(each.mean() for each in student.train()(images)).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert not torch.allclose(student(images)[0], expected[0])  # the batch's statistics
