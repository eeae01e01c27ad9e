"""Toy detectors that pass the battery, and toys with one fault each that every check catches."""

import inspect
import os
import random
import socket
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from umiad.config import Config, DetectorConfig
from umiad.detectors.check import CHECKS, CheckError, check_detector, examine
from umiad.detectors.contract import DetectorInfo
from umiad.detectors.egmf_affine import AffineConfig, AffineEGMF
from umiad.detectors.egmf_network import NetworkConfig, NetworkEGMF
from umiad.detectors.guards import check_fitted, check_images, check_state, evaluating
from umiad.errors import ConfigError, InputError
from umiad.scoring import maximum, smooth
from umiad.types import Scores

SIZE = 64


class ToyConfig(DetectorConfig):
    sigma: float = 1.0


class Toy:
    """A closed form in milliseconds: squared distance to the mean of frozen random features."""

    info: ClassVar[DetectorInfo] = DetectorInfo("toy", "distance to the mean", "none", closed_form=True)
    Config = ToyConfig
    presets: ClassVar[dict] = {"paper": {}, "default": {}, "quick": {"sigma": 2.0}}

    def __init__(self, config, backbone):
        self.config, self.fitted, self.rows = config, False, []
        weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(config.seed))
        convolution = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}
        encoder, statistics = nn.utils.skip_init(nn.Conv2d, 3, 4, **convolution), nn.Module()
        encoder.weight = nn.Parameter(weight, requires_grad=False)
        statistics.register_buffer("mean", torch.zeros(4, config.size // 2, config.size // 2))
        self.module = nn.ModuleDict({"encoder": encoder, "statistics": statistics})

    def prepare(self, images, *, original_size=None):
        check_images(images, size=self.config.size)
        with torch.no_grad():
            return {"features": self.module["encoder"](images)}

    def steps(self, prepared, rng):
        return iter(())

    def param_groups(self):
        return []

    def monitor(self, prepared):
        return {"distance": float(self.distance(prepared).mean())}

    def collect(self, prepared):
        self.rows.append(prepared["features"].double())

    def finish(self, rng):
        self.module["statistics"].mean.copy_(torch.cat(self.rows).mean(0))
        self.rows, self.fitted = [], True

    def distance(self, prepared):
        with evaluating(self.module):
            return (prepared["features"] - self.module["statistics"].mean).square().mean(1)

    def score(self, images, *, original_size=None):
        check_fitted(fitted=self.fitted, name="toy")
        return self.score_prepared(self.prepare(images, original_size=original_size))

    def score_prepared(self, prepared):
        check_fitted(fitted=self.fitted, name="toy")
        maps = nn.functional.interpolate(self.distance(prepared)[:, None], scale_factor=2)[:, 0]
        maps = smooth(maps, self.config.sigma)
        return Scores(maps, maximum(maps))

    def parts(self):
        return {"encoder": self.module["encoder"], "statistics": self.module["statistics"]}

    def state(self):
        return {key: value.detach() for key, value in self.module.state_dict().items()}

    def load_state(self, state):
        check_state(state, self.module.state_dict(), name="toy")
        self.module.load_state_dict(dict(state))
        self.fitted = True


class Trained(Toy):
    """The same with a learned centre; the mean is collected after the last step, as CFLOW's reference is."""

    info: ClassVar[DetectorInfo] = DetectorInfo("toy", "distance to a learned centre", "none")

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.module["centre"] = nn.ParameterDict({"value": torch.zeros(4, 1, 1)})

    def steps(self, prepared, rng):
        self.fitted = True
        yield {"total": (prepared["features"] - self.module["centre"]["value"]).square().mean()}

    def param_groups(self):
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]


def declared(**facts):
    """What overrides `info` of a toy."""
    return {
        "info": DetectorInfo(
            **{"name": "toy", "summary": "s", "reference": "r", "closed_form": True, **facts}
        )
    }


def changed_scores(change):
    """`score_prepared` of the toy, its scores changed."""
    return {"score_prepared": lambda self, prepared: change(Toy.score_prepared(self, prepared))}


def beside(call, effect):
    """The toy's `call` with an effect of `effect(self)` before it; keyword arguments are passed on."""

    def faulty(self, *args, **kwargs):
        effect(self)
        return getattr(Toy, call)(self, *args, **kwargs)

    faulty.__signature__ = inspect.signature(getattr(Toy, call))
    return {call: faulty}


def scores_unfitted(self, prepared):
    zeros = torch.zeros(len(prepared["features"]), SIZE, SIZE)
    return Scores(zeros, zeros[:, 0, 0])


def takes_anything(self, images, *, original_size=None):
    return {"features": torch.zeros(max(1, len(images)), 4, SIZE // 2, SIZE // 2)}


def says_nothing(self, images, *, original_size=None):
    if images.shape[1:] != (3, SIZE, SIZE) or not len(images):
        raise InputError("images", "of a wrong shape")
    return Toy.prepare(self, images)


def scores_otherwise(self, images, *, original_size=None):
    scores = Toy.score(self, images)
    return Scores(scores.anomaly_map, 2 * scores.image_score)


def looks_at_the_size(self, images, *, original_size=None):
    rows = Toy.prepare(self, images)
    return rows if original_size is None else {"features": rows["features"] + original_size.double().mean()}


def batch_normalised(scores):
    return Scores(
        scores.anomaly_map / scores.anomaly_map.max(), scores.image_score / scores.image_score.max()
    )


def first_in_batch(scores):
    return Scores(scores.anomaly_map, scores.image_score + torch.arange(len(scores.image_score)))


def keeps_the_last_batch(self, prepared):
    self.rows = [prepared["features"].double()]


def ignores_sigma(self, prepared):
    maps = nn.functional.interpolate(self.distance(prepared)[:, None], scale_factor=2)[:, 0]
    return Scores(maps, maximum(maps))


def draws(self, *_):
    torch.rand(1), np.random.rand(1), random.random()


def adds_noise(self, rng):
    Toy.finish(self, rng)
    self.module["statistics"].mean.add_(torch.rand(1))


def adds_numpys_noise(self, rng):
    Toy.finish(self, rng)
    self.module["statistics"].mean.add_(float(np.random.rand()))


def adds_other_noise(self, rng):
    Toy.finish(self, rng)
    own = torch.Generator()
    own.seed()
    self.module["statistics"].mean.add_(torch.rand(1, generator=own))


def adds_masked(self, prepared):
    self.rows.append(prepared["features"].double() * (1 - 0.5 * ("mask" in prepared)))


def takes_labels(self, prepared, labels=None):
    Toy.collect(self, prepared)


def leaks_through_a_file(self, *_):
    with open(os.devnull, encoding="utf-8"):
        pass


def opens_a_socket(self, *_):
    socket.socket(socket.AF_UNIX).close()


def unseeded(self, config, backbone):
    Toy.__init__(self, config, backbone)
    self.module["encoder"].weight.data.copy_(torch.ones(4, 3, 3, 3))


def trainable_encoder(self, config, backbone):
    Toy.__init__(self, config, backbone)
    self.module["encoder"].requires_grad_(True)


def changes_encoder(self, rng):
    Toy.finish(self, rng)
    self.module["encoder"].weight.data.mul_(0.9)


def shares_state(self, memo):
    twin = object.__new__(type(self))
    twin.__dict__.update(self.__dict__)
    return twin


def refuses_copies(self, memo):
    raise TypeError("no copies")


def loads_loosely(self, state):
    self.module.load_state_dict(dict(state), strict=False)
    self.fitted = True


def loads_less(self, state):
    Toy.load_state(self, state)
    self.module["statistics"].mean.zero_()


def infinite_state(self):
    return {**Toy.state(self), "statistics.mean": torch.full_like(self.module["statistics"].mean, torch.inf)}


class Forgetful(ToyConfig):
    """A configuration whose plain values are not the whole of it."""

    def canonical(self):
        return {**super().canonical(), "sigma": self.sigma + 1}


class NoDetectorConfig(Config):
    size: int = SIZE
    seed: int = 0
    weights: str = "random"
    preset: str = "default"


def no_total(self, prepared, rng):
    yield {"loss": self.module["centre"]["value"].square().mean()}


def loss_without_gradient(self, prepared, rng):
    yield {"total": self.module["centre"]["value"].detach().square().mean()}


def infinite_loss(self, prepared, rng):
    yield {"total": self.module["centre"]["value"].square().mean() / 0}


def changes_prepared(self, prepared, rng):
    prepared["features"].mul_(2)
    return Trained.steps(self, prepared, rng)


def surplus_parameter(self, config, backbone):
    Trained.__init__(self, config, backbone)
    self.module["surplus"] = nn.ParameterDict({"value": torch.zeros(1)})


def optimises_encoder(self):
    return [{"params": list(self.module.parameters())}]


def optimises_half(self):
    return [{"params": [self.module["centre"]["value"], nn.Parameter(torch.zeros(1))]}]


def needs_two_images(self, prepared, rng):
    squares = (prepared["features"] - prepared["features"].mean(0)).square().sum()
    yield {
        "total": self.module["centre"]["value"].square().mean() * squares / (len(prepared["features"]) - 1)
    }


def needs_to_be_finished(self, prepared):
    check_fitted(fitted=self.fitted, name="toy")
    return {}


def leaves_mode(self, *_):
    self.module.eval()


def counts_calls(self, *_):
    self.module["statistics"].mean.add_(1)


def changes_input(self, images, *, original_size=None):
    rows = Toy.prepare(self, images)
    images.mul_(2)
    return rows


def upside_down(scores):
    return Scores(-scores.anomaly_map, -scores.image_score)


def mirrored_map(scores):
    return Scores(-scores.anomaly_map, scores.image_score)


FAULTS = [
    ("contract", {"monitor": None}),
    ("contract", {"__doc__": None}),
    ("contract", {"parts": lambda self: {}}),
    ("configuration", {"presets": {"paper": {}, "quick": {}}}),
    ("configuration", {"presets": {"paper": {"sigmas": 1}, "default": {}, "quick": {}}}),
    ("configuration", {"Config": NoDetectorConfig}),
    ("kind", declared(closed_form=False)),
    ("kind", {"collect": None}),
    ("kind", {"steps": lambda self, prepared, rng: iter([{"total": torch.zeros(())}])}),
    ("kind", {"__init__": trainable_encoder}),
    ("name", declared(name="padim")),
    ("name", declared(reference="")),
    ("not_fitted", {"score_prepared": scores_unfitted}),
    ("shapes", changed_scores(lambda scores: Scores(scores.anomaly_map[:, ::2], scores.image_score))),
    ("shapes", changed_scores(lambda scores: Scores(scores.anomaly_map / 0 * 0, scores.image_score))),
    ("shapes", changed_scores(lambda scores: Scores(scores.anomaly_map, scores.image_score.double()))),
    ("shapes", changed_scores(lambda scores: Scores(scores.anomaly_map, scores.image_score[:, None]))),
    ("wrong_input", {"prepare": takes_anything}),
    ("wrong_input", {"prepare": says_nothing}),
    ("prepared", {"score": scores_otherwise}),
    (
        "prepared",
        {"prepare": lambda self, images, **_: {**Toy.prepare(self, images), "count": torch.ones(1)}},
    ),
    ("batches", changed_scores(batch_normalised)),
    ("batches", changed_scores(first_in_batch)),
    ("odd_batches", {"collect": keeps_the_last_batch}),
    ("sizes", {"prepare": looks_at_the_size}),
    ("sizes", declared(uses_size=True)),
    ("sizes", {"prepare": looks_at_the_size, "score": lambda self, images, **_: Toy.score(self, images)}),
    ("post_processing", {"score_prepared": ignores_sigma}),
    ("post_processing", {"Config": NoDetectorConfig}),
    ("leaves_alone", {"prepare": changes_input}),
    ("leaves_alone", beside("score_prepared", draws)),
    ("leaves_alone", beside("monitor", draws)),
    ("leaves_alone", beside("score_prepared", leaves_mode)),
    ("leaves_alone", beside("score_prepared", counts_calls)),
    ("no_files", beside("finish", leaks_through_a_file)),
    ("no_files", beside("score", leaks_through_a_file)),
    ("no_files", beside("prepare", opens_a_socket)),
    ("frozen", {"__init__": trainable_encoder}),
    ("frozen", {"finish": changes_encoder}),
    ("monitor", {"monitor": lambda self, prepared: {"distance": float("nan")}}),
    ("monitor", {"monitor": needs_to_be_finished}),
    ("global_random", {"finish": adds_noise}),
    ("global_random", {"finish": adds_numpys_noise}),
    ("global_random", beside("collect", lambda self: torch.manual_seed(0))),
    ("global_random", beside("__init__", lambda self: random.seed(0))),
    ("seeds", {"finish": adds_noise}),
    ("seeds", {"__init__": unseeded}),
    ("seeds", declared(uses_seed=False)),
    ("labels", {"collect": adds_masked}),
    ("labels", {"collect": takes_labels}),
    ("round_trip", {"load_state": loads_less}),
    ("round_trip", {"Config": Forgetful}),
    ("copies", {"__deepcopy__": shares_state}),
    ("copies", {"__deepcopy__": refuses_copies}),
    ("wrong_state", {"load_state": loads_loosely}),
    ("model_file", {"state": infinite_state}),
    ("model_file", {"load_state": loads_less}),
    ("blob", changed_scores(upside_down)),
    ("localises", changed_scores(mirrored_map)),
    ("localises", declared(localises=False)),
]
TRAINED_FAULTS = [
    ("kind", {"param_groups": lambda self: []}),
    ("losses", {"steps": no_total}),
    ("losses", {"steps": lambda self, prepared, rng: iter(())}),
    ("losses", {"steps": loss_without_gradient}),
    ("losses", {"steps": infinite_loss}),
    ("losses", {"steps": changes_prepared}),
    ("gradients", {"__init__": surplus_parameter}),
    ("gradients", {"param_groups": optimises_encoder}),
    ("gradients", {"param_groups": optimises_half}),
    ("odd_batches", {"steps": needs_two_images}),
]


def broken(base, fault):
    """A maker of the toy `base` with what `fault` overrides."""
    cls = type("Broken", (base,), {"__doc__": "A toy with one fault.", **fault})
    return lambda seed: cls(cls.Config(size=SIZE, seed=seed), None)


def ids(faults):
    return [f"{check}-{'-'.join(fault)}-{number}" for number, (check, fault) in enumerate(faults)]


@pytest.mark.parametrize(("check", "fault"), FAULTS, ids=ids(FAULTS))
def test_each_check_catches_faults_of_a_closed_form(check, fault):
    with pytest.raises(CheckError, match=f"^{check}: "):
        examine(broken(Toy, fault), size=SIZE, checks=[check])


@pytest.mark.parametrize(("check", "fault"), TRAINED_FAULTS, ids=ids(TRAINED_FAULTS))
def test_each_check_catches_faults_of_a_trained_detector(check, fault):
    with pytest.raises(CheckError, match=f"^{check}: "):
        examine(broken(Trained, fault), size=SIZE, checks=[check])


def test_every_check_has_a_fault_that_it_catches():
    assert {check for check, _ in FAULTS + TRAINED_FAULTS} == set(CHECKS)


def test_a_sound_detector_passes_and_exemptions_are_named():
    closed = examine(broken(Toy, {}), size=SIZE)
    assert dict(closed.exempt) == dict.fromkeys(("losses", "gradients"), "info.closed_form is True")
    assert [*closed.ran] == [each for each in CHECKS if each not in closed.exempt]
    trained = examine(broken(Trained, {}), size=SIZE)
    assert (list(trained.ran), dict(trained.exempt)) == (list(CHECKS), {})
    assert check_detector(broken(Trained, {}), size=SIZE) == list(CHECKS)


def test_what_a_detector_declares_is_left_out_or_turned_round():
    blind = declared(uses_pixels=False)
    assert examine(broken(Toy, blind), size=SIZE, checks=["blob"]).exempt == {
        "blob": "info.uses_pixels is False"
    }
    bare = {"parts": lambda self: {"statistics": self.module}}
    assert examine(broken(Toy, bare), size=SIZE, checks=["frozen"]).exempt == {
        "frozen": 'parts() has no "encoder"'
    }
    flat = changed_scores(lambda scores: Scores(torch.ones_like(scores.anomaly_map), scores.image_score))
    examine(broken(Toy, {**flat, **declared(localises=False)}), size=SIZE, checks=["localises"])
    sized = {"prepare": looks_at_the_size, **declared(uses_size=True)}
    examine(broken(Toy, sized), size=SIZE, checks=["sizes"])
    unstable = {"finish": adds_other_noise, **declared(deterministic=False)}
    examine(broken(Toy, unstable), size=SIZE, checks=["global_random", "seeds", "labels"])


def test_the_battery_names_the_check_that_failed_and_an_unknown_check():
    half = changed_scores(lambda scores: Scores(scores.anomaly_map[:, ::2], scores.image_score))
    with pytest.raises(CheckError, match="^shapes: map of shape"):
        check_detector(broken(Toy, half), size=SIZE)
    with pytest.raises(ConfigError, match="unknown check 'shape'.*did you mean 'shapes'"):
        examine(broken(Toy, {}), size=SIZE, checks=["shape"])


def test_the_battery_changes_no_global_random_state():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    check_detector(broken(Trained, {}), size=SIZE)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


@pytest.mark.parametrize("name", ["egmf", "padim"])
def test_a_registered_name_cannot_be_taken_by_another_class(name):
    with pytest.raises(CheckError, match="belongs to a registered detector"):
        examine(broken(Toy, declared(name=name)), size=SIZE, checks=["name"])


@pytest.mark.parametrize(("design", "config"), [(AffineEGMF, AffineConfig), (NetworkEGMF, NetworkConfig)])
def test_a_name_of_several_designs_belongs_to_these_classes_only(design, config):
    """A configuration that the registered class takes does not make a toy, or a subclass, one of its designs."""
    settings = {} if design is AffineEGMF else {"blocks": 1}
    examine(lambda seed: design(config(size=SIZE, seed=seed, **settings), None), size=SIZE, checks=["name"])
    heir = type("Heir", (design,), {"__doc__": "A subclass."})
    toy = type("Borrower", (Toy,), {"Config": config, **declared(name="egmf")})
    for other in (heir, toy):
        with pytest.raises(CheckError, match="'egmf' belongs to a registered detector"):
            examine(lambda seed, cls=other: cls(config(size=SIZE, **settings), None), checks=["name"])
    renamed = {"info": DetectorInfo("egmf2", "s", "r", closed_form=design is AffineEGMF)}
    mine = type("Mine", (design,), renamed)
    examine(lambda seed: mine(config(size=SIZE, **settings), None), checks=["name"])
