"""`report.html`: one file without any request, verdict first."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import Any

import torch
from PIL import Image

from ..bench import BenchResult
from ..quality.quality import Quality
from .plots import cost_plot, quality_plot, rendered, speed_plot
from .tables import (
    ALTERNATIVES_NOTE,
    WITHIN_NOISE,
    Table,
    alternatives_table,
    quality_note,
    quality_table,
    ratio_table,
    speed_note,
    speed_table,
)

GRID_ROWS = 8
THUMBNAIL = 256
"""Longest side of a picture on the page, in pixels."""

_STYLE = """
:root{--ink:#1e1e24;--soft:#5a5f6a;--line:#dcdfe4;--accent:#2f6fed}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1.5rem 1rem 3rem;color:var(--ink);
  overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
.verdict{font-size:1.15rem;background:#eef3fe;border-left:5px solid var(--accent);padding:.8rem 1rem;margin:0}
.facts{display:flex;flex-wrap:wrap;gap:.75rem;margin:1rem 0 0;padding:0;list-style:none}
.facts li{flex:1 1 10rem;border:1px solid var(--line);border-radius:.4rem;padding:.6rem .8rem}
.facts b{display:block;font-size:1.35rem;line-height:1.3}.facts span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;margin:.6rem 0}
table{border-collapse:collapse;font-size:.88rem;min-width:100%}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" ↑"}th[aria-sort=descending] button::after{content:" ↓"}
.plot{max-width:42rem;width:100%;height:auto;display:block;margin:.8rem 0}
.pictures td{padding:.25rem;text-align:center}
.pictures td:first-child{white-space:normal;min-width:8rem;text-align:left}
.pictures th{text-align:center}
.pictures img{width:clamp(4.5rem,11vw,9rem);height:auto;display:block;margin:auto}
.small img{image-rendering:pixelated}
.note{color:var(--soft);font-size:.88rem}
pre{overflow-x:auto;background:#f6f6f8;padding:.8rem;font-size:.8rem}summary{cursor:pointer}
"""

# Cells sort by the number that they begin with, else as text; what has no figure comes last in either order.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const text = row.cells[i].textContent, found = text.match(/^[-\\u2212]?[\\d.]+/);
    return found ? parseFloat(found[0].replace("\\u2212", "-")) : text;
  };
  heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a, i), y = value(b, i), known = typeof x === "number";
      if (known !== (typeof y === "number")) return known ? -1 : 1;
      const order = known ? x - y : x.localeCompare(y);
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}
"""


def html_table(table: Table) -> str:
    """A table whose columns sort."""
    headings, cells = table
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(name or "pair")}</button></th>' for name in headings
    )
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _image(data: bytes, kind: str, alt: str, style: str = "") -> str:
    encoded = base64.b64encode(data).decode()
    named = f' class="{style}"' if style else ""
    return f'<img{named} alt="{html.escape(alt)}" src="data:image/{kind};base64,{encoded}">'


def _thumbnail(pixels: torch.Tensor, alt: str) -> str:
    """A uint8 image `(3, H, W)`: PNG as it is where small, else JPEG of at most `THUMBNAIL` pixels a side."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    kind = "png" if max(image.size) <= THUMBNAIL else "jpeg"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return _image(buffer.getvalue(), kind, alt)


def _pictures(result: BenchResult) -> str:
    """A row a prompt, a column a way of sampling; the reseeded teacher shows other images by design."""
    quality = result.quality
    assert quality is not None
    names = [row.name for row in quality.main_rows() if row.kind != "control"]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("prompt", *names))
    body = []
    for index, prompt in enumerate(result.prompts[:GRID_ROWS]):
        cells = "".join(f"<td>{_thumbnail(quality.samples[name][index], f'{name}: {prompt}')}</td>" for name in names)
        body.append(f"<tr><td>{html.escape(prompt)}</td>{cells}</tr>")
    small = " small" if quality.samples[names[0]].shape[-1] <= 128 else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="pictures{small}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _facts(result: BenchResult) -> str:
    """The few figures that a hurried reader takes along."""
    head = result.headline
    fastest = result.speed.fastest
    facts = [
        (f"{head.estimate.value:.2f}x", f"as fast, whole images; counted operations allow {head.ceiling:.2f}x"),
        (f"{fastest.images_per_second.value:.3g} /s", f"student, {fastest.runner}, batch {fastest.batch_size}"),
    ]
    if stock := result.speed.over_baseline("stock diffusers", fastest):
        facts.insert(1, (f"{stock.estimate.value:.2f}x", "as fast as stock diffusers with guidance"))
    if unet := result.speed.ratio("unet", fastest):
        facts.insert(1, (f"{unet.estimate.value:.2f}x", "as fast, the UNet's step alone"))
    if result.quality and result.quality.student.distance is not None:
        quality, student = result.quality, result.quality.student
        told = f"{quality.features} of the student; CFG: {quality.rows[0].distance:.1f}"
        facts.append((f"{student.distance:.1f}", told))
        if share := student.recovered_interval:
            told = f"of guidance's gain recovered [{share.low:.0%}–{share.high:.0%}]"
            facts.append((f"{share.value:.0%}", told))
        else:
            facts.append((WITHIN_NOISE, "what guidance gains, so no share of it is told"))
    items = "".join(f"<li><b>{html.escape(big)}</b><span>{html.escape(small)}</span></li>" for big, small in facts)
    return f'<ul class="facts">{items}</ul>'


def _protocol(result: BenchResult) -> str:
    """How it was measured, in sentences."""
    told = result.provenance
    lines = [speed_note(result)]
    if result.quality:
        lines += [
            quality_note(result),
            f"Image i starts from noise of seed {told['seed']} + i. Features: {result.quality.features_described}; the "
            "Fréchet distance and KID by torchmetrics.",
        ]
    if told["weights"] == "random":
        lines.append("Weights are random: nothing about quality can be said, and student and teacher share them.")
    lines.append(f"Sampler {told['sampler']}, {told['steps']} steps, guidance w = {told['guidance']:g}.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _alternatives(quality: Quality) -> list[str]:
    """The section on what needs no training; nothing where none was judged."""
    if not quality.best_alternatives():
        return []
    parts = ["<h2>Without training</h2>", html_table(alternatives_table(quality))]
    if quality.rows[0].distance is not None:
        plot, alt = rendered(cost_plot(quality), "svg"), f"{quality.features} over UNet passes an image"
        parts.append(_image(plot, "svg+xml", alt, "plot"))
    return [*parts, f'<p class="note">{html.escape(ALTERNATIVES_NOTE)}</p>']


def page(title: str, parts: list[str], provenance: dict[str, Any]) -> str:
    """One self-contained page.

    Args:
        title: plain text.
        parts: HTML between the title and the provenance.
        provenance: plain JSON values.
    """
    told = html.escape(json.dumps(provenance, indent=2))
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        *parts,
        "<h2>Provenance</h2><details open><summary>Hardware, versions, settings, hashes</summary>",
        f"<pre>{told}</pre></details></main><script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(lines)


def html_report(result: BenchResult) -> str:
    """One self-contained page: verdict, tables that sort, plots, pictures, protocol and provenance."""
    parts = [
        f'<p class="verdict">{html.escape(result.verdict())}</p>',
        _facts(result),
        "<h2>Speed</h2>",
        html_table(ratio_table(result.speed)),
        html_table(speed_table(result.speed)),
        _image(
            rendered(speed_plot(result.speed), "svg"),
            "svg+xml",
            "Images per second of teacher, student and unguided teacher on each runner, with intervals",
            "plot",
        ),
    ]
    parts += [
        f'<p class="note">{html.escape(name)} was left out: {html.escape(reason)}</p>'
        for name, reason in result.skipped.items()
    ]
    if result.quality:
        parts += ["<h2>Quality</h2>", html_table(quality_table(result.quality))]
        if result.quality.rows[0].distance is not None:
            plot = rendered(quality_plot(result), "svg")
            alt = f"{result.quality.features} of each way of sampling, with intervals"
            parts.append(_image(plot, "svg+xml", alt, "plot"))
        parts += _alternatives(result.quality)
        parts += ["<h2>Pictures</h2>", '<p class="note">Same prompts, same seeds.</p>', _pictures(result)]
    parts += ["<h2>Protocol</h2>", _protocol(result)]
    return page(f"BoostDiff benchmark of {result.provenance['model']}", parts, result.provenance)
