"""`report.html`: one file without any request, verdict first."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import Any

import matplotlib.pyplot as plt
import torch
from PIL import Image

from ..bench import BenchResult
from ..quality.quality import Quality
from .plots import quality_plot, speed_plot, svg_of
from .tables import (
    BASELINES_NOTE,
    Table,
    baselines_table,
    color_table,
    quality_note,
    quality_table,
    ratio_table,
    speed_note,
    speed_table,
)

GRID_ROWS = 8
THUMBNAIL = 256
"""Longest side of an image on the page, in pixels."""

_STYLE = """
:root{--ink:#1e1e24;--soft:#5a5f6a;--line:#dcdfe4;--accent:#2f6fed}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1.5rem 1rem 3rem;color:var(--ink);
  overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
.verdict{font-size:1.15rem;background:#eef3fe;border-left:5px solid var(--accent);padding:.8rem 1rem;margin:0}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.84rem;min-width:100%}
th,td{padding:.35rem .45rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{vertical-align:bottom;overflow-wrap:normal}td{white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:normal}
td span{display:block;color:var(--soft);font-size:.78rem}
.plot{max-width:42rem;width:100%;height:auto;display:block;margin:.8rem 0}
.prompt{display:flex;flex-wrap:wrap;gap:.6rem;padding:.7rem 0;border-bottom:1px solid var(--line)}
.prompt p{flex:1 1 11rem;margin:0}
figure{margin:0;width:clamp(128px,15vw,192px)}
figure img{width:100%;height:auto;display:block}figcaption{color:var(--soft);font-size:.84rem}
.small img{image-rendering:pixelated}
.note{color:var(--soft);font-size:.88rem}
pre{overflow-x:auto;background:#f6f6f8;padding:.8rem;font-size:.8rem}summary{cursor:pointer}
@media(min-width:40rem){td:first-child{min-width:8rem}}
@media(max-width:40rem){.minor{display:none}.prompt p{flex-basis:100%}}
"""


def html_table(table: Table) -> str:
    """A table; on a narrow screen only the columns of `Table.narrow` show."""
    narrow = table.narrow or table.main or range(len(table.headings))
    classes = ["" if i in narrow else ' class="minor"' for i in range(len(table.headings))]
    head = "".join(
        f'<th scope="col"{style}>{html.escape(name)}</th>' for name, style in zip(table.headings, classes, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row, classes))}</tr>" for row in table.cells)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, style: str) -> str:
    """The interval goes below its value."""
    value, bracket, interval = text.partition(" [")
    below = f" <span>{html.escape('[' + interval)}</span>" if bracket else ""
    return f"<td{style}>{html.escape(value)}{below}</td>"


def html_plot(figure: plt.Figure, alt: str) -> str:
    """A figure as an SVG image; it is closed."""
    return _image(svg_of(figure), "svg+xml", alt, "plot")


def _image(data: bytes, subtype: str, alt: str, style: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img class="{style}" alt="{html.escape(alt)}" src="data:image/{subtype};base64,{encoded}">'


def _thumbnail(pixels: torch.Tensor, alt: str) -> str:
    """A uint8 image `(3, H, W)`: PNG where small, else JPEG of at most `THUMBNAIL` pixels per side."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    subtype = "png" if max(image.size) <= THUMBNAIL else "jpeg"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format=subtype, quality=88, optimize=True)
    return _image(buffer.getvalue(), subtype, alt, "sample")


def _pictures(result: BenchResult, quality: Quality) -> str:
    """A row per prompt, an image per sampling variant; the reseeded teacher shows other images by design."""
    names = [row.name for row in quality.main_rows() if row.role != "reseeded"]
    small = " small" if quality.samples[names[0]].shape[-1] <= 128 else ""
    rows = []
    for index, prompt in enumerate(result.prompts[:GRID_ROWS]):
        figures = "".join(
            f"<figure>{_thumbnail(quality.samples[name][index], f'{name}: {prompt}')}"
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name in names
        )
        rows.append(f'<div class="prompt{small}"><p>{html.escape(prompt)}</p>{figures}</div>')
    return "".join(rows)


def html_note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def _quality(quality: Quality, result: BenchResult) -> list[str]:
    """Images, then tables and plots; then what needs no training, if it was evaluated."""
    config = result.provenance["config"]
    seeds = f"Image i starts from the noise of seed {config['seed']} + i. Features: {quality.features_described}."
    setting = f"Sampler {config['sampler']}, {config['steps']} steps, w = {result.provenance['guidance']:g}."
    parts = ["<h2>Images</h2>", html_note("Same prompt and seed in each row."), _pictures(result, quality)]
    parts += ["<h2>Quality</h2>", html_table(quality_table(quality))]
    if quality.guided.distance is not None:
        parts.append(html_plot(quality_plot(quality), f"{quality.features} of each sampling variant, with intervals"))
    parts += [html_table(color_table(quality)), html_note(f"{quality_note(quality)} {setting} {seeds}")]
    if quality.best_baselines():
        parts += ["<h2>Without training</h2>", html_table(baselines_table(quality))]
        parts.append(html_note(BASELINES_NOTE))
    return parts


def page(title: str, parts: list[str], provenance: dict[str, Any]) -> str:
    """One self-contained page: a title of plain text, HTML, and provenance of plain JSON values."""
    values = html.escape(json.dumps(provenance, indent=2))
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        *parts,
        *map(html_note, provenance["notes"]),
        "<h2>Provenance</h2><details><summary>Hardware, versions, settings, hashes</summary>",
        f"<pre>{values}</pre></details></main></body></html>",
    ]
    return "\n".join(lines)


def html_report(result: BenchResult) -> str:
    """One self-contained page: verdict, images, quality, speed and provenance."""
    parts = [f'<p class="verdict">{html.escape(result.verdict())}</p>']
    if result.quality:
        parts += _quality(result.quality, result)
    parts += ["<h2>Speed</h2>", html_table(ratio_table(result.speed)), html_table(speed_table(result.speed))]
    if result.speed.rows:
        alt = "Images per second of teacher, student and unguided teacher on each runner, with intervals"
        parts.append(html_plot(speed_plot(result.speed), alt))
    parts.append(html_note(speed_note(result)))
    if result.provenance["weights"] == "random":
        parts.append(html_note("Weights are random, and student and teacher share them: only speed is measured."))
    parts += [html_note(f"{name} was left out: {reason}") for name, reason in result.skipped.items()]
    return page(f"BoostDiff benchmark of {result.provenance['model']}", parts, result.provenance)
