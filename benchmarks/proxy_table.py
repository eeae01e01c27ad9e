"""How well `umiad tune` ranks settings: its figures on synthetic anomalies beside those on the real test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from results_store import (
    DATASETS,
    Result,
    difference,
    known,
    load_named,
    over_seeds,
    provenance,
    rank_agreement,
    select,
)
from umiad.report import Block, Table, Text, percent
from win_table import METRICS, OURS, PROXIES, missing, ours

IDEAS = "python benchmarks/ideas.py --data DATA --weights FILE"
SHOWN = ("det_auroc", "seg_auroc", "seg_aupro")
PROXY = "python benchmarks/proxy.py --data DATA --weights FILE"


def proxy_blocks(results: Sequence[Result], dataset: str) -> list[Block]:
    """How the ranking of settings on synthetic anomalies agrees with the one on the real test images."""
    name, proxy = f"How well synthetic anomalies rank settings, {dataset}", load_named(f"proxy-{dataset}")
    if not proxy:
        return [missing(name, f"benchmarks/results/proxy-{dataset}.json", PROXY)]
    rows, real, used = [], [], []
    for each in proxy["candidates"]:
        words = {key: each[key] for key in ("detector", "preset", "variant")}
        runs = select(results, dataset=dataset, **words)
        used += runs
        real.append({metric: known(runs, metric) for metric in METRICS["busi"]})
        shown = ("-" if each[key] is None else percent(each[key]) for key in PROXIES)
        gap = "-" if each.get("gap") is None else f"{each['gap']:.3f}"
        means = (over_seeds(real[-1][metric]) for metric in METRICS[dataset])
        rows.append((each["name"], *shown, gap, *means))
    header = ("candidate", *(f"proxy {key}" for key in PROXIES), "gap (nats/dim)")
    header += tuple(f"real {metric}" for metric in METRICS[dataset])
    pairs = [("det_auroc", "det_auroc"), ("rank_score", "det_auroc")]
    pairs += [(metric, metric) for metric in METRICS[dataset][1:]]
    found = [rank_agreement(proxy["candidates"], real, proxy_key=p, real_key=r) for p, r in pairs]
    origin = f"Real: {provenance(used)}" if used else "Real: no results yet."
    caption = (
        "Percent; real: mean over the seeds there are. Most candidates are variants of one detector; p "
        "takes them as independent and is too small. Proxy: weights label "
        f"{proxy.get('weights', 'not stated')}, seed {proxy.get('seed', 'not stated')}, commit "
        f"{proxy['commit']}. {origin}"
    )
    found.append(picked(results, dataset, proxy["candidates"]))
    return [Text(name, found), Table(f"Proxy and real results, {dataset}", header, rows, caption)]


def picked(results: Sequence[Result], dataset: str, candidates: Sequence[dict[str, Any]]) -> str:
    """What `umiad tune` would have chosen among egmf's settings, and what that gives on the test images."""
    own = [each for each in candidates if each["detector"] == OURS[0] and each["rank_score"] is not None]
    if not own:
        return "No setting of egmf was ranked."
    best = max(own, key=lambda each: float(each["rank_score"]))
    chosen, main = ours(results, dataset, best["variant"]), ours(results, dataset)
    gains = []
    for metric in METRICS[dataset]:
        gap = difference(chosen, main, metric)
        gains.append(f"{metric} {gap.text if gap else 'not measured'}")
    return (
        f"Of egmf's settings `umiad tune` ranks {best['name']} first (rank_score {percent(best['rank_score'])}). On "
        f"the test images, minus the default: {'; '.join(gains)}."
    )


BASE = "base: "
"""How the idea that the others are compared with is named."""


def ideas_block() -> Block:
    """Ideas beside the default, as `umiad tune` judges them: value of the base and differences to it."""
    name = "Ideas that were tried on normal images and synthetic anomalies"
    found = {dataset: known for dataset in DATASETS if (known := load_named(f"ideas-{dataset}"))}
    if not found:
        return missing(name, "benchmarks/results/ideas-*.json", IDEAS)
    ideas = sorted(next(iter(found.values()))["ideas"], key=lambda idea: (not idea.startswith(BASE), idea))
    rows = []
    for idea in ideas:
        cells = []
        for each in found.values():
            base, values = (each["ideas"][key] for key in (ideas[0], idea))
            cells += [
                percent(values[m]) if idea == ideas[0] else f"{100 * (values[m] - base[m]):+.1f}"
                for m in SHOWN
            ]
        rows.append((idea, *cells))
    header = ("idea", *(f"{dataset} {m}" for dataset in found for m in SHOWN))
    facts = next(iter(found.values()))
    commits = ", ".join(sorted({each["commit"] for each in found.values()}))
    caption = (
        "First row: percent; the others: points more or less than it. No abnormal and no test image: synthetic "
        f"anomalies in held-out normal images of seed {facts['seed']}'s training part, {facts['folds']} folds, "
        f"{facts['per_image']} per image; post-processed as the default is. The base is the default without its "
        f"mirrored view. Commit {commits}."
    )
    return Table(name, header, rows, caption)
