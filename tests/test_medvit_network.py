import pytest
import torch

from umiad.nn.cutpaste import three_way
from umiad.nn.medvit import (
    DESIGNS,
    GlobalAttention,
    GlobalBlock,
    LocalBlock,
    MedVitNetwork,
    drop_path,
    rounded,
    to_fibres,
    to_maps,
)

EDGE = 64


def build(design="tiny", **settings):
    return MedVitNetwork(design, **{"classes": 2, "seed": 0, **settings})


def skeleton(design="tiny", **settings):
    """The same without any numbers: built in no time."""
    with torch.device("meta"):
        return build(design, **settings)


def images(count=2, seed=1):
    return torch.randn(count, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(seed))


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


PUBLISHED = {"tiny": 11.34, "small": 29.58, "base": 66.23, "large": 117.27}
"""Parameters in millions with two classes, of the published code."""
UNUSED = {"tiny": 0.98, "small": 2.75, "base": 6.14, "large": 10.87}
"""Of those, the ones that nothing uses."""


@pytest.mark.parametrize("design", PUBLISHED)
def test_the_official_layout_has_the_published_number_of_parameters(design):
    official, ours = skeleton(design, official=True), skeleton(design)
    assert round(numbers(official) / 1e6, 2) == PUBLISHED[design]
    assert round((numbers(official) - numbers(ours)) / 1e6, 2) == UNUSED[design]


@pytest.fixture(scope="module")
def gradients():
    """Names of parameters with a gradient that is not zero everywhere, of both layouts."""
    found = {}
    for official in (False, True):
        network = build(classes=3, official=official)
        views, labels = three_way(images(4), rng=torch.Generator().manual_seed(0))
        logits = network.classify(network(views, torch.Generator().manual_seed(0)).embedding)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        named = dict(network.named_parameters())
        found[official] = {k: None if p.grad is None else float(p.grad.abs().max()) for k, p in named.items()}
    return found


def test_the_corrected_layout_has_no_dead_parameters(gradients):
    keys = [name for name, largest in gradients[False].items() if not largest]
    assert keys == []


def test_what_the_published_code_never_uses_is_frozen(gradients):
    dead = {name for name, largest in gradients[True].items() if largest is None}
    assert dead
    assert all(".unused." in name for name in dead)
    network = skeleton(classes=3, official=True)
    assert dead == {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert gradients[True].keys() - dead == gradients[False].keys()


@pytest.mark.parametrize("design", ["tiny", "small"])
def test_maps_and_embedding_have_the_published_shapes(design):
    network = build(design).eval()
    with torch.no_grad():
        found = network(images())
    shapes = [(2, c, EDGE // s, EDGE // s) for c, s in zip(DESIGNS[design].dims, (4, 8, 16, 32), strict=True)]
    assert [tuple(m.shape) for m in found.maps] == shapes
    assert found.embedding.shape == (2, DESIGNS[design].dims[3])
    assert network.classify(found.embedding).shape == (2, 2)
    pooled = network.norm(found.maps[3]).mean((2, 3))
    assert torch.equal(found.embedding, pooled)


def test_blocks_stand_where_the_publication_has_them():
    kinds = {LocalBlock: "L", GlobalBlock: "G"}
    found = {
        design: " ".join("".join(kinds[type(block)] for block in stage) for stage in skeleton(design).stages)
        for design in DESIGNS
    }
    assert found == {"tiny": "LL LG LLGLLG G", **dict.fromkeys(("small", "base", "large"), "LL LG LLGLLG GG")}
    stages = skeleton("small").stages
    assert [block.attention.heads for block in stages[2]] == [8, 8, 6, 8, 8, 6]
    assert [stage[0].feed_forward.layers[3].kernel_size[0] for stage in stages[:3]] == [7, 3, 3]
    assert [stage[-1].attention.reduction for stage in stages[1:]] == [4, 2, 1]


def test_rates_of_drop_path_rise_in_a_line():
    blocks = [block for stage in skeleton("base").stages for block in stage]
    assert [block.rate for block in blocks] == pytest.approx([0.2 * k / 11 for k in range(12)])
    assert [block.rate for stage in skeleton(drop_rate=0.0).stages for block in stage] == [0.0] * 11


def test_fibres_are_moved_or_merely_cut():
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    fibres, cut = to_fibres(maps, official=False), to_fibres(maps, official=True)
    assert fibres.shape == cut.shape == (1, 3, 4, 2)
    assert fibres[0, 1, 2].tolist() == [6, 18]  # both channels of one position
    assert cut[0, 1, 2].tolist() == [12, 13]  # two positions of one channel
    for official in (False, True):
        assert torch.equal(to_maps(to_fibres(maps, official=official), official=official), maps)


@torch.no_grad()
def test_the_official_layout_computes_something_else():
    ours, official = build().eval(), build(official=True).eval()
    missing = official.load_state_dict(ours.state_dict(), strict=False)
    assert all(".unused." in name for name in missing.missing_keys)
    first, second = ours(images()), official(images())
    assert [m.shape for m in first.maps] == [m.shape for m in second.maps]
    assert not torch.allclose(first.embedding, second.embedding, atol=1e-3)


@torch.no_grad()
def test_the_corrected_attention_is_equivariant_and_the_official_one_is_not():
    """Mirrored input and mirrored relative biases mirror what attention to fibres yields."""
    for official in (False, True):
        block = build(official=official).stages[0][1].eval()
        block.attention.bias.copy_((block.attention.bias + block.attention.bias.flip(-1)) / 2)
        maps = torch.randn(1, 64, 16, 16, generator=torch.Generator().manual_seed(2))
        seen, mirrored = (
            to_maps(block.attention(to_fibres(each, official=official)), official=official)
            for each in (maps, maps.flip(-1))
        )
        assert torch.allclose(seen.flip(-1), mirrored, atol=1e-5) != official


@torch.no_grad()
def test_global_attention_equals_its_definition():
    attention = GlobalAttention(64, reduction=2).double().eval()
    rng = torch.Generator().manual_seed(3)
    attention.norm.running_mean.copy_(torch.randn(64, dtype=torch.float64, generator=rng))
    fibres = torch.randn(2, 18, 64, dtype=torch.float64, generator=rng)
    seen = attention.norm(fibres[:, :16].unflatten(1, (4, 4)).mean(2).mT).mT  # 4 in a row, 2 left over
    found = []
    for head in range(2):
        part = slice(32 * head, 32 * head + 32)
        q, k, v = (
            attention.query(fibres)[..., part],
            attention.key(seen)[..., part],
            attention.value(seen)[..., part],
        )
        found.append((q @ k.mT / 32**0.5).softmax(-1) @ v)
    assert torch.allclose(attention(fibres), attention.proj(torch.cat(found, -1)), atol=1e-10)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
    branch = torch.ones(4000, 2, 3)
    dropped = drop_path(branch, 0.25, torch.Generator().manual_seed(0))
    per_image = dropped.flatten(1)
    assert per_image.unique().tolist() == pytest.approx([0, 4 / 3])
    assert bool((per_image.amax(1) == per_image.amin(1)).all())
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)
    assert drop_path(branch, 0.25, None) is branch
    assert drop_path(branch, 0.0, torch.Generator()) is branch


@torch.no_grad()
def test_nothing_is_random_without_a_generator():
    network, state = build().train(), torch.get_rng_state()
    first, again = network(images()).embedding, network(images()).embedding
    assert torch.equal(first, again)
    dropped = [network(images(), torch.Generator().manual_seed(seed)).embedding for seed in (0, 0, 1)]
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_one_image_can_be_trained_at_the_smallest_edge():
    network = build().train()
    network(images(1), torch.Generator().manual_seed(0)).embedding.sum().backward()
    assert bool(network.stem[0].weight.grad.isfinite().all())


def test_weights_follow_from_the_seed():
    first, again, other = (build(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    spread = torch.cat([v.flatten() for k, v in first.items() if k.endswith("kan.0.weights.weight")]).std()
    assert float(spread) == pytest.approx(0.02, rel=0.02)


def test_channels_are_rounded_to_heads():
    assert [rounded(c * 0.75) for c in (128, 192, 256, 384, 512, 768, 1024)] == [
        96,
        160,
        192,
        288,
        384,
        576,
        768,
    ]
