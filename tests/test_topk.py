import pytest
import torch

from umiad.errors import ConfigError
from umiad.nn import topk
from umiad.nn.topk import distance_prices, nearest_cost, prices, soft_topk, squared_distances


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sinkhorn(costs, *, k, eps, iterations=20_000):
    """Weights of one row: entropic transport of n costs to the anchors 0 and 1, by plain iteration."""
    n = len(costs)
    price = torch.stack([costs, costs - 1], dim=1).square()
    kernel = torch.exp(-price / price.max() / eps)
    rows = torch.full((n,), 1 / n, dtype=costs.dtype)
    columns = torch.tensor([k / n, 1 - k / n], dtype=costs.dtype)
    right = torch.ones_like(columns)
    for _ in range(iterations):
        left = rows / (kernel @ right)
        right = columns / (kernel.T @ left)
    return n * left * kernel[:, 0] * right[0]


@pytest.mark.parametrize("unit", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("k", "eps"), [(1, 0.1), (3, 0.1), (29, 0.1), (3, 1.0), (12, 0.05)])
def test_the_weights_are_the_limit_of_sinkhorns_iteration(unit, k, eps):
    costs = unit * draw(30)
    assert torch.allclose(soft_topk(costs, k=k, eps=eps), sinkhorn(costs, k=k, eps=eps), rtol=0, atol=1e-8)


@pytest.mark.parametrize("k", [1, 3, 20, 39, 40])
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 0.1, 1e3])
def test_each_row_sums_to_k(k, eps):
    costs = 3 * draw(2, 5, 40)
    weights = soft_topk(costs, k=k, eps=eps)
    assert weights.shape == costs.shape
    assert 0 <= float(weights.min()) <= float(weights.max()) <= 1
    assert float((weights.sum(-1) - k).abs().max()) < 1e-12 * k  # rounding of 40 float64 weights
    assert (
        float((soft_topk(costs.float(), k=k, eps=eps).sum(-1) - k).abs().max()) < 1e-5 * k
    )  # and of float32


def test_smaller_costs_weigh_more_and_equal_ones_alike():
    costs = torch.tensor([0.5, 0.1, 0.9, 0.1, 0.3], dtype=torch.float64)
    weights = soft_topk(costs, k=2, eps=0.1)
    assert weights[1] == weights[3]
    assert weights[1] > weights[4] > weights[0] > weights[2]
    assert torch.equal(soft_topk(costs.flip(0), k=2, eps=0.1), weights.flip(0))


def test_a_small_eps_chooses_hard_and_a_large_one_not_at_all():
    costs = draw(4, 20)
    hard = torch.zeros_like(costs).scatter(1, costs.topk(5, largest=False).indices, 1)
    assert torch.allclose(soft_topk(costs, k=5, eps=1e-5), hard, atol=1e-6)
    assert torch.allclose(soft_topk(costs, k=5, eps=1e6), torch.full_like(costs, 0.25), atol=1e-5)


def test_all_costs_alike_share_the_weight():
    for value in (0.0, 1.0, 1e6):
        weights = soft_topk(torch.full((2, 8), value), k=2, eps=0.1)
        assert torch.allclose(weights, torch.full((2, 8), 0.25), rtol=1e-6)


def test_choosing_all_has_weights_of_one_and_no_gradient():
    costs = draw(3, 6).requires_grad_()
    weights = soft_topk(costs, k=6, eps=0.1)
    assert torch.equal(weights, torch.ones_like(costs))
    (weights * draw(3, 6, seed=1)).sum().backward()
    assert torch.equal(costs.grad, torch.zeros_like(costs))


@pytest.mark.parametrize(("k", "eps"), [(1, 0.1), (3, 0.1), (11, 0.3), (12, 0.1), (3, 0.02)])
def test_the_implicit_gradient_is_that_of_finite_differences(k, eps):
    costs, scale = draw(2, 12).requires_grad_(), torch.tensor(0.8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda each: soft_topk(each, k=k, eps=eps, scale=scale), costs)


def test_a_row_depends_on_no_other_where_the_scale_is_given():
    costs, scale = draw(5, 50, dtype=torch.float32), torch.ones(5, 1)
    whole = soft_topk(costs, k=3, eps=0.1, scale=scale)
    for row in range(5):
        alone = soft_topk(costs[row : row + 1], k=3, eps=0.1, scale=scale[:1])
        assert torch.allclose(alone[0], whole[row], rtol=1e-6, atol=0)


def test_the_scale_is_the_highest_price_of_all_and_a_constant():
    costs = (4 * draw(3, 7) - 1).requires_grad_()
    both = torch.stack([costs, costs - 1]).detach().square()
    assert torch.allclose(prices(costs), both.amax((0, 2))[:, None], rtol=1e-12)
    gradients = []
    for scale in (None, both.max()):
        weights = soft_topk(costs, k=2, eps=0.1, scale=scale)
        gradients += torch.autograd.grad((weights * costs).sum(), costs)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-10)


@pytest.mark.parametrize(
    ("k", "eps", "words"), [(0, 0.1, "k is 0"), (6, 0.1, "1 to .* 5"), (2, 0.0, "eps is 0")]
)
def test_an_impossible_choice_is_refused(k, eps, words):
    with pytest.raises(ConfigError, match=words):
        soft_topk(draw(2, 5), k=k, eps=eps)


@pytest.mark.parametrize("pairs", [1, 40, 1 << 20])
def test_the_cost_of_the_nearest_does_not_depend_on_the_blocks(monkeypatch, pairs):
    """Values and gradients are those of all pairs at once, through the weights as well; factors precede the choice."""
    fibres, points = draw(9, 4, seed=1).requires_grad_(), draw(13, 4, seed=2)
    factors = draw(9, seed=4).square()
    factors[0] = 0
    distances = (fibres[:, None] - points).square().sum(2) * factors[:, None]
    scale = prices(distances.detach())
    expected = (soft_topk(distances, k=3, eps=0.1, scale=scale) * distances).sum(1)
    upstream = draw(9, seed=3)
    [gradient] = torch.autograd.grad((upstream * expected).sum(), fibres)
    monkeypatch.setattr(topk, "PAIRS_AT_ONCE", pairs)
    assert torch.allclose(distance_prices(fibres, points, factors), scale[:, 0], rtol=1e-12)
    found = nearest_cost(fibres, points, factors=factors, scale=scale[:, 0], k=3, eps=0.1)
    assert torch.allclose(found, expected, rtol=1e-12)
    [other] = torch.autograd.grad((upstream * found).sum(), fibres)
    assert torch.allclose(other, gradient, rtol=1e-10)
    with torch.inference_mode():
        again = nearest_cost(fibres, points, factors=factors, scale=scale[:, 0], k=3, eps=0.1)
    assert torch.allclose(again, expected, rtol=1e-12)


def test_the_gradient_of_the_nearest_is_that_of_finite_differences():
    fibres, points = draw(4, 3, seed=1).requires_grad_(), draw(6, 3, seed=2)
    scale, factors = torch.full((4,), 2.0, dtype=torch.float64), draw(4, seed=3).square()
    assert torch.autograd.gradcheck(
        lambda each: nearest_cost(each, points, factors=factors, scale=scale, k=2, eps=0.1), fibres
    )


def test_distances_far_from_the_origin_keep_their_digits():
    fibres, points = draw(5, 8, dtype=torch.float32), draw(7, 8, seed=1, dtype=torch.float32)
    exact = (fibres.double()[:, None] + 1e3 - points - 1e3).square().sum(2)
    found = squared_distances(fibres + 1e3, points + 1e3)  # whose last digit is 6e-5
    assert torch.allclose(found.double(), exact, atol=1e-2)
    assert float(squared_distances(points, points).diagonal().max()) < 1e-6


def test_the_published_choice_is_soft():
    """Three of 784 costs spread over 0..1 at eps 0.1: no weight is near 1, the largest 20 times the uniform one."""
    costs = torch.linspace(0, 1, 784, dtype=torch.float64)
    weights = soft_topk(costs, k=3, eps=0.1)
    assert float(weights.max()) * 784 / 3 == pytest.approx(20, rel=0.1)
