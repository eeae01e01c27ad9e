from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from umiad.nn.aggregate import AGGREGATES, AddEdges, EdgeAggregation, IgnoreEdges
from umiad.nn.edge import EDGES, EdgeGuidance, NoEdges
from umiad.nn.guidance import GUIDANCES, ConditionalShift, EdgeCondition, Guided, Joint, StopGradient

COMBINATIONS = list(product(EDGES, AGGREGATES, GUIDANCES))
# by the meaning of the combination (module docstring): nothing connects these edge modules to a loss
EDGE_WITHOUT_GRADIENT = {("egm", "ignore", "joint"), ("egm", "ignore", "shift")}
# nothing to multiply: the gradient is there, and zero
ZERO_GRADIENT = {(edge, "mul", "shift") for edge in EDGES}


def features(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    f1 = torch.rand(batch, 64, 16, 16, generator=rng)
    f2 = torch.rand(batch, 128, 8, 8, generator=rng)
    f4 = torch.rand(batch, 512, 2, 2, generator=rng)
    return f1, f2, f4, torch.rand(batch, 1, 8, 8, generator=rng)


def randomise(*modules: nn.Module) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.05)


def one_loss(edge: nn.Module, policy: nn.Module) -> Tensor:
    """A stand-in for the flow's loss, plus the policy's own."""
    f1, f2, f4, target = features()
    f_edge = edge(f1, f2)
    guided = policy(f_edge, f4)
    # weights that no symmetry can cancel
    flow = (
        guided.f4_flow * torch.arange(512)[None, :, None, None]
    ).square().mean() + guided.condition.square().sum()
    own: Tensor = policy.loss(f_edge, guided.f_cat, target)  # type: ignore[operator]
    assert own.shape == ()
    return flow + own


@pytest.mark.parametrize(("edge_name", "aggregate_name", "policy_name"), COMBINATIONS)
def test_every_combination_takes_a_training_step(
    edge_name: str, aggregate_name: str, policy_name: str
) -> None:
    edge = EDGES[edge_name]()
    policy = GUIDANCES[policy_name](edge, AGGREGATES[aggregate_name]())
    randomise(edge, policy)
    parameters = {f"edge.{k}": p for k, p in edge.named_parameters()} | dict(policy.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    loss = one_loss(edge, policy)
    assert bool(torch.isfinite(loss))
    if loss.requires_grad:
        loss.backward()
    without = {name for name, p in parameters.items() if p.grad is None}
    combination = (edge_name, aggregate_name, policy_name)
    assert without == (
        {n for n in parameters if n.startswith("edge.")} if combination in EDGE_WITHOUT_GRADIENT else set()
    )
    if parameters:
        torch.optim.SGD(parameters.values(), lr=0.1).step()
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    sighted = edge_name != "none" and combination not in ZERO_GRADIENT
    assert moved == set(parameters) - without or not sighted


@pytest.mark.parametrize("name", GUIDANCES)
def test_shapes_and_condition_channels(name: str) -> None:
    f1, f2, f4, _ = features(batch=3)
    edge = EdgeGuidance()
    policy = GUIDANCES[name](edge, EdgeAggregation())
    guided = policy(edge(f1, f2), f4)
    assert isinstance(guided, Guided)
    assert guided.f4_flow.shape == guided.f_cat.shape == f4.shape
    assert guided.condition.shape == (3, policy.condition_channels, 2, 2)
    assert policy.condition_channels == (32 if name == "condition" else 0)


def test_stop_gradient_lets_nothing_through_to_the_flow() -> None:
    f1, f2, f4, target = features()
    edge = EdgeGuidance()
    policy = StopGradient(edge, EdgeAggregation())
    randomise(edge, policy)
    f_edge = edge(f1, f2)
    guided = policy(f_edge, f4)
    assert not guided.f4_flow.requires_grad
    assert torch.equal(guided.f4_flow, policy.aggregate(f_edge, f4).f_agg)
    policy.loss(f_edge, guided.f_cat, target).backward()
    trained = [*edge.parameters(), *policy.parameters()]
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in trained)


def test_heads_are_built_for_trainable_parts_only() -> None:
    def heads(edge: nn.Module, aggregate: nn.Module) -> list[str]:
        names = StopGradient(edge, aggregate).state_dict()
        return sorted({name.split(".")[0] for name in names if "head" in name})

    assert heads(EdgeGuidance(), AddEdges()) == ["cat_head", "edge_head"]
    assert heads(NoEdges(), AddEdges()) == ["cat_head"]
    assert heads(EdgeGuidance(), IgnoreEdges()) == ["edge_head"]
    assert heads(NoEdges(), IgnoreEdges()) == []


def test_stop_gradient_loss_is_the_error_of_both_heads() -> None:
    policy = StopGradient(EdgeGuidance(), EdgeAggregation())
    randomise(policy)
    with torch.no_grad():
        for head in (policy.edge_head, policy.cat_head):
            head.project.weight.zero_()
        policy.edge_head.project.bias.fill_(0.5)
        policy.cat_head.project.bias.fill_(0.25)
    loss = policy.loss(torch.rand(1, 128, 8, 8), torch.rand(1, 512, 2, 2), torch.zeros(1, 1, 16, 16))
    torch.testing.assert_close(loss, torch.tensor(0.5**2 + 0.25**2))


def test_joint_passes_the_gradient_to_the_edge_parts() -> None:
    f1, f2, f4, _ = features()
    edge = EdgeGuidance()
    policy = Joint(edge, EdgeAggregation())
    randomise(edge, policy)
    policy(edge(f1, f2), f4).f4_flow.square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().max() > 0)
        for p in [*edge.parameters(), *policy.parameters()]
    )


@pytest.mark.parametrize("aggregate", ["eam", "add", "mul", "ignore"])
@torch.no_grad()
def test_shift_does_not_depend_on_f4(aggregate: str) -> None:
    f1, f2, f4, _ = features()
    edge, part = EdgeGuidance().eval(), AGGREGATES[aggregate]()
    policy = ConditionalShift(edge, part)
    randomise(edge, policy)
    f_edge = edge(f1, f2)
    shift = policy(f_edge, f4).f4_flow - f4
    other = policy(f_edge, 3 * f4).f4_flow - 3 * f4
    torch.testing.assert_close(shift, other, rtol=0, atol=1e-5)  # float32, values up to about 10
    assert (float(shift.abs().max()) > 1e-3) == (aggregate in {"eam", "add"})


def test_condition_leaves_f4_alone_and_keeps_no_aggregate() -> None:
    f1, f2, f4, _ = features()
    policy = EdgeCondition(EdgeGuidance(), EdgeAggregation())
    guided = policy(EdgeGuidance()(f1, f2), f4)
    assert guided.f4_flow is f4
    assert float(guided.condition.detach().abs().max()) > 0
    assert sum(p.numel() for p in policy.parameters()) == 128 * 32 + 32


@pytest.mark.parametrize("name", GUIDANCES)
def test_weights_follow_the_seed_and_touch_no_global_state(name: str) -> None:
    edge, aggregate = EdgeGuidance(), AddEdges()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, same = (GUIDANCES[name](edge, aggregate, seed=5).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(first[key], same[key]) for key in first)
    other = GUIDANCES[name](edge, aggregate, seed=6).state_dict()
    own = [key for key in first if not key.startswith("aggregate.")]
    assert all(not torch.equal(first[key], other[key]) for key in own)
