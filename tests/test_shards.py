"""Scoring in shards: merged results equal those of one run, a run goes on where it was cut off, mix-ups are refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from make import dicom_file, grey_array, grey_png, nifti_file
from umiad import api, batch, merging
from umiad.batch import FileScorer, Outputs, score_files
from umiad.cli.app import app
from umiad.errors import ConfigError, DiskError, InputError
from umiad.filerecord import by_index
from umiad.fitting import Silent
from umiad.journal import FILES, SHARD, SHARDS, UNFINISHED, Journal, read_facts, read_records, shard_folder
from umiad.merging import merge_shards
from umiad.outputs import Writer
from umiad.workfolder import FolderLock
from umiad.worklist import Shard

THREE = [Shard(number, 3) for number in (1, 2, 3)]


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`intensity` judges each image by itself, so that its scores are bit-equal in any batch."""
    images = [grey_array(seed=100 + k) for k in range(10)]
    fitted = api.fit(api.build("intensity", size=64), images)
    return fitted.save(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(saved):
    return api.load(saved)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for k in range(4):
        grey_png(root / "a" / f"s{k}.png", (40, 50 + k), seed=k)
        grey_png(root / "b" / f"s{k}.png", (40, 50), seed=50 + k)
    (root / "a" / "s2.png").write_bytes(b"not a picture")
    (root / "c.png").write_bytes((root / "b" / "s0.png").read_bytes()[:300])
    cine = np.stack([grey_array((40, 44), seed=k) for k in range(3)])
    shutil.copy(dicom_file(root / "DOE_1.dcm", cine), root / "DOE_2.dcm")
    nifti_file(root / "s0.nii.gz", np.random.default_rng(0).integers(0, 200, (36, 40, 4)).astype(np.int16))
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "b" / "s1.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def plain(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    score_files(model, [data], out)
    return out


@pytest.fixture(scope="module")
def scored(model, data, tmp_path_factory):
    """Three shards, not merged yet."""
    out = tmp_path_factory.mktemp("scored") / "out"
    for shard in THREE[::-1]:
        FileScorer(model).run_shard([data], out, shard)
    return out


@pytest.fixture
def shards(scored, tmp_path):
    return Path(shutil.copytree(scored, tmp_path / "out"))


def results(out):
    """Every result by name; of the summary all but the memory, which is never twice the same."""
    found = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and SHARDS not in path.relative_to(out).parts
    }
    summary = json.loads(found.pop("summary.json"))
    summary.pop("peak_memory_mb")
    return found, list(summary.items())


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + result.stderr
    return result


def stopped_at(monkeypatch, count, error=KeyboardInterrupt):
    """Let the writer fail at its file number `count` (counted from 0)."""
    write, calls = Writer.write, []

    def failing(self, *given):
        calls.append(given)
        if len(calls) > count:
            raise error
        return write(self, *given)

    monkeypatch.setattr(Writer, "write", failing)


# Merging


def test_three_shards_merged_equal_one_run_byte_for_byte(shards, plain):
    summary = merge_shards(shards)
    assert results(shards) == results(plain)
    assert [Path(name).name for name, _ in summary.skipped] == ["c.png", "s2.png"]
    memory = json.loads((shards / "summary.json").read_text())["peak_memory_mb"]
    assert len(memory) == 3
    first = results(shards)
    merge_shards(shards)  # again: the same, and the shards are still there
    assert results(shards) == first


def test_one_shard_of_one_equals_a_plain_run(model, data, plain, tmp_path):
    done = FileScorer(model).run_shard([data], tmp_path / "out", Shard(1, 1))
    assert done.files == 13
    assert done.images == 8 + 3 + 3 + 4  # single images, two cines, a volume
    assert done.to_json()["shard"] == "1/1"
    merge_shards(tmp_path / "out")
    assert results(tmp_path / "out") == results(plain)


def test_more_shards_than_files_leave_some_empty(model, data, tmp_path):
    for number in (1, 2, 3):
        FileScorer(model, outputs=Outputs(maps="png16", pictures="none")).run_shard(
            [data / "a" / "s0.png", data / "c.png"], tmp_path, Shard(number, 3)
        )
    summary = merge_shards(tmp_path)
    assert (len(summary.findings), len(summary.skipped)) == (1, 1)
    assert summary.png16_full_scale > 0


def test_without_hard_links_results_are_copies(shards, plain, monkeypatch):
    def refused(*names):
        raise PermissionError("no links here")

    monkeypatch.setattr(merging.os, "link", refused)
    merge_shards(shards)
    assert results(shards) == results(plain)


def test_scoring_over_merged_results_leaves_the_shards_alone(shards, model, data, plain):
    merge_shards(shards)
    before = {path: path.read_bytes() for path in (shards / SHARDS).rglob("*") if path.is_file()}
    score_files(model, [data / "b"], shards)
    assert {path: path.read_bytes() for path in before} == before
    merge_shards(shards)
    (found, summary), (expected, said) = results(shards), results(plain)
    assert (
        expected.items() <= found.items()
    )  # maps that only the other run wrote stay, as they do without shards
    assert summary == said


def test_no_path_of_a_dicom_file_is_in_any_shard(shards):
    for path in (shards / SHARDS).rglob("*"):
        assert "DOE" not in path.name
        assert path.is_dir() or b"DOE" not in path.read_bytes()


def test_a_trained_models_shards_are_equal_to_rounding(data, tmp_path):
    padim = api.load(Path(__file__).parent / "golden" / "model-1" / "padim")
    bare = Outputs(maps="none", pictures="none")
    score_files(padim, [data / "a"], tmp_path / "plain", outputs=bare)
    for number in (1, 2):
        FileScorer(padim, outputs=bare).run_shard([data / "a"], tmp_path / "out", Shard(number, 2))
    merge_shards(tmp_path / "out")
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
        for name in ("plain", "out")
    )
    assert [line["file"] for line in one] == [line["file"] for line in two]
    assert [line["image_score"] for line in two] == pytest.approx(
        [line["image_score"] for line in one], rel=1e-5
    )


# What is refused


def test_a_missing_shard_is_named_with_its_command(shards):
    shutil.rmtree(shard_folder(shards, THREE[1]))
    with pytest.raises(
        InputError, match=r"shard 2/3 is missing .*umiad score MODEL PATH... --out .* --shard 2/3"
    ):
        merge_shards(shards)
    assert [path.name for path in shards.iterdir()] == [SHARDS]  # nothing was written


def test_a_folder_without_shards_says_how_to_score_them(tmp_path):
    with pytest.raises(InputError, match=r"holds no shards .*--shard 1/2"):
        merge_shards(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_number_are_refused(shards):
    shutil.copytree(shard_folder(shards, THREE[0]), shards / SHARDS / "4-of-4")
    with pytest.raises(InputError, match="shard 4/4 lies beside shard 1/3"):
        merge_shards(shards)


def test_a_folder_under_another_shards_name_is_refused(shards):
    shutil.rmtree(shard_folder(shards, THREE[1]))
    shutil.copytree(shard_folder(shards, THREE[0]), shard_folder(shards, THREE[1]))
    with pytest.raises(InputError, match="shard 2/3: its folder holds shard 1/3"):
        merge_shards(shards)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"kind": "umiad shard"', b"\xff\xfe"])
def test_a_damaged_description_names_the_shard(shards, model, data, content):
    path = shard_folder(shards, THREE[2]) / SHARD
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"shard 3/3: its shard.json is missing or damaged.*delete .*--shard 3/3"
    ):
        merge_shards(shards)
    if content is not None:
        with pytest.raises(InputError, match=r"shard.json is missing or damaged"):
            FileScorer(model).run_shard([data], shards, THREE[2])


def test_a_description_that_lacks_a_fact_or_has_a_wrong_one_is_damaged(shards):
    path = shard_folder(shards, THREE[2]) / SHARD
    facts = json.loads(path.read_bytes())
    changed = (
        {"number": 4},
        {"of": 0},
        {"kind": "x"},
        {"files": -1},
        {"model": []},
        {"more": 1},
        {"files": "3"},
    )
    for change in changed:
        path.write_text(json.dumps({**facts, **change}))
        with pytest.raises(InputError, match=r"shard 3/3: its shard.json is missing or damaged"):
            merge_shards(shards)


@pytest.mark.parametrize("what", ["lines", "map", "picture"])
def test_a_shard_that_is_not_whole_is_refused_with_the_command_that_goes_on(shards, what):
    folder = shard_folder(shards, THREE[0])
    if what == "lines":
        (folder / FILES).write_bytes((folder / FILES).read_bytes()[:-1])
    elif what == "map":
        next((folder / "maps").iterdir()).write_bytes(b"cut")
    else:
        next((folder / "pictures").iterdir()).unlink()
    with pytest.raises(
        InputError, match=r"shard 1/3 is not whole: \d of 5 files .*go on with it: .*--shard 1/3"
    ):
        merge_shards(shards)


@pytest.mark.parametrize("other", ["model", "list", "options"])
def test_shards_of_other_work_are_refused(shards, model, data, tmp_path, other):
    copied, scorer = Path(shutil.copytree(data, tmp_path / "data")), FileScorer(model)
    if other == "model":
        changed = api.calibrate(model, data / "b", fpr=0.2)
        scorer = FileScorer(api.load(changed.save(tmp_path / "changed")))
    elif other == "list":
        grey_png(copied / "new.png")
    else:
        scorer = FileScorer(model, outputs=Outputs(min_area=3))
    with pytest.raises(InputError, match=f"holds results made with .*({other}|min_area).*delete that folder"):
        scorer.run_shard([copied], shards, THREE[1])
    shutil.rmtree(shard_folder(shards, THREE[1]))
    scorer.run_shard([copied], shards, THREE[1])
    with pytest.raises(
        InputError, match=f"shard 2/3 was made with .*({other}|min_area).*compared with shard 1/3"
    ):
        merge_shards(shards)


def test_another_version_is_other_work(shards):
    facts = read_facts(shard_folder(shards, THREE[0]))
    assert facts.difference(facts) == ""
    assert (
        facts.difference(facts.model_copy(update={"version": "9.9"}))
        == f"umiad 9.9 in place of {facts.version}"
    )


def test_a_second_run_of_the_same_shard_and_a_second_merge_are_refused(shards, model, data):
    lock = FolderLock(shard_folder(shards, THREE[0]))
    lock.acquire()
    with pytest.raises(InputError, match="another scoring run is running there"):
        FileScorer(model).run_shard([data], shards, THREE[0])
    lock.release()
    lock = FolderLock(shards / SHARDS)
    lock.acquire()
    with pytest.raises(InputError, match="another merge is running there"):
        merge_shards(shards)
    lock.release()


def test_a_model_that_was_not_loaded_can_be_scored_with_but_not_in_shards(model, data, tmp_path):
    loose = api.FittedModel(model.detector, model.config, model.split)
    for call in (
        lambda: FileScorer(loose).run_shard([data], tmp_path / "out", Shard(1, 2)),
        lambda: FileScorer(loose).run([data], tmp_path / "out", resume=True),
    ):
        with pytest.raises(ConfigError, match="not loaded from a folder"):
            call()
    assert not (tmp_path / "out").exists()
    assert len(score_files(loose, [data / "a" / "s0.png"], tmp_path / "out").findings) == 1


def test_a_disk_that_takes_nothing_is_a_disk_error(model, data, shards, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        FileScorer(model).run_shard([data], tmp_path / "file" / "out", Shard(1, 2))

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging.os, "link", full)
    monkeypatch.setattr(merging.shutil, "copyfile", full)
    with pytest.raises(DiskError, match="No space left"):
        merge_shards(shards)
    assert not (shards / "scores.jsonl").exists()


# Going on


def test_a_shard_that_was_stopped_goes_on_where_it_was(model, data, shards, plain, monkeypatch):
    folder = shard_folder(shards, THREE[0])
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        stopped_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            FileScorer(model).run_shard([data], shards, THREE[0])
    kept = (folder / FILES).read_bytes()
    assert 0 < kept.count(b"\n") < 5
    opened = []
    open_frames = batch.open_frames
    monkeypatch.setattr(
        batch, "open_frames", lambda file, **how: opened.append(file) or open_frames(file, **how)
    )
    FileScorer(model).run_shard([data], shards, THREE[0])
    assert len(opened) == 5 - kept.count(b"\n")
    assert (folder / FILES).read_bytes().startswith(kept)
    FileScorer(model).run_shard([data], shards, THREE[0])  # whole: nothing is read again
    assert len(opened) == 5 - kept.count(b"\n")
    merge_shards(shards)
    assert results(shards) == results(plain)


def test_a_last_line_cut_at_any_byte_is_dropped(shards):
    folder = shard_folder(shards, THREE[0])
    facts, content = read_facts(folder), (folder / FILES).read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for end in range(start, len(content)):
        (folder / FILES).write_bytes(content[:end])
        records, ends = read_records(folder, facts)
        assert (len(records), ends[-1]) == (4, start)
    for end in (start, start + 1, len(content) - 1):
        (folder / FILES).write_bytes(content[:end])
        with Journal(folder, facts, resume=None, on_note=pytest.fail) as journal:
            journal.keep(len(journal.done))
        assert (folder / FILES).read_bytes() == content[:start]
    (folder / FILES).write_bytes(content)
    with Journal(folder, facts, resume=None, on_note=pytest.fail) as journal:
        assert len(journal.done) == 5


def test_a_cut_line_and_a_lost_map_are_scored_again(model, data, shards, plain):
    cut, lost = (shard_folder(shards, shard) for shard in THREE[:2])
    (cut / FILES).write_bytes((cut / FILES).read_bytes()[:-40])
    records, _ = read_records(lost, read_facts(lost))
    second = [record for record in records if record.error is None][1]
    (lost / second.named(by_index(second)[1])["map"]).unlink()
    notes = Notes()
    for shard in THREE[:2]:
        FileScorer(model, reporter=notes).run_shard([data], shards, shard)
    assert ["are missing or cut; they are scored again" in text for text in notes.texts] == [True]
    merge_shards(shards)
    assert results(shards) == results(plain)


def test_lines_of_another_order_or_damaged_within_end_what_is_kept(shards):
    folder = shard_folder(shards, THREE[0])
    lines = (folder / FILES).read_bytes().splitlines(keepends=True)
    for changed, kept in (
        ([lines[0], lines[2], *lines[1:]], 1),
        ([*lines[:3], b"?\n", *lines[3:]], 3),
        ([], 0),
    ):
        (folder / FILES).write_bytes(b"".join(changed))
        assert len(read_records(folder, read_facts(folder))[0]) == kept
    (folder / FILES).unlink()
    assert read_records(folder, read_facts(folder)) == ([], [0])


@pytest.mark.parametrize("count", [0, 5])
def test_a_plain_run_that_was_stopped_resumes_and_equals_one_run(
    model, data, plain, tmp_path, monkeypatch, count
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_at(patch, count, OSError(28, "No space left on device"))
        with pytest.raises(DiskError, match="No space left"):
            score_files(model, [data], out)
    assert (out / UNFINISHED / SHARD).exists()
    if count:  # what a kill may leave
        with (out / UNFINISHED / FILES).open("ab") as file:
            file.write(b'["0123')
        (out / "scores.jsonl").write_text('{"file": "ha')
    FileScorer(model).run([data], out, resume=True)
    assert results(out) == results(plain)
    with pytest.raises(ConfigError, match="nothing to resume"):
        FileScorer(model).run([data], out, resume=True)


def test_without_resume_a_run_starts_anew(model, data, plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            FileScorer(model, outputs=Outputs(min_area=2)).run([data], tmp_path / "out")
    with pytest.raises(InputError, match="min_area 2 in place of 1"):
        FileScorer(model).run([data], tmp_path / "out", resume=True)
    score_files(model, [data], tmp_path / "out")
    assert results(tmp_path / "out") == results(plain)


def test_a_run_that_is_cut_off_leaves_no_summary_of_an_earlier_one(model, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    score_files(model, [data / "a" / "s0.png"], out)
    assert (out / "summary.json").exists()
    with monkeypatch.context() as patch:
        stopped_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            score_files(model, [data], out)
    assert not (out / "summary.json").exists()
    assert not (out / "report.html").exists()


def test_nothing_is_merged_over_a_run_that_is_not_finished(model, data, shards, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            score_files(model, [data], shards)
    before = (shards / "scores.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"score\.work: a run of all files there is not finished"):
        merge_shards(shards)
    assert (shards / "scores.jsonl").read_bytes() == before


def test_nothing_to_resume_leaves_nothing_behind(model, data, tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume; leave out --resume"):
        FileScorer(model).run([data], tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


# The command line


def test_the_commands_end_with_3_for_skipped_files_and_merge_tells_the_same_as_score(
    saved, data, plain, tmp_path
):
    out = tmp_path / "out"
    said = run("score", saved, data, "--out", out, "--shard", "1/2", code=3)
    assert "shard 1/2: 7 files done" in said.stdout
    assert f"when all 2 are done: umiad merge {out}" in said.stdout
    assert "shard 2/2 is missing" in run("merge", out, code=3).stderr
    told = json.loads(run("score", saved, data, "--out", out, "--shard", "2/2", "--json", code=3).stdout)
    assert told["files"] == 6
    merged = run("merge", out, code=3)
    assert "18 images scored, 2 skipped" in merged.stdout
    assert "2 DICOM files are named" in merged.stdout
    assert "c.png" in merged.stderr
    assert results(out) == results(plain)
    assert json.loads(run("merge", out, "--json", code=3).stdout)["scored"] == 18


def test_merging_good_files_only_ends_with_0(saved, data, tmp_path):
    for part in ("1/2", "2/2"):
        run("score", saved, data / "b", "--out", tmp_path, "--shard", part)
    assert "4 images scored, 0 skipped" in run("merge", tmp_path).stdout


@pytest.mark.parametrize("spec", ["0/3", "4/3", "a/b"])
def test_a_wrong_shard_is_a_usage_error_before_anything_is_loaded(data, spec, tmp_path):
    said = run("score", tmp_path / "no-model", data, "--out", tmp_path / "out", "--shard", spec, code=2)
    assert "expected I/N" in said.stderr
    assert not (tmp_path / "out").exists()


def test_resume_on_the_command_line(saved, data, tmp_path):
    said = run("score", saved, data, "--out", tmp_path / "out", "--resume", code=2)
    assert "nothing to resume" in said.stderr
