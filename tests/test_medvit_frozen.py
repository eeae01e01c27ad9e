"""medvit on a checkpoint: the published names, frozen features, and what is no such file."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import umiad
from umiad import api, detectors, medvit_checkpoint
from umiad.detectors.check import clean_images, examine, fit_quickly
from umiad.detectors.medvit_frozen import FrozenMedVit
from umiad.errors import ConfigError, InputError, ModelFileError
from umiad.nn.medvit import MedVitNetwork

SIZE = 64
CLASSES = 7
BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def renamed(network):
    """A network's tensors as the published code names them, by attributes and not by the table under test."""
    found = {}

    def take(name, module):
        found.update({f"{name}.{key}": value.clone() for key, value in module.state_dict().items()})

    def embedding(name, module):
        layers = [layer for layer in module if not isinstance(layer, torch.nn.AvgPool2d)]
        for part, layer in zip(("conv", "norm"), layers, strict=False):
            take(f"{name}.{part}", layer)

    def feed_forward(name, module):
        for number, layer in enumerate(module.layers):
            if number == 6:
                take(f"{name}.conv.6.fc.0", layer.gate[0])
                take(f"{name}.conv.6.fc.2", layer.gate[2])
            else:
                take(f"{name}.conv.{number}", layer)

    for number in range(4):
        take(f"stem.{number}.conv", network.stem[3 * number])
        take(f"stem.{number}.norm", network.stem[3 * number + 1])
    for number, block in enumerate(block for stage in network.stages for block in stage):
        start = f"features.{number}"
        embedding(f"{start}.patch_embed", block.embed)
        take(f"{start}.norm1", block.norm1)
        take(f"{start}.norm2", block.norm2)
        if hasattr(block, "kan"):
            for ours, theirs in {
                "query": "q",
                "key": "k",
                "value": "v",
                "proj": "proj",
                "norm": "norm",
            }.items():
                take(f"{start}.e_mhsa.{theirs}", getattr(block.attention, ours))
            embedding(f"{start}.projection", block.project)
            take(f"{start}.mhca.group_conv3x3", block.convolution[0])
            take(f"{start}.mhca.norm", block.convolution[1])
            take(f"{start}.mhca.projection", block.convolution[3])
            feed_forward(f"{start}.conv", block.unused)
            for layer, each in enumerate(block.kan):
                take(f"{start}.kan.layers.{layer}.layernorm", each.norm)
                take(f"{start}.kan.layers.{layer}.spline_linear", each.weights)
                found[f"{start}.kan.layers.{layer}.rbf.grid"] = torch.linspace(-2, 2, 8)
        else:
            take(f"{start}.attn.qkv", block.attention.qkv)
            take(f"{start}.attn.proj", block.attention.proj)
            found[f"{start}.attn.rpb"] = block.attention.bias.detach().clone()
            feed_forward(f"{start}.conv", block.feed_forward)
    take("norm", network.norm)
    take("proj_head.0", network.head)
    return found


@pytest.fixture(scope="module")
def network():
    """Tiny, with statistics that no fresh network has."""
    made = MedVitNetwork("tiny", classes=CLASSES, seed=5, official=True)
    rng = torch.Generator().manual_seed(6)
    for name, tensor in made.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1, generator=rng)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=rng)
    return made.eval()


@pytest.fixture(scope="module")
def tensors(network):
    return renamed(network)


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("medvit") / "MedViT_tiny.safetensors"
    save_file(tensors, path)
    return path


def build(file, **settings):
    return api.build("medvit", size=SIZE, settings={"checkpoint": file, "network": "tiny", **settings})


def test_some_names_and_shapes_are_those_of_the_published_code(tensors):
    shapes = {
        "stem.0.conv.weight": (64, 3, 3, 3),
        "stem.1.norm.running_var": (32,),
        "features.0.attn.rpb": (2, 13, 13),
        "features.0.attn.qkv.weight": (192, 64),
        "features.0.conv.conv.3.weight": (192, 1, 7, 7),
        "features.0.conv.conv.6.fc.0.weight": (3, 192),
        "features.2.patch_embed.conv.weight": (128, 64, 1, 1),
        "features.3.patch_embed.conv.weight": (96, 128, 1, 1),
        "features.3.e_mhsa.norm.weight": (96,),
        "features.3.projection.conv.weight": (32, 96, 1, 1),
        "features.3.mhca.group_conv3x3.weight": (32, 32, 3, 3),
        "features.3.kan.layers.0.spline_linear.weight": (256, 128 * 8),
        "features.3.kan.layers.1.layernorm.weight": (256,),
        "features.10.e_mhsa.q.weight": (288, 288),
        "norm.weight": (384,),
        "proj_head.0.weight": (CLASSES, 384),
    }
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes


def test_the_features_are_those_of_the_network_in_the_file(network, file):
    detector, images = build(file), clean_images(2, size=SIZE)
    with torch.no_grad():
        expected, found = network(images), detector.network.eval()(images)
    for ours, theirs in zip(found.maps, expected.maps, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found.embedding, expected.embedding)
    assert not any("head" in name or "unused" in name for name in detector.state())
    assert detector.config.weights == medvit_checkpoint.read_checkpoint(file, network="tiny").label


def test_an_own_file_label_and_the_design_are_in_the_configuration(file):
    config = build(file).config
    assert re.fullmatch(r"file:[0-9a-f]{8}", config.weights)
    assert (config.design, config.official_layout, config.image_score, config.edge) == (
        "frozen",
        True,
        "map",
        224,
    )
    assert (
        api.build(
            "medvit", preset="quick", size=256, settings={"checkpoint": file, "network": "tiny"}
        ).config.edge
        == 128
    )


def test_a_saved_model_needs_no_checkpoint_beside_it(file, tmp_path):
    images = [np.random.default_rng(k).integers(0, 255, (SIZE, SIZE), dtype=np.uint8) for k in range(8)]
    model = umiad.fit(build(file, channels=8), images)
    model.save(tmp_path / "model")
    again = umiad.load(tmp_path / "model")
    assert type(again.detector) is FrozenMedVit
    [first], [second] = model.score(images[0]), again.score(images[0])
    assert first.image_score == second.image_score


def make(seed):
    """With random weights the published layout, whose "fibres" are stretches of rows, outlines nothing at all."""
    values = {"design": "frozen", "network": "tiny", "channels": 40, "official_layout": False}
    values |= {"edge": SIZE, "size": SIZE, "seed": seed}
    return detectors.make("medvit", values, None)


@pytest.mark.slow  # half a minute; the other design, which shares all but training, is in the battery of test_detectors
def test_it_passes_the_whole_battery():
    found = examine(make, size=SIZE)
    assert set(found.exempt) == {"losses", "gradients"}
    assert {"blob", "localises", "model_file", "frozen"} <= set(found.ran)


def test_fitted_normal_images_are_about_one_deviation_away_per_dimension():
    detector, images = make(0), clean_images(16, size=SIZE)
    assert detector.monitor(detector.prepare(images)) == {}
    fit_quickly(detector, images, steps=1)
    assert 0.3 < detector.monitor(detector.prepare(images))["distance_per_dim"] < 1.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("features.3.e_mhsa.q.weight"), "'features.3.e_mhsa.q.weight' is missing"),
        (lambda t: t.update({"features.99.x": torch.zeros(1)}), "'features.99.x' is unknown"),
        (
            lambda t: t.update({"norm.bias": torch.zeros(5)}),
            r"'norm.bias' is torch.float32 \[5\], expected .* \[384\]",
        ),
        (lambda t: t.update({"norm.bias": torch.zeros(384).half()}), "'norm.bias' is torch.float16"),
        (
            lambda t: t.update({"features.3.kan.layers.0.rbf.grid": torch.linspace(-1, 1, 8)}),
            "expected 8 centres from -2 to 2",
        ),
        (lambda t: t.update({"norm.bias": torch.full((384,), torch.nan)}), "norm.bias"),
    ],
)
def test_what_is_no_such_network_is_refused(tensors, tmp_path, change, words):
    changed = dict(tensors)
    change(changed)
    path = tmp_path / "changed.safetensors"
    save_file(changed, path)
    with pytest.raises(ModelFileError, match=words):
        build(path)


def test_another_published_size_is_recognised(file):
    with pytest.raises(ModelFileError, match="looks like network 'tiny'"):
        build(file, network="small")


def test_a_pickle_is_never_opened(tensors, tmp_path):
    path = tmp_path / "MedViT_tiny.pth"
    torch.save(tensors, path)
    with pytest.raises(ModelFileError, match=r"a zip archive .* weights_only=True"):
        build(path)


def test_a_missing_file_tells_how_to_get_one(tmp_path):
    with pytest.raises(InputError, match="no such file") as error:
        build(tmp_path / "none.safetensors")
    assert "save_file" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"network": "huge"}, "network"),
        ({"network": ["tiny"]}, "network"),
        ({"drop_path": 0.1}, "drop_path"),
        ({"edge": 100}, "multiple of 32"),
    ],
)
def test_settings_are_those_of_the_design(file, settings, words):
    with pytest.raises(ConfigError, match=words):
        build(file, **settings)
    with pytest.raises(ConfigError, match=r"checkpoint: expected a path, got \['x'\]"):
        build(["x"])
    with pytest.raises(ConfigError, match="unknown preset"):
        api.build("medvit", preset="fast", size=SIZE, settings={"checkpoint": file})
