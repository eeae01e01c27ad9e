import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from umiad.nn.ledoit_wolf import FLOOR, Gaussians, Moments


def fibres(positions=3, count=20, dimensions=6, seed=0, offset=5.0):
    """Correlated fibres [P,B,D] far from zero."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(positions, dimensions, dimensions, dtype=torch.float64, generator=rng)
    raw = torch.randn(positions, count, dimensions, dtype=torch.float64, generator=rng)
    return raw @ mixing + offset


def collected(values, batches=1):
    moments = Moments(values[:, :2].mean(1))
    for part in values.tensor_split(batches, dim=1):
        moments.add(part)
    return moments


@pytest.mark.parametrize(("count", "dimensions"), [(20, 6), (5, 12), (200, 3), (3, 2)])
def test_it_equals_scikit_learns(count, dimensions):
    values = fibres(count=count, dimensions=dimensions)
    covariance, share = collected(values).covariance()
    for position in range(len(values)):
        expected, shrinkage = ledoit_wolf(values[position].numpy())
        np.testing.assert_allclose(covariance[position].numpy(), expected, rtol=0, atol=1e-10)
        assert float(share[position]) == pytest.approx(shrinkage, abs=1e-10)


def test_it_does_not_depend_on_the_batches_nor_on_the_offset():
    values = fibres(count=23)
    whole, share = collected(values).covariance()
    for batches in (2, 5, 23):
        assert torch.allclose(collected(values, batches).covariance()[0], whole, atol=1e-10)
    far = Moments(torch.full((3, 6), 40.0))
    far.add(values)
    assert torch.allclose(far.covariance()[0], whole, atol=1e-6)
    assert torch.allclose(far.covariance()[1], share, atol=1e-6)
    assert torch.allclose(far.mean, values.mean(1), atol=1e-10)
    assert far.variance == pytest.approx(float(values.var(1, correction=0).mean()), rel=1e-10)


def test_few_fibres_are_shrunk_more():
    shares = [float(collected(fibres(count=count)).covariance()[1].mean()) for count in (10, 100, 1000)]
    assert shares[0] > 2 * shares[1] > 4 * shares[2] > 0


def test_the_distance_is_mahalanobis():
    values = fibres(count=40)
    gaussians, moments = Gaussians(3, 6).double(), collected(values)
    gaussians.fill(moments)
    new = fibres(count=4, seed=1)
    covariance, _ = moments.covariance()
    floor = FLOOR * float(covariance.diagonal(dim1=1, dim2=2).mean())
    for position in range(3):
        wide = covariance[position] + floor * torch.eye(6, dtype=torch.float64)
        apart = new[position] - values[position].mean(0)
        expected = torch.einsum("bi,ij,bj->b", apart, torch.linalg.inv(wide), apart).sqrt()
        assert torch.allclose(gaussians.distance(new)[position], expected, rtol=1e-8)
    own = gaussians.distance(values).square().mean() / 6
    assert 0.5 < float(own) < 1.1


def test_blocks_of_positions_change_nothing(monkeypatch):
    moments, found = collected(fibres(positions=5)), []
    for size in (1 << 24, 1, 2 * 36):
        monkeypatch.setattr("umiad.nn.ledoit_wolf.FACTORISED_AT_ONCE", size)
        gaussians = Gaussians(5, 6)
        gaussians.fill(moments)
        found.append(gaussians.whitening)
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=1e-6)


def test_what_does_not_vary_has_a_floor():
    values = fibres(count=10)
    values[1] = 2.0  # one position never varies
    gaussians = Gaussians(3, 6)
    gaussians.fill(collected(values))
    assert bool(gaussians.whitening.isfinite().all())
    assert float(gaussians.distance(values.float())[1].max()) < 1e-2
    constant = Gaussians(3, 6)
    constant.fill(collected(torch.full((3, 4, 6), 7.0, dtype=torch.float64)))
    assert torch.allclose(constant.whitening, torch.eye(6).expand(3, 6, 6))


def test_two_fibres_are_enough():
    gaussians, values = Gaussians(2, 5), fibres(positions=2, count=2, dimensions=5)
    gaussians.fill(collected(values))
    assert bool(gaussians.distance(values.float()).isfinite().all())
