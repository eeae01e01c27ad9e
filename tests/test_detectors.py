"""The battery on every registered detector, and the page that describes detectors and battery."""

import inspect
from pathlib import Path

import pytest

from umiad import detectors
from umiad.detectors.check import CHECKS, Candidate, Exempt
from umiad.errors import ConfigError

SIZE = 64
SETTINGS = {("posgauss", "quick"): {"scales": [2]}, ("egmf", "paper"): {"blocks": 2}}
"""Settings beside a preset: of a random network, 4 x 4 cells of scale 3 cannot tell posgauss where a blob is."""
TOO_SMALL = {"rd4ad-quick-blob", "rd4ad-quick-localises"}
"""Checks that fail on the features of the tiny network, or pass after a minute only."""
SLOW = {"medvit"}
"""Detectors whose battery takes a quarter of all the others' together: in `make slow`; they have tests of their own."""
DESIGNS = [*((name, "quick") for name in detectors.names()), ("egmf", "default"), ("egmf", "paper")]
"""Every detector, and what another preset of it builds: egmf's flows with their second view, and its network."""


def candidates():
    """Every design on the tiny network where it has a backbone; on ResNet18, which takes longer, in `make slow`."""
    for name, preset in DESIGNS:
        if not detectors.detector_class(name).info.uses_backbone:
            yield pytest.param((name, preset, "resnet18"), id=f"{name}-{preset}")
            continue
        marks = [pytest.mark.slow] if name in SLOW else []
        yield pytest.param((name, preset, "resnet-tiny"), id=f"{name}-{preset}", marks=marks)
        yield pytest.param((name, preset, "resnet18"), id=f"{name}-{preset}-resnet18", marks=pytest.mark.slow)


def make(name, preset, backbone, seed):
    settings = {"backbone": backbone, **SETTINGS.get((name, preset), {})}
    config = detectors.preset_config(name, preset, size=SIZE, seed=seed, **settings)
    return detectors.make(name, config.canonical(), None)


@pytest.fixture(scope="module")
def candidate(request):
    """One candidate per detector and preset, shared by its checks and forgotten after them."""
    return Candidate(lambda seed: make(*request.param, seed), SIZE)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("candidate", list(candidates()), indirect=True)
def test_battery(candidate, check, request):
    if request.node.callspec.id in TOO_SMALL:
        pytest.skip("the tiny network tells its students too little; on ResNet18 in `make slow`")
    try:
        CHECKS[check](candidate)
    except Exempt as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", detectors.names())
@pytest.mark.parametrize("preset", ["paper", "default", "quick"])
def test_every_detector_has_the_three_presets(name, preset):
    config = detectors.preset_config(name, preset, size=SIZE)
    assert (config.preset, config.size) == (preset, SIZE)


def test_unknown_names_give_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'padim'"):
        detectors.detector_class("padin")
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        detectors.preset_config("egmf", "papr")


PAGE = (Path(__file__).parents[1] / "docs" / "detectors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", detectors.names())
def test_every_detector_is_on_the_page(name):
    cls = detectors.detector_class(name)
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| {cls.info.fidelity} |" in row
    assert ("closed form" in row) == cls.info.closed_form


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_is_on_the_page_in_its_own_words(check):
    words = " ".join(inspect.getdoc(CHECKS[check]).split())
    assert f"| `{check}` | {words} |" in PAGE


def test_the_page_shows_the_example_as_it_is():
    example = (Path(__file__).parents[1] / "examples" / "own_detector.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in PAGE
