"""One training loop for every detector: a LightningModule over cached features, resumable and guarded."""

from __future__ import annotations

import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from umiad import nonfinite
from umiad.config import TrainingConfig
from umiad.errors import ConfigError, TrainingError, UmiadError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupt, Interrupted
from umiad.nonfinite import NonFiniteError
from umiad.schedule import factor
from umiad.trainlog import LOG, Row, TrainingLog

if TYPE_CHECKING:
    from umiad.detectors.contract import Detector

CHECKPOINT_SECONDS = 30.0
"""At most this much work is lost by a crash; an interrupted run also saves at the end of its epoch."""
MONITORED = 20
"""Training images on which the monitors are computed after each epoch."""

MAX_SKIPPED = 3
"""At most so many batches without a finite loss may be skipped: more of them are no accident."""

__all__ = ["CHECKPOINT_SECONDS", "LOG", "Row", "TrainingRun", "import_lightning", "train"]


@dataclass(frozen=True)
class TrainingRun:
    """What to train on, and where to keep the state.

    `train` and `holdout` are image numbers of `cache`; `folder` receives `log.jsonl` and the resume
    checkpoints (None: nothing is written); `on_epoch` is told each row of the log as it comes, `on_note` what
    the user should know. `skip_nonfinite`: so many batches (0 to 3) of the whole run may be left out where a
    loss, gradient or feature is not finite, instead of stopping. Raises ConfigError for another number.
    """

    cache: FeatureCache
    train: Sequence[int]
    holdout: Sequence[int] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 0
    folder: Path | None = None
    device: str = "cpu"
    on_epoch: Callable[[Row], None] | None = None
    on_note: Callable[[str], None] | None = None
    skip_nonfinite: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.skip_nonfinite <= MAX_SKIPPED:
            raise ConfigError(f"skip_nonfinite is {self.skip_nonfinite}, expected 0 to {MAX_SKIPPED}")

    def note(self, text: str) -> None:
        """Tell the user, where there is somebody to tell."""
        if self.on_note is not None:
            self.on_note(text)


def import_lightning() -> Any:
    """Import lightning.pytorch; a torchvision that does not fit torch makes that fail, so say what to do."""
    try:
        import lightning.pytorch as lightning
    except (RuntimeError, ImportError, AttributeError) as error:
        raise UmiadError(
            f"lightning cannot be imported ({error}). A torchvision that does not fit this torch is the "
            "usual cause: pip uninstall torchvision (umiad does not need it); `umiad doctor` tells more"
        ) from error
    return lightning


def train(detector: Detector, run: TrainingRun, *, resume: bool = False) -> list[Row]:
    """Fit `detector` on the normal images of `run`; returns the log, one row per epoch.

    Batches depend on (seed, epoch) only, so a resumed run ends bit-equal to an uninterrupted one. It goes on
    from the newest checkpoint that is whole and tells which ones it skipped; without any it starts anew.

    Raises:
        TrainingError: a loss is not finite (nothing of that step is kept), or no image to train on.
        Interrupted: after Ctrl-C or SIGTERM, once the epoch is finished and saved.
        ConfigError: the state to resume is of an older umiad.
        DiskError: the state cannot be written; the last saved one is untouched.
    """
    if not run.train:
        raise TrainingError("no normal images to train on")
    lightning = import_lightning()
    start = _start(run, resume=resume)
    log = TrainingLog(run.folder / LOG if run.folder else None)
    with Interrupt() as interrupt, _quiet("lightning.pytorch"):
        fitter = _fitter(lightning, detector, run, log)
        ending = _epoch_end(lightning, run, log, interrupt, start=start)
        trainer = _trainer(lightning, run, ending, epochs=1 if detector.info.closed_form else None)
        batches = _Batches(run, epoch=lambda: trainer.current_epoch)
        trainer.fit(fitter, train_dataloaders=batches, ckpt_path=None if start is None else str(start))
        if interrupt.signal:
            raise Interrupted(interrupt.signal, when="after the last epoch")
    if start is not None:
        detector.load_state(detector.state())  # counts as fitted even where no epoch was left to do
    _finish(detector, run)
    return log.rows


def _trainer(lightning: Any, run: TrainingRun, ending: Any, *, epochs: int | None) -> Any:
    """Lightning's Trainer with all that it would do by itself switched off."""
    from umiad.checkpoint import SafeCheckpointIO

    return lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(run.device, run.device),
        devices=1,
        max_epochs=epochs or run.training.epochs,
        logger=_tensorboard(run.folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[SafeCheckpointIO()],
        callbacks=[ending],
    )


def _start(run: TrainingRun, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, None to start anew; clears what is no longer wanted. Raises DiskError."""
    from umiad import checkpoint

    if run.folder is None:
        return None
    checkpoint.clear_temporary(run.folder)
    if not resume:
        checkpoint.clear(run.folder)
        return None
    start, skipped = checkpoint.newest_valid(run.folder / checkpoint.CHECKPOINTS)
    for reason in skipped:
        run.note(f"a damaged checkpoint was skipped: {reason}")
    if skipped:
        run.note("no checkpoint is whole: from the first epoch" if start is None else f"from {start.name}")
    return start


class _Batches:
    """Batches of prepared features in an order that (seed, epoch) decides."""

    def __init__(self, run: TrainingRun, *, epoch: Callable[[], int]) -> None:
        self._run, self._epoch = run, epoch

    def __len__(self) -> int:
        return -(-len(self._run.train) // self._run.training.batch_size)

    def __iter__(self) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        rng = torch.Generator().manual_seed(_epoch_seed(self._run.seed, self._epoch()))
        order = torch.randperm(len(self._run.train), generator=rng).tolist()
        for start in range(0, len(order), self._run.training.batch_size):
            chosen = [self._run.train[k] for k in order[start : start + self._run.training.batch_size]]
            yield chosen, self._run.cache.rows(chosen)


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % (1 << 62)


def _fitter(lightning: Any, detector: Detector, run: TrainingRun, log: TrainingLog) -> Any:
    """The one LightningModule; it is defined here because lightning is imported only when one trains."""
    encoder = detector.parts().get("encoder", torch.nn.Module())
    frozen = {t.data_ptr() for t in encoder.state_dict().values() if t.numel()}

    class Fitter(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.detector = detector
            self.module = detector.module
            self.losses: list[dict[str, float]] = []
            self.base_rates: list[float] = []

        def configure_optimizers(self) -> Any:
            groups = detector.param_groups()
            if not groups:
                return None
            training = run.training
            adam = torch.optim.Adam(groups, lr=training.learning_rate, weight_decay=training.weight_decay)
            self.base_rates = [group["lr"] for group in adam.param_groups]
            return adam

        def training_step(self, batch: Any, step: int) -> None:
            chosen, prepared = batch
            try:
                nonfinite.check_features(prepared, [run.cache.keys[k] for k in chosen])
                if detector.info.closed_form:
                    detector.collect(prepared)  # type: ignore[attr-defined] # a closed form is a CollectingDetector
                else:
                    _learn(self, run, chosen, prepared, step)
            except NonFiniteError as error:
                problem = f"epoch {self.current_epoch + 1}: {error}"
                if log.skipped >= run.skip_nonfinite:
                    raise NonFiniteError(problem) from error
                log.skipped += 1
                run.note(f"batch skipped ({log.skipped} of at most {run.skip_nonfinite}): {problem}")

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            kept = {k: v for k, v in state.items() if v.data_ptr() not in frozen}
            checkpoint["state_dict"] = kept

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            own = self.state_dict()
            missing = {k: v for k, v in own.items() if v.data_ptr() in frozen}
            checkpoint["state_dict"] = {**missing, **checkpoint["state_dict"]}

    return Fitter()


def _learn(
    fitter: Any, run: TrainingRun, chosen: list[int], prepared: dict[str, torch.Tensor], step: int
) -> None:
    """The optimiser's steps on one batch; stops before it sees a value that is not finite. NonFiniteError."""
    seed = _epoch_seed(run.seed, fitter.current_epoch) + step
    optimisers = fitter.optimizers()
    scale = factor(run.training, fitter.current_epoch + step / fitter.trainer.num_training_batches)
    for group, base in zip(optimisers.param_groups, fitter.base_rates, strict=True):
        group["lr"] = base * scale
    parameters = [p for group in optimisers.param_groups for p in group["params"]]
    limit = math.inf if run.training.clip_norm is None else run.training.clip_norm
    try:
        for losses in fitter.detector.steps(prepared, torch.Generator().manual_seed(seed)):
            nonfinite.check_losses(losses)
            optimisers.zero_grad()
            fitter.manual_backward(losses["total"])
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            nonfinite.check_gradients(fitter.detector, norm)
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            optimisers.step()
            fitter.losses.append({name: float(value.detach()) for name, value in losses.items()})
    except NonFiniteError as error:
        part = nonfinite.origin(fitter.detector, prepared, torch.Generator().manual_seed(seed))
        raise NonFiniteError(
            f"{error} on a batch of {len(chosen)} images "
            f"(content hashes {nonfinite.named([run.cache.keys[k] for k in chosen])}); "
            f"{'' if part is None else f'first in {part}; '}{nonfinite.ADVICE}"
        ) from error


def _finish(detector: Detector, run: TrainingRun) -> None:
    """What is left to do after the last epoch. Raises TrainingError when the result is not finite."""
    from umiad.detectors.contract import CollectingDetector

    detector.module.to(run.device)
    if isinstance(detector, CollectingDetector):
        if not detector.info.closed_form:
            for start in range(0, len(run.train), run.training.batch_size):
                rows = run.cache.rows(run.train[start : start + run.training.batch_size])
                detector.collect({name: values.to(run.device) for name, values in rows.items()})
        detector.finish(torch.Generator().manual_seed(run.seed))
    nonfinite.check_tensors(detector.state(), what="after training: tensor")


def _epoch_end(
    lightning: Any, run: TrainingRun, log: TrainingLog, interrupt: Interrupt, *, start: Path | None
) -> Any:
    """The callback that ends an epoch: checks, log, checkpoint, and stopping on request."""
    from umiad.detectors.contract import PhasedDetector

    class EpochEnd(lightning.Callback):
        state_key = "umiad"

        def __init__(self) -> None:
            self.started = self.saved = time.monotonic()
            self.newest = start

        def state_dict(self) -> dict[str, Any]:
            return {"rows": log.rows, "skipped": log.skipped}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            log.restore(state["rows"], skipped=state["skipped"])

        def on_train_epoch_start(self, trainer: Any, fitter: Any) -> None:
            fitter.losses.clear()
            if isinstance(fitter.detector, PhasedDetector):
                fitter.detector.begin_epoch(trainer.current_epoch + 1)
            self.started = time.monotonic()

        def on_train_epoch_end(self, trainer: Any, fitter: Any) -> None:
            _check_state(trainer, fitter)
            row = _row(trainer, fitter, run, skipped=log.skipped, seconds=time.monotonic() - self.started)
            log.append(row)
            if trainer.logger is not None:
                trainer.logger.log_metrics(
                    {k: v for k, v in row.items() if v is not None}, trainer.current_epoch
                )
            if run.on_epoch is not None:
                run.on_epoch(row)
            due = time.monotonic() - self.saved > CHECKPOINT_SECONDS
            if run.folder is not None and fitter.losses and (due or interrupt.signal):
                self.newest = _save(trainer, run.folder, before=self.newest)
                self.saved = time.monotonic()
            if interrupt.signal:
                raise Interrupted(interrupt.signal, when=f"after epoch {trainer.current_epoch + 1}")

    return EpochEnd()


def _check_state(trainer: Any, fitter: Any) -> None:
    """Raise TrainingError before weights or moments that are not finite are monitored or saved."""
    where = f"epoch {trainer.current_epoch + 1}:"
    nonfinite.check_tensors(fitter.module.state_dict(), what=f"{where} tensor")
    for optimiser in trainer.optimizers:
        nonfinite.check_tensors(nonfinite.optimiser_tensors(optimiser), what=f"{where} the optimiser's")


def _save(trainer: Any, folder: Path, *, before: Path | None) -> Path:
    """Write a checkpoint and keep it and the one `before`. Raises DiskError."""
    from umiad.checkpoint import CHECKPOINTS, checkpoint_path, keep_only

    path = checkpoint_path(folder / CHECKPOINTS, trainer.current_epoch + 1)
    trainer.save_checkpoint(path)
    keep_only(path.parent, [path] if before is None else [path, before])
    return path


def _row(trainer: Any, fitter: Any, run: TrainingRun, *, skipped: int, seconds: float) -> Row:
    """One line of the log: mean losses of the epoch, monitors on training and held-out normal images.

    Raises TrainingError when one of them is not finite.
    """
    epoch = trainer.current_epoch + 1
    row: Row = {"epoch": epoch, "epochs": trainer.max_epochs, "seconds": round(seconds, 3)}
    for name in fitter.losses[0] if fitter.losses else ():
        row["loss" if name == "total" else name] = sum(each[name] for each in fitter.losses) / len(
            fitter.losses
        )
    row.update(_monitors(fitter.detector, run, where=f"epoch {epoch}"))
    row["seconds_left"] = round(seconds * (trainer.max_epochs - epoch), 1)
    if run.skip_nonfinite:
        row["skipped"] = skipped
    nonfinite.check_numbers(row, what=f"epoch {epoch}")
    return row


def _monitors(detector: Detector, run: TrainingRun, *, where: str) -> Row:
    """The detector's monitors on some training images, and on the held-out ones. Raises TrainingError."""
    shown = run.train[:MONITORED]
    if run.skip_nonfinite:
        usable = nonfinite.finite_rows(run.cache.rows(shown), len(shown))
        shown = [shown[k] for k in usable]
    row: Row = {}
    try:
        if shown:
            row.update(detector.monitor(run.cache.rows(shown)))
        if run.holdout:
            held_out = run.cache.rows(run.holdout)
            nonfinite.check_features(held_out, [run.cache.keys[k] for k in run.holdout])
            row.update(
                {f"holdout_{k}": v for k, v in detector.monitor(held_out).items() if k.endswith("per_dim")}
            )
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteError(
            f"{where}: the monitors cannot be computed ({error}); {nonfinite.ADVICE}"
        ) from error
    return row


def _tensorboard(folder: Path | None) -> Any:
    """A TensorBoard logger where TensorBoard is installed and there is a folder; else none."""
    import importlib.util

    if folder is None or importlib.util.find_spec("tensorboard") is None:
        return False
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=folder, name="tensorboard", version="")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a library's information lines and its warnings about itself while we report progress."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=re.escape(name.split(".")[0]))
            yield
    finally:
        logger.setLevel(level)
