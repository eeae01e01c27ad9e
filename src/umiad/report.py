"""Reports: results -> one HTML page that needs nothing else, or Markdown. No model code; percent only here.

A page is a list of blocks. It holds no script and loads nothing: its Content-Security-Policy allows only its
own style and the pictures inside it. File names may hold anything: every text passes through `_visible`
(undecodable bytes, control and direction characters) and is then escaped.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umiad.diskfile import write_atomic
from umiad.types import Finding

RESEARCH_ONLY = "Research use only: unusual regions, not a diagnosis."
FEW_NORMALS = 20
UNDEFINED, NONE = "undefined", "n/a"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
METRICS = {
    "det_auroc": "Detection AUROC",
    "det_ap": "Detection average precision",
    "det_sensitivity": "Detection sensitivity at the model's threshold",
    "det_specificity": "Detection specificity at the model's threshold",
    "oracle_det_precision": "Detection precision at the best threshold",
    "oracle_det_recall": "Detection recall at the best threshold",
    "seg_auroc": "Segmentation AUROC (pixels)",
    "seg_ap": "Segmentation average precision (pixels)",
    "seg_aupro": "Segmentation AUPRO (regions, false-positive rate up to 0.3)",
    "precision": "Pixel precision at the model's threshold",
    "recall": "Pixel recall at the model's threshold",
    "dice": "Dice at the model's threshold",
    "oracle_f1_precision": "Pixel precision at the best threshold",
    "oracle_f1_recall": "Pixel recall at the best threshold",
    "oracle_dice": "Dice at the best threshold",
}
"""Names of the metrics for people, in the order of the table; others follow under their own name."""
ORACLE = "oracle: threshold chosen on the test images"

_NUMBER = re.compile(r"-?\d[\d.]*(e[-+]?\d+)?( to -?\d[\d.]*)?|n/a|undefined")
_HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
_MARKDOWN = re.compile(r"[\\`*_\[\]|~$]|^[#+=-](?=\s|[#=-])")
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--page:#fff;--line:#d0d7de;--band:#f6f8fa;
--warn:#fff4d6}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa5b1;--page:#0d1117;
--line:#30363d;--band:#161b22;--warn:#33260a}}
*{box-sizing:border-box}h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin:2rem 0 .5rem}
body{margin:0 auto;padding:1rem;max-width:72rem;font:1rem/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--page);overflow-wrap:anywhere}
.lead{font-size:1.1rem}.soft,figcaption,caption,footer{color:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;min-width:50%}caption{text-align:left;padding:.3rem 0}
th,td{text-align:left;vertical-align:top;padding:.3rem .7rem;border-bottom:1px solid var(--line);
min-width:5rem;overflow-wrap:break-word}td:first-child,th+td{overflow-wrap:anywhere;min-width:10rem}
thead th,tbody tr:nth-child(even){background:var(--band)}
.number{text-align:right;font-variant-numeric:tabular-nums}td.number{white-space:nowrap}
.warnings{background:var(--warn);border-left:.3rem solid #b45309;padding:.1rem 1rem}
.warnings h2{margin-top:.7rem}
.grid{--wide:16rem;display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(var(--wide),100%),1fr))}
.charts{--wide:28rem}
figure{margin:0}img{max-width:100%;height:auto;background:#fff;border:1px solid var(--line)}
figcaption b{color:var(--ink)}footer{margin-top:3rem;border-top:1px solid var(--line)}
@media print{body{max-width:none;padding:0}.scroll{overflow:visible}thead{display:table-header-group}
tr,figure{break-inside:avoid}h2{break-after:avoid}}
"""


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a value."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows as long as `header` (else ValueError); a column of nothing but numbers is set to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != (width := len(self.header)):
                raise ValueError(f"{self.title}: row {number} has {len(row)} cells, expected {width}")


@dataclass(frozen=True)
class Picture:
    """A PNG with a caption and a line of detail under it."""

    caption: str
    png: bytes
    detail: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, `wide` for charts with small print; Markdown leaves them out."""

    title: str
    pictures: Sequence[Picture]
    caption: str = ""
    wide: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    title: str
    paragraphs: Sequence[str]


@dataclass(frozen=True)
class Warnings:
    """Paragraphs that must not be missed."""

    paragraphs: Sequence[str]
    title: str = "Read this first"


Block = Facts | Table | Gallery | Text | Warnings


def percent(fraction: float | None) -> str:
    """A fraction in percent, one decimal, no sign: 0.9583 -> "95.8"; None or not finite -> "undefined"."""
    return f"{100 * fraction:.1f}" if fraction is not None and math.isfinite(fraction) else UNDEFINED


def p_text(p_value: float | None) -> str:
    """A p-value: two decimals from 0.1 up, else two significant digits; None -> "n/a"."""
    if p_value is None:
        return NONE
    return f"{p_value:.2f}" if p_value >= 0.0995 else f"{p_value:.2g}"


def write_page(
    path: str | Path, *, title: str, lead: str, blocks: Sequence[Block], footer: str = RESEARCH_ONLY
) -> Path:
    """Write one self-contained HTML page; raises DiskError, and then an older page is as it was."""
    path = Path(path)
    body = "\n".join(_html(block) for block in blocks)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{_text(title)}</h1>\n<p class="lead">{_text(lead)}</p>\n</header>\n'
        f"<main>\n{body}\n</main>\n<footer><p>{_text(footer)}</p></footer>\n</body>\n</html>\n"
    )
    write_atomic(path, page.encode("utf-8"))
    return path


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as GitHub Markdown; galleries are left out."""
    return "\n".join(_markdown(block) for block in blocks if not isinstance(block, Gallery))


def score_page(
    path: str | Path,
    *,
    findings: Sequence[Finding],
    pictures: Mapping[str, bytes],
    skipped: Sequence[tuple[str, str]],
    provenance: Mapping[str, Any],
    limit: int = 60,
) -> Path:
    """Write the report of scored images, highest score first; returns its path.

    `pictures`: overlay PNG by `Finding.name`; the `limit` highest scores are shown. `skipped`: file, reason.
    Raises DiskError when the page cannot be written.
    """
    ranked = sorted(findings, key=lambda finding: -finding.image_score)
    shown = [_finding_picture(f, pictures[f.name]) for f in ranked[: max(limit, 0)] if f.name in pictures]
    summary = Facts("Summary", _score_summary(ranked, skipped))
    notes = _counted(note for finding in ranked for note in finding.notes)
    blocks: list[Block] = [Warnings(notes), summary] if notes else [summary]
    if shown:
        caption = f"{len(shown)} of {_count(len(ranked), 'image')}, the highest score first."
        blocks.append(Gallery("Highest scores", shown, caption))
    blocks.append(_findings_table(ranked))
    if skipped:
        blocks.append(Table("Skipped files", ("File", "Reason"), skipped))
    blocks.append(_provenance(provenance))
    lead = "; ".join(f"{name}: {value}" for name, value in summary.rows[:2]) + "."
    return write_page(path, title="Unusual regions", lead=lead, blocks=blocks)


def evaluation_page(
    path: str | Path,
    *,
    evaluation: Mapping[str, Any],
    charts: Sequence[Picture],
    best: Sequence[Picture],
    worst: Sequence[Picture],
) -> Path:
    """Write the report of an evaluation; returns its path.

    `evaluation`: "metrics" (name -> value, ci95, n_resamples, reason; fractions), "counts" (n_normal,
    n_abnormal, n_masked), "provenance" and "notes", as in `metrics.json`. Raises DiskError.
    """
    metrics, counts = evaluation["metrics"], evaluation["counts"]
    table = _metrics_table(metrics, counts)
    cautions = [*_few_normals(counts["n_normal"]), *evaluation.get("notes", ())]
    blocks: list[Block] = [Warnings(cautions), table] if cautions else [table]
    hardest = Gallery("Hardest images, with misses and false alarms if there are any", worst)
    galleries = (Gallery("Curves and scores", charts, wide=True), hardest, Gallery("Clearest images", best))
    blocks += [gallery for gallery in galleries if gallery.pictures]
    blocks.append(_provenance(evaluation["provenance"]))
    auroc = percent(metrics.get("det_auroc", {}).get("value"))
    tested = f"{_count(counts['n_normal'], 'normal image')} and {counts['n_abnormal']} abnormal"
    lead = f"Detection AUROC {auroc}{'' if auroc == UNDEFINED else ' %'} on {tested}."
    return write_page(path, title="Evaluation", lead=lead, blocks=blocks)


def _score_summary(ranked: Sequence[Finding], skipped: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    without = [finding for finding in ranked if finding.above_threshold is None]
    above = sum(finding.above_threshold is True for finding in ranked)
    thresholds = sorted({finding.threshold for finding in ranked if finding.threshold is not None})
    reasons = _counted(finding.reason or "no reason given" for finding in without)
    return [
        ("Images scored", str(len(ranked))),
        ("Above the threshold", str(above) if len(without) < len(ranked) or not ranked else UNDEFINED),
        ("Threshold", ", ".join(f"{each:.6g}" for each in thresholds) or "none"),
        ("Without a threshold", "; ".join([str(len(without)), *reasons])),
        ("Skipped files", str(len(skipped))),
    ]


def _findings_table(ranked: Sequence[Finding]) -> Table:
    judged = {True: "yes", False: "no", None: NONE}
    rows = [
        (
            finding.name,
            f"{finding.image_score:.6g}",
            p_text(finding.p_value),
            judged[finding.above_threshold],
            NONE if finding.above_threshold is None else str(len(finding.regions)),
            str(max(region.area for region in finding.regions)) if finding.regions else NONE,
        )
        for finding in ranked
    ]
    header = ("File", "Score", "p-value", "Above threshold", "Regions", "Largest region (pixels)")
    caption = "Higher = more anomalous. p-value: share of unseen normal images scoring at least as high."
    return Table("All images", header, rows, caption)


def _finding_picture(finding: Finding, png: bytes) -> Picture:
    p_value = "" if finding.p_value is None else f", p = {p_text(finding.p_value)}"
    above = ", above the threshold" if finding.above_threshold else ""
    return Picture(finding.name, png, f"score {finding.image_score:.6g}{p_value}{above}")


def _metrics_table(metrics: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> Table:
    names = [name for name in METRICS if name in metrics] + sorted(set(metrics) - set(METRICS))
    rows = [_metric_row(name, metrics[name], counts) for name in names]
    resamples = sorted({m["n_resamples"] for m in metrics.values() if m.get("ci95") is not None})
    caption = "Pixel metrics count only the abnormal images that have a mask."
    if resamples:
        caption += f" Intervals: bootstrap, {' or '.join(map(str, resamples))} resamples."
    header = ("Metric", "Value (%)", "95 % interval (%)", "Normal images", "Abnormal images", "Remark")
    return Table("Metrics", header, rows, caption)


def _metric_row(name: str, metric: Mapping[str, Any], counts: Mapping[str, int]) -> tuple[str, ...]:
    abnormal = counts["n_abnormal" if name.startswith(("det_", "oracle_det_")) else "n_masked"]
    remarks = (ORACLE if name.startswith("oracle") else "", metric.get("reason"))
    ends = metric.get("ci95")
    interval = NONE if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"
    numbers = (percent(metric["value"]), interval, str(counts["n_normal"]), str(abnormal))
    return (METRICS.get(name, name), *numbers, "; ".join(filter(None, remarks)))


def _few_normals(n_normal: int) -> Iterator[str]:
    """Why not to trust the numbers: n normals make AUROC a mean of n terms, each between 0 and 1."""
    if n_normal == 0:
        yield "No normal test image: detection cannot be judged."
    elif n_normal < FEW_NORMALS:
        few, most = _count(n_normal, "normal test image"), percent(1 / n_normal)
        yield f"Only {few}: one image moves the detection AUROC by up to {most} points; compare intervals."


def _provenance(provenance: Mapping[str, Any]) -> Facts:
    known = {key: "unknown" if value is None else str(value) for key, value in provenance.items()}
    return Facts("Provenance", list(known.items()))


def _counted(texts: Iterable[str]) -> list[str]:
    return [f"{_count(number, 'image')}: {text}" for text, number in Counter(texts).most_common()]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _visible(text: str) -> str:
    """Make control and direction characters visible; what has no character at all becomes U+FFFD."""

    def shown(match: re.Match[str]) -> str:
        code = ord(match.group())
        if code < 0x20:
            return chr(0x2400 + code)
        return f"[U+{code:04X}]" if 0x200E <= code <= 0x2069 or code == 0x061C else "\ufffd"

    return _HIDDEN.sub(shown, text)


def _text(text: str) -> str:
    return html.escape(_visible(text), quote=True)


def _html(block: Block) -> str:
    match block:
        case Facts(rows=rows):
            cells = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>\n' for k, v in rows)
            inner = f'<div class="scroll"><table><tbody>\n{cells}</tbody></table></div>'
        case Table():
            inner = _html_table(block)
        case Gallery(pictures=pictures, caption=caption, wide=wide):
            figures = "\n".join(_figure(picture) for picture in pictures)
            look = "grid charts" if wide else "grid"
            inner = f'<p class="soft">{_text(caption)}</p>\n<div class="{look}">\n{figures}\n</div>'
        case Text(paragraphs=paragraphs) | Warnings(paragraphs=paragraphs):
            inner = "\n".join(f"<p>{_text(paragraph)}</p>" for paragraph in paragraphs)
    kind = type(block).__name__.lower()
    return f'<section class="{kind}">\n<h2>{_text(block.title)}</h2>\n{inner}\n</section>'


def _html_table(table: Table) -> str:
    looks = [' class="number"' if numeric else "" for numeric in _numeric(table)]
    head = "".join(
        f'<th scope="col"{look}>{_text(n)}</th>' for look, n in zip(looks, table.header, strict=True)
    )
    rows = (
        "".join(f"<td{look}><bdi>{_text(v)}</bdi></td>" for look, v in zip(looks, row, strict=True))
        for row in table.rows
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title)}"><table>{caption}\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _numeric(table: Table) -> list[bool]:
    """Which columns hold nothing but numbers, intervals and marks for a missing number."""
    columns = zip(*table.rows, strict=True) if table.rows else ((),) * len(table.header)
    return [all(map(_NUMBER.fullmatch, column)) and column != () for column in columns]


def _figure(picture: Picture) -> str:
    source = base64.b64encode(picture.png).decode("ascii")
    caption, detail = _text(picture.caption), _text(picture.detail)
    text = f"<b><bdi>{caption}</bdi></b>" + (f"<br>{detail}" if detail else "")
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _markdown(block: Facts | Table | Text | Warnings) -> str:
    match block:
        case Facts(rows=rows):
            lines = ["| | |", "|---|---|", *_markdown_rows(rows)]
        case Table(header=header, rows=rows, caption=caption):
            rule = "|" + "|".join("---:" if numeric else "---" for numeric in _numeric(block)) + "|"
            lines = [*_markdown_rows([header]), rule, *_markdown_rows(rows)]
            lines += ["", _plain(caption)] if caption else []
        case Text(paragraphs=paragraphs):
            lines = ["\n\n".join(map(_plain, paragraphs))]
        case Warnings(paragraphs=paragraphs):
            lines = ["\n>\n".join(f"> {_plain(paragraph)}" for paragraph in paragraphs)]
    return "\n".join([f"## {_plain(block.title)}", "", *lines, ""])


def _markdown_rows(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in rows:
        yield "| " + " | ".join(map(_plain, row)) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(_visible(text), quote=False))
