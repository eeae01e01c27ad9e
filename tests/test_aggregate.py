from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from umiad.errors import ConfigError
from umiad.nn.aggregate import (
    AGGREGATES,
    GATES,
    AddEdges,
    Aggregated,
    EdgeAggregation,
    IgnoreEdges,
    MultiplyEdges,
)


def features(size: int = 64, batch: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    f_edge = torch.rand(batch, 128, size // 8, size // 8, generator=rng)
    return f_edge, torch.rand(batch, 512, size // 32, size // 32, generator=rng)


def randomise(module: nn.Module, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05)


@pytest.mark.parametrize("size", [64, 96, 224])
@pytest.mark.parametrize("name", AGGREGATES)
def test_every_aggregate_has_the_same_call_and_starts_at_f4(name: str, size: int) -> None:
    f_edge, f4 = features(size, batch=1)
    f_agg, f_cat = AGGREGATES[name](seed=2)(f_edge, f4)
    assert torch.equal(f_agg, f4)
    assert f_cat.shape == f4.shape


@pytest.mark.parametrize(("gate", "expected"), [("sigmoid", torch.sigmoid), ("raw", lambda mean: mean)])
def test_eam_is_equation_8(gate: str, expected: object) -> None:
    part, (f_edge, f4) = EdgeAggregation(gate=gate), features()
    randomise(part)
    f_agg, f_cat = part(f_edge, f4)
    weight = expected(f_cat.mean(dim=(2, 3), keepdim=True))  # type: ignore[operator]
    torch.testing.assert_close(f_agg, weight * f_cat + f4)


def test_eam_convolves_attended_averaged_edges_beside_f4() -> None:
    part, (f_edge, f4) = EdgeAggregation(), features()
    with torch.no_grad():
        part.fuse.weight.zero_()
        part.fuse.weight[0, 7, 1, 1] = 1.0
        part.fuse.weight[1, 128 + 9, 1, 1] = 1.0
    f_cat = part(f_edge, f4).f_cat
    blocks = part.attention(f_edge)[:, 7].unflatten(1, (2, 4)).unflatten(3, (2, 4)).mean(dim=(2, 4))
    torch.testing.assert_close(f_cat[:, 0], blocks)
    torch.testing.assert_close(f_cat[:, 1], f4[:, 9])


@torch.no_grad()
def test_attention_weighs_whole_channels_between_zero_and_one() -> None:
    attention, (f_edge, _) = EdgeAggregation().attention, features()
    ratio = attention(f_edge) / f_edge
    assert float((ratio.amax(dim=(2, 3)) - ratio.amin(dim=(2, 3))).max()) < 1e-5  # float32 division
    assert bool(((ratio > 0) & (ratio < 1)).all())


@pytest.mark.parametrize("gate", GATES)
def test_every_eam_parameter_gets_a_gradient(gate: str) -> None:
    part, (f_edge, f4) = EdgeAggregation(gate=gate), features()
    randomise(part)
    part(f_edge, f4).f_agg.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters())


@pytest.mark.parametrize("gate", GATES)
def test_training_can_leave_the_start(gate: str) -> None:
    part, (f_edge, f4) = EdgeAggregation(gate=gate), features()
    part(f_edge, f4).f_agg.square().sum().backward()
    assert part.fuse.weight.grad is not None
    assert float(part.fuse.weight.grad.abs().max()) > 0


@torch.no_grad()
def test_raw_gate_starts_near_f4() -> None:
    f_edge, f4 = features()
    f_agg = EdgeAggregation(gate="raw")(f_edge, f4).f_agg
    assert float((f_agg - f4).std() / f4.std()) < 0.05


def test_unknown_gate_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"gate 'sigmoidal' is unknown.*'sigmoid'"):
        EdgeAggregation(gate="sigmoidal")


def test_add_and_multiply_differ_in_the_operator_only() -> None:
    f_edge, f4 = features()
    add, multiply = AddEdges(seed=1), MultiplyEdges(seed=1)
    randomise(add)
    multiply.load_state_dict(add.state_dict(), strict=True)
    added, multiplied = add(f_edge, f4), multiply(f_edge, f4)
    assert torch.equal(added.f_cat, multiplied.f_cat)
    assert torch.equal(added.f_agg, f4 + added.f_cat)
    assert torch.equal(multiplied.f_agg, f4 * added.f_cat)


@pytest.mark.parametrize("name", ["add", "mul"])
def test_simple_aggregates_get_gradients_from_the_start(name: str) -> None:
    part, (f_edge, f4) = AGGREGATES[name](), features()
    part(f_edge, f4).f_agg.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters())


def test_ignore_edges_has_no_parameters_and_no_edges() -> None:
    f_edge, f4 = features()
    result = IgnoreEdges()(f_edge, f4)
    assert isinstance(result, Aggregated)
    assert result.f_agg is f4
    assert float(result.f_cat.abs().max()) == 0
    assert not IgnoreEdges().state_dict()


def test_parameter_counts() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(EdgeAggregation().fuse) == 2_949_632
    assert count(EdgeAggregation().attention) == 2_048
    assert count(AddEdges()) == count(MultiplyEdges()) == 128 * 512 + 512


def test_weights_follow_the_seed_and_touch_no_global_state() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, same, other = (EdgeAggregation(seed=s).attention.bottleneck[0].weight for s in (0, 0, 1))
    for name in AGGREGATES:
        AGGREGATES[name](seed=4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
