"""The affine flow and its sums against autograd, numpy and scipy; float64 wherever equality is claimed."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from scipy.stats import multivariate_normal

from umiad.nn import affine
from umiad.nn.affine import RIDGE, AffineFlow, TwinMoments, fibres_of, on_grid, parts, spectrum

P, C = 4, 6
BLOCKS = (2, 4)
EPSILON = 0.1
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of a hundred products, condition numbers below 1e3


def pairs(images=30, *, seed=0, positions=P, channels=C):
    """Fibres and twins [B,P,C] that are correlated, within and across, each position in its own way; float64."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    shared = randn(images, positions, channels)
    mixing, mean = randn(positions, channels, channels), randn(positions, channels)
    first, second = (
        torch.einsum("pcd,bpd->bpc", mixing, shared + 0.7 * randn(images, positions, channels))
        for _ in range(2)
    )
    return first + mean, second + mean


def moments_of(fibres, twins, *, at_once=7, blocks=BLOCKS, joint=True):
    moments = TwinMoments(fibres[:at_once].double().mean(0), blocks=blocks, joint=joint)
    for start in range(0, len(fibres), at_once):
        moments.add(fibres[start : start + at_once], twins[start : start + at_once])
    return moments


def fitted(moments, *, rank=C, conditional=False, prior=0.0, epsilon=EPSILON):
    positions, channels = moments.total.shape
    flow = AffineFlow(positions, channels, rank=rank, conditional=conditional).double()
    flow.fit(moments, prior=prior, epsilon=epsilon)
    return flow


def stacked(fibres, twins):
    """Both halves of every pair and what stands across from them, [2B,P,C] in numpy."""
    return torch.cat([fibres, twins]).numpy(), torch.cat([twins, fibres]).numpy()


def naive(fibres, twins, *, conditional, prior, epsilon=EPSILON):
    """Mean [P,C], regression [C,C] and covariance [P,C,C] from the stacked fibres; the regression by least squares.

    The ridge enters as rows of their own: sqrt(n ridge) I on the left, zeros on the right.
    """
    every, across = stacked(fibres, twins)
    n, positions, channels = every.shape
    mean = every.mean(0)
    y, x = ((each - mean).reshape(-1, channels) for each in (every, across))
    by = np.zeros((channels, channels))
    if conditional:
        ridge = RIDGE * np.square(y).mean()
        padding = math.sqrt(len(x) * ridge) * np.eye(channels)
        solved = np.linalg.lstsq(np.vstack([x, padding]), np.vstack([y, 0 * padding]), rcond=None)[0]
        by = solved.T
    residual = (y - x @ by.T).reshape(n, positions, channels)
    own = np.stack([np.cov(residual[:, p].T, bias=True) for p in range(positions)])
    shared = own.mean(0)
    variance = np.trace(shared) / channels
    shrunk = n / (n + prior) * own + prior / (n + prior) * shared
    return mean, by, shrunk + epsilon * variance * np.eye(channels)


def jacobian(flow, z, c):
    """du/dz of one image, [P,C,P,C]."""
    return torch.autograd.functional.jacobian(lambda each: flow(each[None], c[None])[0][0], z)


@pytest.mark.parametrize("rank", [3, C])
@pytest.mark.parametrize("conditional", [False, True])
def test_log_det_equals_that_of_autograd_and_positions_do_not_mix(conditional, rank):
    fibres, twins = pairs()
    flow = fitted(moments_of(fibres, twins), rank=rank, conditional=conditional, prior=5.0)
    found = jacobian(flow, fibres[0], twins[0])
    for p in range(P):
        sign, log_det = torch.linalg.slogdet(found[p, :, p])
        assert float(sign) == 1.0
        assert float(flow.log_det[p]) == pytest.approx(float(log_det), abs=1e-10)
        elsewhere = [q for q in range(P) if q != p]
        assert float(found[p][:, elsewhere].abs().max()) == 0.0
    assert torch.equal(flow(fibres, twins)[1], flow.log_det)


@pytest.mark.parametrize("rank", [3, C])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_flow_is_affine_in_its_fibre_and_its_condition(conditional, rank):
    flow = fitted(moments_of(*pairs()), rank=rank, conditional=conditional)
    (z, dz), (c, dc) = pairs(3, seed=1), pairs(3, seed=2)
    before, at, after = (flow(z + k * dz, c + k * dc)[0] for k in (-1, 0, 1))
    torch.testing.assert_close(before + after - 2 * at, torch.zeros_like(at), **EXACT)
    assert float((after - at).abs().max()) > 1e-3
    assert torch.equal(flow(z, c + dc)[0], at) == (not conditional)


def test_an_unconditional_flow_does_not_look_at_the_condition():
    fibres, twins = pairs()
    flow = fitted(moments_of(fibres, twins), rank=3)
    u, _ = flow(fibres, torch.full_like(twins, torch.nan))
    assert torch.equal(u, flow(fibres, twins)[0])


@pytest.mark.parametrize("rank", [1, 3, C])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_mean_square_is_that_of_the_latents(conditional, rank):
    flow = fitted(moments_of(*pairs()), rank=rank, conditional=conditional, prior=5.0)
    z, c = pairs(5, seed=1)
    torch.testing.assert_close(flow.mean_square(z, c), flow(z, c)[0].square().mean(2), rtol=1e-10, atol=0)
    along = flow.mean + flow.vectors[:, :, -1] @ torch.linalg.inv(flow.whitener).mT  # what is left is small
    expected = flow(along[None], along[None])[0].square().mean(2)
    found = flow.float().mean_square(along[None].float(), along[None].float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_mean_square_is_never_negative(conditional):
    flow = fitted(moments_of(*pairs()), rank=C, conditional=conditional).float()
    at_the_mean = flow.mean[None]
    assert float(flow.mean_square(at_the_mean, at_the_mean).min()) >= 0.0


def test_an_unfitted_flow_changes_nothing():
    fibres, twins = pairs(2)
    u, log_det = AffineFlow(P, C, rank=3, conditional=True).double()(fibres, twins)
    assert torch.equal(u, fibres)
    assert torch.equal(log_det, torch.zeros_like(log_det))


@pytest.mark.parametrize("prior", [0.0, 20.0])
@pytest.mark.parametrize("conditional", [False, True])
def test_at_full_rank_it_is_the_gaussian_with_the_naive_covariance(conditional, prior):
    fibres, twins = pairs()
    flow = fitted(moments_of(fibres, twins), conditional=conditional, prior=prior)
    mean, by, covariance = naive(fibres, twins, conditional=conditional, prior=prior)
    z, c = pairs(3, seed=1)
    u, log_det = flow(z, c)
    for p in range(P):
        expected = mean[p] + (c[:, p].numpy() - mean[p]) @ by.T
        for image in range(3):
            distance = mahalanobis(z[image, p], expected[image], np.linalg.inv(covariance[p]))
            assert float(u[image, p].norm()) == pytest.approx(distance, rel=1e-9)
            density = multivariate_normal(expected[image], covariance[p]).logpdf(z[image, p])
            own = -0.5 * float(u[image, p].square().sum()) + float(log_det[p])
            assert own - 0.5 * C * math.log(2 * math.pi) == pytest.approx(density, rel=1e-9)


@pytest.mark.parametrize("conditional", [False, True])
def test_what_was_fitted_comes_out_white(conditional):
    fibres, twins = pairs()
    flow = fitted(moments_of(fibres, twins), conditional=conditional, epsilon=1e-9)
    u = torch.cat([flow(fibres, twins)[0], flow(twins, fibres)[0]])
    for p in range(P):
        # epsilon over the smallest eigenvalue, which is above 1e-3 of the mean variance
        torch.testing.assert_close(
            torch.cov(u[:, p].T, correction=0), torch.eye(C).double(), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(u[:, p].mean(0), torch.zeros(C).double(), rtol=0, atol=1e-8)


def test_knowing_the_twin_makes_the_fibre_likelier():
    """On what was fitted, in the mean: the pairs share most of what they are made of."""
    fibres, twins = pairs()
    totals = []
    for conditional in (False, True):
        flow = fitted(moments_of(fibres, twins), conditional=conditional, epsilon=1e-3)
        u, log_det = flow(fibres, twins)
        totals.append(float((log_det - 0.5 * u.square().sum(-1)).mean()))
    assert totals[1] > totals[0] + 0.5


@pytest.mark.parametrize("joint", [True, False])
def test_moments_are_those_of_fibres_and_twins_taken_in_both_orders(joint):
    fibres, twins = pairs()
    moments = moments_of(fibres, twins, joint=joint)
    every, across = stacked(fibres, twins)
    assert moments.count == len(every) == 60
    torch.testing.assert_close(moments.mean(), torch.from_numpy(every.mean(0)), **EXACT)
    found = moments.covariances(slice(0, P))
    for p in range(P):
        both = np.cov(np.hstack([every[:, p], across[:, p]]).T, bias=True)
        for name, expected in (("own", both[:C, :C]), ("cross", both[:C, C:])):
            if not joint:
                expected[:2, 2:], expected[2:, :2] = 0, 0  # between the two scales
            torch.testing.assert_close(getattr(found, name)[p], torch.from_numpy(expected), **EXACT)
    assert torch.equal(found.own, found.own.mT)
    torch.testing.assert_close(found.cross, found.cross.mT, **EXACT)
    shared = moments.shared()
    torch.testing.assert_close(shared.own, found.own.mean(0), **EXACT)
    torch.testing.assert_close(shared.cross, found.cross.mean(0), **EXACT)


def assert_same_moments(first, second):
    """Up to the rounding of float64 sums in another order."""
    assert first.count == second.count
    torch.testing.assert_close(first.mean(), second.mean(), rtol=1e-12, atol=1e-12)
    for one, other in zip(first.covariances(slice(0, P)), second.covariances(slice(0, P)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_neither_batches_nor_their_order_nor_which_side_came_first_change_the_moments():
    fibres, twins = pairs()
    expected = moments_of(fibres, twins)
    order = torch.randperm(len(fibres), generator=torch.Generator().manual_seed(3))
    assert_same_moments(expected, moments_of(fibres[order], twins[order], at_once=4))
    swapped = (torch.arange(len(fibres)) % 2 == 0)[:, None, None]
    mixed = torch.where(swapped, twins, fibres), torch.where(swapped, fibres, twins)
    assert_same_moments(expected, moments_of(*mixed))


def test_moments_survive_a_large_mean():
    fibres, twins = pairs()
    near, far = moments_of(fibres, twins), moments_of(fibres + 1e6, twins + 1e6)
    for one, other in zip(near.covariances(slice(0, P)), far.covariances(slice(0, P)), strict=True):
        # the offset keeps 1e6 out of the products: what is lost is the rounding of the values themselves, 1e-10
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("blocks", [(2, 4), (1, 2, 3)])
def test_without_joint_density_the_distance_is_the_sum_over_scales(blocks):
    fibres, twins = pairs()
    flow = fitted(moments_of(fibres, twins, blocks=blocks, joint=False))
    every, _ = stacked(fibres, twins)
    variance = np.mean([every[:, p].var(0).mean() for p in range(P)])  # of all channels: one epsilon for all
    z, c = pairs(3, seed=1)
    squares = flow(z, c)[0].square().sum(-1)
    edges = np.cumsum((0, *blocks))
    for p in range(P):
        expected = np.zeros(3)
        for low, high in itertools.pairwise(edges):
            block = np.cov(every[:, p, low:high].T, bias=True) + EPSILON * variance * np.eye(high - low)
            apart = z[:, p, low:high].numpy() - every[:, p, low:high].mean(0)
            expected += np.einsum("bc,cd,bd->b", apart, np.linalg.inv(block), apart)
        np.testing.assert_allclose(squares[:, p].numpy(), expected, rtol=1e-9)


def implied(flow, p):
    """The covariance that position p stands for, as the flow whitens it: K Sigma_p K^T."""
    inner = torch.diag_embed(flow.floor[p].rsqrt().expand(C))
    inner = inner + flow.vectors[p] @ torch.diag_embed(flow.gain[p]) @ flow.vectors[p].mT
    return torch.linalg.inv(inner.mT @ inner)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("conditional", [False, True])
def test_truncating_the_rank_keeps_the_trace_and_the_leading_directions(conditional, rank):
    moments = moments_of(*pairs())
    whole, cut = (fitted(moments, rank=r, conditional=conditional, prior=5.0) for r in (C, rank))
    assert cut.vectors.shape == (P, C, rank)
    assert torch.equal(whole.whitener, cut.whitener)
    for p in range(P):
        dense, approximate = implied(whole, p), implied(cut, p)
        torch.testing.assert_close(dense.trace(), approximate.trace(), **EXACT)
        leading = (torch.linalg.eigvalsh(each)[-rank:] for each in (dense, approximate))
        torch.testing.assert_close(*leading, **EXACT)
        assert torch.allclose(dense, approximate, rtol=1e-9) == (rank == C - 1)  # then the rest is one value


def test_a_rank_above_the_channels_is_the_full_one():
    moments = moments_of(*pairs())
    full, more = fitted(moments), fitted(moments, rank=10 * C)
    assert all(torch.equal(value, more.state_dict()[key]) for key, value in full.state_dict().items())


@pytest.mark.parametrize("rank", [1, 4, C])
def test_spectrum_puts_a_matrix_together_again_and_ignores_rounding_below_zero(rank):
    fibres, _ = pairs()
    covariance = torch.stack([torch.cov(fibres[:, p].T, correction=0) for p in range(P)])
    values, vectors, rest = spectrum(covariance, rank)
    torch.testing.assert_close(
        values.sum(-1) + (C - rank) * rest, covariance.diagonal(dim1=1, dim2=2).sum(-1), **EXACT
    )
    torch.testing.assert_close(covariance @ vectors, vectors * values[:, None], **EXACT)
    below = torch.diag(torch.tensor([2.0, 1.0, -1e-17]))[None].double()
    assert float(spectrum(below, 1)[2]) == 0.5
    assert float(spectrum(below, 3)[0].min()) == 0.0


@pytest.mark.parametrize("conditional", [False, True])
def test_a_huge_prior_leaves_one_covariance_for_all_positions(conditional):
    fibres, twins = pairs()
    flow = fitted(moments_of(fibres, twins), rank=3, conditional=conditional, prior=1e12)
    found = jacobian(flow, fibres[0], twins[0])
    _, _, expected = naive(fibres, twins, conditional=conditional, prior=1e12)
    for p in range(P):
        # what a position itself has to say counts 60 / 1e12
        torch.testing.assert_close(found[p, :, p], found[0, :, 0], rtol=1e-8, atol=1e-8)
        precision = found[p, :, p].mT @ found[p, :, p]
        torch.testing.assert_close(
            torch.linalg.inv(precision), torch.from_numpy(expected[0]), rtol=1e-8, atol=1e-8
        )
    assert not torch.allclose(flow.mean[0], flow.mean[1])


@pytest.mark.parametrize("conditional", [False, True])
def test_positions_are_fitted_alike_however_many_at_once(conditional, monkeypatch):
    moments = moments_of(*pairs(positions=7))
    expected = fitted(moments, rank=3, conditional=conditional, prior=5.0)
    monkeypatch.setattr(affine, "POSITIONS_AT_ONCE", 3)
    found = fitted(moments, rank=3, conditional=conditional, prior=5.0)
    z, c = pairs(3, seed=1, positions=7)
    torch.testing.assert_close(found(z, c)[0], expected(z, c)[0], **EXACT)
    torch.testing.assert_close(found.log_det, expected.log_det, **EXACT)


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 64, 100])
def test_parts_cover_all_positions_once(positions):
    found = [list(range(positions))[part] for part in parts(positions)]
    assert [each for part in found for each in part] == list(range(positions))
    assert max(map(len, found)) <= affine.POSITIONS_AT_ONCE
    assert all(found)


def test_fibres_go_row_by_row_and_on_grid_is_the_inverse():
    features = torch.randn(2, C, 3, 5, generator=torch.Generator().manual_seed(0))
    fibres = fibres_of(features)
    assert fibres.shape == (2, 15, C)
    assert torch.equal(fibres[1, 7], features[1, :, 1, 2])
    assert torch.equal(on_grid(fibres, (3, 5)), features)
    assert torch.equal(on_grid(fibres[0], (3, 5)), features[0])


@pytest.mark.parametrize("conditional", [False, True])
def test_the_state_holds_what_the_docstring_says(conditional):
    positions, channels, rank = 100, 64, 16
    state = AffineFlow(positions, channels, rank=rank, conditional=conditional).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "mean": (positions, channels),
        "whitener": (channels, channels),
        "regression": (channels, channels if conditional else 0),
        "vectors": (positions, channels, rank),
        "gain": (positions, rank),
        "floor": (positions,),
        "log_det": (positions,),
    }
    size = sum(value.numel() * value.element_size() for value in state.values())
    main = 4 * positions * channels * (rank + 1)
    assert main < size < 1.1 * main  # the rest does not grow with P C r
    assert not list(AffineFlow(2, 2, rank=1, conditional=conditional).parameters())


@pytest.mark.parametrize("conditional", [False, True])
def test_in_float32_it_is_the_same_flow(conditional):
    moments = moments_of(*pairs())
    wide = fitted(moments, rank=3, conditional=conditional, prior=5.0)
    narrow = AffineFlow(P, C, rank=3, conditional=conditional)
    narrow.fit(moments, prior=5.0, epsilon=EPSILON)
    z, c = pairs(3, seed=1)
    u, log_det = narrow(z.float(), c.float())
    assert u.dtype == log_det.dtype == torch.float32
    # float32 products of values up to 20, condition numbers below 100
    torch.testing.assert_close(u.double(), wide(z, c)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det.double(), wide.log_det, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-1e3, 1e3),
    conditional=st.booleans(),
    rank=st.integers(1, C),
    prior=st.floats(0, 100),
)
def test_another_unit_or_origin_of_the_features_leaves_the_distance(
    seed, scale, shift, conditional, rank, prior
):
    chosen = {"rank": rank, "conditional": conditional, "prior": prior}
    fibres, twins = pairs(20, seed=seed)
    z, c = pairs(3, seed=1)
    u, log_det = fitted(moments_of(fibres, twins), **chosen)(z, c)
    moved = [scale * each + shift for each in (fibres, twins, z, c)]
    other, other_log_det = fitted(moments_of(*moved[:2]), **chosen)(*moved[2:])
    # shifts of 1e3 beside features of 1e-3 cost six of sixteen digits, condition numbers up to 1e3 three more
    torch.testing.assert_close(other.square().sum(-1), u.square().sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_log_det, log_det - C * math.log(scale), rtol=1e-5, atol=1e-5)
