"""Hostile models and tensor files, made from a good model: all of them must be refused with one kind of error.

Everything here is harmless test material. What stands in for the attacker's code is a canary: an object that, if
ever unpickled, creates an empty marker file (`CANARY`) in a folder of the test, and does nothing else.

`good` is always a folder with a model written by umiad (padim at 64 pixels); it is copied, never changed. Ids M1 to M7:
foreign formats that execute code; malformed tensors; configurations of something else; formats; names and links;
ONNX (see tests/test_onnxfile.py); manifests altered too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attacks.pickles import CANARY, PICKLES
from attacks.tensors import CHANGES, Change, last_value, split_file

from umiad import manifest as manifests
from umiad.errors import ModelFileError

__all__ = ["ATTACKS", "CANARY", "Attack", "bit_flips", "cuts", "replace_file"]

HUGE = 10**9
EDGE = 10**6
"""An image edge (a multiple of 32) whose anomaly map alone would take 4 TB."""
CONFIG, WEIGHTS, MANIFEST = manifests.CONFIG, manifests.WEIGHTS, manifests.MANIFEST


@dataclass(frozen=True)
class Attack:
    """One hostile model.

    `make(folder, good)` writes it below the empty `folder` and returns its path; loading that must raise `error`
    with `words` in its message. `pinned`: refused only where the good manifest's hash is pinned. `slow`: some seconds.
    """

    id: str
    name: str
    make: Callable[[Path, Path], Path]
    words: str = ""
    error: type[Exception] = ModelFileError
    pinned: bool = False
    slow: bool = False


def replace_file(model: Path, name: str, content: bytes) -> Path:
    """Replace one file of a model and its entry in the manifest, as one who alters both; returns the model."""
    (model / name).write_bytes(content)
    facts = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    facts["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (model / MANIFEST).write_text(json.dumps(facts), encoding="utf-8")
    return model


def cuts(content: bytes, *, until: int = 512) -> Iterator[bytes]:
    """The beginnings of a file with 0 to `until` - 1 bytes."""
    return (content[:length] for length in range(min(until, len(content))))


def bit_flips(content: bytes, *, parts: int = 100) -> Iterator[bytes]:
    """The file with one flipped bit, once in each of `parts` equal parts."""
    for part in range(parts):
        altered = bytearray(content)
        position = part * len(content) // parts
        altered[position] ^= 1 << (part % 8)
        yield bytes(altered)


def _copy(folder: Path, good: Path) -> Path:
    return Path(shutil.copytree(good, folder / "model"))


# ---- M1: what would execute


def _as_file(folder: Path, good: Path, *, kind: str) -> Path:
    """A foreign file where a model folder is expected, under the name that it has elsewhere."""
    suffix, build = PICKLES[kind]
    path = folder / f"model{suffix}"
    path.write_bytes(build(folder / CANARY))
    return path


def _as_weights(folder: Path, good: Path, *, kind: str, name: str = WEIGHTS) -> Path:
    """The same bytes inside a model, with a manifest that fits."""
    return replace_file(_copy(folder, good), name, PICKLES[kind][1](folder / CANARY))


def _unlisted_manifest(folder: Path, good: Path) -> Path:
    """A pickle in the manifest's place."""
    model = _copy(folder, good)
    (model / MANIFEST).write_bytes(PICKLES["protocol 4"][1](folder / CANARY))
    return model


def _m1() -> Iterator[Attack]:
    for kind in PICKLES:
        yield Attack("M1", f"{kind} as a model", partial(_as_file, kind=kind), "is a file")
        yield Attack("M1", f"{kind} as weights", partial(_as_weights, kind=kind), WEIGHTS)
    for name in (CONFIG, manifests.SPLIT, manifests.CARD):
        yield Attack("M1", f"pickle as {name}", partial(_as_weights, kind="protocol 4", name=name), name)
    yield Attack("M1", "pickle as manifest", _unlisted_manifest, MANIFEST)
    tricks = {
        "class path": {"detector": "umiad.detectors.padim:Padim"},
        "module": {"detector": "os:system"},
        "expression": {"detector": "$__import__('os').system('true')"},
        "target": {"_target_": "os.system", "_args_": ["true"]},
        "pickled object in JSON": {"py/object": "os.system"},
    }
    for name, change in tricks.items():
        yield Attack("M1", f"config: {name}", partial(_config, change=change), "unknown")


# ---- M2: tensors


def _tensors(folder: Path, good: Path, *, change: Change) -> Path:
    """A model whose weights were changed, with a manifest that fits."""
    content = change(*split_file((good / WEIGHTS).read_bytes()))
    return replace_file(_copy(folder, good), WEIGHTS, content)


# ---- M3: configurations


def _config(
    folder: Path, good: Path, *, change: dict[str, Any], detector: dict[str, Any] | None = None
) -> Path:
    """A model whose configuration was changed, with a manifest that fits; `detector` goes into the detector's."""
    config = json.loads((good / CONFIG).read_text(encoding="utf-8")) | change
    config["detector_config"] = config["detector_config"] | (detector or {})
    return replace_file(_copy(folder, good), CONFIG, json.dumps(config).encode())


def _other(name: str, **fields: Any) -> Callable[[Path, Path], Path]:
    """Another detector's configuration over the same tensors."""
    own = {"size": 64, "backbone": "resnet-tiny", **fields}
    return partial(_config_of, change={"detector": name, "detector_config": own})


def _config_of(folder: Path, good: Path, *, change: dict[str, Any]) -> Path:
    config = json.loads((good / CONFIG).read_text(encoding="utf-8")) | change
    return replace_file(_copy(folder, good), CONFIG, json.dumps(config).encode())


def _m3() -> Iterator[Attack]:
    wrong = {
        "an unknown key": (partial(_config, change={"colour": "grey"}), "unknown key 'colour'"),
        "an unknown key of the detector": (partial(_config, change={}, detector={"chanels": 5}), "'chanels'"),
        "text for a number": (partial(_config, change={}, detector={"channels": "5"}), "channels: "),
        "a fraction for a count": (partial(_config, change={}, detector={"channels": 5.5}), "channels: "),
        "an unknown detector": (partial(_config, change={"detector": "padin"}), "did you mean 'padim'"),
        "no preprocessing": (partial(_config, change={"preprocessing": None}), "preprocessing"),
        "a size no network takes": (partial(_config, change={}, detector={"size": 65}), "size 65"),
        "another backbone": (partial(_config, change={}, detector={"backbone": "resnet18"}), "shape"),
        "a scale that is not there": (partial(_config, change={}, detector={"scales": [9]}), CONFIG),
        "another detector": (_other("posgauss"), "'gaussians.epsilon' is missing"),
    }
    for name, (make, words) in wrong.items():
        yield Attack("M3", name, make, words)
    huge = {
        **{f"{name} of {EDGE} px": _other(name, size=EDGE) for name in ("padim", "egmf", "msflow")},
        f"egmf default of {EDGE} px": _other("egmf", size=EDGE, design="affine"),
        "egmf with 1e9 condition channels": _other("egmf", condition_channels=HUGE),
        "cflow with 1e9 condition channels": _other("cflow", condition_channels=HUGE),
        "cflow with 1e9 times the width": _other("cflow", hidden_ratio=float(HUGE)),
        "fastflow with 1e300 times the width": _other("fastflow", hidden_ratio=1e300),
        "uflow with 1e9 times the width": _other("uflow", hidden_ratio=float(HUGE)),
        "msflow with 1e9 condition channels": _other("msflow", condition_channels=HUGE),
        "posgauss with 1e12 bytes": _other("posgauss", size=2048, megabytes=1e6),
        "egmf with 10000 blocks": _other("egmf", blocks=10_000),
        "cflow with 100000 blocks": _other("cflow", blocks=100_000, permutation="hard"),
        "fastflow with 100000 blocks": _other("fastflow", blocks=100_000),
        "adfa with 1e9 cells a side": _other("adfa", grid=HUGE),
        "fanogan with 1e9 channels": _other("fanogan", width=HUGE),
        "anovaegan with 1e9 latents": _other("anovaegan", latent=HUGE),
        "medmae with 1e9 blocks": _other("medmae", depth=HUGE),
        "medmae with 1e9 channels": _other("medmae", width=4 * HUGE),
        "medvit at 1e9 pixels": _other("medvit", edge=32 * HUGE),
        "mlfeu with 1e9 channels": _other("mlfeu", width=4 * HUGE),
        f"rd4ad of {EDGE} px": _other("rd4ad", size=EDGE, backbone="resnet50"),
        f"ikd of {EDGE} px": _other("ikd", size=EDGE, backbone="resnet50"),
        f"medvit of {EDGE} px": _other("medvit", size=EDGE, network="large"),
        f"adfa of {EDGE} px": _other("adfa", size=EDGE),
    }
    for name, make in huge.items():
        yield Attack("M3", name, make, CONFIG)
    yield Attack("M3", "1e9 channels", partial(_config, change={}, detector={"channels": HUGE}), "shape")


# ---- M4, M5, M7: manifests


def _manifest(folder: Path, good: Path, *, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A model whose manifest was edited by hand."""
    model = _copy(folder, good)
    facts = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    change(facts)
    (model / MANIFEST).write_text(json.dumps(facts), encoding="utf-8")
    return model


def _named(name: str) -> Callable[[Path, Path], Path]:
    """List one more file under `name`; it exists, with that content, wherever the name may lead."""
    facts = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    return partial(_manifest, change=lambda manifest: manifest["files"].update({name: facts}))


def _instead(folder: Path, good: Path, *, name: str, put: Callable[[Path, Path], object]) -> Path:
    """One file of a model lies outside, and `put(place, outside)` leaves something that leads there."""
    model = _copy(folder, good)
    outside = (model / name).rename(folder / "outside")
    put(model / name, outside)
    return model


def _set(**fields: Any) -> Callable[[Path, Path], Path]:
    return partial(_manifest, change=lambda manifest: manifest.update(fields))


NAMES = (
    "../../x",
    "../model/card.md",
    "/etc/hostname",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "C:x",
    "x\0y",
    "~x",
    "x\n",
    "é",
)
PLACES: dict[str, Callable[[Path, Path], object]] = {
    "symbolic link": lambda place, outside: place.symlink_to(outside),
    "relative symbolic link": lambda place, outside: place.symlink_to(Path("..") / outside.name),
    "hard link": lambda place, outside: place.hardlink_to(outside),
    "special file": lambda place, outside: os.mkfifo(place),
    "link to a device": lambda place, outside: place.symlink_to("/dev/zero"),
    "folder": lambda place, outside: place.mkdir(),
}


def _m4_to_m7() -> Iterator[Attack]:
    newer = manifests.MODEL.format + 1
    yield Attack("M4", "a newer format", _set(format=newer, umiad_version="9.1"), "pip install 'umiad>=9.1'")
    for value in (0, -1, None, True, "1", 1.0, [1]):
        yield Attack("M4", f"format {value!r}", _set(format=value), "format is")
    yield Attack("M4", "no format", partial(_manifest, change=lambda m: m.pop("format")), "format is")
    yield Attack("M4", "a giant format", _set(format=10**400), "reads up to")
    yield Attack("M4", "a version that is code", _set(format=newer, umiad_version="9'; true #"), "malformed")
    for name in NAMES:
        yield Attack("M5", f"name {name!r}", _named(name), "expected letters")
    for name in (WEIGHTS, CONFIG, MANIFEST):
        for kind, put in PLACES.items():
            yield Attack("M5", f"{kind} for {name}", partial(_instead, name=name, put=put), name)
    for path in ("/dev/zero", "/dev/null"):
        yield Attack("M5", f"{path} as a model", lambda folder, good, path=path: Path(path), "special file")
    edited = partial(_config, change={"map_reference": 1e6})
    yield Attack(
        "M7", "configuration and manifest altered", edited, "not the model that was pinned", pinned=True
    )
    yield Attack(
        "M7",
        "weights and manifest altered",
        partial(_tensors, change=last_value(bytes(4))),
        "pinned",
        pinned=True,
    )


ATTACKS: tuple[Attack, ...] = (
    *_m1(),
    *(
        Attack("M2", name, partial(_tensors, change=change), words)
        for name, (change, words) in CHANGES.items()
    ),
    *_m3(),
    *_m4_to_m7(),
)
"""Every hostile model, by id and name."""
