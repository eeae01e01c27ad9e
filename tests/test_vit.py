import math

import pytest
import torch

from umiad.nn.vit import Attention, Block, blocks, init_weights, patchify, position_code, unpatchify


@pytest.mark.parametrize(("patch", "channels"), [(4, 1), (8, 3), (16, 3)])
def test_unpatchify_is_the_inverse_of_patchify(patch, channels):
    images = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, patch)
    assert patches.shape == (2, (32 // patch) ** 2, patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch), images)
    assert torch.equal(patchify(unpatchify(patches, patch), patch), patches)


def test_patches_go_row_by_row_and_keep_the_channels_of_a_pixel_together():
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)  # not square
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for number in range(6):
        top, left = 4 * (number // 3), 4 * (number % 3)
        expected = images[:, :, top : top + 4, left : left + 4].permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(patches[:, number], expected)


def direct_code(width, column, row):
    """The formula, number by number."""
    quarter, code = width // 4, []
    for place in (column, row):
        angles = [place / 10_000 ** (i / quarter) for i in range(quarter)]
        code += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return code


@pytest.mark.parametrize(("width", "side"), [(4, 3), (16, 5), (768, 14)])
def test_position_codes_equal_the_formula(width, side):
    code = position_code(width, side)
    assert (code.shape, code.dtype) == ((side * side, width), torch.float32)
    for cell in {0, 1, side, side * side - 1, side + 2}:
        expected = torch.tensor(direct_code(width, cell % side, cell // side))
        assert torch.allclose(code[cell], expected, atol=1e-6)  # rounding to float32
    assert len(code.unique(dim=0)) == side * side


def test_attention_equals_softmax_head_by_head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention, tokens = Attention(8, heads=2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    query, key, value = attention.qkv(tokens).split(8, dim=2)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (query[..., head] @ key[..., head].mT / math.sqrt(4)).softmax(-1)
        heads.append(weights @ value[..., head])
    expected = attention.proj(torch.cat(heads, dim=2))
    assert torch.allclose(attention(tokens), expected, atol=1e-12)


def test_a_block_adds_attention_and_then_its_mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block, tokens = Block(8, heads=2).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    middle = tokens + block.attention(block.norm1(tokens))
    assert torch.allclose(block(tokens), middle + block.mlp(block.norm2(middle)), atol=1e-12)
    assert sum(p.numel() for p in block.parameters()) == 12 * 8**2 + 13 * 8
    assert [part.eps for part in (block.norm1, block.norm2)] == [1e-6, 1e-6]


def test_tokens_of_different_images_do_not_touch_each_other():
    stack = blocks(8, depth=2, heads=2)
    tokens = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[1] = 7.0
    assert torch.allclose(stack(tokens)[0], stack(changed)[0], atol=1e-6)
    assert not torch.allclose(stack(tokens)[1], stack(changed)[1], atol=1e-2)


def test_blocks_end_with_a_norm_and_gradients_reach_all_of_them():
    stack = blocks(8, depth=3, heads=2)
    assert len(stack) == 4
    tokens = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(stack(tokens).mean(2), torch.zeros(1, 4), atol=1e-5)
    (stack(tokens) * tokens).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in stack.parameters())


def test_initial_weights_are_xaviers_and_biases_are_zero():
    stack = blocks(64, depth=1, heads=2)
    init_weights(stack)
    for part in stack.modules():
        if isinstance(part, torch.nn.Linear):
            limit = math.sqrt(6 / (part.in_features + part.out_features))
            highest = float(part.weight.detach().abs().max())
            assert 0.95 * limit < highest <= limit
            assert not part.bias.detach().any()


def test_gradients_of_a_block_equal_differences():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block(4, heads=2).double()
        tokens = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (tokens,))
