"""Where the time goes: stages of scoring, whole runs, fitting, start-up, and how costs grow; for docs/performance.md.

    python benchmarks/performance.py --data ../shared/data --weights FILE [--only folder,scaling]

Every figure is a ratio to one of two references that take turns with it in the same run, medians of the turns: R1 is
the plain ResNet18, all four layers, float32, PyTorch's default layout; R2 the fastest float32 form of it that we
know, folded and channels-last. A part keeps its last figures when it is not named in --only, or when a row is
missing now (a package or a compiler is not there).
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import profile_jobs
from metrics_speed import CHUNK, base_fields, chunk
from paper_protocol import CODE
from speed import alternate
from umiad import api, batch, exported, metrics, weights
from umiad.data import list_images
from umiad.detectors.check import clean_images
from umiad.errors import ConfigError, MissingExtraError
from umiad.export import export_model
from umiad.fitted import FittedModel
from umiad.io import read_image
from umiad.nn.encoder import Pyramid, yardstick
from umiad.overlay import colour_scale, draw_overlay, png_bytes
from umiad.phantoms import write_phantoms
from umiad.preprocess import to_input
from umiad.runtimes import Runtime
from umiad.scorer import BATCH_SIZE, Scorer

TARGET = Path(__file__).parent / "results" / "performance.json"
FOLDER, SOME = 500, 24
"""Images of the folder that is scored as a whole; images whose stages are timed one by one."""
SIZES, BATCHES = (128, 256, 512, 1024), (1, 2, 4, 8, 16)
PEAK = """
import json, sys
from pathlib import Path
import lightning.pytorch, matplotlib.figure
from umiad import api, batch

def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = high()
batch.score_files(api.load(sys.argv[1]), [Path(each) for each in sys.argv[3:]], Path(sys.argv[2]))
print(json.dumps([high() - before, high()]))
"""
"""The body of a fresh process that scores files: prints its peak above the imports, and in all, in kB."""
EXPORTS: dict[str, tuple[Runtime, bool]] = {
    "ONNX Runtime": ("onnx", False),
    "ONNX Runtime, int8": ("onnx", True),
    "OpenVINO": ("openvino", False),
}
"""Exports that are timed: runtime, and whether in 8 bits."""
INT8_FILES = 32
COUNTS: dict[str, tuple[int, ...]] = {
    "score": (16, 32, 64, 128),
    "fit": (16, 32, 64, 128),
    "evaluate": (50, 100, 200, 400),
}


class References:
    """R1 and R2 on preprocessed images [N,3,S,S], in batches."""

    def __init__(self, state: dict[str, torch.Tensor] | None) -> None:
        self._plain, self._fast = yardstick("resnet18"), Pyramid(state, seed=0)

    def calls(self, images: torch.Tensor, size: int = BATCH_SIZE) -> dict[str, Callable[[], object]]:
        """Name -> a pass over all images."""

        def run(network: Callable[[torch.Tensor], object]) -> Callable[[], None]:
            def call() -> None:
                with torch.inference_mode():
                    for each in images.split(size):
                        network(each)

            return call

        return {"r1": run(self._plain), "r2": run(self._fast)}


class Bench:
    """A fitted default model and images to try it on."""

    def __init__(self, data: Path, weights_source: str, folder: Path) -> None:
        self.source, self.folder = weights_source, folder
        known = data / "busi"
        self.real = (known / "normal").is_dir()
        if not self.real:
            known = write_phantoms(
                folder / "set", n_normal=FOLDER // 4, n_abnormal=FOLDER - FOLDER // 4, size=512
            )
        self.data = known
        found, _ = list_images([known])
        images = [path for path in found if "_mask" not in path.name]
        self.files = images[:FOLDER]
        self.normals = [path for path in images if path.parent.name == "normal"][:INT8_FILES]
        self.references = References(weights.resolve(weights_source).state)
        self.model = self.fit(self.inputs(256, 32))

    def build(self, size: int = 256, preset: str = "default") -> Any:
        """The default detector, not fitted."""
        return api.build("egmf", preset=preset, weights=self.source, size=size)

    def fit(self, images: Sequence[np.ndarray], size: int = 256, preset: str = "default") -> FittedModel:
        """The default, or another preset, fitted on grey images in 0..1."""
        return api.fit(self.build(size, preset), list(images), options=api.FitOptions(holdout=0.2))

    def inputs(self, size: int, count: int) -> list[np.ndarray]:
        """Grey images [size,size] in 0..1, generated."""
        return [np.asarray(each) for each in grey(clean_images(count, size=size, seed=3))]


def grey(images: torch.Tensor) -> torch.Tensor:
    """Generated inputs [B,3,S,S] as images [B,S,S] in 0..1."""
    mean = images.mean(1)
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    return (mean - low) / (high - low).clamp_min(1e-6)


def stages(bench: Bench, turns: int) -> dict[str, float]:
    """Seconds per image of each stage of `umiad score`, one after another, as multiples of R1's."""
    files, model, preprocessing = bench.files[:SOME], bench.model, bench.model.config.preprocessing
    images = [read_image(file) for file in files]
    inputs = np.stack([to_input(each, preprocessing) for each in images])
    sizes = [image.size for image in images]
    prepared = model.detector.prepare(torch.from_numpy(inputs))
    maps = model.score_inputs(inputs, sizes).anomaly_map.numpy()
    findings = [model.finding(i, 0.0, m) for i, m in zip(images, maps, strict=True)]
    scale = colour_scale(None, model.config.map_reference)
    pictures = [
        draw_overlay(i, f.anomaly_map, scale=scale, regions=f.regions)
        for i, f in zip(images, findings, strict=True)
    ]
    blob = bench.folder / "map.npy"

    def fibres() -> None:
        for each in torch.from_numpy(inputs).split(BATCH_SIZE):
            model.detector.prepare(each)

    def likelihood() -> None:
        for start in range(0, len(inputs), BATCH_SIZE):
            model.detector.score_prepared({k: v[start : start + BATCH_SIZE] for k, v in prepared.items()})

    found = alternate(
        {
            **bench.references.calls(torch.from_numpy(inputs)),
            "read": lambda: [read_image(file) for file in files],
            "resize": lambda: [to_input(each, preprocessing) for each in images],
            "backbone, image and mirror": fibres,
            "flows, map and score": likelihood,
            "finding": lambda: [model.finding(i, 0.0, m) for i, m in zip(images, maps, strict=True)],
            "map to disk": lambda: [np.save(blob, f.anomaly_map) for f in findings],
            "draw": lambda: [
                draw_overlay(i, f.anomaly_map, scale=scale, regions=f.regions)
                for i, f in zip(images, findings, strict=True)
            ],
            "encode picture": lambda: [png_bytes(each) for each in pictures],
        },
        repeats=turns,
    )
    return ratios(found)


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Everything divided by R1; R1 itself in milliseconds is left to the machine's owner."""
    return {name: round(value / seconds["r1"], 4) for name, value in seconds.items() if name != "r1"}


def folder(bench: Bench, turns: int) -> dict[str, float]:
    """Scoring the whole folder, without and with pictures and maps, as multiples of R1 on as many images.

    By a model that is loaded, and by the command `umiad score` from its start; both also by an export to ONNX.
    """
    sample = torch.from_numpy(
        np.stack(
            [to_input(read_image(f), bench.model.config.preprocessing) for f in bench.files[:BATCH_SIZE]]
        )
    )
    count = len(bench.files) // BATCH_SIZE * BATCH_SIZE
    images = sample.repeat(count // BATCH_SIZE, 1, 1, 1)

    def score(outputs: batch.Outputs, scorer: Scorer = bench.model) -> Callable[[], object]:
        return lambda: batch.score_files(scorer, bench.files[:count], bench.folder / "out", outputs=outputs)

    model, files = saved(bench), [str(file) for file in bench.files[:count]]
    plain = ("--pictures", "none", "--maps", "none")
    words = ("score", str(model), *files, "--out", str(bench.folder / "out"), *plain)
    nothing = batch.Outputs(pictures="none", maps="none")
    calls = {
        "nothing written": score(nothing),
        "maps and pictures": score(batch.Outputs()),
        "command, nothing written": command(*words),
    }
    if (export := exported_to_onnx(bench)) is not None:
        calls["export, nothing written"] = score(nothing, exported.load(export))
        calls["export, command"] = command("score", str(export), *words[2:])
    return {
        "images": count,
        **ratios(alternate({**bench.references.calls(images), **calls}, repeats=turns)),
    }


def saved(bench: Bench) -> Path:
    """The folder of the bench's model."""
    model = bench.folder / "model"
    if not model.exists():
        bench.model.save(model)
    return model


def exported_to_onnx(bench: Bench) -> Path | None:
    """The folder of the bench's model as an ONNX graph; None where the packages for that are not installed."""
    target = bench.folder / "onnx"
    try:
        if not target.exists():
            export_model(bench.model, target, to="onnx")
        exported.load(target)
    except MissingExtraError as error:
        print(f"export: not measured, {error}")
        return None
    return target


def command(*words: str) -> Callable[[], object]:
    """A call of `umiad` in a fresh process, which must end without complaint."""
    return lambda: subprocess.run([sys.executable, "-m", "umiad", *words], capture_output=True, check=True)


def arrays(bench: Bench, turns: int) -> dict[str, float]:
    """`score` of one and of eight arrays of 256 px, over R1 and R2; by preset "quick" and by an export, over R1."""
    found, quick = {}, bench.fit(bench.inputs(256, 32), preset="quick")
    export = exported_to_onnx(bench)
    graph = None if export is None else exported.load(export)
    for count in (1, 8):
        images = bench.inputs(256, count)
        tensors = clean_images(count, size=256)
        calls = {
            "score": functools.partial(bench.model.score, images),
            "quick": functools.partial(quick.score, images),
        }
        if graph is not None:
            calls["export"] = functools.partial(graph.score, images)
        seconds = alternate({**bench.references.calls(tensors), **calls}, repeats=3 * turns)
        found[f"{count}, over r1"] = round(seconds["score"] / seconds["r1"], 4)
        found[f"{count}, over r2"] = round(seconds["score"] / seconds["r2"], 4)
        for name in calls.keys() - {"score"}:
            found[f"{count}, {name}, over r1"] = round(seconds[name] / seconds["r1"], 4)
    return found


def fitting(bench: Bench, turns: int) -> dict[str, float]:
    """A whole fit of the default on the set's normal images, in seconds and as a multiple of R1 on as many images."""
    data = bench.data
    started = time.perf_counter()
    model = api.fit(bench.build(), data, options=api.FitOptions(holdout=0.0))
    seconds = time.perf_counter() - started
    count = int(model.info["n_train"] or 0)
    images = clean_images(BATCH_SIZE, size=256).repeat(-(-count // BATCH_SIZE), 1, 1, 1)[:count]
    r1 = alternate({"r1": bench.references.calls(images)["r1"]}, repeats=turns)["r1"]
    return {"images": count, "seconds": round(seconds, 1), "over r1": round(seconds / r1, 3)}


def startup(bench: Bench, turns: int) -> dict[str, float]:
    """Seconds of `umiad --help` and of scoring one image, each in a fresh process, files in the system's cache."""
    one = (str(bench.files[0]), "--out", str(bench.folder / "one"))
    calls = {
        "help": command("--help"),
        "score one image": command("score", str(saved(bench)), *one),
        "import torch": lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True),
    }
    if (export := exported_to_onnx(bench)) is not None:
        calls["score one image by an export"] = command("score", str(export), *one)
    return {name: round(value, 3) for name, value in alternate(calls, repeats=turns).items()}


def growth(bench: Bench, turns: int) -> dict[str, Any]:
    """How costs grow: seconds at each size, batch and number of images, and the exponent of a power law."""
    found: dict[str, Any] = {}
    model = bench.model
    found["batch"] = power(
        {n: timed(lambda n=n: model.detector.score(clean_images(n, size=256)), turns) for n in BATCHES}
    )
    arrays_ = bench.inputs(256, max(COUNTS["score"]))
    found["images scored"] = power(
        {n: timed(lambda n=n: model.score(arrays_[:n]), turns) for n in COUNTS["score"]}
    )
    found["images fitted"] = power({n: timed(lambda n=n: bench.fit(arrays_[:n]), 1) for n in COUNTS["fit"]})
    found["maps evaluated"] = power(dict(evaluated(turns)))
    found["edge in pixels"] = power(dict(sized(bench, turns)))
    return found


def evaluated(turns: int) -> Iterator[tuple[int, float]]:
    """Number of maps of 256 px -> seconds of their exact pixel AUROC and AUPRO."""
    fields, most = base_fields(np.random.default_rng(0)), max(COUNTS["evaluate"])
    chunks = (chunk(number, *fields) for number in range(-(-most // CHUNK)))
    maps, masks = (np.concatenate(each) for each in zip(*chunks, strict=True))

    def exact(count: int) -> None:
        ranking = metrics.rank_pixels(maps[:count], masks[:count])
        metrics.ranked_auroc(ranking)
        metrics.ranked_aupro(ranking)

    for count in COUNTS["evaluate"]:
        yield count, timed(functools.partial(exact, count), turns)


def sized(bench: Bench, turns: int) -> Iterator[tuple[int, float]]:
    """Edge of the input -> seconds of scoring one image."""
    for size in SIZES:
        detector = bench.fit(bench.inputs(size, 4), size=size).detector
        image = clean_images(1, size=size)
        yield size, timed(lambda: detector.score(image), turns)  # noqa: B023 - called at once


def timed(call: Callable[[], object], turns: int) -> float:
    """Median seconds, after one call that warms up."""
    return alternate({"call": call}, repeats=turns)["call"]


def power(seconds: dict[int, float]) -> dict[str, Any]:
    """The points, relative to the first, and the exponent b of seconds = a n^b by least squares of the logarithms."""
    n, t = np.array(list(seconds)), np.array(list(seconds.values()))
    exponent = float(np.polyfit(np.log(n), np.log(t), 1)[0])
    return {
        "exponent": round(exponent, 3),
        "points": {str(k): round(v / t[0], 4) for k, v in seconds.items()},
    }


def memory(bench: Bench, turns: int) -> dict[str, float]:
    """Peak megabytes of `umiad score` on the folder: above its imports, and in all."""
    del turns
    words = [
        sys.executable,
        "-c",
        PEAK,
        str(saved(bench)),
        str(bench.folder / "peak"),
        *map(str, bench.files[:64]),
    ]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    above, whole = json.loads(out.splitlines()[-1])
    return {"above the imports": round(above / 1e3, 1), "in all": round(whole / 1e3, 1)}


def runtimes(bench: Bench, turns: int) -> dict[str, float]:
    """Scoring 8 arrays by the model and by each export of it whose packages are installed, as multiples of R1."""
    images, tensors = bench.inputs(256, BATCH_SIZE), clean_images(BATCH_SIZE, size=256)
    scorers: dict[str, Scorer] = {"torch": bench.model}
    for name, (to, int8) in EXPORTS.items():
        target = bench.folder / name.replace(", ", "-")
        try:
            export_model(bench.model, target, to=to, int8=bench.normals if int8 else ())
            scorers[name] = exported.load(target)
        except MissingExtraError as error:
            print(f"{name}: not measured, {error}")
        except ConfigError as error:  # 8 bits may change too much
            print(f"{name}: {error}")
    calls = {name: functools.partial(scorer.score, images) for name, scorer in scorers.items()}
    return ratios(alternate({**bench.references.calls(tensors), **calls}, repeats=3 * turns))


def backbone(bench: Bench, turns: int) -> dict[str, Any]:
    """Other ways to run the backbone, as multiples of R1."""
    import backbone_forms  # late: it imports torch's compiler

    del bench
    return backbone_forms.measure(3 * turns)


def jobs(bench: Bench, turns: int) -> dict[str, Any]:
    """Shares of the stages of a fit and of an evaluation, each once: they take minutes."""
    del turns
    return profile_jobs.jobs(bench.build, bench.data)


def training(bench: Bench, turns: int) -> dict[str, float]:
    """Parts of a step of the published training, as multiples of R1."""
    images = clean_images(profile_jobs.STEP_IMAGES, size=256)
    r1 = bench.references.calls(images, len(images))["r1"]
    return profile_jobs.training(bench.source, r1, images, turns)


PARTS: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
    "backbone": backbone,
    "stages": stages,
    "folder": folder,
    "arrays": arrays,
    "fitting": fitting,
    "jobs": jobs,
    "training": training,
    "startup": startup,
    "growth": growth,
    "memory": memory,
    "runtimes": runtimes,
}


def main() -> None:
    """Measure the parts that are asked for, and write benchmarks/results/performance.json after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with busi (else: phantoms)")
    parser.add_argument("--weights", default="random", help="backbone weights, as in umiad fit")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    found = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.data, "random" if options.weights == "auto" else options.weights, Path(scratch))
        for name in options.only.split(","):
            facts = {
                "commit": CODE,
                "weights": bench.model.detector.config.weights,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "images": "busi" if bench.real else "phantoms",
                "turns": options.turns,
            }
            values = PARTS[name](bench, options.turns)
            if lost := sorted(set(found.get(name, {}).get("values", {})) - set(values)):
                print(f"{name}: without {', '.join(lost)}; the figures of before are kept")
                continue
            found[name] = {"facts": facts, "values": values}
            TARGET.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            print(name, json.dumps(found[name]["values"], indent=1))


if __name__ == "__main__":
    main()
