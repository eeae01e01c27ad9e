import math

import pytest
import torch

from umiad.nn import neighbourhood
from umiad.nn.neighbourhood import NeighbourhoodAttention, fitting_kernel, window_starts


def build(channels=8, heads=2, kernel=7):
    attention = NeighbourhoodAttention(channels, heads=heads, kernel=kernel).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=rng))
    return attention


def drawn(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def window(position, length, kernel):
    """Positions that one position sees, written out."""
    first = position - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > length:
        first -= 1
    return list(range(first, first + kernel))


def dense(attention, fibres, kernels):
    """Attention of every position to every position, those outside of the window masked."""
    count, h, w, channels = fibres.shape
    width = channels // attention.heads
    q, k, v = attention.qkv(fibres).reshape(count, h * w, 3, attention.heads, width).unbind(2)
    added = torch.full((attention.heads, h * w, h * w), -math.inf, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for a in window(i, h, kernels[0]):
                for b in window(j, w, kernels[1]):
                    relative = attention.bias[:, a - i + attention.kernel - 1, b - j + attention.kernel - 1]
                    added[:, i * w + j, a * w + b] = relative.detach()
    products = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width) + added
    taken = torch.einsum("bhqk,bkhd->bqhd", products.softmax(3), v)
    return attention.proj(taken.reshape(count, h, w, channels))


@pytest.mark.parametrize(
    ("h", "w", "kernels"),
    [
        (9, 9, (7, 7)),
        (7, 8, (7, 7)),
        (11, 7, (7, 7)),
        (4, 9, (3, 7)),
        (2, 4, (1, 3)),
        (1, 1, (1, 1)),
        (6, 5, (5, 5)),
    ],
)
def test_it_equals_a_masked_dense_attention(h, w, kernels):
    """Borders and relative biases included; a map too small for the kernel has smaller windows."""
    attention, fibres = build(), drawn(2, h, w, 8)
    assert torch.allclose(attention(fibres), dense(attention, fibres, kernels), atol=1e-10)


def test_another_kernel_and_one_head():
    attention, fibres = build(heads=1, kernel=3), drawn(1, 5, 6, 8)
    assert torch.allclose(attention(fibres), dense(attention, fibres, (3, 3)), atol=1e-10)


def test_blocks_of_rows_change_nothing(monkeypatch):
    attention, fibres = build(), drawn(2, 9, 8, 8)
    whole = attention(fibres)
    monkeypatch.setattr(neighbourhood, "SCORES_AT_ONCE", 1)  # a row at a time
    assert torch.allclose(attention(fibres), whole, atol=1e-12)
    monkeypatch.setattr(
        neighbourhood, "SCORES_AT_ONCE", 4 * 2 * 2 * 8 * 7 * 8
    )  # 4 rows, the last block has 1
    assert torch.allclose(attention(fibres), whole, atol=1e-12)


def test_a_position_sees_its_window_and_nothing_else():
    attention, fibres = build(), drawn(1, 12, 10, 8)
    fibres.requires_grad_()
    for i, j in ((0, 0), (5, 5), (11, 2), (3, 9)):
        [gradient] = torch.autograd.grad(attention(fibres)[0, i, j].sum(), fibres)
        seen = gradient[0].abs().sum(2) > 0
        expected = torch.zeros(12, 10, dtype=torch.bool)
        for a in window(i, 12, 7):
            expected[a, window(j, 10, 7)] = True
        assert int(expected.sum()) == 49
        assert torch.equal(seen, expected)


def test_every_parameter_gets_a_gradient():
    attention = build()
    attention(drawn(2, 13, 13, 8)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert bool((attention.bias.grad != 0).all())  # all 13 x 13 relative positions occur on a map of 13 x 13


@pytest.mark.parametrize("length", [7, 8, 20])
def test_windows_are_shifted_inward(length):
    assert window_starts(length, 7).tolist() == [window(i, length, 7)[0] for i in range(length)]


def test_the_kernel_shrinks_to_an_odd_number_that_fits():
    assert [fitting_kernel(7, length) for length in (1, 2, 3, 4, 5, 6, 7, 8)] == [1, 1, 3, 3, 5, 5, 7, 7]
