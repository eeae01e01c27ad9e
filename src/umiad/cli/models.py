"""Commands around a model: check-data, fit, score, evaluate, calibrate, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from umiad.cli.app import app, command, console, importing, print_json, set_threads
from umiad.cli.files import Axis, Follow, Frame, Nan, ShowNames, WindowOption, file_options, reading
from umiad.progress import RichReporter

if TYPE_CHECKING:
    from umiad.batch import ShardSummary
    from umiad.fitted import FittedModel
    from umiad.scorebook import Summary
    from umiad.scorer import Scorer, ScoringConfig
    from umiad.types import FileOptions

Data = Annotated[Path, typer.Argument(help="Folder of images, or a .csv manifest.", metavar="DATA")]
Model = Annotated[Path, typer.Argument(help="Saved model (a directory).", metavar="MODEL")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: all).")]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option("--device", help="Where to compute; auto = best present."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Groups = Annotated[
    Path | None,
    typer.Option("--groups", help="CSV path,group: images that must stay on one side of a split."),
]
Holdout = Annotated[
    float,
    typer.Option(
        "--holdout", min=0.0, max=0.89, help="Share of training normals kept for the threshold; 0 = none."
    ),
]
Fpr = Annotated[float, typer.Option("--fpr", help="False-positive rate that the threshold keeps.")]
Size = Annotated[int, typer.Option("--size", help="Edge in pixels; a multiple of 32 from 64 up.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the split and of the detector.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Instead of the preset's.")]
Weights = Annotated[
    str, typer.Option("--weights", help="Backbone: imagenet, random, a label in the cache, or a file.")
]
Equalise = Annotated[
    int | None,
    typer.Option(
        "--equalise",
        min=32,
        metavar="N",
        help="Reduce every image to N x N by area averaging and back, so that file size and sharpness cannot "
        "give labels away (off by default).",
    ),
]
MinArea = Annotated[int, typer.Option("--min-area", min=1, help="Leave out regions below this many pixels.")]


@app.command("check-data")
@command
def check_data(
    data: Data,
    seed: Seed = 0,
    holdout: Holdout = 0.2,
    groups: Groups = None,
    frame: Frame = None,
    window: WindowOption = "file",
    axis: Axis = "axial",
    nan: Nan = "error",
    follow: Follow = False,
    show_names: ShowNames = False,
    json: Json = False,
) -> int:
    """Show what is in a data set, what is wrong with it, and which split would be made."""
    from umiad.data import load_data
    from umiad.duplicates import fingerprints
    from umiad.splits import read_groups
    from umiad.survey import survey
    from umiad.survey_view import render

    files = file_options(frame, reading(window, axis, nan), follow=follow, show_names=show_names)
    found = load_data(data, files=files)
    with RichReporter(console(err=True)) as reporter:
        prints = fingerprints(found.cases, progress=lambda n, of: reporter.stage("reading images", n, of))
    given = read_groups(groups) if groups else None
    result = survey(found, prints, seed=seed, holdout=holdout, groups=given)
    if json:
        print_json(result.to_json())
    else:
        render(result, console())
    return 3 if any(problem.level == "error" for problem in result.problems) else 0


@app.command("fit")
@command
def fit(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Where to write the model (a directory).")],
    detector: Annotated[str, typer.Option("--detector", help="See `umiad detectors`.")] = "egmf",
    preset: Annotated[str, typer.Option("--preset", help="default, paper or quick.")] = "default",
    size: Size = 256,
    epochs: Epochs = None,
    seed: Seed = 0,
    holdout: Annotated[
        float | None,
        typer.Option(
            "--holdout",
            min=0.0,
            max=0.89,
            help="Share of training normals kept for the threshold (default: 0.2); 0 = none.",
        ),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            "--folds",
            min=0,
            max=100,
            metavar="K",
            help="Instead of a hold-out: fit on all normals, and take the threshold from K further fits, each "
            "scoring the fold it does without. For closed forms, such as the default; 5 is usual.",
        ),
    ] = 0,
    weights: Weights = "imagenet",
    backbone: Annotated[
        Literal["resnet18", "resnet34", "resnet50"] | None,
        typer.Option("--backbone", help="The frozen network (default: resnet18)."),
    ] = None,
    fpr: Fpr = 0.05,
    colour: Annotated[Literal["grey", "rgb"], typer.Option(help="grey: luminance only.")] = "grey",
    intensity: Annotated[
        Literal["full", "percentile"], typer.Option(help="percentile: stretch each image's 1st..99th.")
    ] = "full",
    equalise: Equalise = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Detector setting, e.g. fusion=none; repeatable.")
    ] = None,
    groups: Groups = None,
    split: Annotated[
        Path | None, typer.Option("--split", help="Reproduce the split of this split.json.")
    ] = None,
    on_error: Annotated[
        Literal["fail", "skip"], typer.Option("--on-error", help="What to do with unreadable files.")
    ] = "fail",
    frame: Frame = None,
    window: WindowOption = "file",
    axis: Axis = "axial",
    nan: Nan = "error",
    follow: Follow = False,
    show_names: ShowNames = False,
    skip_nonfinite: Annotated[
        int,
        typer.Option(
            "--skip-nonfinite",
            min=0,
            max=3,
            help="Leave out so many batches whose loss is not finite, then stop.",
        ),
    ] = 0,
    compact_features: Annotated[
        bool,
        typer.Option("--compact-features", help="Keep frozen features in float16: half the memory or disk."),
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted fit.")] = False,
) -> None:
    """Learn from the normal images of DATA and save the model.

    Abnormal images in DATA are never shown to the detector. Ctrl-C finishes the epoch and leaves
    OUT.work; repeat the command with --resume to go on.
    """
    from umiad.config import check_size

    check_size(size)
    set_threads(threads)
    from umiad import api, fitting
    from umiad.cli.settings import parse_settings
    from umiad.splits import Split, read_groups

    chosen = parse_settings(settings or [])
    if epochs is not None:
        chosen["training"] = {**chosen.get("training", {}), "epochs": epochs}
    if backbone is not None:
        chosen["backbone"] = backbone
    built = api.build(detector, preset=preset, weights=weights, size=size, seed=seed, settings=chosen)
    given: dict[str, Any] = {} if holdout is None else {"holdout": holdout}
    options = api.FitOptions(
        **given,
        folds=folds,
        seed=seed,
        fpr=fpr,
        colour=colour,
        intensity=intensity,
        equalise=equalise,
        on_error=on_error,
        skip_nonfinite=skip_nonfinite,
        compact_features=compact_features,
        device=device,
        files=file_options(frame, reading(window, axis, nan), follow=follow, show_names=show_names),
    )
    grouped = Split.read(split) if split else read_groups(groups) if groups else None
    with RichReporter(console(err=True)) as reporter:
        reporter.note(f"{detector} ({preset}), backbone weights: {built.config.weights}")
        if epochs is not None and built.info.closed_form:
            reporter.note(f"--epochs has no effect: {detector} ({preset}) is a closed form")
        if built.config.weights == "random":
            reporter.note("random backbone weights: scores will be weak; see `umiad weights --help`")
        model = fitting.fit_model(
            built, data, options, groups=grouped, out=out, resume=resume, reporter=reporter
        )
    facts = model.info
    unseen = f"{folds} further fits for the threshold" if folds else f"{facts['n_holdout']} held out"
    typer.echo(f"saved {out}: {facts['n_train']} normal images fitted, {unseen}")
    typer.echo(f"threshold: {threshold_text(facts)}")


@app.command("score")
@command
def score(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(help="Images and folders, any mix.", metavar="PATH...")],
    out: Out,
    pictures: Annotated[Literal["overlay", "none"], typer.Option(help="A picture per image.")] = "overlay",
    maps: Annotated[
        Literal["npy", "png16", "none"],
        typer.Option(help="The anomaly map per image, in the image's own pixels."),
    ] = "npy",
    min_area: MinArea = 1,
    frame: Frame = None,
    follow: Follow = False,
    show_names: ShowNames = False,
    manifest_sha256: Annotated[
        str | None,
        typer.Option("--manifest-sha256", help="Refuse a model with another manifest (see inspect)."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Only every N-th file, from number I (1 to N), on any machine; the same command again goes on "
            "where it ended. `umiad merge OUT` makes one result of all N.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run into OUT that was cut off.")
    ] = False,
    precision: Annotated[
        Literal["float32", "auto", "bfloat16"],
        typer.Option(
            help="auto: the backbone in bfloat16 where the processor has it and a few of the images score alike "
            "in both; bfloat16: the same on any processor."
        ),
    ] = "float32",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> int:
    """Score images: a JSON line, a map and a picture each, and a report.

    Reads PNG, JPEG, TIFF, BMP, DICOM and NIfTI. Of a file of several frames or slices all are scored, or those that
    --frame names; it comes back as one map (a NIfTI volume in its own place) and a picture of its highest slice.
    Windows and axes are those the model was fitted with. DICOM files are named by a hash of their content.

    Writes scores.jsonl, maps/, pictures/, summary.json and report.html into OUT (with --shard: into OUT/shards).
    Unreadable files are skipped, named and counted; the exit code is then 3. MODEL may also be what `umiad export`
    wrote; it runs on the CPU, without torch.
    """
    from umiad.io import expect
    from umiad.worklist import Shard

    part = None if shard is None else Shard.parse(shard)
    expect(paths)  # while torch is imported and the model is read
    with importing():
        loaded = _scorer(model, manifest_sha256, device=device, threads=threads)
        from umiad import batch
        from umiad.cli.results import show

    outputs = batch.Outputs(pictures=pictures, maps=maps, min_area=min_area)
    files = file_options(
        frame, reading("file", "axial", "error"), follow=follow, show_names=show_names, default="all"
    )
    result: Summary | ShardSummary
    with RichReporter(console(err=True)) as reporter:
        scorer = batch.FileScorer(
            loaded, outputs=outputs, files=files, reporter=reporter, precision=precision
        )
        result = scorer.run(paths, out, resume=resume) if part is None else scorer.run_shard(paths, out, part)
    return show(result, out, json=json)


@app.command("evaluate")
@command
def evaluate(
    model: Model,
    data: Data,
    out: Out,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples for the intervals.")] = 1000,
    frame: Frame = None,
    follow: Follow = False,
    show_names: ShowNames = False,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Metrics with 95 % intervals on the test part of DATA, curves, best and worst cases.

    The test part is the official one, or the one of the split stored in the model. An image that was
    fitted, held out or calibrated on is an error there. Writes metrics.json and report.html into OUT.
    """
    set_threads(threads)
    from umiad import api, fitting, report_files

    loaded = api.load(model).to(fitting.resolve_device(device))
    with RichReporter(console(err=True)) as reporter:
        files = _files(loaded, frame, follow=follow, show_names=show_names)
        result = api.evaluate(loaded, data, n_resamples=resamples, files=files, reporter=reporter)
    report_files.write_evaluation(loaded, result, out)
    if json:
        print_json(result.to_json())
        return
    for name, metric in result.metrics.items():
        typer.echo(f"{name:22} {_metric(metric)}")
    typer.echo(f"{result.counts['n_normal']} normal and {result.counts['n_abnormal']} abnormal test images")
    typer.echo(f"report: {out / 'report.html'}")


@app.command("calibrate")
@command
def calibrate(
    model: Model,
    normals: Annotated[Path, typer.Argument(help="Folder of normal images.", metavar="NORMALS")],
    fpr: Fpr = 0.05,
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead of changing MODEL.")] = None,
    frame: Frame = None,
    follow: Follow = False,
    device: Device = "auto",
) -> None:
    """Reset the threshold from a site's own normal images, without refitting."""
    from umiad import api, fitting

    loaded = api.load(model).to(fitting.resolve_device(device))
    files = _files(loaded, frame, follow=follow, show_names=False)
    fresh = api.calibrate(loaded, normals, fpr=fpr, files=files)
    fresh.save(out or model)
    typer.echo(f"threshold before: {threshold_text(loaded.info)}")
    typer.echo(f"threshold now:    {threshold_text(fresh.info)}")


@app.command("inspect")
@command
def inspect(model: Model, json: Json = False) -> None:
    """Show what a saved or exported model is, where it comes from and how its threshold was chosen.

    `manifest_sha256` stands for the whole model: `umiad score --manifest-sha256` refuses any other.
    """
    from umiad import exported
    from umiad.duplicates import file_sha256
    from umiad.manifest import MANIFEST

    config: ScoringConfig
    if exported.is_export(model):
        config = exported.read(model)[0]
    else:
        from umiad import api

        config = api.load(model).config
    digest = file_sha256(model / MANIFEST)
    if json:
        print_json({"info": config.facts, "manifest_sha256": digest, "config": config.canonical()})
        return
    for key, value in {**config.facts, "manifest_sha256": digest}.items():
        typer.echo(f"{key:22} {'-' if value is None else value}")


def _scorer(model: Path, manifest_sha256: str | None, *, device: str, threads: int | None) -> Scorer:
    """A saved or an exported model, ready to score; only the saved one needs torch."""
    from umiad import exported

    if exported.is_export(model):
        return exported.load(model, manifest_sha256=manifest_sha256, device=device, threads=threads)
    set_threads(threads)
    from umiad import api, fitting

    return api.load(model, manifest_sha256=manifest_sha256).to(fitting.resolve_device(device))


def _files(model: FittedModel, frame: str | None, *, follow: bool, show_names: bool) -> FileOptions:
    """Frames as the model was fitted on, unless others are asked for."""
    own = model.config.preprocessing
    return file_options(frame, own.reading, follow=follow, show_names=show_names, default=own.frames)


def threshold_text(facts: dict[str, str | int | float | None]) -> str:
    """The threshold and how it was chosen."""
    value = facts["image_threshold"]
    return f"{facts['threshold_rule']}" if value is None else f"{value:.6g} ({facts['threshold_rule']})"


def _metric(metric: dict[str, object]) -> str:
    value, interval = metric["value"], metric["ci95"]
    if not isinstance(value, float):
        return f"-  ({metric['reason']})"
    text = f"{value:.4f}"
    return f"{text}  [{interval[0]:.4f}, {interval[1]:.4f}]" if isinstance(interval, (list, tuple)) else text
