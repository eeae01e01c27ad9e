"""The section on egmf's default: made-up results are traced to the rendered cells."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from umiad.metrics import det_auroc
from umiad.report import Table, Text, to_markdown

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LABELS = "0" * 8 + "1" * 12


@pytest.fixture
def win(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import results_store
    import win_table

    monkeypatch.setattr(results_store, "RESULTS", tmp_path)
    return win_table


@pytest.fixture
def proxy(win):
    import proxy_table

    return proxy_table


@pytest.fixture
def store(win):
    return sys.modules["results_store"]


def run(*, lift=1.0, seg=None, noise=0, **facts):
    """A result: scores are noise, `lift` added to abnormal images; seg_auroc and seg_aupro are `seg`."""
    facts = {"detector": "egmf", "preset": "default", "variant": "main", "dataset": "busi", "seed": 0} | facts
    truth = np.array([int(digit) for digit in LABELS])
    rng = np.random.default_rng([facts["seed"], noise])
    scores = [float(score) for score in rng.standard_normal(len(truth)) + lift * truth]
    value = float(det_auroc(np.array(scores), truth.astype(bool)))
    ends = [value - 0.05, value + 0.05] if facts["seed"] == 0 else None
    pixel = {"value": seg, "ci95": None if ends is None or seg is None else [seg - 0.01, seg + 0.01]}
    return facts | {
        "localises": seg is not None,
        "split_digest": f"{facts['dataset']} {facts['seed']}",
        "fit_seconds": 30.0 + facts["seed"],
        "threads": 1,
        "weights": "label-w",
        "size": 64,
        "epochs": 0,
        "commit": "c0ffee",
        "cases": {"labels": LABELS, "groups": [""] * len(truth), "image_scores": scores},
        "metrics": {"det_auroc": {"value": value, "ci95": ends}, "seg_auroc": pixel, "seg_aupro": pixel},
    }


def runs(seeds=range(5), **facts):
    """One run per seed; `seg` grows by a hundredth of it per seed."""
    seg = facts.pop("seg", None)
    return [run(**facts, seed=s, seg=None if seg is None else seg * (1 + s / 100)) for s in seeds]


def auroc(each):
    return each["metrics"]["det_auroc"]["value"]


def row(table, *start):
    [found] = [each for each in table.rows if each[: len(start)] == start]
    return found


def test_a_paired_interval_is_of_seeds_and_images(store):
    first, second = runs(lift=3.0), runs(lift=0.0, noise=1, detector="padim")
    gap = store.image_difference(first, second)
    values = [auroc(a) - auroc(b) for a, b in zip(first, second, strict=True)]
    assert gap.values == pytest.approx(values)
    assert gap.ends[0] < np.mean(values) < gap.ends[1]
    assert (gap.sign, gap.verdict) == (1, "ahead")
    back = store.image_difference(second, first)
    assert back.verdict == "behind"
    # the same draws of seeds and images: the mirrored interval
    assert back.ends == pytest.approx((-gap.ends[1], -gap.ends[0]))
    alone = store.image_difference(first[:1], second)
    assert alone.seeds == (0,)
    drawn = store.auroc_draws(first[0]) - store.auroc_draws(second[0])
    # resampled draws of one seed: percentiles of the draws themselves, within their spacing
    assert alone.ends == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.05)
    same = store.image_difference(first, first)
    assert (same.ends, same.verdict) == ((0.0, 0.0), "no difference shown")


def test_seeds_that_disagree_widen_the_interval(store):
    base, agreeing = runs(lift=1.0), runs(lift=1.5)
    mixed = [run(lift=3.0 if seed % 2 else -1.0, seed=seed) for seed in range(5)]
    narrow, wide = (store.image_difference(each, base).ends for each in (agreeing, mixed))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_differences_need_the_same_images(store):
    assert store.difference(runs(range(2)), runs(range(2, 4)), "det_auroc") is None
    assert store.difference(runs(), runs(), "seg_auroc") is None
    other = run() | {"split_digest": "other"}
    with pytest.raises(SystemExit, match="busi, seed 0: egmf main and egmf main have different test images"):
        store.image_difference(runs(), [other])
    single = run()
    single["cases"]["groups"] = ["one"] * 8 + [""] * 12
    gap = store.image_difference([single], [single])
    assert (gap.ends, gap.verdict) == (None, "no interval")


def test_pixel_metrics_have_a_t_interval_over_seeds(store):
    from scipy import stats

    first, second = runs(seg=0.8), runs(seg=0.7)
    gap = store.difference(first, second, "seg_auroc")
    interval = stats.ttest_rel(*([store.value(r, "seg_auroc") for r in each] for each in (first, second)))
    assert gap.ends == pytest.approx(tuple(interval.confidence_interval(0.95)))
    assert gap.verdict == "ahead (these images)"
    assert store.difference(first[:1], second, "seg_auroc").verdict == "ahead (seed 0)"
    assert store.difference(second[:2], first, "seg_auroc").verdict == "behind (seed 0)"
    near = store.difference(first[:1], runs(seg=0.79), "seg_auroc")
    assert near.verdict == "no difference shown (seed 0)"
    assert store.difference(first[1:2], second, "seg_auroc").verdict == "no interval"


def test_goals_are_judged_by_the_mean(win, store, tmp_path):
    results = [*runs(lift=9.0, seg=0.7), *runs(range(2), lift=0.0, dataset="head_ct")]
    table = win.goals(results)
    assert row(table, "busi", "det_auroc")[2:4] == (">= 97.0", "100.0 (100.0 to 100.0, n = 5)")
    assert row(table, "busi", "det_auroc")[5] == "yes"
    assert row(table, "busi", "seg_auroc")[3:] == ("71.4 (70.0 to 72.8, n = 5)", "70.0 [69.0, 71.0]", "no")
    assert row(table, "head_ct", "det_auroc")[4] == store.cell(results[5]["metrics"]["det_auroc"])
    assert row(table, "head_ct", "det_auroc")[5] == "no (without seeds 2 3 4)"
    assert row(table, "brain_mri", "det_auroc")[3:] == ("-", "-", "not measured")
    assert row(table, "busi", "fit seconds")[2:] == ("<= 180", "32 (30 to 34, n = 5)", "30", "yes")
    assert row(table, "any", "tensors of the saved model, MB")[3] == "not measured: make bench"
    for part in ("label-w", "64 px", "closed form", "c0ffee", "win.toml"):
        assert part in table.caption
    speed = {"egmf": {"preset": "default", "ratio": 1.234, "ratio_batch8": 1.9, "model_mb": 56.78}}
    (tmp_path / "speed_scoring.json").write_text(
        json.dumps({"detectors": speed, "threads": 1, "commit": "c"})
    )
    table = win.goals([each | {"fit_seconds": 181.0} for each in results])
    assert row(table, "busi", "fit seconds")[5] == "no"
    assert [line[3:] for line in table.rows[-2:]] == [("56.78", "-", "yes"), ("1.90", "-", "no")]


def test_every_rival_is_compared_on_common_seeds(win):
    own = runs(lift=3.0, seg=0.8)
    results = [
        *own,
        *runs(range(2), lift=0.0, noise=1, seg=0.7, detector="padim"),
        run(lift=3.0, seg=0.81, preset="paper"),
        run(lift=0.0, noise=2, detector="size"),
    ]
    table = win.against(results, "busi")
    padim = row(table, "det_auroc", "padim")
    shown = f"{100 * np.mean([auroc(own[0]), auroc(own[1])]):.1f}"
    assert (padim[2], padim[3], padim[6]) == ("0 1", shown, "ahead")
    paper = row(table, "det_auroc", "egmf, preset paper")
    assert paper[5:] == ("+0.0 [+0.0, +0.0]", "no difference shown")
    assert row(table, "seg_auroc", "egmf, preset paper")[5:] == ("-1.0", "no difference shown (seed 0)")
    assert row(table, "seg_aupro", "padim")[6] == "ahead (seed 0)"
    assert [line[0] for line in table.rows if line[1].startswith("size (a confounder")] == ["det_auroc"]
    assert not [line for line in table.rows if line[1] == "egmf"]
    assert "paired bootstrap" in table.caption
    assert row(win.against([*own, *runs([7], detector="cflow")], "busi"), "det_auroc", "cflow")[6] == (
        "no common seed"
    )


def test_the_ranking_has_who_was_run_on_all_sets(win):
    sets = ("busi", "brain_mri", "head_ct")
    own = [each for name in sets for each in runs(lift=0.5, dataset=name)]
    padim = [run(lift=9.0, dataset=name, detector="padim") for name in sets]
    table = win.ranking([*own, *padim, run(detector="cflow")])
    assert [line[:3] for line in table.rows] == [
        ("1", "padim", "100.0"),
        ("2", "egmf", f"{100 * np.mean([auroc(each) for each in own]):.1f}"),
    ]
    first = [auroc(each) for each in own if each["seed"] == 0]
    assert table.rows[0][6:] == ("1 / 1 / 1", f"{100 * np.mean(first):.1f}")
    assert "Without results on all three sets yet: cflow" in table.caption


def test_each_ingredient_has_its_gain(win):
    results = [
        *runs(lift=3.0, seg=0.8),
        *runs(lift=0.0, noise=1, seg=0.78, variant="no-mirror"),
        *runs(range(2), lift=3.0, seg=0.9, variant="maximum"),
    ]
    table, lacking = win.ablation(results)
    assert [line[0] for line in table.rows] == ["main", *win.VARIANTS]
    mirror = row(table, "no-mirror")
    gain = np.mean([auroc(a) - auroc(b) for a, b in zip(results[:5], results[5:10], strict=True)])
    assert f"gain {100 * gain:+.1f} [" in mirror[2]
    assert mirror[3] == "79.6; gain +2.0 (+2.0 to +2.1), n = 5"
    assert "busi det_auroc: helps; busi seg_auroc: higher with it on every seed" in mirror[-1]
    maximum = row(table, "maximum")
    assert "gain +0.0 [+0.0, +0.0], n = 2" in maximum[2]
    # two seeds that agree are too few
    assert "busi seg_auroc: no difference shown" in maximum[-1]
    assert row(table, "no-edges")[2:] == ("-",) * 5 + ("no results yet",)
    assert "maximum (busi 2 3 4, brain_mri all, head_ct all)" in lacking.paragraphs[0]
    assert "no-mirror (brain_mri all, head_ct all)" in lacking.paragraphs[0]
    swapped = win.ablation(
        [each | {"variant": "main"} for each in results[5:10]] + runs(lift=3.0, variant="no-mirror")
    )
    assert "busi det_auroc: harms" in row(swapped[0], "no-mirror")[-1]


def test_equal_sharpness_stands_beside_what_it_was(win, store):
    own = runs(lift=1.0, noise=3, variant="equalised", dataset="head_ct")
    rival = run(lift=0.0, noise=4, variant="equalised", dataset="head_ct", detector="padim")
    plain = [*runs(dataset="head_ct"), run(lift=0.0, dataset="head_ct", detector="padim")]
    table = win.equal_sharpness([*own, rival, *plain])
    assert row(table, "head_ct", "egmf")[2] == store.cell(own[0]["metrics"]["det_auroc"])
    assert row(table, "head_ct", "egmf")[4:] == (store.over_seeds([auroc(r) for r in plain[:5]]), "")
    padim = row(table, "head_ct", "padim")
    assert padim[4] == f"{100 * auroc(plain[5]):.1f} (n = 1)"
    assert padim[5].startswith(f"{100 * (auroc(own[0]) - auroc(rival)):+.1f} [")
    assert isinstance(win.equal_sharpness([rival, *plain]), Text)


LEARNING = {
    "dataset": "busi",
    "commit": "c0ffee",
    "weights": "label-w",
    "rows": [
        {"n": n, "seed": seed, "det_auroc": n / 100 + seed / 50, "seg_auroc": 0.5, "seg_aupro": 0.25}
        for n in (50, 10)
        for seed in (0, 1)
    ],
}


def test_the_learning_curve_is_tabled_and_drawn(win):
    table = win.learning_block(LEARNING)
    assert table.rows[0][:3] == ("egmf", "10", "11.0 (10.0 to 12.0, n = 2)")
    assert table.rows[1][1:4] == ("50", "51.0 (50.0 to 52.0, n = 2)", "50.0 (50.0 to 50.0, n = 2)")
    assert "commit c0ffee" in table.caption
    more = [each | {"detector": "posgauss", "seg_auroc": None} for each in LEARNING["rows"]]
    both = LEARNING | {"rows": LEARNING["rows"] + more}
    assert [line[0] for line in win.learning_block(both).rows] == ["egmf"] * 2 + ["posgauss"] * 2
    assert win.learning_block(both).rows[2][3] == "-"
    for learning in (LEARNING, both):
        assert win.learning_picture(learning).startswith(b"\x89PNG")


def candidate(variant, value, **facts):
    figures = {"det_auroc": value, "seg_auroc": value, "seg_aupro": None, "rank_score": 1 - value, "gap": 0.5}
    return {
        "name": f"egmf-default-{variant}",
        "detector": "egmf",
        "preset": "default",
        "variant": variant,
    } | (figures | facts)


def test_the_proxy_is_judged_by_its_ranks(proxy, tmp_path):
    lifts = {"main": 0.0, "no-mirror": 1.0, "no-edges": 2.0, "maximum": 9.0}
    results = [run(lift=lift, seg=0.5 + lift / 30, variant=name) for name, lift in lifts.items()]
    rows = [candidate(name, 0.6 + lift / 30) for name, lift in lifts.items()] + [candidate("no-prior", 0.5)]
    ranked = {"dataset": "busi", "commit": "feed", "seed": 0, "candidates": rows}
    (tmp_path / "proxy-busi.json").write_text(json.dumps(ranked))
    text, table = proxy.proxy_blocks(results, "busi")
    assert text.paragraphs[0].startswith(
        "Proxy det_auroc and real det_auroc, 4 candidates: Spearman's rho +1.00, p ="
    )
    assert "rank_score and real det_auroc, 4 candidates: Spearman's rho -1.00" in text.paragraphs[1]
    assert "seg_auroc and real seg_auroc, 4 candidates: Spearman's rho +1.00" in text.paragraphs[2]
    assert "seg_aupro and real seg_aupro, 0 candidates: too few" in text.paragraphs[3]
    shown = row(table, "egmf-default-no-edges")
    assert shown[1:6] == ("66.7", "33.3", "66.7", "-", "0.500")
    assert shown[6] == f"{100 * auroc(results[2]):.1f} (n = 1)"
    assert row(table, "egmf-default-no-prior")[6:] == ("-", "-", "-")
    assert "commit feed" in table.caption
    # the highest rank_score is that of the lowest value: no-prior, which has no results; without it main
    assert "ranks egmf-default-no-prior first (rank_score 50.0)" in text.paragraphs[4]
    assert "det_auroc not measured" in text.paragraphs[4]
    ranked["candidates"] = rows[1:3]
    (tmp_path / "proxy-busi.json").write_text(json.dumps(ranked))
    gain = 100 * (auroc(results[1]) - auroc(results[0]))
    assert (
        f"minus the default: det_auroc {gain:+.1f}" in proxy.proxy_blocks(results, "busi")[0].paragraphs[-1]
    )
    _, table = proxy.proxy_blocks([], "busi")
    assert "no results yet" in table.caption


def test_the_operating_point_is_that_of_runs_with_a_hold_out_and_by_folds(win):
    from operating_point import operating_blocks

    assert "foundation.toml" in operating_blocks([run()])[0].paragraphs[0]
    kept = run(variant="holdout") | {"n_train": 71, "n_holdout": 19, "weights": "w", "commit": "abc"}
    kept["counts"] = {"n_normal": 10, "n_abnormal": 100}
    figures = {"det_sensitivity": 0.75, "det_specificity": 0.9}
    kept["metrics"] |= {key: {"value": value, "ci95": [0.5, 1.0]} for key, value in figures.items()}
    folds = kept | {"variant": "folds", "n_train": 90, "n_holdout": 0}
    [table] = operating_blocks([run(), folds, kept])
    assert [line[1] for line in table.rows] == ["hold-out", "five folds"]
    assert [line[3] for line in table.rows] == ["71 / 19", "90 / 90"]
    for line in table.rows:
        assert line[5:7] == ("75.0 [50.0, 100.0]", "90.0 [50.0, 100.0]")
        assert line[-1] == "w, abc"


def test_ideas_are_shown_as_differences_to_the_first(proxy, tmp_path):
    assert "ideas.py" in proxy.ideas_block().paragraphs[0]
    figures = {"det_auroc": 0.6, "seg_auroc": 0.7, "seg_aupro": 0.5}
    ideas = {"base": figures, "other": figures | {"det_auroc": 0.615, "seg_aupro": 0.48}}
    known = {"dataset": "busi", "seed": 0, "folds": 3, "per_image": 4, "commit": "beef", "ideas": ideas}
    (tmp_path / "ideas-busi.json").write_text(json.dumps(known))
    table = proxy.ideas_block()
    assert table.rows == [("base", "60.0", "70.0", "50.0"), ("other", "+1.5", "+0.0", "-2.0")]
    assert "beef" in table.caption


def test_the_page_says_what_is_missing_and_what_makes_it(win, store, tmp_path):
    import tables

    page = tables.default_section([])
    for name in ("win.toml", "table3.toml", "learning\\_curve.py", "proxy.py"):
        assert name in page
    assert "learning-curve-busi.png" not in page
    (tmp_path / "learning_curve-busi.json").write_text(json.dumps(LEARNING))
    results = runs(lift=3.0, seg=0.8)
    page = tables.default_section(results)
    assert "(images/learning-curve-busi.png)" in page
    assert store.over_seeds([auroc(each) for each in results]) in page
    for dataset in ("brain_mri", "head_ct"):
        assert isinstance(win.against(results, dataset), Text)
    assert isinstance(win.against(results, "busi"), Table)
    # no other result file is taken for a run
    assert store.load_results() == []
    assert "## The default of egmf" in to_markdown(win.win_blocks([]))


def test_two_results_for_one_seed_are_an_error(win):
    for show in (win.goals, win.ablation, win.ranking):
        with pytest.raises(SystemExit, match="two results for one seed"):
            show([run(), run()])
    # another preset or variant is another row
    win.goals([run(), run(preset="paper"), run(variant="maximum")])
