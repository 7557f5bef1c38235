"""A benchmark as headings and cells, for the terminal and the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from ..bench import BenchResult
from ..quality.distances import KID_SUBSET, KID_SUBSETS, NEIGHBORS
from ..quality.quality import Quality, QualityRow
from ..quality.samples import COLORS
from ..speed.throughput import RunnerMode, Speed, SpeedRatio
from ..stats import CONFIDENCE, GROUPS, Estimate

NOTHING = "–"
MODE_NAMES = {"teacher": "teacher, CFG", "student": "student", "unguided": "teacher, no CFG"}
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headings and cells.

    Attributes:
        headings: one per column.
        cells: row by row.
        main: columns for 80 characters; None for all.
        narrow: columns for a phone; None for `main`.
    """

    headings: list[str]
    cells: list[list[str]]
    main: tuple[int, ...] | None = None
    narrow: tuple[int, ...] | None = None

    def brief(self) -> Table:
        """Only the main columns."""
        if self.main is None:
            return self
        return Table(
            headings=[self.headings[i] for i in self.main], cells=[[row[i] for i in self.main] for row in self.cells]
        )


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


def variant_name(key: RunnerMode) -> str:
    """Of a runner and mode: "onnx student"."""
    return f"{key.runner} {MODE_NAMES[key.mode]}"


def _coverage(speed: Speed) -> str:
    """Coverage of the intervals of speed: 95%, or less where too few runs were timed."""
    return f"[{min([CONFIDENCE, *(row.images_per_second.coverage for row in speed.rows)]):.0%}]"


def speed_table(speed: Speed) -> Table:
    """Every variant: throughput, latency and its parts; times in milliseconds per batch."""
    headings = ["runner", "mode", "batch", f"images/s {_coverage(speed)}", "p50 ms", "p90 ms", "p99 ms"]
    headings += ["UNet step ms", "text ms", "VAE ms", "host gap ms", "UNet TFLOP/s", "of GEMM peak", "J/image"]
    cells = []
    for row in speed.rows:
        times = (row.latency.median, row.latency.p90, row.latency.p99, row.unet_step.median)
        parts = (row.text_encoder, row.vae_decode, row.host_gap)
        cells.append(
            [
                f"{row.runner} {_PRECISIONS.get(row.precision, row.precision)}",
                MODE_NAMES[row.mode],
                str(row.batch_size),
                within(row.images_per_second, "{:.3g}"),
                *(f"{seconds * 1e3:.1f}" for seconds in times),
                *(NOTHING if part is None else f"{part.median * 1e3:.1f}" for part in parts),
                f"{row.tflops:.3g}",
                number(row.peak_share, "{:.0%}"),
                number(row.joules_per_image, "{:.3g}"),
            ]
        )
    return Table(headings=headings, cells=cells, main=(0, 1, 2, 3, 4, 7), narrow=(0, 1, 2, 3))


def ratio_table(speed: Speed) -> Table:
    """Speed-ups: whole images beside the ceiling of the counted operations, and the UNet step."""
    headings = ["", "batch", f"whole images {_coverage(speed)}", "ceiling", f"UNet step {_coverage(speed)}"]
    pairs: dict[tuple[RunnerMode, RunnerMode, int], dict[str, SpeedRatio]] = {}
    for ratio in speed.ratios:
        pairs.setdefault((ratio.slower, ratio.faster, ratio.batch_size), {})[ratio.part] = ratio
    cells = [
        [
            f"{variant_name(faster)} over {variant_name(slower)}",
            str(batch),
            within(parts["images"].estimate, "{:.2f}", "x"),
            number(parts["images"].ceiling, "{:.2f}x"),
            within(parts["unet"].estimate, "{:.2f}", "x"),
        ]
        for (slower, faster, batch), parts in pairs.items()
    ]
    return Table(headings=headings, cells=cells, narrow=(0, 1, 2))


def _distance(row: QualityRow) -> str:
    return within(row.distance_interval) if row.distance_interval else number(row.distance)


def _gain(row: QualityRow, share: Estimate | None, figure: object) -> str:
    """Cell of a share of the guidance gain: where there is none, whether that is for noise."""
    has_one = row.role == "student" and figure is not None
    return "gain within noise" if has_one and share is None else within(share, "{:.0%}")


def quality_table(quality: Quality) -> Table:
    """Every row but the alternatives; a dash where nothing was measured."""
    label = quality.caption_label or "CLIP score"
    headings = ["sampling", "passes per step", f"{quality.features} [95%]", "ΔFD to the guided teacher"]
    headings += ["guidance gain recovered", label, f"Δ {label}", "its gain recovered", KID_HEADING, "precision"]
    headings += ["recall", "distance to the teacher's image"]
    cells = [
        [
            row.name,
            f"{row.passes:g}",
            _distance(row),
            within(row.delta_to_guided, "{:+.1f}"),
            _gain(row, row.gain_recovered, row.distance),
            within(row.caption_score),
            within(row.caption_delta_to_guided, "{:+.1f}"),
            _gain(row, row.caption_gain_recovered, row.caption_score),
            kid_cell(row.kid, row.kid_spread),
            number(row.precision, "{:.0%}"),
            number(row.recall, "{:.0%}"),
            f"{row.distance_to_teacher_image:.3f}",
        ]
        for row in quality.main_rows()
    ]
    captions = () if quality.caption_label is None else (5,)
    shown = [i for i in range(len(headings)) if captions or i not in (5, 6, 7)]
    table = Table(
        headings=[headings[i] for i in shown],
        cells=[[row[i] for i in shown] for row in cells],
        main=(0, 2, 3, 4, *captions),
        narrow=(0, 2, 3),
    )
    return table


def color_table(quality: Quality) -> Table:
    """Color of the images, and the difference to the guided teacher: a washed-out or burned look shows here."""
    headings = ["color, 0 to 100"]
    for name in COLORS:
        headings += [name, f"Δ {name} [95%]"]
    cells = []
    for row in quality.main_rows():
        cells.append([row.name])
        for name in COLORS:
            color = row.colors[name]
            cells[-1] += [f"{color.value:.1f}", within(color.delta_to_guided, "{:+.1f}")]
    return Table(headings=headings, cells=cells, narrow=(0, 2, 4, 6))


def alternatives_table(quality: Quality) -> Table:
    """The best setting of every method that needs no training at each cost, below the teacher and the students."""
    compared = [row for row in quality.main_rows() if row.role != "reseeded"]
    best = sorted(quality.best_alternatives(), key=lambda row: (row.cost, row.method or ""))
    tried = [row for row in quality.rows if row.role == "alternative"]
    headings = ["sampling", "method", "passes per image", f"{quality.features} [95%]", "ΔFD to the guided teacher"]
    headings += [quality.caption_label or "CLIP score", "distance to the teacher's image", "best of"]
    cells = []
    for row in (*compared, *best):
        sweep = [one for one in tried if (one.method, one.cost) == (row.method, row.cost)]
        cells.append(
            [
                row.name,
                row.method or NOTHING,
                str(row.cost),
                _distance(row),
                within(row.delta_to_guided, "{:+.1f}"),
                within(row.caption_score),
                f"{row.distance_to_teacher_image:.3f}",
                str(len(sweep)) if sweep else NOTHING,
            ]
        )
    return Table(headings=headings, cells=cells, main=(0, 2, 3), narrow=(0, 2, 4))


ALTERNATIVES_NOTE = (
    "Each method's settings were swept at equal cost, and the best is shown. It was chosen on the images that it is "
    "compared by, which flatters it. Cost counts UNet passes, a guided step as two."
)


def speed_note(result: BenchResult) -> str:
    """How the speed was measured."""
    speed, flops = result.speed, result.speed.flops
    peaks = ", ".join(f"{_PRECISIONS.get(name, name)} {peak:.3g} TFLOP/s" for name, peak in speed.peaks.items())
    config = result.provenance["config"]
    return (
        f"{config['steps']} steps. Medians of {config['runs']} batches per variant, all variants interleaved after a "
        f"discarded batch, from prompts to pixels. Intervals: order statistics, coverage {_coverage(speed)[1:-1]}. "
        'Ratios: of times in the same round. "Teacher, no CFG" is the no-CFG speed bound. Ceiling: counted operations, '
        f"{flops.unet / 1e9:.3g} GFLOP per UNet pass, {flops.vae_decode / 1e9:.3g} per VAE decode, "
        f"{flops.text_encoder / 1e9:.2g} per prompt. Peak of matrix multiplication in the same run: {peaks}. Stock "
        "diffusers: its own pipeline call, eager, with guidance."
    )


def quality_note(quality: Quality) -> str:
    """How the quality was measured."""
    note = f"N = {quality.images} images per row, with the same prompts, seeds and noise."
    if quality.reference_images:
        note += f" {quality.reference_images} real images in the reference, {quality.reference_apart} kept apart."
    if quality.real_vs_real_distance is not None:
        note += f" Real-vs-real distance at this N: {quality.real_vs_real_distance:.1f}."
    if quality.caption_label:
        note += f" {quality.caption_label[0].upper()}{quality.caption_label[1:]}: 100 times the cosine of image and "
        note += "prompt, higher is better."
    return (
        f"{note} Intervals: jackknife over {GROUPS} groups of prompts, the same in all rows. Gain recovered: share of "
        "the teacher's gain by guidance; none is given where that gain is within noise. Precision and recall: k = "
        f"{NEIGHBORS}. KID: mean of {KID_SUBSETS} subsets of up to {KID_SUBSET} images, ± their standard deviation. "
        "Distance to the teacher's image: cosine distance of features, same seed."
    )
