"""Ideas that did not become part of egmf's default, judged as `umiad tune` judges: benchmarks/results/ideas-SET.json.

python benchmarks/ideas.py --data ../shared/data --weights FILE

Normal images of seed 0's training part and synthetic anomalies planted in held-out ones; no abnormal and no test image.
All ideas start from the default's fibres (square roots of F1, F2 and F3 on F3's grid) and its Gaussian per position.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from paper_protocol import CODE, RESULTS, write
from umiad.api import build
from umiad.config import Preprocessing
from umiad.data import load_data
from umiad.fitting import case_image, split_data
from umiad.nn.affine import AffineFlow, TwinMoments, on_grid
from umiad.preprocess import to_input
from umiad.progress import RichReporter
from umiad.scoring import smooth_cells, top_mean
from umiad.tuning import TuneOptions
from umiad.tuning_folds import Fold, judge_fold, make_folds

PRIOR, EPSILON, RANK, TOP = 20.0, 0.1, 128, 0.03
"""As in the default."""
BATCH, TRAINED_EPOCHS, NOISE = 8, 12, 0.3
PIXELS = 8
"""Grey values per side of a cell in the views "grey" and "grey mirror"."""

Views = Mapping[str, Tensor]
"""Name of a view of the images -> their fibres [N,P,C]; "plain" and "mirror" always."""
Idea = Callable[[Views, Views], Tensor]
"""(fitted, tested) -> energy of every tested position, [N,P]."""


def gaussian(fitted: Tensor, twins: Tensor) -> Callable[[Tensor], Tensor]:
    """The default's Gaussian per position, without the mirrored view: fibres [N,P,C] -> 0.5 mean u^2, [N,P]."""
    moments = TwinMoments(fitted.double().mean(0), blocks=(fitted.shape[2],))
    moments.add(fitted, twins)
    flow = AffineFlow(fitted.shape[1], fitted.shape[2], rank=min(RANK, fitted.shape[2]), conditional=False)
    flow.fit(moments, prior=PRIOR, epsilon=EPSILON)
    return lambda fibres: 0.5 * flow(fibres, fibres)[0].square().mean(2)


def base(fitted: Views, tested: Views) -> Tensor:
    """The default's view "position": what the ideas are compared with."""
    return gaussian(fitted["plain"], fitted["mirror"])(tested["plain"])


def augmented(*names: str) -> Idea:
    """Statistics over altered copies of the normal images too."""

    def idea(fitted: Views, tested: Views) -> Tensor:
        plain = torch.cat([fitted["plain"], *(fitted[name] for name in names)])
        mirror = torch.cat([fitted["mirror"], *(fitted[f"mirror {name}"] for name in names)])
        return gaussian(plain, mirror)(tested["plain"])

    return idea


def residual(context: Callable[[Tensor], Tensor], ridge: float = 0.01) -> Idea:
    """The Gaussian of what a linear regression on the context, shared by all positions, leaves over."""

    def idea(fitted: Views, tested: Views) -> Tensor:
        mean = torch.cat([fitted["plain"], fitted["mirror"]]).mean(0)
        seen = torch.cat([fitted["plain"], fitted["mirror"]]) - mean
        x, y = context(seen).flatten(0, 1).double(), seen.flatten(0, 1).double()
        square = x.mT @ x / len(x)
        square += ridge * square.diagonal().mean() * torch.eye(len(square)).double()
        by = torch.cholesky_solve(x.mT @ y / len(x), torch.linalg.cholesky(square)).float()
        left = {
            name: fibres - mean - context(fibres - mean) @ by
            for name, fibres in fitted.items()
            if name in ("plain", "mirror")
        }
        score = gaussian(left["plain"], left["mirror"])
        test = tested["plain"] - mean
        return score(test - context(test) @ by)

    return idea


def everywhere(fibres: Tensor) -> Tensor:
    """The mean over all positions, at every position: a descriptor of the whole image."""
    return fibres.mean(1, keepdim=True).expand_as(fibres)


def ring(fibres: Tensor, inner: int = 2, outer: int = 5) -> Tensor:
    """The mean of the cells that are more than `inner` and at most `outer` cells away, in rows or columns."""
    edge = round(fibres.shape[1] ** 0.5)
    maps = on_grid(fibres, (edge, edge))
    sums = [F.avg_pool2d(maps, 2 * r + 1, 1, r, divisor_override=1) for r in (outer, inner)]
    ones = torch.ones_like(maps[:1, :1])
    counts = [F.avg_pool2d(ones, 2 * r + 1, 1, r, divisor_override=1) for r in (outer, inner)]
    return ((sums[0] - sums[1]) / (counts[0] - counts[1]).clamp_min(1)).flatten(2).transpose(1, 2)


def nearest(fitted: Views, tested: Views) -> Tensor:
    """Distance to the nearest fitted fibre within one cell, as a memory bank with positions."""
    bank = torch.cat([fitted["plain"], fitted["mirror"]])
    edge = round(bank.shape[1] ** 0.5)
    found = torch.empty(tested["plain"].shape[:2])
    for place in range(bank.shape[1]):
        row, column = divmod(place, edge)
        near = [
            r * edge + c
            for r in range(max(0, row - 1), min(edge, row + 2))
            for c in range(max(0, column - 1), min(edge, column + 2))
        ]
        found[:, place] = torch.cdist(tested["plain"][:, place], bank[:, near].flatten(0, 1)).amin(1)
    return found


def calibrated(fitted: Views, tested: Views) -> Tensor:
    """Energies as z-scores of each position, mean and spread (3 x 3 averaged) of images left out in four folds."""
    n = len(fitted["plain"])
    held = torch.arange(n) * 4 // n
    energies = []
    for fold in range(4):
        score = gaussian(fitted["plain"][held != fold], fitted["mirror"][held != fold])
        energies.append(score(fitted["plain"][held == fold]))
    logs = torch.cat(energies).log()
    edge = round(logs.shape[1] ** 0.5)

    def averaged(values: Tensor) -> Tensor:
        return F.avg_pool2d(
            values.unflatten(0, (edge, edge))[None, None], 3, 1, 1, count_include_pad=False
        ).flatten()

    mean = averaged(logs.mean(0))
    spread = (averaged(logs.square().mean(0)) - mean.square()).clamp_min(1e-6).sqrt()
    return (base(fitted, tested).log() - mean) / spread


def flipped_too(fitted: Views, tested: Views) -> Tensor:
    """Mean with the energy of the mirrored test image, mirrored back."""
    score = gaussian(fitted["plain"], fitted["mirror"])
    edge = round(tested["plain"].shape[1] ** 0.5)
    back = score(tested["mirror"]).unflatten(1, (edge, edge)).flip(-1).flatten(1)
    return (score(tested["plain"]) + back) / 2


def trained(fitted: Views, tested: Views) -> Tensor:
    """One conditional affine coupling, trained by gradient steps, with its full likelihood.

    A network tells mean and scale of the whitened fibre from the whitened fibre of the mirrored image. Noise on
    its input; the whitening of the images it is trained on is cross-fitted in four folds.
    """
    n = len(fitted["plain"])
    held = torch.arange(n) * 4 // n

    def whitener(chosen: Tensor) -> Callable[[Tensor], Tensor]:
        moments = TwinMoments(fitted["plain"].double().mean(0), blocks=(fitted["plain"].shape[2],))
        moments.add(fitted["plain"][chosen], fitted["mirror"][chosen])
        flow = AffineFlow(*fitted["plain"].shape[1:], rank=RANK, conditional=False)
        flow.fit(moments, prior=PRIOR, epsilon=EPSILON)
        return lambda fibres: flow(fibres, fibres)[0]

    pairs = []
    for fold in range(4):
        white = whitener(held != fold)
        u, c = white(fitted["plain"][held == fold]), white(fitted["mirror"][held == fold])
        pairs += [(u, c), (c, u)]
    us, cs = (torch.cat(each) for each in zip(*pairs, strict=True))
    torch.manual_seed(0)
    width = us.shape[2]
    net = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 2 * width))
    nn.init.zeros_(net[3].weight)
    nn.init.zeros_(net[3].bias)

    def nats(u: Tensor, c: Tensor) -> Tensor:
        mean, log_scale = net(c).chunk(2, dim=-1)
        log_scale = torch.tanh(log_scale)
        return (0.5 * ((u - mean) * torch.exp(-log_scale)).square() + log_scale).mean(-1)

    adam = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    with torch.enable_grad():
        for _ in range(TRAINED_EPOCHS):
            for rows in torch.randperm(len(us)).split(16):
                loss = nats(us[rows] + NOISE * torch.randn_like(us[rows]), cs[rows]).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
    net.eval()
    white = whitener(torch.ones(n, dtype=torch.bool))
    return nats(white(tested["plain"]), white(tested["mirror"]))


def grey_alone(fitted: Views, tested: Views) -> Tensor:
    """The Gaussian of the grey values of each cell, in place of descriptors."""
    return gaussian(fitted["grey"], fitted["grey mirror"])(tested["grey"])


def grey_beside(share: float) -> Idea:
    """`share` of the energy of grey values, the rest of the descriptors'; both are means over their dimensions."""

    def idea(fitted: Views, tested: Views) -> Tensor:
        return (1 - share) * base(fitted, tested) + share * grey_alone(fitted, tested)

    return idea


IDEAS: dict[str, Idea] = {
    "base: position view": base,
    "grey values of each cell, alone": grey_alone,
    "grey values beside descriptors, a quarter": grey_beside(0.25),
    "grey values beside descriptors, half": grey_beside(0.5),
    "condition: mirrored image, trained coupling": trained,
    "condition: descriptor of the whole image": residual(everywhere),
    "condition: ring of neighbours": residual(ring),
    "nearest neighbour within one cell": nearest,
    "z-scores per position from held-out normals": calibrated,
    "mean with the flipped test image": flipped_too,
    "augmentation: gamma 0.75 and 1.33": augmented("gamma 0.75", "gamma 1.33"),
    "augmentation: shifts of 6 pixels": augmented("shift +", "shift -"),
}
ALTERED: dict[str, Callable[[Tensor], Tensor]] = {
    "gamma 0.75": lambda grey: grey**0.75,
    "gamma 1.33": lambda grey: grey**1.33,
    "shift +": lambda grey: _shifted(grey, 6),
    "shift -": lambda grey: _shifted(grey, -6),
}


def _shifted(grey: Tensor, pixels: int) -> Tensor:
    wide = F.pad(grey[:, None], (8, 8, 8, 8), mode="replicate").roll((pixels, pixels), (2, 3))
    return wide[:, 0, 8:-8, 8:-8]


def fibres_of_greys(grey: Tensor, weights: str) -> dict[str, Tensor]:
    """Fibres of grey images [N,S,S] in 0..1 and of their mirror images, by the default's `prepare`."""
    detector, preprocessing = build("egmf", weights=weights), Preprocessing()
    mean, std = (torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std))
    batches = [
        detector.prepare((part[:, None].expand(-1, 3, -1, -1) - mean) / std)
        for part in grey.float().split(BATCH)
    ]
    fibres = torch.cat([each["fibres"] for each in batches])
    edge = round(fibres.shape[1] ** 0.5)
    return {
        "plain": fibres,
        "mirror": torch.cat([each["twins"] for each in batches]),
        "grey": cells_of(grey, edge),
        "grey mirror": cells_of(grey.flip(-1), edge),
    }


def cells_of(grey: Tensor, edge: int) -> Tensor:
    """PIXELS x PIXELS grey values of each of edge x edge cells of images [N,S,S]: [N,edge^2,PIXELS^2]."""
    small = F.adaptive_avg_pool2d(grey.float()[:, None], edge * PIXELS)
    return F.unfold(small, PIXELS, stride=PIXELS).transpose(1, 2).contiguous()


def all_views(grey: Tensor, weights: str, *, altered: bool) -> dict[str, Tensor]:
    """The fibres of the images and, where wanted, of every altered copy."""
    views = fibres_of_greys(grey, weights)
    for name, alter in ALTERED.items() if altered else ():
        found = fibres_of_greys(alter(grey), weights)
        views |= {name: found["plain"], f"mirror {name}": found["mirror"]}
    return views


def judge(fold: Fold, energy: Tensor, size: int) -> dict[str, float | None]:
    """det_auroc, seg_auroc and seg_aupro of an idea on a fold, post-processed as the default is."""
    edge = round(energy.shape[1] ** 0.5)
    maps = smooth_cells(energy.unflatten(1, (edge, edge)), size, 4.0)
    scores = top_mean(maps, TOP).double().numpy()
    found: dict[str, float | None] = judge_fold(fold, scores, maps.numpy(), n_resamples=0)["metrics"]
    return found


def main() -> None:
    """Judge every idea on every set, if it has no result there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=["head_ct", "brain_mri", "busi"])
    parser.add_argument("--data", type=Path, required=True, help="folder with busi, brain_mri, head_ct")
    parser.add_argument("--weights", required=True, help="backbone weights, as in umiad fit")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for name in options.sets:
        target = RESULTS / f"ideas-{name}.json"
        known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"ideas": {}}
        wanted = {idea: run for idea, run in IDEAS.items() if idea not in known["ideas"]}
        if not wanted:
            continue
        dataset, tuning = load_data(options.data / name), TuneOptions()
        with RichReporter(Console(stderr=True)) as reporter:
            split = split_data(dataset, seed=0, holdout=0.0, reporter=reporter)
            entries, cases = split.part("train"), {dataset.name_of(case): case for case in dataset.cases}
            plain = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
            greys = [to_input(case_image(cases[entry.name]), plain)[0] for entry in entries]
            altered = any(idea.startswith("augmentation") for idea in wanted)
            views = all_views(torch.from_numpy(np.stack(greys)), options.weights, altered=altered)
            rows: dict[str, list[dict[str, float | None]]] = {idea: [] for idea in wanted}
            for fold in make_folds(entries, greys, tuning):
                planted = torch.from_numpy(np.stack([each.pixels for each in fold.anomalies]))
                found = fibres_of_greys(planted, options.weights)
                tested = {k: torch.cat([views[k][list(fold.held_out)], v]) for k, v in found.items()}
                fitted = {key: value[list(fold.fitted)] for key, value in views.items()}
                for done, (idea, run) in enumerate(wanted.items()):
                    reporter.stage(f"ideas, fold {fold.number + 1}", done, len(wanted))
                    rows[idea].append(judge(fold, run(fitted, tested), len(greys[0])))
        means = {
            idea: {metric: round(float(np.mean([f[metric] for f in folds])), 4) for metric in folds[0]}
            for idea, folds in rows.items()
        }
        facts = {
            "dataset": name,
            "seed": 0,
            "folds": tuning.folds,
            "per_image": tuning.per_image,
            "commit": known.get("commit", CODE),
        }
        later = {**known.get("commits", {}), **dict.fromkeys(wanted, CODE)} if known["ideas"] else {}
        write(target, {**facts, "commits": later, "ideas": {**known["ideas"], **means}})


if __name__ == "__main__":
    main()
