from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from umiad.nn.edge import EDGES, EdgeGuidance, FineScales, NoEdges, Prewitt, sobel_target


def features(size: int = 64, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    f1 = torch.rand(batch, 64, size // 4, size // 4, generator=rng)
    return f1, torch.rand(batch, 128, size // 8, size // 8, generator=rng)


@pytest.mark.parametrize("size", [64, 96, 160])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", EDGES)
def test_every_edge_part_has_the_same_call(name: str, batch: int, size: int) -> None:
    part = EDGES[name](seed=3) if batch > 1 else EDGES[name]()
    assert part(*features(size, batch)).shape == (batch, 128, size // 8, size // 8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_gates_are_positive_and_sum_to_one(seed: int, scale: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    f1p, f2 = (torch.randn(2, 128, 4, 4, generator=rng, dtype=torch.float64) * scale for _ in range(2))
    gates = EdgeGuidance(seed=seed).double().gates(f1p, f2)
    assert gates.shape == (2, 2, 4, 4)
    assert bool((gates >= 0).all())
    assert bool((gates.sum(dim=1) - 1).abs().max() < 1e-14)  # a softmax over two values in float64


def test_gates_see_both_maps_in_the_papers_order() -> None:
    part = EdgeGuidance()
    f1p, f2 = torch.ones(1, 128, 1, 1), torch.zeros(1, 128, 1, 1)
    with torch.no_grad():
        for gate in (part.gate_fine, part.gate_coarse):
            gate.weight.zero_()
            gate.bias.zero_()
        part.gate_fine.weight[:, :128] = 1 / 128  # reads F1', first in Eq. 1
        part.gate_coarse.weight[:, :128] = 1 / 128  # reads F2, first in Eq. 2
        expected = torch.tensor([1.0, 0.0]).softmax(dim=0)
        torch.testing.assert_close(part.gates(f1p, f2).flatten(), expected)


def test_the_mixture_lies_between_its_two_maps() -> None:
    part, (f1, f2) = EdgeGuidance(), features()
    f1p, f_edge = part.eval().down(f1), part(f1, f2)
    assert bool((f_edge >= torch.minimum(f1p, f2) - 1e-6).all())  # float32 rounding of values near 1
    assert bool((f_edge <= torch.maximum(f1p, f2) + 1e-6).all())


def test_egm_has_the_documented_number_of_parameters() -> None:
    counts = {
        name: sum(p.numel() for p in child.parameters()) for name, child in EdgeGuidance().named_children()
    }
    assert counts == {"down": 64 * 128 * 9 + 2 * 128, "gate_fine": 257, "gate_coarse": 257}


def test_every_egm_parameter_gets_a_gradient_and_statistics_follow_the_mode() -> None:
    part, (f1, f2) = EdgeGuidance(), features()
    norm = part.down[1]
    assert isinstance(norm, nn.BatchNorm2d)
    part.eval()(f1, f2)
    assert float(norm.running_mean.abs().max()) == 0
    part.train()(f1, f2).square().sum().backward()
    assert float(norm.running_mean.abs().max()) > 0
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters())


def test_weights_follow_the_seed_and_touch_no_global_state() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, same, other = (EdgeGuidance(seed=seed).gate_fine.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_prewitt_finds_a_step_and_nothing_else() -> None:
    f1, f2 = torch.zeros(1, 64, 16, 16), torch.zeros(1, 128, 8, 8)
    f1[..., 8:], f2[..., 4:] = 1, 1
    f_edge = Prewitt()(f1, f2)
    columns = f_edge[0, 0, 4]
    torch.testing.assert_close(columns[[3, 4]], torch.full((2,), 0.75))  # mean of 1 (F2) and 1/2 (pooled F1)
    assert float(columns[[0, 1, 2, 5, 6, 7]].abs().max()) < 1e-6  # float32 rounding of the kernel


def test_prewitt_matches_finite_differences() -> None:
    f1, f2 = features()
    f1 = torch.zeros_like(f1)
    f_edge = 2 * Prewitt()(f1, f2)
    window = f2[0, 5, 2:5, 2:5]
    gx = (window[:, 2] - window[:, 0]).mean()
    gy = (window[2] - window[0]).mean()
    torch.testing.assert_close(f_edge[0, 5, 3, 3], torch.hypot(gx, gy))


def test_prewitt_and_no_edges_have_nothing_to_train_or_save() -> None:
    for part in (Prewitt(), NoEdges(), FineScales()):
        assert not list(part.parameters())
        assert not part.state_dict()


def test_no_edges_are_zero() -> None:
    assert float(NoEdges()(*features()).abs().max()) == 0


@pytest.mark.parametrize("size", [64, 96, 160])
def test_fine_scales_are_averaged_f1_beside_f2_as_it_is(size: int) -> None:
    f1, f2 = features(size)
    f_edge = FineScales(seed=3)(f1, f2)
    assert f_edge.shape == (2, 192, size // 8, size // 8)
    means = sum(f1[..., row::2, column::2] for row in (0, 1) for column in (0, 1)) / 4
    torch.testing.assert_close(f_edge[:, :64], means)  # sums of four float32 in another order
    assert torch.equal(f_edge[:, 64:], f2)


def test_fine_scales_are_no_edge_part_of_the_network() -> None:
    """The network's slot has 128 channels."""
    assert FineScales not in EDGES.values()


def test_sobel_target_marks_the_border_of_a_square() -> None:
    grey = torch.zeros(1, 1, 64, 64)
    grey[..., 16:48, 16:48] = 0.5
    target = sobel_target(grey, (8, 8))[0, 0]
    assert target.shape == (8, 8)
    assert float(target[2, 4]) > 0.1
    assert float(target[0].max()) < 1e-6  # nothing but rounding far from the square
    assert float(target[3:5, 3:5].max()) < 1e-6


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gain=st.floats(0.05, 20.0),
    offset=st.floats(-2.0, 2.0),
    size=st.sampled_from([(8, 8), (5, 7), (2, 2)]),
)
def test_sobel_target_is_in_range_and_blind_to_contrast(
    seed: int, gain: float, offset: float, size: tuple[int, int]
) -> None:
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = sobel_target(grey, size)
    assert target.shape == (2, 1, *size)
    assert bool((target >= 0).all())
    assert bool((target <= 1 + 1e-12).all())
    # float64 rounding of values up to 20 through about a hundred operations
    torch.testing.assert_close(sobel_target(gain * grey + offset, size), target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_sobel_target_of_a_constant_image_is_zero(value: float) -> None:
    target = sobel_target(torch.full((1, 1, 64, 64), value), (8, 8))
    assert bool(torch.isfinite(target).all())
    assert float(target.max()) < 0.1  # rounding of the kernel stays below the threshold of an edge


def test_sobel_target_treats_images_of_a_batch_apart() -> None:
    grey = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    together = sobel_target(grey, (8, 8))
    apart = torch.cat([sobel_target(one[None], (8, 8)) for one in grey])
    torch.testing.assert_close(together, apart)
