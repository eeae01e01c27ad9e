"""A small fit as a process of its own, to be killed, signalled and starved by `test_faults*.py`.

    python fault_job.py fit FOLDER [--resume] [--epochs N] [--limit BYTES] [--stuck]   one fit, exit code as umiad's
    python fault_job.py kills FOLDER SEED DELAYS POINTS                fits killed at seeded moments, then resumed
    python fault_job.py long FOLDER EPOCHS                             memory and open files after every epoch

The work is that of `umiad fit`: a folder of work, a lock, checkpoints (here after every epoch), the model.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.plugins import CheckpointIO  # noqa: F401 - imported once, before the children

from umiad import charts, checkpoint, detectors, training  # noqa: F401
from umiad.errors import UmiadError
from umiad.fitting import FitOptions, fit_model
from umiad.progress import Silent

SIZE, IMAGES, BATCH, EPOCHS = 64, 8, 3, 5
OUT = "model"
WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


def say(*words, to=None):
    stream = to or sys.stdout
    stream.write(" ".join(map(str, words)) + "\n")
    stream.flush()


class Reporter(Silent):
    """Says each epoch aloud, keeps notes and the first epoch."""

    def __init__(self, watch=None):
        self.first, self.notes, self._watch = None, [], watch

    def epoch(self, row):
        if self.first is None:
            self.first = row["epoch"]
        say("epoch", row["epoch"])
        if self._watch is not None:
            self._watch(row)

    def note(self, text):
        self.notes.append(text)
        say("note", text)


def images():
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.linspace(0.1, 0.5, SIZE), np.linspace(0, 0.3, SIZE))
    return [np.clip(smooth + rng.normal(0, 0.05, (SIZE, SIZE)), 0, 1) for _ in range(IMAGES)]


def detector(epochs):
    config = detectors.preset_config(
        "egmf",
        "paper",
        size=SIZE,
        blocks=1,
        condition_channels=4,
        hidden_ratio=64,
        aggregate="add",
        fusion="none",
        training={"epochs": epochs, "batch_size": BATCH, "learning_rate": 1e-3},
    )
    return detectors.make("egmf", config.canonical(), None)


def fit(folder, *, epochs=EPOCHS, resume=False, reporter=None, made=None):
    """One fit into FOLDER/model; the global random states differ from process to process, and must not matter."""
    training.CHECKPOINT_SECONDS = -1.0  # also where the clock is too coarse to see an epoch
    random.seed()
    np.random.seed(None)
    torch.seed()
    options = FitOptions(holdout=0.25, device="cpu")
    made = made or detector(epochs)
    return fit_model(made, images(), options, out=folder / OUT, resume=resume, reporter=reporter or Silent())


def digest(folder):
    """SHA-256 of the weights of the saved model."""
    return hashlib.sha256((folder / OUT / "weights.safetensors").read_bytes()).hexdigest()


def resumable(folder):
    return (folder / f"{OUT}.work" / "run.json").exists()


def logged(folder):
    """The last epoch that the log of a run has."""
    try:
        lines = (folder / f"{OUT}.work" / training.LOG).read_text().splitlines()
        return max((json.loads(line)["epoch"] for line in lines), default=0)
    except (FileNotFoundError, ValueError):
        return 0


# Killing


def count_disk_events(folder, *, kill_at=None):
    """Count what this process changes on the disk below `folder`; SIGKILL before event number `kill_at`."""
    seen, where = [0], str(folder)

    def event():
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name, arguments):
        opened = name == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or name in WRITING) and str(arguments[0]).startswith(where):
            event()

    fsync = os.fsync

    def counted(handle):
        event()
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = counted
    return seen


def in_child(work, *, delay=None):
    """Run `work()` in a forked process, killed after `delay` seconds; its result, None if it was killed."""
    reading, writing = os.pipe()
    number = os.fork()
    if number == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            os.write(writing, json.dumps(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    if delay is not None:
        time.sleep(delay)
        os.kill(number, signal.SIGKILL)
    _, status = os.waitpid(number, 0)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    if os.WIFSIGNALED(status):
        return None
    if os.WEXITSTATUS(status):
        raise SystemExit("a fit failed")
    return json.loads(said)


def one_kill(folder, *, delay=None, point=None):
    """Kill a fit, resume it, and tell what came of it."""

    def killed():
        count_disk_events(folder, kill_at=point)
        fit(folder)
        return True

    def resumed():
        reporter = Reporter()
        if resumable(folder) or not (folder / OUT).exists():
            fit(folder, resume=resumable(folder), reporter=reporter)
        return {"first": reporter.first, "notes": reporter.notes}

    folder.mkdir()
    while (finished := in_child(killed, delay=delay)) and delay is not None:  # too late: earlier then
        delay /= 2
        shutil.rmtree(folder)
        folder.mkdir()
    before = logged(folder)
    facts = in_child(resumed)
    left = sorted(each.name for each in folder.iterdir() if each.name != OUT)
    return {
        "delay": delay,
        "point": point,
        "killed": finished is None,
        "lost": max(0, before + 1 - (facts["first"] or before + 1)),
        "sha256": digest(folder),
        "left": left,
        **facts,
    }


def kills(folder, seed, delays, points):
    rng = random.Random(seed)

    def reference():
        seen = count_disk_events(folder / "reference")
        fit(folder / "reference")
        return seen[0]

    (folder / "reference").mkdir(parents=True)
    start = time.monotonic()
    events = in_child(reference)
    seconds = time.monotonic() - start
    done = [one_kill(folder / f"delay{n}", delay=rng.uniform(0, seconds)) for n in range(delays)]
    chosen = rng.sample(range(1, events + 1), points)
    done += [one_kill(folder / f"point{n}", point=point) for n, point in enumerate(chosen)]
    return {"reference": digest(folder / "reference"), "events": events, "kills": done}


# Long runs


def long(folder, epochs):
    """Resident bytes and open files after each epoch."""
    seen = []

    def watch(row):
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        seen.append([row["epoch"], resident, len(os.listdir("/proc/self/fd"))])

    fit(folder, epochs=epochs, reporter=Reporter(watch))
    return seen


# One fit


def stuck(made):
    """The detector with a first step that never ends; it says when a signal has been noted."""

    def steps(prepared, rng):
        say("in a step")
        while not signal.getsignal(signal.SIGINT).__self__.signal:
            time.sleep(0.01)
        say("noted")
        while True:
            time.sleep(0.01)

    made.steps = steps
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["fit", "kills", "long"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("numbers", type=int, nargs="*")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stuck", action="store_true")
    parser.add_argument("--clock-back", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.clock_back:
        back = iter(range(2_000_000_000, 0, -1000))
        time.time = lambda: float(next(back))
    if given.what != "fit":
        say(json.dumps((kills if given.what == "kills" else long)(given.folder, *given.numbers)))
        return 0
    if given.limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (given.limit, given.limit))
    made = detector(given.epochs)
    reporter = Reporter()
    try:
        fit(
            given.folder,
            epochs=given.epochs,
            resume=given.resume,
            reporter=reporter,
            made=stuck(made) if given.stuck else made,
        )
    except UmiadError as error:
        say(error, to=sys.stderr)
        return error.exit_code
    say(digest(given.folder))
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
