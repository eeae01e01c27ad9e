"""The battery that every detector passes; public, so that detectors written elsewhere can use it too.

`check_detector(make)` runs it; docs/detectors.md tells what each check means. The checks themselves are in
`umiad.detectors.battery`, by theme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from umiad.config import nearest
from umiad.detectors.battery import effects, facts, fitting, saving, scores
from umiad.detectors.battery.candidate import Candidate, CheckError, Exempt, Make, fit_quickly
from umiad.detectors.battery.images import clean_images, with_blob
from umiad.errors import ConfigError

__all__ = [
    "CHECKS",
    "Candidate",
    "Check",
    "CheckError",
    "Examination",
    "Exempt",
    "Make",
    "check_detector",
    "clean_images",
    "examine",
    "fit_quickly",
    "with_blob",
]

Check: TypeAlias = Callable[[Candidate], None]
"""Raises CheckError for a fault, Exempt where the detector declares that the check does not apply."""

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "contract": facts.contract,
        "configuration": facts.configuration,
        "kind": facts.kind,
        "name": facts.name,
        "not_fitted": scores.not_fitted,
        "losses": fitting.losses,
        "gradients": fitting.gradients,
        "shapes": scores.shapes,
        "wrong_input": scores.wrong_input,
        "prepared": scores.prepared,
        "batches": scores.batches,
        "odd_batches": fitting.odd_batches,
        "sizes": scores.sizes,
        "post_processing": scores.post_processing,
        "leaves_alone": effects.leaves_alone,
        "no_files": effects.no_files,
        "frozen": fitting.frozen,
        "monitor": fitting.monitor,
        "global_random": fitting.global_random,
        "seeds": fitting.seeds,
        "labels": fitting.labels,
        "round_trip": saving.round_trip,
        "copies": saving.copies,
        "wrong_state": saving.wrong_state,
        "model_file": saving.model_file,
        "blob": scores.blob,
        "localises": scores.localises,
    }
)
"""Name -> check; each takes a `Candidate`, so that several can share what was built and fitted."""


@dataclass(frozen=True)
class Examination:
    """The outcome of a battery without faults: names of checks that `ran`; `exempt` ones with the reason."""

    ran: tuple[str, ...]
    exempt: Mapping[str, str]


def examine(make: Make, *, size: int = 64, checks: Iterable[str] = tuple(CHECKS)) -> Examination:
    """Run `checks` on `make(seed)`, detectors for size x size images. Raises CheckError at the first fault.

    Anything else that a detector raises where it should not becomes a CheckError too. Raises ConfigError for
    an unknown check.
    """
    candidate = Candidate(make, size)
    ran: list[str] = []
    exempt: dict[str, str] = {}
    for name in checks:
        if name not in CHECKS:
            raise ConfigError(f"unknown check {name!r}{nearest(name, list(CHECKS))}")
        try:
            CHECKS[name](candidate)
        except Exempt as reason:
            exempt[name] = str(reason)
        except CheckError as error:
            raise CheckError(f"{name}: {error}") from error
        except Exception as error:
            raise CheckError(f"{name}: {type(error).__name__}: {error}") from error
        else:
            ran.append(name)
    return Examination(tuple(ran), exempt)


def check_detector(make: Make, *, size: int = 64) -> list[str]:
    """Run every check on `make(seed)`; returns the names of the checks that ran. Raises CheckError.

    `make` builds an unfitted detector from a seed, for images of `size` x `size`. Checks from which the
    detector's `info` exempts it are left out; `examine` also tells why.
    """
    return list(examine(make, size=size).ran)
