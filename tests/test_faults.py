"""What may go wrong while a detector is fitted: the training faults T1 to T10 (the long ones in test_faults_slow)."""

import ast
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import umiad
from test_training import build, cached, interrupt_after, run_of
from umiad import training
from umiad.checkpoint import CHECKPOINTS, SafeCheckpointIO, checkpoint_path, newest_valid
from umiad.config import TrainingConfig
from umiad.errors import ConfigError, DiskError
from umiad.interrupt import Interrupted
from umiad.training import LOG, TrainingRun, train

JOB = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fault_job.py"))]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = {"condition_channels": 4, "hidden_ratio": 64, "aggregate": "add", "fusion": "none"}
SOURCES = sorted(Path(umiad.__file__).parent.rglob("*.py"))


def job(*words, env=ALONE):
    """Run the job to its end; its exit code, output and errors."""
    return subprocess.run([*JOB, *map(str, words)], capture_output=True, text=True, env=env, timeout=1200)


@pytest.fixture
def every_epoch(monkeypatch):
    """Checkpoints after every epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# T1: killed


def check_kills(folder, *, seed, delays, points):
    """Run the kills; every resumed fit must end with the weights of one that nothing has disturbed."""
    done = job("kills", folder, seed, delays, points)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["kills"]) == delays + points
    for kill in result["kills"]:
        assert kill["sha256"] == result["reference"], kill
        assert kill["lost"] <= 1, kill
        assert kill["left"] == [] or kill["first"] is None, kill  # None: the model was finished before
    assert all(kill["killed"] for kill in result["kills"])
    return result


@pytest.mark.slow  # half a minute; resumed runs of the loop are compared to the bit in test_training
def test_T1_killed_and_resumed_three_times_ends_bit_equal(tmp_path):
    check_kills(tmp_path / "job", seed=1, delays=1, points=2)


@pytest.mark.parametrize("name", ["egmf", "cflow"])
def test_T1_a_run_killed_after_its_last_checkpoint_still_finishes(tmp_path, every_epoch, name):
    settings = SMALL if name == "egmf" else {"blocks": 1}
    whole = build(name, **settings)
    rows = train(whole, run_of(whole, folder=tmp_path, epochs=2))
    again = build(name, **settings)
    told = []
    assert train(again, run_of(again, folder=tmp_path, epochs=2, on_epoch=told.append), resume=True) == rows
    assert told == []
    assert again.fitted
    assert equal(again.state(), whole.state())


# T2: the disk refuses


def failing(monkeypatch, step, number):
    """Let one step of writing fail with the error `number` of the operating system."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    original = pathlib.Path.open

    def half_writing(self, mode="r", *rest, **named):
        file = original(self, mode, *rest, **named)
        if "x" in mode:
            write = file.write

            class Half:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                def write(self, content):
                    write(content[: len(content) // 2])
                    fail()

            return Half()
        return file

    def folder_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            fail()

    match step:
        case "write":
            monkeypatch.setattr(pathlib.Path, "open", half_writing)
        case "open":
            monkeypatch.setattr(pathlib.Path, "open", fail)
        case "fsync of the folder":
            monkeypatch.setattr(os, "fsync", folder_only)
        case _:
            monkeypatch.setattr(os, step, fail)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells folders from files through /proc")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("step", ["mkdir", "open", "write", "fsync", "rename", "fsync of the folder"])
def test_T2_disk_full_keeps_the_old_checkpoint(tmp_path, monkeypatch, step, number):
    state = {"w": torch.randn(5000), "epoch": 1}
    folder = tmp_path / CHECKPOINTS
    SafeCheckpointIO().save_checkpoint(state, checkpoint_path(folder, 1))
    before = {each.name: each.read_bytes() for each in checkpoint_path(folder, 1).iterdir()}
    with monkeypatch.context() as broken:
        failing(broken, step, number)
        with pytest.raises(DiskError, match=r"needed 2\d{4} bytes, free \d+ bytes") as caught:
            SafeCheckpointIO().save_checkpoint({**state, "epoch": 2}, checkpoint_path(folder, 2))
    assert caught.value.exit_code == 4
    assert os.strerror(number) in str(caught.value)
    assert {each.name: each.read_bytes() for each in checkpoint_path(folder, 1).iterdir()} == before
    assert torch.equal(SafeCheckpointIO().load_checkpoint(checkpoint_path(folder, 1))["w"], state["w"])
    assert not list(folder.glob("*.tmp"))


def test_T2_a_failed_replacement_keeps_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "epoch-000001"
    SafeCheckpointIO().save_checkpoint({"epoch": 1}, path)
    rename, calls = os.rename, []

    def second_fails(*names):
        calls.append(names)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(*names)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(DiskError, match="Input/output error"):
        SafeCheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert SafeCheckpointIO().load_checkpoint(path) == {"epoch": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["epoch-000001"]


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_T2_a_run_stopped_by_the_disk_is_resumed_bit_equal(tmp_path, monkeypatch, every_epoch, what):
    whole = build(**SMALL)
    cache = cached(whole)
    train(whole, run_of(whole, cache=cache))
    refusing = []

    def refuse_from_now(row):
        if row["epoch"] == 2:
            refusing.append(True)

    original = pathlib.Path.open

    def sometimes(self, mode="r", *rest, **named):
        if refusing and mode[0] in "xa" and (self.name == LOG) == (what == "log"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, mode, *rest, **named)

    first = build(**SMALL)
    with monkeypatch.context() as broken:
        broken.setattr(pathlib.Path, "open", sometimes)
        with pytest.raises(DiskError, match="No space left on device"):
            train(first, run_of(first, folder=tmp_path, cache=cache, on_epoch=refuse_from_now))
    (tmp_path / CHECKPOINTS / "epoch-000009.new.tmp").mkdir()  # as a kill would have left
    told, resumed = [], build(**SMALL)
    rows = train(resumed, run_of(resumed, folder=tmp_path, cache=cache, on_epoch=told.append), resume=True)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert told[0]["epoch"] == {"checkpoint": 2, "log": 3}[what]
    assert equal(resumed.state(), whole.state())
    assert sorted(each.name for each in (tmp_path / CHECKPOINTS).iterdir()) == [
        "epoch-000003",
        "epoch-000004",
    ]


@pytest.mark.slow
def test_T2_a_real_limit_of_the_system_ends_with_exit_code_4(tmp_path):
    (tmp_path / "a").mkdir()
    done = job("fit", tmp_path / "a", "--limit", 200_000)
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stderr
    assert " bytes, free " in done.stderr
    assert not list((tmp_path / "a" / "model.work").rglob("*.tmp"))


# T3: cut short or zeroed by a power cut


def damages(path, block=4096):
    """Every way to cut short or zero one block of a file: (what, content)."""
    content = path.read_bytes()
    for start in range(0, len(content), block):
        yield f"cut at {start}", content[:start]
        zeroed = content[:start] + bytes(len(content[start : start + block])) + content[start + block :]
        yield f"zeroed at {start}", zeroed
    yield "cut by one", content[:-1]
    yield "longer by a block", content + bytes(block)


def test_T3_whatever_is_damaged_the_newest_whole_checkpoint_is_chosen_and_the_other_named(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for epoch in (1, 2):
        state = {"w": torch.rand(5000, generator=rng), "rows": list(range(2000)), "epoch": epoch}
        SafeCheckpointIO().save_checkpoint(state, checkpoint_path(tmp_path, epoch))
    newest, tried = checkpoint_path(tmp_path, 2), 0
    assert newest_valid(tmp_path) == (newest, [])
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for what, content in damages(file):
            file.write_bytes(content)
            chosen, skipped = newest_valid(tmp_path)
            assert chosen == checkpoint_path(tmp_path, 1), (file.name, what)
            assert len(skipped) == 1
            assert str(newest) in skipped[0], (file.name, what)
            tried += 1
        file.unlink()
        assert newest_valid(tmp_path)[0] == checkpoint_path(tmp_path, 1)
        file.write_bytes(whole)
    assert tried > 30
    assert newest_valid(tmp_path) == (newest, [])


@pytest.mark.parametrize("damaged", [1, 2])
def test_T3_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(tmp_path, every_epoch, damaged):
    whole = build(**SMALL)
    cache = cached(whole)
    train(whole, run_of(whole, cache=cache))
    first = build(**SMALL)
    with pytest.raises(Interrupted):
        train(first, run_of(first, folder=tmp_path, cache=cache, on_epoch=interrupt_after(3)))
    for epoch in range(3, 3 - damaged, -1):
        tensors = checkpoint_path(tmp_path / CHECKPOINTS, epoch) / "tensors.safetensors"
        os.truncate(tensors, tensors.stat().st_size // 2)
    (tmp_path / LOG).write_bytes(bytes(100))
    notes, told, resumed = [], [], build(**SMALL)
    run = TrainingRun(
        cache,
        train=range(5),
        holdout=[5],
        training=TrainingConfig(epochs=4, batch_size=3, learning_rate=1e-3),
        seed=1,
        folder=tmp_path,
        on_epoch=told.append,
        on_note=notes.append,
    )
    rows = train(resumed, run, resume=True)
    assert told[0]["epoch"] == {1: 3, 2: 1}[damaged]
    assert [f"epoch-{3 - k:06d}" in note for k, note in enumerate(notes[:damaged])] == [True] * damaged
    assert notes[-1] == {1: "from epoch-000002", 2: "no checkpoint is whole: from the first epoch"}[damaged]
    assert equal(resumed.state(), whole.state())
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == rows
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert len(list((tmp_path / CHECKPOINTS).iterdir())) == 2


def test_T3_a_new_run_forgets_the_checkpoints_of_the_old_one(tmp_path, every_epoch):
    for epochs in (3, 2):
        detector = build(**SMALL)
        train(detector, run_of(detector, folder=tmp_path, epochs=epochs))
    assert newest_valid(tmp_path / CHECKPOINTS)[0] == checkpoint_path(tmp_path / CHECKPOINTS, 2)


def test_T3_the_state_of_an_older_umiad_is_not_continued(tmp_path):
    (tmp_path / "last").mkdir()
    detector = build(**SMALL)
    with pytest.raises(ConfigError, match="older umiad; start the fit anew"):
        train(detector, run_of(detector, folder=tmp_path), resume=True)


# T6: signals, in real processes

SIGNALS = [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_T6_a_signal_saves_and_ends_with_its_exit_code(tmp_path, number, code):
    (tmp_path / "a").mkdir()
    command = [*JOB, "fit", str(tmp_path / "a"), "--epochs", "200"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE
    ) as run:
        assert run.stdout.readline() == "epoch 1\n"
        run.send_signal(number)
        _, errors = run.communicate(timeout=200)
    assert run.returncode == code
    chosen, skipped = newest_valid(tmp_path / "a" / "model.work" / CHECKPOINTS)
    assert skipped == []
    assert f"stopped after epoch {int(chosen.name[-6:])};" in errors
    assert "--resume" in errors
    assert not (tmp_path / "a" / "model.work" / "lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_T6_a_second_signal_stops_at_once(tmp_path, number, code):
    (tmp_path / "a").mkdir()
    command = [*JOB, "fit", str(tmp_path / "a"), "--stuck"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE
    ) as run:
        assert run.stdout.readline() == "in a step\n"
        run.send_signal(number)
        assert run.stdout.readline() == "noted\n"
        run.send_signal(number)
        _, errors = run.communicate(timeout=200)  # the step itself would never end
    assert run.returncode == code
    assert "stopped at once" in errors
    assert not (tmp_path / "a" / "model.work" / "lock").exists()


def test_T6_a_signal_after_the_last_epoch_is_not_lost(monkeypatch):
    detector = build(**SMALL)
    original = training._fitter

    def with_signal(lightning, *rest):
        fitter = original(lightning, *rest)
        fitter.on_train_end = lambda: os.kill(os.getpid(), signal.SIGINT)
        return fitter

    monkeypatch.setattr(training, "_fitter", with_signal)
    with pytest.raises(Interrupted, match="after the last epoch"):
        train(detector, run_of(detector, epochs=1))


# T7 and T9: what the sources must not contain


def names_in(path):
    """All names, attributes and keywords of a source file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
            yield ast.unparse(node)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.keyword):
            yield node.arg


def test_T7_no_loader_workers_exist_that_could_die_or_hang():
    for path in SOURCES:
        assert not {"DataLoader", "num_workers", "worker_init_fn"} & set(names_in(path)), path


def test_T9_only_clocks_that_never_go_back_decide():
    for path in SOURCES:
        assert not {"time.time", "time.localtime", "datetime.today"} & set(names_in(path)), path
        dates = {"datetime.now", "datetime.datetime.now", "date.today", "datetime.date.today"}
        assert not dates & set(names_in(path)) or path.name == "fitting.py", (
            path
        )  # the date in a model's card


def test_T9_no_assert_that_python_O_would_drop():
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not any(isinstance(node, (ast.Assert,)) for node in ast.walk(tree)), path
        assert "__debug__" not in set(names_in(path)), path


# T10: the short half


def test_T10_only_two_checkpoints_are_kept_however_long_it_takes(tmp_path, every_epoch):
    detector = build(**SMALL)
    train(detector, run_of(detector, folder=tmp_path, epochs=6))
    kept = sorted(each.name for each in (tmp_path / CHECKPOINTS).iterdir())
    assert kept == ["epoch-000005", "epoch-000006"]
    shutil.rmtree(tmp_path / CHECKPOINTS)
