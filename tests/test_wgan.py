import pytest
import torch
from torch import nn

from umiad.nn.wgan import critic_loss, frozen, generator_loss, gradient_penalty


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(seed, count=5):
    return torch.randn(count, 1, 3, 3, dtype=torch.float64, generator=rng(seed))


class Linear(nn.Module):
    """w . x + b, whose gradient by x is w everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(images(7, count=1)[0])
        self.bias = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return (self.weight * x).flatten(1).sum(1) + self.bias


def half_square(x):
    return 0.5 * x.square().flatten(1).sum(1)  # its gradient is x


def test_the_penalty_of_a_linear_critic_is_known_and_so_is_its_gradient():
    critic = Linear()
    penalty = gradient_penalty(critic, images(1), images(2), rng=rng())
    length = critic.weight.detach().norm()
    assert abs(float(penalty.detach()) - float((length - 1) ** 2)) < 1e-10  # 1e-12 is added to the square
    penalty.backward()
    expected = 2 * (length - 1) * critic.weight.detach() / length
    assert torch.allclose(critic.weight.grad, expected, atol=1e-10)


def test_the_penalty_is_taken_at_one_random_point_per_pair():
    real, fake = images(1), images(2)
    found = gradient_penalty(half_square, real, fake, rng=rng(4)).detach()
    share = torch.rand(5, 1, 1, 1, generator=rng(4)).double()
    between = real + share * (fake - real)
    expected = (between.flatten(1).norm(dim=1) - 1).square().mean()
    assert abs(float(found) - float(expected)) < 1e-10


def test_the_penalty_at_the_images_themselves():
    unit = images(1) / images(1).flatten(1).norm(dim=1)[:, None, None, None]
    for length, expected in ((1, 0), (3, 4)):
        found = gradient_penalty(half_square, length * unit, length * unit, rng=rng()).detach()
        assert abs(float(found) - expected) < 1e-10


def test_a_critic_without_slope_has_a_penalty_and_a_finite_gradient():
    critic = Linear()
    nn.init.zeros_(critic.weight)
    penalty = gradient_penalty(critic, images(1), images(2), rng=rng())
    penalty.backward()
    assert abs(float(penalty.detach()) - 1) < 1e-5
    assert torch.isfinite(critic.weight.grad).all()


def test_the_penalty_is_also_known_where_gradients_are_switched_off():
    critic = Linear()
    expected = float(gradient_penalty(critic, images(1), images(2), rng=rng()).detach())
    with torch.no_grad():
        found = gradient_penalty(critic, images(1), images(2), rng=rng())
    assert float(found) == expected
    assert not found.requires_grad


def test_losses_by_hand_and_no_gradient_to_the_fake_images_of_the_critic():
    critic, real, fake = Linear(), images(1), images(2).requires_grad_()
    loss = critic_loss(critic, real, fake, rng=rng(), penalty=10.0)
    length = critic.weight.detach().norm()
    gap = critic(fake).mean() - critic(real).mean()
    assert abs(float((loss - gap).detach()) - 10 * float((length - 1) ** 2)) < 1e-9
    loss.backward()
    assert fake.grad is None
    generator = generator_loss(critic, fake)
    assert float(generator.detach()) == -float(critic(fake).mean().detach())
    generator.backward()
    assert torch.allclose(fake.grad[0], -critic.weight.detach() / 5)


def test_frozen_networks_let_gradients_pass_but_take_none():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    x = images(1).requires_grad_()
    with frozen(network):
        network(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in network.parameters())
    assert network[1].running_mean.tolist() == [0, 0]  # evaluation mode


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_frozen_or_in_evaluation_mode_before_is_so_afterwards(fails):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    network[0].weight.requires_grad_(False)
    network[1].eval()
    modes = [part.training for part in network.modules()]
    trainable = [p.requires_grad for p in network.parameters()]
    try:
        with frozen(network):
            assert not any(p.requires_grad for p in network.parameters())
            assert not any(part.training for part in network.modules())
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert [part.training for part in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == trainable
    assert not all(trainable)
