"""Learning-rate schedules as pure functions of the progress: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from umiad.config import TrainingConfig

WARMUP_START = 0.1
COSINE_END = 1e-3
LINEAR_END = 0.4
STEP_FACTOR, STEPS_AT = 0.33, (0.7, 0.9)


def _constant(done: float) -> float:
    del done
    return 1.0


def _cosine(done: float) -> float:
    return COSINE_END + (1 - COSINE_END) * 0.5 * (1 + math.cos(math.pi * done))


def _linear(done: float) -> float:
    return 1 - (1 - LINEAR_END) * done


def _steps(done: float) -> float:
    return STEP_FACTOR ** sum(done >= at for at in STEPS_AT)


SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"constant": _constant, "cosine": _cosine, "linear": _linear, "steps": _steps}
)
"""Name -> factor of the learning rate by the fraction of the training that is done.

"cosine" ends at 0.001 (CFLOW-AD), "linear" at 0.4 (U-Flow), "steps" multiplies by 0.33 after 70 % and after
90 % (MSFlow).
"""


def factor(training: TrainingConfig, progress: float) -> float:
    """What the learning rate is multiplied by after `progress` epochs (a fraction within the epoch counts).

    During the first `warmup_epochs` it rises in a line from a tenth to the schedule's own value.
    """
    own = SCHEDULES[training.schedule](min(max(progress / training.epochs, 0.0), 1.0))
    if progress >= training.warmup_epochs:
        return own
    return own * (WARMUP_START + (1 - WARMUP_START) * progress / training.warmup_epochs)
