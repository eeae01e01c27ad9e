"""Tables 1, 2 and 5 to 8, the opening paragraph and the HTML page: numbers are traced from JSON to the cell."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from make import grey_png, save_array, tiny_set
from umiad.data import load_data
from umiad.metrics import det_auroc
from umiad.report import Table, Text, to_markdown

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LABELS = "0" * 8 + "1" * 12


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations
    import opening
    import page
    import paper_protocol
    import printed
    import results_store
    import studies
    import table1
    import table2
    import tables

    (tmp_path / "results").mkdir()
    for module in (paper_protocol, results_store):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return SimpleNamespace(
        ablations=ablations,
        opening=opening,
        page=page,
        printed=printed,
        protocol=paper_protocol,
        store=results_store,
        studies=studies,
        table1=table1,
        table2=table2,
        tables=tables,
    )


def run(*, lift=1.0, seg=None, noise=0, parts="egm eam mff", **facts):
    """A result: scores are noise, `lift` added to abnormal images; seg_auroc and seg_aupro are `seg`."""
    known = {"detector": "egmf", "preset": "ablation", "variant": "main", "dataset": "busi", "seed": 0}
    facts = known | {"size": 256} | facts
    truth = np.array([int(digit) for digit in LABELS])
    scores = np.random.default_rng([facts["seed"], noise]).standard_normal(len(truth)) + lift * truth
    value = float(det_auroc(scores, truth.astype(bool)))

    def around(center):
        ends = [center - 0.01, center + 0.01] if center is not None and facts["seed"] == 0 else None
        return {"value": center, "ci95": ends}

    return facts | {
        "config": dict(zip(("edge", "aggregate", "fusion"), parts.split(), strict=True)),
        "split_digest": f"{facts['dataset']} {facts['seed']}",
        "counts": {"n_normal": 8, "n_abnormal": 12, "n_masked": 0 if seg is None else 12},
        "fit_seconds": 30.0 + facts["seed"],
        "score_seconds": 5.0,
        "threads": 1,
        "weights": "label-w",
        "epochs": 7,
        "commit": "c0ffee",
        "cases": {"labels": LABELS, "groups": [""] * len(truth), "image_scores": list(map(float, scores))},
        "metrics": {"det_auroc": around(value), "seg_auroc": around(seg), "seg_aupro": around(seg)},
    }


def runs(**facts):
    """Seeds 0 to 2; `seg` grows by a hundredth of it per seed."""
    seg = facts.pop("seg", None)
    return [run(**facts, seed=s, seg=None if seg is None else seg * (1 + s / 100)) for s in range(3)]


def modules():
    """All variants of Table 6 on busi: EGM helps, EAM harms, MFF changes nothing."""
    return [
        *runs(variant="none", lift=0.5, seg=0.70, parts="none ignore none"),
        *runs(variant="egm", lift=3.0, seg=0.80, noise=1, parts="egm add none"),
        *runs(variant="egm-eam", lift=0.5, seg=0.75, noise=2, parts="egm eam none"),
        *runs(variant="mff", lift=0.5, seg=0.70, parts="none ignore mff"),
        *runs(lift=0.5, seg=0.75, noise=2),
    ]


def auroc(each):
    return each["metrics"]["det_auroc"]["value"]


def row(table, *start):
    [found] = [each for each in table.rows if each[: len(start)] == start]
    return found


def titled(blocks, title):
    [found] = [block for block in blocks if block.title == title]
    return found


# The printed values


def test_reachable_agrees_with_the_marks_of_every_table(scripts):
    for number in (3, 5, 6, 7, 8):
        for printed in scripts.store.paper_table(number):
            marked = any("not a multiple" in why for why in scripts.printed.reasons(printed, "det_auroc"))
            assert scripts.printed.reachable(printed["det_auroc"], printed["dataset"]) != marked, printed
    assert scripts.printed.paper_counts("brain_mri") == (10, 154)
    assert scripts.printed.reachable_text("90.83", "brain_mri") == "no (nearest 90.84)"
    assert scripts.printed.reachable_text("82.90", "head_ct") == "yes"
    assert scripts.printed.nearest("62.0", 2, 2) == 62.5  # a tie counts half: steps of an eighth
    assert sum(scripts.printed.unreachable((3, 5, 6, 7, 8)).values()) == 11


def test_a_reason_marks_the_columns_it_names(scripts):
    reasons, notes = scripts.printed.reasons, scripts.printed.Notes()
    line = {"suspect": "yes", "det_auroc": "1.00", "seg_auroc": "2.00", "seg_aupro": ""}
    line["why"] = "all: copied (a; b); seg_auroc+seg_aupro: too high"
    assert reasons(line, "det_auroc") == ["copied (a; b)"]
    assert reasons(line, "seg_auroc") == ["copied (a; b)", "too high"]
    assert notes.mark(line, "seg_auroc") == "2.00 (note 1, 2)"
    assert notes.mark(line, "det_auroc") == "1.00 (note 1)"
    assert notes.mark(line, "seg_aupro") == "- (note 1, 2)"
    assert notes.lines() == ["Note 1: copied (a; b).", "Note 2: too high."]
    assert reasons(line | {"why": "no column named"}, "seg_auroc") == ["no column named"]
    assert reasons(line | {"suspect": "no"}, "seg_auroc") == []


# Tables 5 to 8


def test_numbers_of_the_ablation_are_traced_to_the_cell(scripts):
    results = modules()
    blocks = scripts.ablations.study_blocks(results, scripts.studies.MODULES)
    table = titled(blocks, "Table 6, modules, busi")
    own = [auroc(each) for each in results[3:6]]
    low, high = results[3]["metrics"]["det_auroc"]["ci95"]
    assert row(table, "EGM", "det_auroc")[2:] == (
        "93.46",
        "yes",
        f"{100 * np.mean(own):.1f} ({100 * min(own):.1f} to {100 * max(own):.1f}, n = 3)",
        f"{100 * own[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        "none",
        "ahead",
    )
    assert row(table, "EGM", "seg_auroc")[2:] == (
        "74.99",
        "-",
        "80.8 (80.0 to 81.6, n = 3)",
        "80.0 [79.0, 81.0]",
        "none",
        "ahead (these images)",
    )
    assert row(table, "EGM", "seg_aupro")[2] == "60.47 (note 2)"
    assert row(table, "none", "det_auroc")[2] == "92.43 (note 1)"
    assert row(table, "none", "det_auroc")[6:] == ("", "")
    assert "EGM + EAM: egm / eam / none" in table.caption
    notes = titled(blocks, "Notes on the paper's Table 6").paragraphs
    assert "Note 1: equals the CFlow row of Table 3." in notes
    for part in ("label-w", "256 px", "epochs 7", "c0ffee", "8 normal, 12 abnormal"):
        assert part in table.caption
    lacking = titled(blocks, "Table 6: runs without results").paragraphs[0]
    assert "EGM (variant egm, 256 px: brain_mri 0 1 2, head_ct 0 1 2)" in lacking
    assert "ablation.toml" in lacking


def test_a_difference_stands_beside_the_papers_with_a_verdict(scripts):
    results = modules()
    blocks = scripts.ablations.study_blocks(results, scripts.studies.MODULES)
    table = titled(blocks, "Table 6, modules: differences")
    gap = scripts.store.image_difference(results[3:6], results[:3])
    assert row(table, "EGM added", "busi", "det_auroc")[3:] == ("+1.03", gap.text, "0 1 2", "ahead")
    assert row(table, "EAM added to EGM", "busi", "det_auroc")[-1] == "behind"
    assert row(table, "MFF added", "busi", "det_auroc")[3:5] == ("+2.40", "+0.0 [+0.0, +0.0]")
    same = row(table, "MFF added to EGM and EAM", "busi", "seg_aupro")
    assert same[3:] == ("+0.68", "+0.0 [+0.0, +0.0]", "0 1 2", "no difference shown")
    assert row(table, "EGM added", "head_ct", "det_auroc")[4:] == ("-", "none", "not measured")
    words = titled(blocks, "Table 6, modules: in words").paragraphs
    assert (
        words[0] == "EGM added (EGM against none): ahead in 3 of 3. EGM is better where a difference shows."
    )
    assert (
        words[2]
        == "MFF added (MFF against none): no difference shown in 3 of 3. No difference shown anywhere."
    )
    mixed = [*results, *runs(variant="none", lift=9.0, dataset="head_ct")]
    mixed += runs(variant="egm", lift=-9.0, dataset="head_ct")
    words = scripts.ablations.answers(mixed, scripts.studies.MODULES).paragraphs
    assert "behind in 1 of 4 (head_ct det_auroc). Better in some, worse in others." in words[0]
    table = scripts.ablations.differences(mixed, scripts.studies.MODULES)
    assert row(table, "EGM added", "head_ct", "seg_auroc")[4:] == ("-", "none", "no lesion masks")


def test_sizes_are_kept_apart_and_cost_is_stated(scripts):
    results = [*runs(lift=0.0, seg=0.6, size=128), *runs(lift=3.0, seg=0.7, noise=1)]
    results.append(run(lift=0.0, seg=0.5, size=512) | {"fit_seconds": 480.0, "score_seconds": 77.0})
    blocks = scripts.ablations.study_blocks(results, scripts.studies.SIZES)
    table = titled(blocks, "Table 5, image size, busi")
    assert row(table, "512 px", "seg_auroc")[4:6] == ("50.0 (n = 1)", "50.0 [49.0, 51.0]")
    assert row(table, "128 px", "det_auroc")[2] == "88.27 (note 1)"
    cost = titled(blocks, "Table 5, image size: cost of a run")
    assert row(cost, "busi", "512 px")[2:] == ("480", "77", f"{557 / 36:.1f}")
    assert row(cost, "busi", "128 px")[2:] == ("31", "5", "1.0")
    assert scripts.ablations.costs(results[:3], scripts.studies.SIZES).rows[0][-1] == "-"
    gaps = titled(blocks, "Table 5, image size: differences")
    assert row(gaps, "512 instead of 256 px", "busi", "seg_auroc")[3:] == (
        "-4.52",
        "-20.0",
        "0",
        "behind (seed 0)",
    )
    lacking = titled(blocks, "Table 5: runs without results").paragraphs[0]
    assert "512 px (variant main, 512 px: brain_mri 0, head_ct 0)" in lacking


def test_without_a_checkpoint_the_sam_row_says_so(scripts):
    results = [*runs(variant="prewitt", seg=0.6), *runs(variant="egm", seg=0.7)]
    blocks = scripts.ablations.study_blocks(results, scripts.studies.EDGES)
    table = titled(blocks, "Table 7, edges, brain_mri")
    sam = [row(table, "SAM", metric) for metric in ("det_auroc", "seg_auroc", "seg_aupro")]
    assert {line[4] for line in sam} == {"not run: no SAM checkpoint"}
    assert sam[0][2:4] == ("92.66 (note 1)", "yes")
    assert sam[1][3] == "no masks"
    notes = titled(blocks, "Notes on the paper's Table 7").paragraphs
    assert "sam-vit-base" in notes[-1]
    assert "SAM" not in titled(blocks, "Table 7: runs without results").paragraphs[0]
    own = run(variant="sam", seg=0.65)
    blocks = scripts.ablations.study_blocks([*results, own], scripts.studies.EDGES)
    assert f"{100 * auroc(own):.1f} (n = 1)" in row(
        titled(blocks, "Table 7, edges, busi"), "SAM", "det_auroc"
    )
    assert "sam-vit-base" not in " ".join(titled(blocks, "Notes on the paper's Table 7").paragraphs)
    assert "SAM (variant sam" in titled(blocks, "Table 7: runs without results").paragraphs[0]


def test_every_study_has_a_printed_row_for_each_of_ours(scripts):
    for study in scripts.studies.STUDIES:
        assert len(study.rows) * 3 == len(scripts.store.paper_table(study.number))
        names = {each.name for each in study.rows}
        assert all({step.of, step.against} <= names for step in study.steps)
        for each in study.rows:
            assert scripts.studies.printed_row(study, "busi", each)["dataset"] == "busi"
    everything = to_markdown(scripts.ablations.ablation_blocks([]))
    assert everything.count("No results yet.") == 4 * 4  # three sets and the differences of each table
    assert "Table 8, aggregation, head\\_ct" in everything


def test_the_published_training_stands_beside_the_ablation(scripts):
    paper = run(preset="paper", lift=1.0, seg=0.69) | {"epochs": 100}
    table = scripts.ablations.study_blocks([*modules(), paper], scripts.studies.MODULES)[0]
    assert row(table, "all, preset paper (100 epochs)", "seg_auroc")[4:6] == (
        "69.0 (n = 1)",
        "69.0 [68.0, 70.0]",
    )
    assert not [
        r for r in scripts.ablations.study_blocks([paper], scripts.studies.EDGES)[0].rows if "all" in r[0]
    ]


@pytest.mark.slow
def test_the_ablation_runs_on_phantoms(scripts, tmp_path):
    data = tiny_set(tmp_path / "data", n_normal=12, n_abnormal=4)
    training = {"epochs": 1, "batch_size": 8}
    shared = {"backbone": "resnet-tiny", "training": training, "blocks": 2}
    for variant, edge, aggregate in (("none", "none", "ignore"), ("egm", "egm", "add")):
        job = scripts.protocol.DEFAULTS | {
            "detector": "egmf",
            "dataset": "busi",
            "preset": "paper",
            "variant": variant,
            "seed": 0,
            "size": 64,
            "settings": {**shared, "edge": edge, "aggregate": aggregate, "fusion": "none"},
        }
        [path] = scripts.protocol.execute(job, data, "random", scratch=None)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"preset": "ablation"}))
    results = scripts.store.load_results()
    small = [dataclasses.replace(each, size=64) for each in scripts.studies.MODULES.rows]
    study = dataclasses.replace(scripts.studies.MODULES, rows=tuple(small))
    table = scripts.ablations.study_blocks(results, study)[0]
    for variant, name in (("none", "none"), ("egm", "EGM")):
        [own] = [each for each in results if each["variant"] == variant]
        for metric in ("det_auroc", "seg_auroc", "seg_aupro"):
            assert row(table, name, metric)[5] == scripts.store.cell(own["metrics"][metric])
    assert "none: none / ignore / none; EGM: egm / add / none" in table.caption
    gaps = scripts.ablations.differences(results, study)
    assert row(gaps, "EGM added", "busi", "det_auroc")[5] == "0"


# Tables 1 and 2


def test_table1_counts_what_lies_on_disk(scripts, tmp_path):
    root, rng = tmp_path / "brain_mri", np.random.default_rng(0)
    for kind, number in (("no", 10), ("yes", 6)):
        for k in range(number):  # blocks of random grey: no two are near-duplicates
            blocks = rng.integers(0, 255, (8, 10), dtype=np.uint8)
            save_array(root / kind / f"{kind}{k}.png", np.kron(blocks, np.ones((8, 8 + k), np.uint8)))
    (root / "yes" / "copy.png").write_bytes((root / "yes" / "yes0.png").read_bytes())
    found = scripts.table1.measure(load_data(root))
    assert scripts.table1.parts(found) == {"train": 9, "test_normal": 1, "test_abnormal": 7}
    assert found["duplicates"]["identical_files"] == {"groups": 1, "files": 2, "across_classes": 0}
    facts = {"sets": {"brain_mri": found}, "seed": 0, "commit": "c0ffee"}
    (scripts.store.RESULTS / "table1.json").write_text(json.dumps(facts))
    counts, files, same, notes = scripts.table1.table1_blocks()
    [line] = counts.rows
    assert line[:7] == ("brain_mri (note 1)", "88", "9", "10", "1", "154", "7")
    assert line[7].startswith(
        "train: no reason known; test_normal: no reason known; the paper leaves out one of the 7 abnormal"
    )
    assert row(files, "brain_mri", "no")[2:] == ("10", "9", "1", "0", "64 / 64 / 64", "80 / 125 / 170")
    assert row(same, "brain_mri", "identical files")[2:] == ("1", "2", "0")
    assert "Kaggle" in notes.paragraphs[0]
    assert "c0ffee" in counts.caption


def test_table1_sums_the_three_sets_and_names_what_makes_it(scripts, monkeypatch, tmp_path):
    assert isinstance(scripts.table1.table1_blocks()[0], Text)
    for name in scripts.store.DATASETS:
        tiny_set(tmp_path / "data" / name, n_normal=5, n_abnormal=2)
    monkeypatch.setattr(sys, "argv", ["table1.py", "--data", str(tmp_path / "data")])
    scripts.table1.main()
    counts = scripts.table1.table1_blocks()[0]
    assert row(counts, "total")[1:7] == ("277", "12", "54", "3", "901", "6")
    before = (scripts.store.RESULTS / "table1.json").stat().st_mtime_ns
    scripts.table1.main()
    assert (scripts.store.RESULTS / "table1.json").stat().st_mtime_ns == before


def test_table2_is_what_the_network_does(scripts):
    rows = scripts.table2.measure(size=64, batch=2, settings={"backbone": "resnet-tiny", "blocks": 1})
    printed = scripts.store.paper_table(2)
    named = [(line["part"], line["layer"]) for line in rows]
    assert named[: len(printed)] == [(line["part"], line["layer"]) for line in printed]
    by_name = {line["layer"]: line for line in rows}
    assert by_name["Layer1"]["output"] == [[2, 64, 16, 16]]
    assert by_name["Layer1"]["pooled"] == [2, 64, 8, 8]
    assert by_name["Decoder layer4"]["output"] == [[2, 512, 1, 1]]
    assert by_name["Concat"]["output"] == [[2, 960, 1, 1]]
    assert by_name["EGM"]["output"] == [[2, 128, 8, 8]]
    convolutions = [line for line in rows if line["layer"] == "Conv2d"]
    assert [line["parameters"] for line in convolutions] == [960 * 240 + 240, 240 * 960 + 960]


def test_table2_stands_beside_the_paper_with_its_errors_marked(scripts):
    assert "table2.py" in scripts.table2.table2_blocks()[0].paragraphs[0]
    rows = scripts.table2.measure(size=64, batch=2, settings={"backbone": "resnet-tiny", "blocks": 1})
    stored = {"rows": rows, "size": 64, "batch": 2, "commit": "c0ffee"}
    (scripts.store.RESULTS / "table2.json").write_text(json.dumps(stored))
    table, notes = scripts.table2.table2_blocks()
    layer3 = row(table, "Fusion_flow", "AvgPool2d layer3")
    assert layer3[2:5] == ("32x256x4x4 (note 2)", "2x256x1x1", "no")
    assert "3x3, not 4x4" in notes.paragraphs[1]
    assert row(table, "Multi_flow", "Decoder layer1")[3] == "2x64x8x8"
    assert "64 px, batch 2" in table.caption
    rows[3]["layer"] = "other"
    (scripts.store.RESULTS / "table2.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="where the paper has Layer1"):
        scripts.table2.table2_blocks()


def test_the_committed_shapes_agree_where_the_paper_can_be_right(scripts, monkeypatch):
    monkeypatch.setattr(scripts.store, "RESULTS", BENCHMARKS / "results")
    table = scripts.table2.table2_blocks()[0]
    wrong = [line[1] for line in table.rows if line[4] == "no"]
    assert wrong == ["Conv2d + BN + ReLu", "Maxpool"]
    assert sum(line[4] == "after pooling" for line in table.rows) == 4
    counts = scripts.table1.table1_blocks()[0]
    assert row(counts, "total")[1:7] == ("277", "277", "54", "54", "901", "902")


# The opening and the page


def test_the_opening_is_counted(scripts):
    whole = run(preset="paper", seg=0.77)
    whole["metrics"]["det_auroc"] = {"value": 0.95, "ci95": [0.93, 0.97]}
    text = scripts.opening.opening([*modules(), whole])
    assert text.title == "What reproduces, what does not, and what cannot"
    [words] = text.paragraphs
    # preset paper: 95.83 lies in [93, 97], 77.81 in [76, 78], 63.36 does not
    found = {
        (each.dataset, each.metric, each.value): each.within
        for each in scripts.opening.own_values([whole])
        if each.judged
    }
    assert found == {
        ("busi", "det_auroc", "95.83"): True,
        ("busi", "seg_auroc", "77.81"): True,
        ("busi", "seg_aupro", "63.36"): False,
    }
    own = re.search(r"Tables 3 and 5 to 8\) busi det_auroc (\d) of (\d), busi seg_auroc (\d) of (\d)", words)
    assert own[2] == own[4] == "6"  # four variants beside the whole, EGM once more as ADD
    assert "Table 6 (modules) EGM added: ahead in 3 and behind in 0 of 3" in words
    assert "MFF added: no difference shown in any of 3" in words
    assert "Table 7 (edges) is not run yet" in words
    assert "9 of brain_mri and 2 of head_ct" in words
    assert "recall and precision in 30 of 30 rows" in words
    assert "not run" in words
    assert "label-w" in words
    assert "checkpoint" not in scripts.opening.opening([run(variant="sam")]).paragraphs[0]


def test_what_is_printed_twice_counts_once(scripts):
    whole = run(preset="paper", dataset="head_ct")
    values = [
        each for each in scripts.opening.own_values([whole]) if each.metric == "det_auroc" and each.runs
    ]
    assert [(each.dataset, each.value) for each in values] == [("head_ct", "82.90")]
    everything = list(scripts.opening.own_values([]))
    # 128, 256, 512 px; none, egm, egm-eam, mff; prewitt, sam; add, mul: each on three sets by three metrics
    assert len(everything) == (3 + 4 + 2 + 2) * 9
    assert not any(each.judged for each in everything)


def test_one_page_holds_everything(scripts, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("paper-figure8.png", "misses-busi.png", "other.png"):
        grey_png(images / name)
    items = [
        Text("First", ["<b>not bold</b> 95.83"]),
        Table("Second", ("a",), [("1",)]),
        scripts.page.Shown("absent.png", "Not there"),
        *scripts.page.figures(images),
    ]
    target = scripts.page.write_html(
        tmp_path / "build" / "page.html", items, title="T", lead="L", images=images
    )
    text = target.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == 2
    assert "<script" not in text
    assert "http" not in text.split("Content-Security-Policy")[1].split(">", 1)[1]
    assert "&lt;b&gt;not bold" in text
    assert "Missing in docs/images: absent.png" in text
    marked = scripts.page.markdown(items, title="T")
    assert marked.startswith("# T\n")
    assert "![paper figure8](images/paper-figure8.png)" in marked
    assert "other.png" not in marked


def test_the_ablation_stays_out_of_the_other_tables(scripts):
    mixed = [*modules(), run(size=128), run(preset="paper", seg=0.69)]
    assert [each["preset"] for each in scripts.tables.shared(mixed)] == ["paper"]
    # three sizes of one variant and seed are no stale results, but only where sizes are asked for
    with pytest.raises(SystemExit, match="two results for one seed"):
        scripts.store.select(mixed, dataset="busi", detector="egmf", preset="ablation")
    words = {"dataset": "busi", "detector": "egmf", "preset": "ablation"}
    assert len(scripts.store.select(mixed, **words, size=128)) == 1


def test_the_committed_results_render(scripts, monkeypatch, tmp_path):
    monkeypatch.setattr(scripts.store, "RESULTS", BENCHMARKS / "results")
    results = [each for each in scripts.store.load_results() if each["seed"] == 0]
    row_of = {"name": "egmf", "preset": "paper", "parts": {}, "total": 1, "used": 1, "trainable": 1}
    monkeypatch.setattr(scripts.tables, "default_items", lambda _: [])
    items = scripts.tables.results_items(results, [row_of])
    assert items[0].title == scripts.opening.TITLE
    text = scripts.page.markdown(items, title="T")
    order = [
        "Table 1: images",
        "Table 2: layers",
        "Table 3, busi",
        "## Table 4",
        "Table 5, image",
        "Table 8, aggr",
    ]
    places = [text.index(name) for name in order]
    assert places == sorted(places)
    target = scripts.page.write_html(tmp_path / "t.html", items, title="T", lead="L")
    assert "Table 8, aggregation" in target.read_text(encoding="utf-8")
