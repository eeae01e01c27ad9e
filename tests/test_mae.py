import numpy as np
import pytest
import torch

from umiad.nn.mae import MaskedAutoencoder, Stack, masked_loss, partitions, pick, random_visible
from umiad.nn.vit import position_code

CELLS, VALUES = 16, 6


def build(seed=0):
    return MaskedAutoencoder(side=4, values=VALUES, encoder=Stack(8, 2, 2), decoder=Stack(4, 1, 1), seed=seed)


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VISIBLE = torch.tensor([[3, 0, 9, 14], [5, 6, 7, 8]])


def masked_places():
    masked = torch.ones(2, CELLS, dtype=torch.bool)
    return masked.scatter(1, VISIBLE, False)


@torch.no_grad()
def test_masked_patches_never_reach_the_network():
    """Whatever is in them, even NaN: output and prediction are equal to the last bit."""
    network, patches = build(), made(2, CELLS, VALUES)
    for value in (1e9, float("nan"), float("inf")):
        changed = torch.where(masked_places()[..., None], value, patches)
        assert torch.equal(network.encode(changed, VISIBLE), network.encode(patches, VISIBLE))
        assert torch.equal(network(changed, VISIBLE), network(patches, VISIBLE))


@torch.no_grad()
def test_every_visible_patch_reaches_every_prediction():
    network, patches = build(), made(2, CELLS, VALUES)
    before = network(patches, VISIBLE)
    for place in range(4):
        changed = patches.clone()
        changed[torch.arange(2), VISIBLE[:, place]] += 3.0
        assert ((network(changed, VISIBLE) - before).abs().amax(2) > 0).all()


def test_the_gradient_of_masked_patches_is_zero():
    network, patches = build(), made(2, CELLS, VALUES).requires_grad_()
    network(patches, VISIBLE).square().sum().backward()
    touched = patches.grad.abs().amax(2) > 0
    assert torch.equal(touched, ~masked_places())


@torch.no_grad()
def test_the_network_by_hand():
    """Codes on what is embedded, the class token first and without a code, mask tokens where nothing is known."""
    network, patches = build(), made(2, CELLS, VALUES)
    code, decoder_code = position_code(8, 4), position_code(4, 4)
    for image in range(2):
        tokens = [network.class_token[0, 0]]
        tokens += [network.embed(patches[image, cell]) + code[cell] for cell in VISIBLE[image]]
        encoded = network.encoder(torch.stack(tokens)[None])[0]
        assert torch.allclose(network.encode(patches, VISIBLE)[image], encoded, atol=1e-5)
        known = network.decoder_embed(encoded)
        full = [known[0]]
        for cell in range(CELLS):
            at = (VISIBLE[image] == cell).nonzero()
            token = known[1 + int(at)] if len(at) else network.mask_token[0, 0]
            full.append(token + decoder_code[cell])
        expected = network.predict(network.decoder(torch.stack(full)[None])[0, 1:])
        assert torch.allclose(network(patches, VISIBLE)[image], expected, atol=1e-5)


@torch.no_grad()
def test_the_order_of_visible_patches_does_not_matter():
    network, patches = build(), made(2, CELLS, VALUES)
    turned = VISIBLE.flip(1)
    assert torch.allclose(network(patches, turned), network(patches, VISIBLE), atol=1e-5)


def test_the_loss_counts_masked_patches_only():
    patches, predicted = made(2, CELLS, VALUES), made(2, CELLS, VALUES, seed=1)
    squares = ((predicted - patches) ** 2)[masked_places()]
    assert squares.shape == (24, VALUES)
    assert masked_loss(patches, predicted, VISIBLE) == pytest.approx(float(squares.mean()), rel=1e-6)
    wrong = predicted.clone()
    wrong[~masked_places()] = 1e3
    assert torch.equal(masked_loss(patches, wrong, VISIBLE), masked_loss(patches, predicted, VISIBLE))
    hand = masked_loss(torch.tensor([[[0.0], [0.0], [5.0]]]), torch.ones(1, 3, 1), torch.tensor([[1]]))
    assert float(hand) == (1 + 16) / 2


def test_gradients_reach_every_parameter():
    network, patches = build(), made(2, CELLS, VALUES)
    masked_loss(patches, network(patches, VISIBLE), VISIBLE).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_pick_takes_each_images_own_patches():
    patches = made(2, CELLS, VALUES)
    expected = torch.stack([patches[image][VISIBLE[image]] for image in range(2)])
    assert torch.equal(pick(patches, VISIBLE), expected)


def test_random_sets_are_different_patches_drawn_from_the_generator_alone():
    state = torch.get_rng_state()
    drawn = random_visible(200, CELLS, keep=4, rng=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, random_visible(200, CELLS, keep=4, rng=torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert len(drawn.sort(dim=1).values.unique(dim=0)) > 150
    counts = drawn.flatten().bincount(minlength=CELLS)  # 50 expected, standard deviation 6.1
    assert counts.min() > 25
    assert counts.max() < 75


@pytest.mark.parametrize(("cells", "sets", "rounds"), [(16, 4, 3), (9, 4, 2), (196, 4, 4), (25, 2, 1)])
def test_partitions_show_every_patch_once_per_round(cells, sets, rounds):
    found = list(partitions(cells, sets=sets, rounds=rounds, seed=3))
    assert len(found) == sets * rounds
    for start in range(0, len(found), sets):
        shown = torch.cat(found[start : start + sets])
        assert sorted(shown.tolist()) == list(range(cells))
    lengths = {len(each) for each in found}
    assert max(lengths) - min(lengths) <= 1
    seen = torch.cat(found).bincount(minlength=cells)
    assert (sets * rounds - seen).unique().tolist() == [(sets - 1) * rounds]


def test_partitions_depend_on_the_seed_alone():
    first = [each.tolist() for each in partitions(9, sets=3, rounds=2, seed=0)]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        np.random.seed(2)
        assert [each.tolist() for each in partitions(9, sets=3, rounds=2, seed=0)] == first
    assert [each.tolist() for each in partitions(9, sets=3, rounds=2, seed=1)] != first
    assert first[:3] != first[3:]
    assert first == FOREVER


FOREVER = [[3, 2, 1], [8, 6, 0], [7, 4, 5], [2, 4, 6], [8, 5, 1], [3, 7, 0]]
"""What seed 0 draws: a saved model judges by these sets, so they must never change."""


def test_weights_come_from_the_seed_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    first, again, other = build(), build(), build(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)
    assert "code" not in first.state_dict()


def test_the_published_size():
    """ViT-B/16 at 224 px: 85.65 M in the encoder and 26.01 M in the decoder (positions are not counted)."""
    with torch.device("meta"):
        network = MaskedAutoencoder(
            side=14, values=768, encoder=Stack(768, 12, 12), decoder=Stack(512, 8, 16), seed=0
        )
    counts = {"encoder": 0, "decoder": 0}
    for name, parameter in network.named_parameters():
        part = "encoder" if name.startswith(("embed", "class_token", "encoder")) else "decoder"
        counts[part] += parameter.numel()
    assert counts == {"encoder": 85_647_360, "decoder": 26_008_320}
    assert sum(counts.values()) == 111_655_680
