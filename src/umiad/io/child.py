"""The process that decodes files nobody vouches for: `python -m umiad.io.child GROUP`, spoken to over pipes.

It reads requests from standard input and answers on standard output (see `wire`). It imports what it needs,
then gives up the right to open files and sockets; each file has a ceiling of memory and of processor time. It
ends when its input ends, so nothing is left behind when the process that started it dies.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from umiad.errors import InputError
from umiad.io import frames, wire
from umiad.io.decode import open_images, open_masks, unexpected
from umiad.io.source import TOO_LARGE, Limits, Source, Window
from umiad.types import Image, Stack

GROUPS = ("raster", "DICOM", "NIfTI")


def main(group: str) -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    requests, answers = _pipes()
    _import(group)
    status = _status()
    _give_up_files()
    wire.send(answers, {"ready": group})
    _mute()
    while True:
        try:
            request, content = wire.receive(requests)
        except wire.BrokenWire:
            return
        except MemoryError:
            wire.send(answers, {"error": list(TOO_LARGE)})
            return  # the rest of the request is still in the pipe
        source = _source(request)
        _limit(source.limits)
        try:
            for header, payload in _answer(request, content, source):
                if "end" in header or "error" in header:
                    header["peak"] = _peak_bytes(status)
                wire.send(answers, header, payload)
        except BrokenPipeError:
            return
        del content


def _answer(
    request: dict[str, Any], content: bytearray, source: Source
) -> Iterator[tuple[dict[str, Any], bytes | memoryview]]:
    """First the stack, then each image, then the end; an error takes the place of what could not be had."""
    try:
        stack = (open_masks if request["mask"] else open_images)(bytes(content), source)
        yield _about(stack), b""
        if request["frames"] is not None:
            for number in _numbers(request["frames"], stack, source):
                _limit(source.limits)  # each frame has the time of a file: a cine of 500 frames is no attack
                image = stack.frame(number)
                yield image_header(image), np.ascontiguousarray(image.pixels, dtype=np.float32).data.cast("B")
        yield {"end": True}, b""
    except InputError as error:
        yield {"error": [error.reason, error.hint]}, b""
    except (Exception, RecursionError) as error:
        told = unexpected(error, source)
        yield {"error": [told.reason, told.hint]}, b""


def _numbers(choice: str | Sequence[int], stack: Stack, source: Source) -> Sequence[int]:
    return frames.resolve(choice, stack.count, name=source.name, single=stack.single)


def _about(stack: Stack) -> dict[str, Any]:
    place = stack.geometry
    geometry = None if place is None else [place.shape, place.affine, place.axis]
    return {"count": stack.count, "single": stack.single, "geometry": geometry}


def image_header(image: Image) -> dict[str, Any]:
    """What is sent of an image beside its pixels."""
    return {
        "shape": image.pixels.shape,
        "mode": image.mode,
        "bits": image.bits,
        "notes": image.notes,
        "spacing": image.spacing,
        "frame": image.frame,
        "patient": image.patient,
    }


def _source(request: dict[str, Any]) -> Source:
    window = request["window"]
    chosen: Window = window if isinstance(window, str) else (window[0], window[1])  # type: ignore[assignment]
    return Source(
        name=request["name"],
        kind=request["kind"],
        limits=Limits(**request["limits"]),
        window=chosen,
        axis=request["axis"],
        nan=request["nan"],
        key=bytes.fromhex(request["key"]),
    )


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two ends, out of reach of whatever a library prints."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    _redirect(1)
    _redirect(0)
    return requests, answers


def _mute() -> None:
    """Until now standard error told why a start failed; C libraries would write about each bad file there."""
    os.dup2(1, 2)


def _status() -> int | None:
    """What the operating system says of this process, opened while that may be done. Linux only."""
    try:
        return os.open("/proc/self/status", os.O_RDONLY)
    except OSError:
        return None


def _peak_bytes(status: int | None) -> int | None:
    """The most memory this process has held; `ru_maxrss` would start at that of the parent."""
    if status is None:
        return None
    lines = os.pread(status, 8192, 0).decode(errors="replace").splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def _redirect(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, number)
    os.close(null)


def _import(group: str) -> None:
    """Everything the readers of a group may want later: afterwards nothing can be opened."""
    sys.dont_write_bytecode = True
    from umiad.io import warm

    {"raster": warm.raster, "DICOM": warm.dicom, "NIfTI": warm.nifti}[group]()


def _give_up_files() -> None:
    """No file grows, no core is written, and no further file or socket is opened. POSIX only."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # numbers 0 to 2 are taken


def _limit(limits: Limits) -> None:
    """Ceilings of memory, and of processor time from now on. POSIX only."""
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = limits.child_memory if most == resource.RLIM_INFINITY else min(limits.child_memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + limits.child_seconds)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(
        resource.RLIMIT_CPU, (seconds if most == resource.RLIM_INFINITY else min(seconds, most), most)
    )


if __name__ == "__main__":
    main(sys.argv[1])
