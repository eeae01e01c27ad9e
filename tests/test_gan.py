import pytest
import torch
from torch import nn
from torch.nn import functional as F

from umiad.nn.encoder import seeded
from umiad.nn.gan import Critic, Generator, LatentEncoder, ResidualBlock, layer_norm, widths


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_published_widths_at_64_pixels():
    assert widths(64, 64) == [64, 128, 256, 512, 512]
    assert widths(128, 4) == [4, 8, 16, 32, 32, 32]
    assert widths(32, 4) == [4, 8, 16, 32]


def plain(block, maps):
    """The block as it is described: every convolution 3x3, cells repeated or means taken beside it."""
    inner, around = F.relu(block.norm1(maps)), maps
    if block.up:
        inner, around = (each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in (inner, around))
    inner = block.conv2(F.relu(block.norm2(block.conv1(inner))))
    shortcut = block.shortcut(around)
    if block.up:
        return inner + shortcut
    return F.avg_pool2d(inner, 2) + F.avg_pool2d(shortcut, 2)


@pytest.mark.parametrize("norm", [layer_norm, nn.BatchNorm2d])
@pytest.mark.parametrize("up", [False, True])
def test_a_block_equals_its_description(up, norm):
    with seeded(1):
        block = ResidualBlock(6, 4, up=up, norm=norm).double()
    maps = noise(3, 6, 8, 8, dtype=torch.float64)
    found, expected = block(maps), plain(block, maps)
    assert found.shape == ((3, 4, 16, 16) if up else (3, 4, 4, 4))
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = [
        torch.autograd.grad(each.square().sum(), block.conv1.weight)[0] for each in (found, expected)
    ]
    assert torch.allclose(*gradients, atol=1e-9)


@pytest.mark.parametrize("edge", [32, 64, 128])
def test_shapes_and_ranges(edge):
    with seeded(0):
        generator = Generator(edge, width=2, latent=5)
        critic = Critic(edge, width=2)
        bounded, free = (LatentEncoder(edge, width=2, latent=5, bounded=each) for each in (True, False))
    images = generator(10 * noise(3, 5))
    assert images.shape == (3, 1, edge, edge)
    assert float(images.detach().abs().max()) <= 1
    assert critic(images).shape == (3,)
    assert critic.features(images).shape == (3, 16, 4, 4)
    free.load_state_dict(bounded.state_dict())
    latents = free(images)
    assert latents.shape == (3, 5)
    assert torch.allclose(bounded(images), torch.tanh(latents), atol=1e-6)


def test_a_critic_sees_one_image_at_a_time_also_in_training_mode():
    with seeded(0):
        critic = Critic(32, width=2)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in critic.modules())
    images = noise(4, 1, 32, 32)
    single = torch.cat([critic(image[None]) for image in images])
    assert torch.allclose(critic(images), single, atol=1e-5)


@pytest.mark.parametrize("build", [Generator, LatentEncoder])
def test_generator_and_encoder_depend_on_the_batch_in_training_mode_only(build):
    with seeded(0):
        network = build(32, width=2, latent=5, **({"bounded": False} if build is LatentEncoder else {}))
    inputs = noise(4, 5) if build is Generator else noise(4, 1, 32, 32)
    assert not torch.allclose(network(inputs)[:1], network(inputs[:1]), atol=1e-3)
    network.eval()
    assert torch.allclose(network(inputs)[:1], network(inputs[:1]), atol=1e-5)


def test_the_critic_is_twice_differentiable_by_autograd():
    with seeded(0):
        critic = Critic(32, width=2).double()
    image = 0.5 * noise(1, 1, 32, 32, dtype=torch.float64)
    image.requires_grad_()
    [slope] = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    weight = critic.blocks[0].conv2.weight
    [found] = torch.autograd.grad(slope.square().sum(), weight)

    def squared_slope(amount):
        with torch.no_grad():
            weight[0, 0, 1, 1] += amount
        [moved] = torch.autograd.grad(critic(image).sum(), image)
        with torch.no_grad():
            weight[0, 0, 1, 1] -= amount
        return float(moved.square().sum())

    step = 1e-6
    numeric = (squared_slope(step) - squared_slope(-step)) / (2 * step)
    assert float(found[0, 0, 1, 1]) == pytest.approx(numeric, rel=1e-4)
