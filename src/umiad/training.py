"""One training loop for every detector: a LightningModule over cached features, resumable and guarded."""

from __future__ import annotations

import json
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

from umiad.config import TrainingConfig
from umiad.errors import TrainingError, UmiadError
from umiad.features import FeatureCache
from umiad.interrupt import Interrupt, Interrupted
from umiad.schedule import factor

if TYPE_CHECKING:
    from umiad.detectors.contract import Detector

CHECKPOINT, LOG = "last", "log.jsonl"
CHECKPOINT_SECONDS = 30.0
"""At most this much work is lost by a crash; an interrupted run also saves at the end of its epoch."""
MONITORED = 20
"""Training images on which the monitors are computed after each epoch."""

Row = dict[str, float | int | None]


@dataclass(frozen=True)
class TrainingRun:
    """What to train on, and where to keep the state.

    `train` and `holdout` are image numbers of `cache`; `folder` receives `log.jsonl` and the resume
    checkpoint (None: nothing is written); `on_epoch` is told each row of the log as it comes.
    """

    cache: FeatureCache
    train: Sequence[int]
    holdout: Sequence[int] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 0
    folder: Path | None = None
    device: str = "cpu"
    on_epoch: Callable[[Row], None] | None = None


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

    Batches depend on (seed, epoch) only, so a resumed run ends bit-equal to an uninterrupted one.
    Raises TrainingError when a loss is not finite (nothing of that step is kept), `Interrupted` after
    Ctrl-C or SIGTERM once the epoch is finished and saved, DiskError when the state cannot be written.
    """
    if not run.train:
        raise TrainingError("no normal images to train on")
    lightning = import_lightning()
    from umiad.checkpoint import SafeCheckpointIO, newest

    checkpoint = newest(run.folder / CHECKPOINT) if run.folder else None
    start = str(checkpoint) if resume and checkpoint is not None and checkpoint.exists() else None
    log = _Log(run.folder / LOG if run.folder else None, keep=start is not None)
    epochs = 1 if detector.info.closed_form else run.training.epochs
    with Interrupt() as interrupt, _quiet("lightning.pytorch"):
        fitter = _fitter(lightning, detector, run)
        trainer = lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(run.device, run.device),
            devices=1,
            max_epochs=epochs,
            logger=_tensorboard(run.folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=[SafeCheckpointIO()],
            callbacks=[_epoch_end(lightning, run, log, interrupt)],
        )
        batches = _Batches(run, epoch=lambda: trainer.current_epoch)
        trainer.fit(fitter, train_dataloaders=batches, ckpt_path=start)
    return log.rows


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


def _fitter(lightning: Any, detector: Detector, run: TrainingRun) -> Any:
    """The one LightningModule; it is defined here because lightning is imported only when one trains."""
    from umiad.detectors.contract import CollectingDetector

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
            if isinstance(detector, CollectingDetector) and detector.info.closed_form:
                detector.collect(prepared)
                return
            rng = torch.Generator().manual_seed(_epoch_seed(run.seed, self.current_epoch) + step)
            optimizers = self.optimizers()
            scale = factor(run.training, self.current_epoch + step / self.trainer.num_training_batches)
            for group, base in zip(optimizers.param_groups, self.base_rates, strict=True):
                group["lr"] = base * scale
            for losses in detector.steps(prepared, rng):
                _check_finite(losses, run, chosen, epoch=self.current_epoch)
                optimizers.zero_grad()
                self.manual_backward(losses["total"])
                parameters = [p for group in optimizers.param_groups for p in group["params"]]
                limit = math.inf if run.training.clip_norm is None else run.training.clip_norm
                norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
                _check_finite({"gradient norm": norm}, run, chosen, epoch=self.current_epoch)
                optimizers.step()
                self.losses.append({name: float(value.detach()) for name, value in losses.items()})

        def on_train_end(self) -> None:
            if not isinstance(detector, CollectingDetector):
                return
            if not detector.info.closed_form:
                for start in range(0, len(run.train), run.training.batch_size):
                    rows = run.cache.rows(run.train[start : start + run.training.batch_size])
                    detector.collect({name: values.to(self.device) for name, values in rows.items()})
            detector.finish(torch.Generator().manual_seed(run.seed))

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            kept = {k: v for k, v in state.items() if v.data_ptr() not in frozen}
            checkpoint["state_dict"] = kept

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            own = self.state_dict()
            missing = {k: v for k, v in own.items() if v.data_ptr() in frozen}
            checkpoint["state_dict"] = {**missing, **checkpoint["state_dict"]}

    return Fitter()


def _check_finite(
    values: dict[str, torch.Tensor], run: TrainingRun, chosen: list[int], *, epoch: int
) -> None:
    """Stop before the optimiser sees a value that is not finite; the images are named by content hash."""
    bad = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
    if bad:
        images = ", ".join(run.cache.keys[k][:12] for k in chosen[:8])
        raise TrainingError(
            f"epoch {epoch + 1}: {', '.join(bad)} not finite on a batch of {len(chosen)} images "
            f"(content hashes {images}, ...); a smaller learning rate or clamp helps; "
            "the last saved state is kept"
        )


def _epoch_end(lightning: Any, run: TrainingRun, log: _Log, interrupt: Interrupt) -> Any:
    class EpochEnd(lightning.Callback):
        def __init__(self) -> None:
            self.started = self.saved = time.monotonic()

        def on_train_epoch_start(self, trainer: Any, fitter: Any) -> None:
            fitter.losses.clear()
            self.started = time.monotonic()

        def on_train_epoch_end(self, trainer: Any, fitter: Any) -> None:
            row = _row(trainer, fitter, run, seconds=time.monotonic() - self.started)
            log.append(row)
            if trainer.logger is not None:
                trainer.logger.log_metrics(
                    {k: v for k, v in row.items() if v is not None}, trainer.current_epoch
                )
            if run.on_epoch is not None:
                run.on_epoch(row)
            due = time.monotonic() - self.saved > CHECKPOINT_SECONDS
            if run.folder is not None and fitter.losses and (due or interrupt.signal):
                trainer.save_checkpoint(run.folder / CHECKPOINT)
                self.saved = time.monotonic()
            if interrupt.signal:
                raise Interrupted(interrupt.signal, when=f"after epoch {trainer.current_epoch + 1}")

    return EpochEnd()


def _row(trainer: Any, fitter: Any, run: TrainingRun, *, seconds: float) -> Row:
    """One line of the log: mean losses of the epoch, monitors on training and held-out normal images."""
    epoch = trainer.current_epoch + 1
    row: Row = {"epoch": epoch, "epochs": trainer.max_epochs, "seconds": round(seconds, 3)}
    for name in fitter.losses[0] if fitter.losses else ():
        row["loss" if name == "total" else name] = sum(each[name] for each in fitter.losses) / len(
            fitter.losses
        )
    detector = fitter.detector
    row.update(detector.monitor(run.cache.rows(run.train[:MONITORED])))
    if run.holdout:
        held_out = detector.monitor(run.cache.rows(run.holdout))
        row.update({f"holdout_{k}": v for k, v in held_out.items() if k.endswith("per_dim")})
    row["seconds_left"] = round(seconds * (trainer.max_epochs - epoch), 1)
    return row


class _Log:
    """The training log: rows in memory and, one JSON object a line, in a file."""

    def __init__(self, path: Path | None, *, keep: bool) -> None:
        self.rows: list[Row] = []
        self._path = path
        if path is not None and path.exists():
            if keep:
                self.rows = [
                    json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line
                ]
            path.unlink()
        for row in self.rows:
            self._write(row)

    def append(self, row: Row) -> None:
        repeated = [old for old in self.rows if (old["epoch"] or 0) >= (row["epoch"] or 0)]
        if repeated:  # a run resumed from a checkpoint older than the last line
            self.rows = [old for old in self.rows if old not in repeated]
            if self._path is not None:
                self._path.write_text("", encoding="utf-8")
            for old in self.rows:
                self._write(old)
        self.rows.append(row)
        self._write(row)

    def _write(self, row: Row) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


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
