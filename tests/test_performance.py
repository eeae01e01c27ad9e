"""docs/performance.md: figures are traced from JSON to the page, and every part can be measured."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FACTS = {"images": "busi", "threads": 2, "turns": 5, "weights": "w", "torch": "2", "commit": "abc"}


def part(**values):
    return {"facts": FACTS, "values": values}


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import performance_page

    return performance_page


def test_the_page_tells_reached_beside_asked_for(pages):
    found = {
        "folder": part(**{"nothing written": 1.234, "maps and pictures": 2.5}),
        "startup": part(help=0.25),
    }
    metrics = [{"what": "exact", "seconds": 2.3, "peak_gb": 0.8, "goal_seconds": 3.0, "goal_gb": 1.5}]
    text = pages.page(found, metrics)
    assert (
        "| scoring a folder of 496 images, model loaded, nothing written | 1.23 x R1 | at most 1 x R1 |"
        in text
    )
    assert "| `umiad --help` | 0.25 s | at most 0.3 s |" in text
    assert "| exact | 2.3 s, 0.8 GB | at most 3 s and 1.5 GB |" in text
    assert "| the same folder with maps and pictures | 2.5 x R1 | - |" in text
    assert "| folder | busi | 2 | 5 | w | 2 | abc |" in text


def test_what_was_not_measured_says_so(pages):
    text = pages.page({}, [])
    assert text.count("not measured yet") == len(pages.GOALS)
    assert text.count("Not measured yet: `make bench`.") == 7


def test_growth_has_its_exponent_and_its_plot(pages, monkeypatch, tmp_path):
    law = {"exponent": 0.987, "points": {"1": 1.0, "16": 12.5, "8": 7.4}}  # sorted as words
    found = {"growth": part(batch=law)}
    monkeypatch.setattr(pages, "PLOT", tmp_path / "growth.png")
    pages.plot(found)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "| batch | 1 | 16 | 12.5 | 0.99 |" in pages.page(found, [])


def test_the_committed_page_is_the_one_of_the_committed_results(pages):
    assert pages.PAGE.read_text() == pages.page(
        pages.load("performance.json"), *(pages.load(f"{name}.json") or [] for name in pages.LISTS)
    )


def test_runtimes_are_compared_with_torch(pages):
    found = {"runtimes": part(**{"torch": 1.6, "OpenVINO": 1.2, "r2": 0.7})}
    text = pages.page(found, [])
    assert "| torch | 1.60 | 1.00 |\n| OpenVINO | 1.20 | 0.75 |" in text


def test_jobs_are_cut_into_their_stages_and_training_into_its_parts(pages):
    jobs = {"fit": {"images": 9, "seconds": 4.0, "shares": {"reading images": 0.25, "the rest": 0.75}}}
    steps = {"forward": 1.0, "whole step, cached": 2.0, "whole step, uncached": 3.0}
    found = {"jobs": part(**jobs), "training": part(**steps), "startup": part(**{"import torch": 1.5})}
    text = pages.page(found, [])
    assert "| fit | 9 | 4 | the rest | 75% |\n| fit | 9 | 4 | reading images | 25% |" in text
    assert "An epoch without the cache takes 1.50 times one with it." in text
    assert "| import torch | 1.50 |" in text


def test_a_clock_gives_time_to_the_stage_that_is_named_next(pages, monkeypatch):
    import profile_jobs

    times = iter([0.0, 1.0, 4.0, 5.0, 10.0])
    monkeypatch.setattr(profile_jobs.time, "perf_counter", lambda: next(times))
    clock = profile_jobs.Clock()
    for name in ("read", "score", "read"):
        clock.stage(name, 1, 2)
    assert clock.shares() == {"read": 0.2, "score": 0.3, "the rest": 0.5}


def test_a_part_that_lacks_a_row_keeps_its_figures(pages, monkeypatch, tmp_path, capsys):
    import performance

    target = tmp_path / "performance.json"
    older = {"runtimes": part(torch=1.5, OpenVINO=1.0)}
    target.write_text(json.dumps(older))
    monkeypatch.setattr(performance, "TARGET", target)
    monkeypatch.setattr(performance, "Bench", lambda *_: SimpleNamespace(real=False, model=model_of("w")))
    monkeypatch.setitem(performance.PARTS, "runtimes", lambda *_: {"torch": 1.25})
    monkeypatch.setattr(sys, "argv", ["performance.py", "--only", "runtimes"])
    performance.main()
    assert json.loads(target.read_text()) == older
    assert "without OpenVINO; the figures of before are kept" in capsys.readouterr().out
    monkeypatch.setitem(
        performance.PARTS, "runtimes", lambda *_: {"torch": 1.25, "OpenVINO": 1.0, "new": 2.0}
    )
    performance.main()
    assert json.loads(target.read_text())["runtimes"]["values"]["new"] == 2.0


def model_of(weights):
    return SimpleNamespace(detector=SimpleNamespace(config=SimpleNamespace(weights=weights)))


def test_forms_of_the_backbone_stand_side_by_side(pages):
    forms = {"plain": 0.75, "folded": 0.5}
    times = {"seconds to compile, batch 1": 14.0, "seconds to compile, batch 8": 3.5}
    text = pages.page({"backbone": part(**{"1": forms, "8": {**forms, "folded": 0.48}}, **times)}, [])
    assert "| form | x R1, batch of 1 | x R1, batch of 8 |" in text
    assert "| folded | 0.50 | 0.48 |" in text
    assert "Compiling took 14 s, 3.5 s." in text


def test_other_ways_to_the_same_scores_stand_beside_what_they_change(pages):
    each = {"map_median": 1e-6, "map_most": 2e-6, "score_most": 3e-7, "decisions_changed": 0, "decisions": 20}
    row = {"dataset": "busi", "images": 10, "commit": "abc"}
    row |= {"compared": {"plain network": {**each, "det_auroc": [90.0, 90.25]}}}
    text = pages.page({}, [], same=[row])
    assert (
        "| busi | 10 | plain network | 1.0e-06 | 2.0e-06 | 3.0e-07 | 0 of 20 | 90.00 -> 90.25 | abc |" in text
    )


def test_what_was_exported_and_what_was_refused_have_their_rows(pages):
    parity = {"map_relative": 2e-6, "score_relative": 3e-7, "decisions": 8, "same_decisions": 7, "ties": 1}
    row = {"detector": "padim", "preset": "quick", "runtime": "onnx", "weights": "w", "commit": "abc"}
    refused = {**row, "detector": "adfa", "refused": "adfa cannot be exported: a search"}
    text = pages.page({}, [], exported=[{**row, "parity": parity}, refused])
    assert "| padim, quick | onnx | 2.0e-06 | 3.0e-07 | 7 of 8, 1 ties | w | abc |" in text
    assert "| adfa, quick | onnx | refused: adfa cannot be exported: a search | - | - | w | abc |" in text


def test_the_cost_of_a_fit_stands_beside_what_makes_it_up(pages):
    row = {"detector": "ikd", "minutes": 9.5, "epochs": 60, "seconds_per_epoch": 9.25, "seconds_beside": 15.0}
    text = pages.page({}, [], fits=[{**row, "threads": 2, "weights": "w", "commit": "abc"}])
    assert "| ikd | 9.5 | 60 | 9.25 | 15.0 | 2 | w | abc |" in text


def test_a_fit_is_timed_by_its_longer_epoch_and_closed_forms_are_not(pages, monkeypatch):
    import fit_cost

    monkeypatch.setattr(
        fit_cost.Epochs, "epoch", lambda clock, row: clock.seconds.append(float(row["epoch"]))
    )
    assert fit_cost.cost("padim", "random", fit_cost.draw(2)) is None
    row = fit_cost.cost("fanogan", "random", fit_cost.draw(2))
    assert (row["epochs"], row["seconds_per_epoch"], row["images"]) == (80, 2.0, 2)
    assert row["minutes"] == round((80 * 2.0 + row["seconds_beside"]) / 60, 1)


def test_a_score_that_changed_ends_with_an_error(pages):
    import same_scores

    same = {"map_most": 2e-5, "score_most": 2e-6, "decisions_changed": 0}
    row = {
        "dataset": "busi",
        "compared": {"plain network": same, same_scores.IN_BFLOAT16: {**same, "map_most": 0.04}},
    }
    assert same_scores.beyond([row]) == []
    for worse in ({"map_most": 2e-4}, {"score_most": 2e-4}, {"decisions_changed": 1}):
        [words] = same_scores.beyond([{**row, "compared": {"plain network": {**same, **worse}}}])
        assert words.startswith("busi, plain network: ")


def test_compact_features_stand_beside_exact_ones(pages):
    metrics = {"det_auroc": 66.5, "seg_auroc": None, "seg_aupro": None}
    row = {"dataset": "head_ct", "detector": "padim", "preset": "default", "weights": "w", "commit": "abc"}
    row |= {
        "metrics": {"float32": metrics, "float16": {**metrics, "det_auroc": 66.75}},
        "scores_apart": 0.00123,
        "epochs": 0,
    }
    text = pages.page({}, [], [row])
    assert "| head_ct | padim, default | 0 | 66.50 -> 66.75 | - | - | 1.2e-03 | w | abc |" in text


def test_an_exponent_is_the_slope_of_the_logarithms(pages):
    from performance import power

    law = power({1: 0.5, 2: 2.0, 4: 8.0})
    assert law == {"exponent": 2.0, "points": {"1": 1.0, "2": 4.0, "4": 16.0}}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's compiler
def test_every_part_is_measured_on_phantoms(pages, monkeypatch, tmp_path):
    import performance

    monkeypatch.setattr(performance, "TARGET", tmp_path / "performance.json")
    for name, value in {"FOLDER": 48, "SOME": 2, "BATCHES": (1, 2), "SIZES": (64, 128)}.items():
        monkeypatch.setattr(performance, name, value)
    monkeypatch.setattr(performance, "COUNTS", {"score": (2, 4), "fit": (4, 8), "evaluate": (2, 4)})
    monkeypatch.setattr(sys, "argv", ["performance.py", "--data", str(tmp_path / "none"), "--turns", "1"])
    performance.main()
    found = json.loads((tmp_path / "performance.json").read_text())
    assert found.keys() == performance.PARTS.keys()
    assert "not measured yet" not in pages.page(found, [])
    assert found["folder"]["facts"]["images"] == "phantoms"
