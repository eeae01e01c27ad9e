"""Every hostile model of `attacks/models.py` is refused with one kind of error; nothing in it is ever executed."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import umiad
from umiad import modelfile, tensorfile, weights
from umiad.errors import ModelFileError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from attacks import models  # noqa: E402 - the repository's root is put on the path first
from attacks.pickles import PICKLES, Canary  # noqa: E402

GOOD = Path(__file__).parent / "golden" / "model-1" / "padim"
MIB = 1 << 20
GROWTH = 32 * MIB


def ids(attacks):
    return [f"{attack.id} {attack.name}" for attack in attacks]


def of(*wanted):
    found = [attack for attack in models.ATTACKS if attack.id in wanted]
    marked = [pytest.param(each, marks=[pytest.mark.slow] if each.slow else []) for each in found]
    return pytest.mark.parametrize("attack", marked, ids=ids(found))


def refuse(attack, folder):
    path = attack.make(folder, GOOD)
    with pytest.raises(attack.error) as caught:
        umiad.load(path)
    assert attack.words in str(caught.value)
    assert len(str(caught.value)) < 1000
    return path


# ---- what every one of them must meet


def test_the_good_model_loads():
    assert umiad.load(GOOD).info["detector"] == "padim"


def test_attacks_have_distinct_names_and_cover_the_matrix():
    assert len(set(ids(models.ATTACKS))) == len(models.ATTACKS) >= 150
    assert {attack.id for attack in models.ATTACKS} == {"M1", "M2", "M3", "M4", "M5", "M7"}
    assert len(PICKLES) >= 20


@of("M1")
def test_M1_what_could_execute_is_refused_and_the_canary_is_silent(attack, tmp_path):
    refuse(attack, tmp_path)
    assert not (tmp_path / models.CANARY).exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_M1_no_door_for_tensors_and_weights_opens_to_them(kind, tmp_path):
    suffix, build = PICKLES[kind]
    for name in (f"file{suffix}", "file.safetensors", "imagenet.pth"):
        path = tmp_path / name
        path.write_bytes(build(tmp_path / models.CANARY))
        with pytest.raises(ModelFileError):
            tensorfile.read_tensors(path)
        with pytest.raises(ModelFileError):
            weights.resolve(str(path), cache=tmp_path / "cache")
        with pytest.raises(ModelFileError):
            weights.resolve(str(path), backbone="resnet50", cache=tmp_path / "cache")
        with pytest.raises(ModelFileError):
            weights.add(path, cache=tmp_path / "cache")
    assert not (tmp_path / models.CANARY).exists()
    assert not (tmp_path / "cache").exists()


def test_M1_the_canary_fires_where_something_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / models.CANARY))).close()
    assert (tmp_path / models.CANARY).exists()


def test_M1_a_pickle_as_an_extra_file_is_bytes_and_nothing_else(tmp_path):
    model = models.replace_file(
        Path(models.shutil.copytree(GOOD, tmp_path / "model")),
        "notes.pkl",
        PICKLES["protocol 4"][1](tmp_path / models.CANARY),
    )
    assert umiad.load(model).extras["notes.pkl"].startswith(b"\x80\x04")
    assert not (tmp_path / models.CANARY).exists()


@of("M2", "M3", "M4", "M5")
def test_M2_M3_M4_M5_a_hostile_model_is_refused(attack, tmp_path):
    refuse(attack, tmp_path)


@of("M7")
def test_M7_a_manifest_altered_too_is_seen_where_its_hash_is_pinned(attack, tmp_path):
    pinned = hashlib.sha256((GOOD / "manifest.json").read_bytes()).hexdigest()
    assert modelfile.load(GOOD, manifest_sha256=pinned).config["detector"] == "padim"
    path = attack.make(tmp_path, GOOD)
    assert attack.pinned
    assert modelfile.load(path).config["detector"] == "padim"  # integrity, not authenticity
    with pytest.raises(ModelFileError, match=attack.words):
        modelfile.load(path, manifest_sha256=pinned)


# ---- M2: cuts, flips, memory


def test_M2_weights_cut_at_each_of_the_first_512_bytes(tmp_path):
    model = Path(models.shutil.copytree(GOOD, tmp_path / "model"))
    content, seen = (GOOD / "weights.safetensors").read_bytes(), 0
    for cut in models.cuts(content):
        with pytest.raises(ModelFileError, match="weights.safetensors"):
            modelfile.load(models.replace_file(model, "weights.safetensors", cut))
        seen += 1
    assert seen == 512


def test_M2_a_flipped_bit_in_every_percent_of_every_file(tmp_path):
    model = Path(models.shutil.copytree(GOOD, tmp_path / "model"))
    pinned = hashlib.sha256((GOOD / "manifest.json").read_bytes()).hexdigest()
    for path in model.iterdir():
        content, pin = path.read_bytes(), pinned if path.name == "manifest.json" else None
        for altered in models.bit_flips(content):
            path.write_bytes(altered)
            with pytest.raises(ModelFileError):
                modelfile.load(model, manifest_sha256=pin)
        path.write_bytes(content)
    assert modelfile.load(model, manifest_sha256=pinned).card


def test_M2_flipped_bits_that_the_manifest_vouches_for_give_a_model_or_one_error(tmp_path):
    model = Path(models.shutil.copytree(GOOD, tmp_path / "model"))
    content, refused = (GOOD / "weights.safetensors").read_bytes(), 0
    for altered in models.bit_flips(content, parts=40):
        models.replace_file(model, "weights.safetensors", altered)
        try:
            umiad.load(model)
        except ModelFileError:
            refused += 1
    assert 0 < refused < 40  # in the header all are seen, in the tensors those that make a value infinite


MEASURE = """
import contextlib, json, resource, sys
from pathlib import Path
import umiad
from umiad.errors import ModelFileError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

good, *paths = sys.argv[1:]
umiad.load(good)
grown = {}
for path in paths:
    before = peak()
    with contextlib.suppress(ModelFileError):
        umiad.load(path)
    grown[Path(path).parent.name] = peak() - before
print(json.dumps(grown))
"""


def run_python(code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts otherwise elsewhere")
def test_M2_refusing_takes_little_memory(tmp_path):
    paths = []
    for number, attack in enumerate(each for each in models.ATTACKS if each.id == "M2"):
        (tmp_path / str(number)).mkdir()
        paths.append(attack.make(tmp_path / str(number), GOOD))
    grown = run_python(MEASURE, GOOD, *paths)
    assert len(grown) == len(paths)
    assert sum(grown.values()) <= GROWTH  # peaks only rise: the sum is the growth over all of them


# ---- M3: what is built, and how much memory it may take


def saved(**tensors):
    return modelfile.SavedModel(Path("m"), {}, tensors, {}, {"format": 1}, "")


class Built:
    def __init__(self, **tensors):
        self.tensors, self.loaded = tensors, None

    def state(self):
        return self.tensors

    def load_state(self, state):
        self.loaded = state


def test_M3_what_fits_is_built_and_filled():
    model = saved(a=torch.ones(3), b=torch.tensor(2))
    built = modelfile.rebuild(model, lambda: Built(a=torch.zeros(3), b=torch.tensor(0)))
    assert built.loaded is model.tensors


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(10**13),
        lambda: torch.empty(10**13, device="cpu"),
        lambda: torch.arange(10**13),
        lambda: torch.ones(10**7, 1).expand(-1, 10**6).contiguous(),
        lambda: torch.cat([torch.ones(1).expand(10**13)] * 2),
        lambda: torch.ones(10**6, 1) * torch.ones(10**6),
        lambda: torch.ones(10**6, 1) @ torch.ones(1, 10**6),
        lambda: torch.nn.Linear(10**7, 10**7),
        lambda: [torch.zeros(10**6) for _ in range(10**9)],
        lambda: torch.randn(10**13, generator=torch.Generator()),
    ],
)
def test_M3_memory_is_refused_before_it_is_taken(make):
    with pytest.raises(ModelFileError, match=r"m.config.json: what it describes takes [0-9]+ bytes or more"):
        modelfile.rebuild(saved(a=torch.ones(3)), make)


def test_M3_no_more_than_4_gib_whatever_the_file_holds(monkeypatch):
    monkeypatch.setattr(modelfile, "MAX_BUILD_BYTES", 1000)
    with pytest.raises(ModelFileError, match="expected 1000 at most"):
        modelfile.rebuild(saved(a=torch.ones(3000)), lambda: torch.zeros(251))


@pytest.mark.parametrize(
    "error", [OverflowError, IndexError, MemoryError, RuntimeError, TypeError, ValueError]
)
def test_M3_whatever_goes_wrong_while_building_is_one_kind_of_error(error):
    def make():
        raise error("x" * 1000)

    with pytest.raises(
        ModelFileError, match=f"nothing can be built from it: {error.__name__}: x+$"
    ) as caught:
        modelfile.rebuild(saved(), make)
    assert len(str(caught.value)) < 300


def test_M3_building_draws_the_same_numbers_as_without_the_limit():
    torch.manual_seed(3)
    expected = torch.nn.Linear(3, 4).weight
    torch.manual_seed(3)
    built = modelfile.rebuild(
        saved(weight=torch.ones(4, 3)), lambda: Built(weight=torch.nn.Linear(3, 4).weight.detach())
    )
    assert torch.equal(built.tensors["weight"], expected)


def test_M2_another_dtype_is_refused_by_name():
    with pytest.raises(ModelFileError, match=r"'a' has dtype torch.float64, expected torch.float32"):
        modelfile.rebuild(saved(a=torch.ones(3).double()), lambda: Built(a=torch.zeros(3)))


WATCH = """
import json, sys
events = set()
from pathlib import Path
import umiad

folder, *names = sys.argv[1:]
images = sorted((Path(folder) / "images").glob("*.png"))
sys.addaudithook(lambda event, _: events.add(event))
scored = sum(len(umiad.load(Path(folder) / name).score(images)) for name in names)
seen = sorted(event for event in events if "pickle" in event)
print(json.dumps({"scored": scored, "opened": "open" in events, "seen": seen}))
"""


def test_M1_nothing_is_unpickled_while_models_are_loaded_and_scored():
    found = run_python(WATCH, GOOD.parent, "padim", "fastflow", "egmf-affine")
    assert found == {"scored": 9, "opened": True, "seen": []}
