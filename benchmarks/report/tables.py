"""A benchmark as headings and cells, for the terminal and the page alike."""

from __future__ import annotations

from ..bench import BenchResult
from ..quality.distances import GROUPS, KID_SUBSET, KID_SUBSETS, NEIGHBOURS
from ..quality.quality import Quality
from ..speed.throughput import Speed, SpeedRatio
from ..stats import CONFIDENCE, Estimate

Table = tuple[list[str], list[list[str]]]
"""Headings and cells."""

NOTHING = "–"
WAY_NAMES = {"teacher": "teacher, CFG", "student": "student", "unguided": "teacher, no CFG"}
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def number(value: float | None, pattern: str = "{:.1f}") -> str:
    """Formatted, or a dash."""
    return NOTHING if value is None else pattern.format(value)


def within(estimate: Estimate | None, pattern: str = "{:.1f}", unit: str = "") -> str:
    """A value with its interval, or a dash."""
    if estimate is None:
        return NOTHING
    value, low, high = (pattern.format(x) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value}{unit} [{low}, {high}]"


KID_HEADING = "KID ×1000 (± spread of subsets)"


def kid_cell(kid: float | None, spread: float | None) -> str:
    """For a column under `KID_HEADING`."""
    if kid is None or spread is None:
        return number(None if kid is None else kid * 1e3)
    return f"{kid * 1e3:.1f} ± {spread * 1e3:.1f}"


WITHIN_NOISE = "within noise"
"""In the place of a share of what guidance gains, where that gain is not resolved."""


def _coverage(speed: Speed) -> str:
    """What the intervals of speed may be called: 95%, or less where too few runs were timed."""
    return f"[{min(CONFIDENCE, speed.rows[0].images_per_second.coverage):.0%}]"


def speed_table(speed: Speed, *, brief: bool = False) -> Table:
    """Every entrant: throughput, latency and its parts; times in milliseconds for the whole batch.

    Args:
        speed: what was measured.
        brief: leave out what a terminal of 80 columns has no room for.
    """
    headings = ["runner", "sampling", "batch", f"images/s {_coverage(speed)}", "p50 ms", "p90 ms", "p99 ms"]
    headings += ["UNet step ms", "text ms", "VAE ms", "host gap ms", "UNet TFLOP/s", "of GEMM peak", "J/image"]
    cells = []
    for row in speed.rows:
        times = (row.latency.median, row.latency.p90, row.latency.p99, row.unet_step.median)
        parts = (row.text_encoder, row.vae_decode, row.host_gap)
        cells.append(
            [
                f"{row.runner} {_PRECISIONS.get(row.precision, row.precision)}",
                WAY_NAMES[row.way],
                str(row.batch_size),
                within(row.images_per_second, "{:.3g}"),
                *(f"{seconds * 1e3:.1f}" for seconds in times),
                *(NOTHING if part is None else f"{part.median * 1e3:.1f}" for part in parts),
                f"{row.tflops:.3g}",
                number(row.peak_share, "{:.0%}"),
                number(row.joules_per_image, "{:.3g}"),
            ]
        )
    return _columns((headings, cells), (0, 1, 2, 3, 4, 7)) if brief else (headings, cells)


def ratio_table(speed: Speed) -> Table:
    """How many times as fast: whole images beside the ceiling of the counted operations, and the UNet's step."""
    headings = ["", "batch", f"whole images {_coverage(speed)}", "ceiling", f"UNet step {_coverage(speed)}"]
    pairs: dict[tuple[str, str, int], dict[str, SpeedRatio]] = {}
    for ratio in speed.ratios:
        pairs.setdefault((ratio.slower, ratio.faster, ratio.batch_size), {})[ratio.part] = ratio
    cells = [
        [
            f"{faster} over {slower.replace('unguided', 'teacher, no CFG')}",
            str(batch),
            within(parts["images"].estimate, "{:.2f}", "x"),
            number(parts["images"].ceiling, "{:.2f}x"),
            within(parts["unet"].estimate, "{:.2f}", "x"),
        ]
        for (slower, faster, batch), parts in pairs.items()
    ]
    return headings, cells


def quality_table(quality: Quality, *, brief: bool = False) -> Table:
    """Every way of sampling but the alternatives; a dash where nothing was measured.

    Args:
        quality: what was measured.
        brief: leave out what a terminal of 80 columns has no room for.
    """
    name = quality.features
    headings = ["sampling", "passes", f"{name} [95%]", "behind CFG [95%]", KID_HEADING, "precision", "recall"]
    headings += ["paired", "CLIP [95%]", "recovered [95%]"]
    cells = []
    for row in quality.main_rows():
        recovered = within(row.recovered_interval, "{:.0%}")
        if row.recovered is not None and row.recovered_interval is None:
            recovered = WITHIN_NOISE
        distance = within(row.distance_interval) if row.distance_interval else number(row.distance)
        cells.append(
            [
                row.name,
                f"{row.passes:g}",
                distance,
                within(row.behind),
                kid_cell(row.kid, row.kid_spread),
                number(row.precision, "{:.0%}"),
                number(row.recall, "{:.0%}"),
                f"{row.paired:.3f}",
                within(row.clip),
                recovered,
            ]
        )
    if not brief:
        return headings, cells
    headings, cells = _columns((headings, cells), (0, 2, 6, 7, 9))
    return [name if heading.startswith(name) else heading for heading in headings], cells


def alternatives_table(quality: Quality, *, brief: bool = False) -> Table:
    """The best setting of every method that needs no training at each cost, between the teacher and the students.

    Args:
        quality: what was measured.
        brief: leave out what a terminal of 80 columns has no room for.
    """
    compared = [row for row in quality.main_rows() if row.kind != "control"]
    best = sorted(quality.best_alternatives(), key=lambda row: (row.cost, row.method or ""))
    tried = [row for row in quality.rows if row.kind == "alternative"]
    headings = ["sampling", "method", "passes an image", f"{quality.features} [95%]", "behind CFG [95%]", "paired"]
    headings += ["CLIP [95%]", "best of"]
    cells = []
    for row in (*compared, *best):
        sweep = [one for one in tried if (one.method, one.cost) == (row.method, row.cost)]
        cells.append(
            [
                row.name,
                row.method or NOTHING,
                str(row.cost),
                within(row.distance_interval) if row.distance_interval else number(row.distance),
                within(row.behind),
                f"{row.paired:.3f}",
                within(row.clip),
                str(len(sweep)) if sweep else NOTHING,
            ]
        )
    return _columns((headings, cells), (0, 2, 3)) if brief else (headings, cells)


ALTERNATIVES_NOTE = (
    "Each method's settings were swept at equal cost, and the best is shown: chosen on the images that it is judged "
    "by, which flatters it. Cost counts UNet passes, a guided step as two."
)


def _columns(table: Table, keep: tuple[int, ...]) -> Table:
    headings, cells = table
    return [headings[i] for i in keep], [[row[i] for i in keep] for row in cells]


def speed_note(result: BenchResult) -> str:
    """How the speed was measured."""
    speed = result.speed
    runs, coverage = speed.rows[0].latency.runs, speed.rows[0].images_per_second.coverage
    flops = speed.flops
    peaks = ", ".join(f"{_PRECISIONS.get(name, name)} {peak:.3g} TFLOP/s" for name, peak in speed.peaks.items())
    return (
        f"{result.provenance['steps']} steps; medians of {runs} batches each, all entrants in turn after a discarded "
        f"batch, prompts to pixels. Intervals: order statistics, coverage {coverage:.0%}. Ratios: of times in the same "
        f"round. Ceiling: counted operations, {flops.unet / 1e9:.3g} GFLOP for a UNet pass, "
        f"{flops.vae_decode / 1e9:.3g} for a VAE decode, {flops.text_encoder / 1e9:.2g} for a prompt. Peak of matrix "
        f"multiplication, same run: {peaks}. Stock diffusers: its own pipeline's call, eager, with guidance."
    )


def quality_note(result: BenchResult) -> str:
    """How the quality was measured."""
    quality = result.quality
    assert quality is not None
    note = f"N = {quality.images} images a row, same prompts, seeds and noise"
    if quality.reference_images:
        note += f"; {quality.reference_images} real images in the reference, {quality.reference_apart} kept apart"
    if quality.floor is not None:
        note += f", which themselves score {quality.floor:.1f} at this N"
    return (
        f"{note}. Intervals: jackknife over {GROUPS} groups of prompts, the same in all rows. Precision and recall: "
        f"k = {NEIGHBOURS}. KID: mean of {KID_SUBSETS} subsets of up to {KID_SUBSET} images, ± their standard "
        "deviation where a subset is not all images. Paired: cosine distance of features to the guided teacher's image "
        "of the same seed."
    )
