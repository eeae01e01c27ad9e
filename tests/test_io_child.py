"""Decoding in child processes: the same results as in this process, whatever happens to the children, and no traces."""

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from pydicom.charset import python_encoding as CHARSETS
from pydicom.data import get_testdata_files

from make import dicom_file, grey_array, grey_png, nifti_file, save_array
from umiad.errors import InputError, UmiadError
from umiad.io import Limits, expect, pool, read_frames, read_image, read_mask, read_stack, wire
from umiad.types import Reading

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from attacks import formats, inputs  # noqa: E402 - the repository's root is put on the path first

HERE, CHILD = Limits(isolated=False), Limits(child_seconds=20)
MIB = 1 << 20
GROUPS = ("raster", "DICOM", "NIfTI")
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
posix = pytest.mark.skipif(os.name != "posix", reason="signals, forks and limits of POSIX")


@pytest.fixture
def fresh(monkeypatch):
    """A pool of this test alone."""
    own = pool.Pool()
    monkeypatch.setattr(pool._PROCESS, "pool", own)
    yield own
    own.close()


@pytest.fixture
def trio(tmp_path):
    """One good file for each group of children."""
    png, volume = grey_png(tmp_path / "a.png"), grey_array()[:, :, None] * np.ones((1, 1, 3), np.uint8)
    return {
        "raster": png,
        "DICOM": dicom_file(tmp_path / "a.dcm", grey_array()),
        "NIfTI": nifti_file(tmp_path / "a.nii.gz", volume),
    }  # fmt: skip


def children(of, group="raster"):
    """The processes that wait for work."""
    return [worker._process for worker in of._idle.get(group, [])]


def everything(path, *, limits, frames="all", reading=None, mask=False):
    """All that can be known of a file, or the reason why it cannot be used, in comparable form."""
    try:
        if mask:
            return read_mask([path], limits=limits).tobytes()
        images = list(read_frames(path, frames=frames, reading=reading or Reading(), limits=limits))
    except InputError as error:
        return error.path, error.reason, error.hint
    return [
        (i.pixels.tobytes(), i.pixels.shape, i.name, i.mode, i.bits, i.notes, i.spacing, i.frame, i.patient)
        for i in images
    ]


def agree(path, **options):
    """Compare both ways bit for bit; whether the file could be read."""
    found = everything(path, limits=CHILD, **options)
    assert found == everything(path, limits=HERE, **options), path
    return isinstance(found, (list, bytes))


# ---- the same bits as in this process


def modes():
    """Rasters of every mode and compression that Pillow writes, by name."""
    rng = np.random.default_rng(0)
    grey, colour = grey_array((48, 40)), rng.integers(0, 255, (48, 40, 4), np.uint8)
    picture = {"L": PIL.Image.fromarray(grey), "RGB": PIL.Image.fromarray(colour[..., :3])}
    picture["RGBA"], picture["LA"] = PIL.Image.fromarray(colour), PIL.Image.fromarray(colour[..., :2], "LA")
    picture["CMYK"], picture["YCbCr"] = (PIL.Image.fromarray(colour, "CMYK"), picture["RGB"].convert("YCbCr"))
    to_lab = PIL.ImageCms.buildTransform(
        PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    picture["LAB"] = PIL.ImageCms.applyTransform(picture["RGB"], to_lab)
    picture["P"], picture["1"] = picture["RGB"].convert("P"), picture["L"].convert("1")
    picture["I;16"] = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    picture["I;16B"] = PIL.Image.fromarray(grey.astype(">u2") * 257)
    picture["I"] = PIL.Image.fromarray(grey.astype(np.int32) * 200)
    picture["F"] = PIL.Image.fromarray(grey.astype(np.float32) / 255)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    kinds = {"PNG": "L RGB RGBA LA P 1 I;16", "JPEG": "L RGB CMYK YCbCr", "BMP": "L RGB P 1"}
    kinds["TIFF"] = "L RGB RGBA LA CMYK YCbCr LAB P 1 I;16 I;16B I F"
    made = {
        f"{kind} {mode}": formats.encoded(picture[mode], kind)
        for kind, names in kinds.items()
        for mode in names.split()
    }
    for way in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate", "lzma", "zstd"):
        for mode in ("L", "RGB"):
            made[f"TIFF {way} {mode}"] = formats.encoded(picture[mode], "TIFF", compression=way)
    for way in ("group3", "group4", "tiff_ccitt"):
        made[f"TIFF {way}"] = formats.encoded(picture["1"], "TIFF", compression=way)
    made["TIFF big"] = formats.encoded(picture["L"], "TIFF", big_tiff=True)
    made["TIFF two frames"] = formats.encoded(
        picture["L"], "TIFF", save_all=True, append_images=[picture["L"]]
    )
    for mode in ("L", "RGB"):
        made[f"JPEG progressive {mode}"] = formats.encoded(picture[mode], "JPEG", progressive=True)
        made[f"JPEG optimised {mode}"] = formats.encoded(picture[mode], "JPEG", optimize=True, subsampling=2)
        for kind in ("PNG", "JPEG", "TIFF"):
            made[f"{kind} EXIF {mode}"] = formats.encoded(picture[mode], kind, exif=exif)
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    made["PNG profile"] = formats.encoded(picture["RGB"], "PNG", icc_profile=profile)
    made["JPEG profile"] = formats.encoded(picture["RGB"], "JPEG", icc_profile=profile)
    made["JPEG damaged EXIF"] = formats.encoded(picture["L"], "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff")
    made["PNG key"] = formats.encoded(picture["L"], "PNG", transparency=80)
    made["PNG palette key"] = formats.encoded(picture["P"], "PNG", transparency=3)
    made["PNG frames"] = formats.encoded(picture["L"], "PNG", save_all=True, append_images=[picture["LA"]])
    made["PNG texts"] = formats.good_png(extra=formats.chunk(b"zTXt", b"note\0\0" + formats.zlib_zeros(99)))
    return made


def test_rasters_of_all_modes_are_bit_equal_in_the_child(tmp_path, record_property):
    files = modes()
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
    for name, content in files.items():
        path = inputs.write(tmp_path, content, name.replace(" ", "_"))
        read += agree(path)
        agree(path, mask=True)
    assert read >= len(files) - 3
    note(record_property, "child", len(files), "rasters: bit-equal in the child and here")


def note(record_property, case, count, what):
    record_property("reliability", {"case": case, "tried": count, "passed": count, "what": what})


@pytest.mark.parametrize("part", range(4))
def test_I2_pydicoms_files_are_bit_equal_in_the_child(part, record_property):
    files = sorted({Path(name) for name in get_testdata_files() if Path(name).is_file()})[part::4]
    read = sum(agree(path, frames="middle") for path in files)
    assert read > 10
    note(record_property, "I2", len(files), "pydicom's files: bit-equal in the child and here")


@pytest.mark.parametrize("charset", [*sorted(set(CHARSETS)), "ISO_IR 999", "\\ISO 2022 IR 87"])
def test_dicom_of_all_character_sets_gives_the_same_patient_token_in_the_child(charset, tmp_path):
    changes = {"t00080005": b"CS" + charset.encode(), "t00100020": b"LO4711 \x1b$B;3\x1b(B\xe9"}
    path = inputs.write(tmp_path, formats.dicom(**changes))
    assert agree(path)
    assert read_image(path).patient == read_image(path, limits=HERE).patient != ""


@pytest.mark.parametrize("window", ["file", "full", "percentile", (300.0, 500.0)])
def test_dicom_of_all_windows_and_frames_is_bit_equal_in_the_child(window, tmp_path):
    stored = np.stack([grey_array(seed=k).astype(np.uint16) * 100 for k in range(3)])
    options = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 40, "WindowWidth": 400}
    for count, frames in ((0, "one"), (None, "all")):
        path = dicom_file(tmp_path / f"{count}.dcm", stored if count is None else stored[0], **options)
        assert agree(path, frames=frames, reading=Reading(window=window))


def volumes():
    """NIfTI files of many types and both versions, by name."""
    rng, affine = (
        np.random.default_rng(0),
        np.array([[0, -2.0, 0, 9], [0, 0, 3, -5], [1.5, 0, 0, 7], [0, 0, 0, 1]]),
    )
    grid = rng.integers(0, 100, (12, 14, 5))
    made = {"pair of axes": formats.nifti(np.ascontiguousarray(grid[..., 0], np.int16))}
    for kind in (
        np.uint8,
        np.int8,
        np.int16,
        np.uint16,
        np.int32,
        np.uint32,
        np.float32,
        np.float64,
        np.int64,
    ):
        made[np.dtype(kind).name] = nibabel.Nifti1Image(grid.astype(kind), affine, dtype=kind).to_bytes()
    made["NIfTI-2"] = nibabel.Nifti2Image(grid.astype(np.int16), affine).to_bytes()
    made["scaled"] = formats.nifti(grid.astype(np.int16), scl_slope=0.37, scl_inter=-5.0)
    made["window"] = formats.nifti(grid.astype(np.int16), cal_min=10.0, cal_max=60.0)
    made["metres"] = formats.nifti(grid.astype(np.int16), xyzt_units=1)
    made["NaN"] = formats.nifti(np.where(grid > 90, np.nan, grid).astype(np.float32))
    made["labels"] = formats.nifti((grid > 50).astype(np.uint8))
    made["big endian"] = nibabel.Nifti1Image(
        grid.astype(">i2"), affine, nibabel.Nifti1Header(endianness=">")
    ).to_bytes()
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_nifti_of_all_types_is_bit_equal_in_the_child(axis, packed, tmp_path):
    for name, content in volumes().items():
        path = inputs.write(tmp_path, gzip.compress(content, mtime=0) if packed else content, name)
        for reading in (Reading(axis=axis), Reading(axis=axis, window="percentile", nan="zero")):
            assert agree(path, reading=reading) or name == "NaN"
        agree(path, mask=True)


ALIKE = [each for each in inputs.ATTACKS if each.id not in ("I8", "I15")]


@pytest.mark.parametrize("part", range(4))
def test_hostile_files_end_alike_in_the_child_and_here(part, tmp_path):
    for number, attack in enumerate(ALIKE[part::4]):
        (folder := tmp_path / str(number)).mkdir()
        agree(attack.make(folder), frames="middle")


def test_the_stack_is_equal_in_the_child(trio):
    for path in trio.values():
        there, here = read_stack(path), read_stack(path, limits=HERE)
        assert (there.count, there.single, there.geometry) == (here.count, here.single, here.geometry)
        with pytest.raises(InputError, match="decoding process"):
            there.frame(0)


# ---- from wherever it is called

READ_ALL = """
from umiad.io import read_frames
names = {names!r}
found = [list(read_frames(name, frames="middle"))[0].size for name in names]
assert found[0] == (64, 64), found
"""


def script(trio, tail=""):
    return READ_ALL.format(names=[str(path) for path in trio.values()]) + textwrap.dedent(tail)


def python(*words, cwd=None, **options):
    """Run Python to its end, with every warning an error; its standard output."""
    command = [sys.executable, "-W", "error", "-X", "dev", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_it_works_from_standard_input(trio):
    assert python("-", input=script(trio, "print('read')")) == "read\n"


def test_it_works_from_a_command(trio):
    assert python("-c", script(trio, "print('read')")) == "read\n"


def test_an_unguarded_script_runs_once(trio, tmp_path):
    path = tmp_path / "job.py"
    path.write_text("print('start')\n" + script(trio))
    assert python(path) == "start\n"


def test_it_works_where_standard_streams_are_closed(trio, tmp_path):
    tail = f"""
    import os
    for number in (0, 1, 2):
        os.close(number)
    from umiad.io import pool
    pool.current().end_idle()
    found = [list(read_frames(name, frames="middle"))[0].size for name in names]
    open({str(tmp_path / "done")!r}, "w").write(str(len(found)))
    os._exit(0)
    """
    python("-c", script(trio, tail))
    assert (tmp_path / "done").read_text() == "3"


@posix
def test_nothing_of_the_current_folder_is_imported(trio, tmp_path):
    """Modules in the folder where somebody happens to be (a download folder, say) must not run in the child."""
    hostile = tmp_path / "hostile"
    for name in (
        "numpy",
        "umiad",
        "PIL",
        "json",
        "pydicom",
        "nibabel",
        "sitecustomize",
        "encodings",
        "resource",
    ):
        (hostile / name).mkdir(parents=True)
        evil = f"open({str(tmp_path / 'marker')!r}, 'w').close(); raise SystemExit(3)"
        (hostile / name / "__init__.py").write_text(evil)
    job = tmp_path / "job" / "job.py"
    job.parent.mkdir()
    job.write_text(script(trio, "print('read')"))
    assert python(job, cwd=hostile) == "read\n"
    assert not (tmp_path / "marker").exists()


@posix
def test_a_forked_process_has_children_of_its_own(trio):
    tail = """
    import os
    from umiad.io import pool
    def pids(): return [w._process.pid for each in pool.current()._idle.values() for w in each]
    first = pids()
    assert len(first) == 3
    child = os.fork()
    if child == 0:
        again = [list(read_frames(name, frames="middle"))[0].size for name in names]
        os._exit(0 if again == found and not set(pids()) & set(first) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [list(read_frames(name, frames="middle"))[0].size for name in names] == found
    assert pids() == first
    """
    python("-c", script(trio, tail))


@posix
def test_forked_workers_of_multiprocessing_have_children_of_their_own(trio):
    tail = """
    import multiprocessing
    def read(name): return list(read_frames(name, frames="middle"))[0].size
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map(read, names * 4) == found * 4
    assert list(map(read, names)) == found
    """
    assert "fork" in multiprocessing.get_all_start_methods()
    python("-c", script(trio, tail))


def test_threads_share_a_few_children(tmp_path, fresh):
    paths = [save_array(tmp_path / f"{seed}.png", grey_array(seed=seed)) for seed in range(20)]
    damaged = inputs.write(tmp_path, b"\x89PNG\r\n\x1a\n damaged", "damaged.png")

    def read(job):
        if job % 7 == 0:
            with pytest.raises(InputError, match="decoded as PNG"):
                read_image(damaged)
        return read_image(paths[job % 20]).pixels

    with ThreadPoolExecutor(8) as threads:
        for job, pixels in enumerate(threads.map(read, range(160))):
            np.testing.assert_array_equal(np.round(pixels[0] * 255), grey_array(seed=job % 20))
    assert 1 <= len(children(fresh)) <= pool.WORKERS


def test_a_reader_that_stops_early_leaves_a_pool_that_works(trio, fresh):
    for _ in range(3):
        frames = read_frames(trio["NIfTI"])
        assert next(frames).frame == 0
        frames.close()
    assert len(list(read_frames(trio["NIfTI"]))) == 3


# ---- whatever happens to a child


@posix
def test_a_child_that_is_killed_is_replaced(trio, fresh):
    read_image(trio["raster"])
    [process] = children(fresh)
    process.kill()
    process.wait()
    assert read_image(trio["raster"]).size == (64, 64)
    assert children(fresh)[0].pid != process.pid


@posix
def test_a_child_that_dies_with_a_file_names_the_file(trio, fresh, monkeypatch):
    read_image(trio["raster"])
    [process] = children(fresh)
    truth = wire.send

    def send(*arguments):
        process.send_signal(signal.SIGSEGV)
        process.wait()
        truth(*arguments)

    monkeypatch.setattr(wire, "send", send)
    with pytest.raises(InputError, match=r"made its decoder crash \(signal SIGSEGV\)") as caught:
        read_image(trio["raster"])
    assert caught.value.path == str(trio["raster"])
    monkeypatch.undo()
    assert read_image(trio["raster"]).size == (64, 64)


@posix
def test_a_child_that_hangs_is_ended(trio, fresh, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 1)
    monkeypatch.setattr(pool, "LOOK_SECONDS", 0.05)
    read_image(trio["raster"])
    [process] = children(fresh)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="was not decoded within 1 s"):
        read_image(trio["raster"], limits=Limits(child_seconds=1))
    assert process.poll() is not None
    assert read_image(trio["raster"]).size == (64, 64)


@posix
def test_a_file_that_takes_too_long_is_given_up(trio, fresh, tmp_path):
    path = inputs.write(tmp_path, inputs.killer())
    with pytest.raises(InputError, match="needs more than 1 s of processor time"):
        read_image(path, limits=Limits(child_seconds=1))
    assert read_image(trio["raster"]).size == (64, 64)


@posix
def test_processor_time_is_counted_for_each_file_anew(fresh, tmp_path):
    path = inputs.write(tmp_path, formats.black_png(3000))
    for _ in range(12):
        read_image(path, limits=Limits(child_seconds=1))
    assert len(children(fresh)) == 1


def large_dicom():
    """An RLE file of 25 million black pixels."""
    size = struct.pack("<H", 5000)
    frame = formats.rle_frame(b"\x81\0" * (5000 * 5000 // 128 + 1))
    changes = {"t00280010": b"US" + size, "t00280011": b"US" + size}
    return formats.dicom(syntax=formats.RLE, pixels=formats.fragments(frame), **changes)


def large_nifti():
    """A gzip file of 50 million voxels, 100 MB, most of them equal."""
    grid = np.zeros((1000, 1000, 50), np.int16)
    grid[::7, ::3] = np.arange(50)
    return gzip.compress(formats.nifti(grid), 1, mtime=0)


LARGE = {"raster": lambda: formats.black_png(6000), "DICOM": large_dicom, "NIfTI": large_nifti}


@needs_proc
@pytest.mark.parametrize("group", GROUPS)
def test_a_file_that_needs_too_much_memory_is_given_up(group, trio, fresh, tmp_path):
    large = inputs.write(tmp_path, LARGE[group]())
    read_image(trio[group], frame="middle")
    status = Path(f"/proc/{children(fresh, group)[0].pid}/status").read_text()
    size = 1024 * int(status.partition("VmSize:")[2].split()[0])
    with pytest.raises(InputError, match="memory"):
        read_image(large, frame="middle", limits=Limits(child_memory=size + 16 * MIB))
    assert read_image(trio[group], frame="middle").size == (64, 64)
    assert read_image(large, frame="middle").pixels.shape[0] == 1


@posix
def test_ctrl_c_is_not_the_childrens_business(trio, tmp_path):
    tail = """
    import time
    from umiad.io import pool
    def pids(): return [w._process.pid for each in pool.current()._idle.values() for w in each]
    before = pids()
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
    assert [list(read_frames(name, frames="middle"))[0].size for name in names] == found
    assert pids() == before
    print("same", flush=True)
    """
    with start(script(trio, tail)) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "same\n"
        assert process.wait(timeout=30) == 0


def start(code):
    """Run a script in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


PIDS = """
import json, signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
from umiad.io import pool
print(json.dumps([w._process.pid for each in pool.current()._idle.values() for w in each]), flush=True)
"""


def gone(pids, *, seconds=20.0):
    """Wait until none of the processes is left (a zombie that nobody waits for counts as gone)."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        left = []
        for pid in pids:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            left += [pid] if state != "Z" else []
        if not left:
            return True
        time.sleep(0.05)
    return False


@needs_proc
@pytest.mark.parametrize(
    "end",
    [
        "normally",
        "SIGKILL",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("by an error", "by os._exit", "SIGTERM", "SIGHUP")
        ),
    ],
)
def test_no_child_outlives_its_parent(end, trio):
    tail = {"normally": "", "by an error": "raise SystemExit(1)", "by os._exit": "import os; os._exit(0)"}
    with start(script(trio) + PIDS + tail.get(end, "time.sleep(60)")) as process:
        pids = json.loads(process.stdout.readline())
        assert len(pids) == 3
        if end.startswith("SIG"):
            process.send_signal(signal.Signals[end])
        process.wait(timeout=30)
    assert gone(pids)


@needs_proc
def test_a_busy_child_does_not_outlive_its_parent(trio, tmp_path):
    slow = inputs.write(tmp_path, inputs.killer(), "slow.jpg")
    tail = f"""
    import threading
    from umiad.io import read_image, Limits
    limits = Limits(child_seconds=2)
    threading.Thread(target=read_image, args=({str(slow)!r},), kwargs=dict(limits=limits), daemon=True).start()
    time.sleep(0.3)
    while True: time.sleep(1)
    """
    with start(script(trio) + PIDS + textwrap.dedent(tail)) as process:
        pids = json.loads(process.stdout.readline())
        time.sleep(0.5)
        process.kill()
    assert gone(pids, seconds=200.0)  # it ends by its processor time, of which a busy machine gives it little


@needs_proc
def test_files_and_children_do_not_add_up(trio, fresh, tmp_path):
    damaged = inputs.write(tmp_path, b"\x89PNG\r\n\x1a\n damaged", "damaged.png")

    def some(count):
        for number in range(count):
            read_image(trio[GROUPS[number % 3]], frame="middle")
            with pytest.raises(InputError):
                read_image(damaged)

    some(6)
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    some(200)
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() <= threads + 1
    assert Counter(len(children(fresh, group)) for group in GROUPS) == {1: 3}
    fresh.close()
    assert len(os.listdir("/proc/self/fd")) == before - 9  # three pipes to each of three children


def test_the_end_is_clean_whatever_was_read(trio, tmp_path):
    damaged = inputs.write(tmp_path, b"\x89PNG\r\n\x1a\n damaged", "damaged.png")
    tail = f"""
    from umiad.errors import InputError
    from umiad.io import read_image
    try:
        read_image({str(damaged)!r})
    except InputError as error:
        print(error.reason)
    unfinished = read_frames(names[2])
    next(unfinished)
    """
    assert "decoded as PNG" in python("-c", script(trio, tail))


# ---- what a child may do

RIGHTS = """
import errno, json, os, socket, subprocess, sys, tempfile, threading
from umiad.io import child
child._import({group!r})
child._give_up_files()
path = {path!r}
def refused(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno, "other")
    return "allowed"
attempts = dict(
    read=lambda: open(path), write=lambda: open(path, "w"), create=lambda: open(path + ".new", "x"),
    listdir=lambda: os.listdir("/"), scandir=lambda: os.scandir("/"), pipe=os.pipe, dup=lambda: os.dup(0),
    inet=lambda: socket.socket(socket.AF_INET), inet6=lambda: socket.socket(socket.AF_INET6),
    unix=lambda: socket.socket(socket.AF_UNIX), udp=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    pair=socket.socketpair, process=lambda: subprocess.run([sys.executable, "-c", ""]),
    temporary=tempfile.TemporaryFile, memory=lambda: os.memfd_create("x"), null=lambda: open(os.devnull),
    grow=lambda: os.truncate(path, 10**6),
)
sys.stdout.write(json.dumps({{name: refused(attempt) for name, attempt in attempts.items()}}))
"""


@posix
@pytest.mark.parametrize("group", GROUPS)
def test_a_child_opens_no_file_and_no_socket(group, tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + RIGHTS
    command = [sys.executable, "-c", code.format(group=group, path=str(path))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert found.pop("grow") == "EFBIG"
    assert set(found.values()) <= {"EMFILE", "ENOENT", "ENOSYS"}, (
        found
    )  # ENOENT: no folder for temporary files
    assert found["read"] == found["inet"] == found["pipe"] == "EMFILE"
    assert path.read_text() == "secret"


@needs_proc
def test_a_living_child_holds_two_pipes_and_its_own_status(trio, fresh):
    for group, path in trio.items():
        read_image(path, frame="middle")
        [process] = children(fresh, group)
        held = [os.readlink(each) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert sum(name.startswith("pipe:") for name in held) == 2, held
        others = {name for name in held if not name.startswith("pipe:")}
        assert others <= {"/dev/null", f"/proc/{process.pid}/status"}
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert "Max open files            3                    3" in limits
        assert "Max core file size        0                    0" in limits


def test_a_child_that_cannot_be_started_says_why(trio, fresh, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(UmiadError, match=r"names no executable.*isolated=False"):
        read_image(trio["raster"])
    assert read_image(trio["raster"], limits=HERE).size == (64, 64)


@pytest.mark.parametrize("group", GROUPS)
def test_a_child_that_is_expected_decodes_the_first_file(group, trio, fresh):
    expect([trio[group].parent / "absent.png"])
    expect([])
    assert not fresh._coming
    for _ in range(2):
        expect([trio[group], trio["raster"]])
    [thread] = fresh._coming.values()
    thread.join()
    [process] = children(fresh, group)
    read_image(trio[group], frame="middle")
    expect([trio[group]])
    assert children(fresh, group) == [process]
    assert not fresh._coming


def test_a_file_waits_for_the_child_that_is_expected(trio, fresh, monkeypatch):
    started = []
    make = pool._Worker.__init__
    monkeypatch.setattr(
        pool._Worker, "__init__", lambda self, group: (started.append(group), make(self, group))[1]
    )
    (trio["raster"].parent / "folder").mkdir()
    shutil.copy(trio["raster"], trio["raster"].parent / "folder")
    expect([trio["raster"].parent / "folder"])
    read_image(trio["raster"])
    assert started == ["raster"]


def test_a_child_that_is_expected_ends_with_the_pool(trio, fresh, monkeypatch):
    expect([trio["raster"]])
    fresh.close()
    assert not children(fresh)
    expect([trio["raster"]])
    assert not fresh._coming


def test_an_expected_child_that_cannot_be_started_is_told_when_a_file_needs_it(trio, fresh, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    expect([trio["raster"]])
    with pytest.raises(UmiadError, match="names no executable"):
        read_image(trio["raster"])


def test_what_is_no_message_is_refused():
    class Stream:
        def __init__(self, content):
            self.content = bytearray(content)

        def readinto(self, view):
            count = min(len(view), len(self.content))
            view[:count], self.content[:count] = self.content[:count], b""
            return count

    whole = b"\0\0\0\x02" + bytes(7) + b"\x01" + b"{}x"
    assert wire.receive(Stream(whole)) == ({}, bytearray(b"x"))
    bad = [whole[:cut] for cut in range(len(whole))]
    bad += [b"\xff" * 12, b"\0\0\0\x02" + b"\xff" * 8 + b"{}", b"\0\0\0\x02" + bytes(8) + b"[]"]
    bad += [b"\0\0\0\x02" + bytes(8) + b"{'", b"\0\x01\0\0" + bytes(8) + b"[" * 65536]
    for content in bad:
        with pytest.raises(wire.BrokenWire):
            wire.receive(Stream(content))
