"""Wasserstein losses with gradient penalty (Gulrajani et al., 2017), and networks that a step leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TINY_SQUARE = 1e-12
"""Added to the squared length of a gradient: a gradient of 0 then has a derivative (0), not NaN."""


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """No gradients reach the parameters of `networks` by what is computed inside, and they are in evaluation mode.

    Gradients pass through them to their input. What each parameter and submodule was before is restored after.
    """
    parameters = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    modes = [(part, part.training) for network in networks for part in network.modules()]
    try:
        for network in networks:
            network.requires_grad_(False).eval()
        yield
    finally:
        for parameter, trainable in parameters:
            parameter.requires_grad_(trainable)
        for part, training in modes:
            part.training = training


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, rng: torch.Generator
) -> Tensor:
    """Mean of (|d critic / d image| - 1)^2 at random points between real and fake images [B,...]: a scalar.

    `critic` gives [B]; its value for an image must not depend on the others of the batch (no BatchNorm). One point
    per pair, uniform on the line between both; `rng` draws on the CPU. Images get no gradient, the critic does, unless
    gradients are switched off outside. Gulrajani et al., Algorithm 1, lines 6 and 7 (without the factor lambda).
    """
    share = torch.rand((len(real),) + (1,) * (real.ndim - 1), generator=rng).to(real)
    with torch.enable_grad():  # the penalty is a derivative, also where no gradient of it is wanted
        between = torch.lerp(real.detach(), fake.detach(), share).requires_grad_()
        [slope] = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = ((slope.square().flatten(1).sum(1) + TINY_SQUARE).sqrt() - 1).square().mean()
    return penalty if torch.is_grad_enabled() else penalty.detach()


def critic_loss(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, rng: torch.Generator, penalty: float
) -> Tensor:
    """What the critic minimises: mean over fake - mean over real + `penalty` times the gradient penalty.

    Images [B,...], of which the fake ones get no gradient. Gulrajani et al., Eq. 3.
    """
    gap = critic(fake.detach()).mean() - critic(real).mean()
    return gap + penalty * gradient_penalty(critic, real, fake, rng=rng)


def generator_loss(critic: Callable[[Tensor], Tensor], fake: Tensor) -> Tensor:
    """What the generator of the images `fake` [B,...] minimises: minus the critic's mean over them."""
    return -critic(fake).mean()
