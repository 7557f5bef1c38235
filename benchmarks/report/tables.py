"""A benchmark as headings and cells, for the terminal and the page alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..bench import BenchResult
from ..quality.distances import KID_SUBSET, KID_SUBSETS
from ..quality.quality import Quality, QualityRow
from ..quality.samples import COLORS
from ..speed.throughput import RunnerMode, Speed, SpeedRatio
from ..stats import CONFIDENCE, Estimate, Percentiles, leave_one_group_out

NOTHING = "–"
MODE_NAMES = {"teacher": "teacher, CFG", "student": "student", "unguided": "teacher, no CFG"}
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Headings and cells.

    Attributes:
        headings: one per column.
        cells: row by row.
        main: columns for 80 characters; None for all.
        narrow: columns for a phone; None for `main`.
    """

    headings: list[str] = field(default_factory=list)
    cells: list[list[str]] = field(default_factory=list)
    main: tuple[int, ...] | None = None
    narrow: tuple[int, ...] | None = None

    @classmethod
    def of(cls, rows: list[dict[str, str]], **columns: tuple[int, ...]) -> Table:
        """From rows of cells by heading, the same headings in each."""
        return cls(headings=list(rows[0]), cells=[list(row.values()) for row in rows], **columns) if rows else cls()

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.headings, ["---"] * len(self.headings), *self.cells]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)

    def brief(self) -> Table:
        """Only the main columns."""
        main = range(len(self.headings)) if self.main is None else self.main
        return Table(headings=[self.headings[i] for i in main], cells=[[row[i] for i in main] for row in self.cells])


def formatted(value: float | Estimate | None, spec: str = ".1f") -> str:
    """A value, with its interval where it has one, or a dash; a `spec` may end in a unit, "x"."""
    if value is None or isinstance(value, Estimate):
        return NOTHING if value is None else format(value, spec)
    return format(value, spec.rstrip("x")) + "x" * spec.endswith("x")


def _kid_cell(row: QualityRow) -> str:
    spread = "" if row.kid_spread is None else f" ± {row.kid_spread * 1e3:.1f}"
    return NOTHING if row.kid is None else f"{row.kid * 1e3:.1f}{spread}"


def variant_name(key: RunnerMode) -> str:
    """Of a runner and mode: "onnx student"."""
    return f"{key.runner} {MODE_NAMES[key.mode]}"


def _coverage(speed: Speed) -> str:
    """Coverage of the intervals of speed: 95%, or less where too few runs were timed."""
    return f"[{min([CONFIDENCE, *(row.images_per_second.coverage for row in speed.rows)]):.0%}]"


def _milliseconds(times: Percentiles | None) -> str:
    return formatted(None if times is None else times.median * 1e3)


def speed_table(speed: Speed) -> Table:
    """Every variant: throughput, latency and its parts; times in milliseconds per batch."""
    rows = [
        {
            "runner": f"{row.runner} {_PRECISIONS.get(row.precision, row.precision)}",
            "mode": MODE_NAMES[row.mode],
            "batch": str(row.batch_size),
            f"images/s {_coverage(speed)}": formatted(row.images_per_second, ".3g"),
            "p50 ms": _milliseconds(row.latency),
            "p90 ms": f"{row.latency.p90 * 1e3:.1f}",
            "UNet step ms": _milliseconds(row.denoiser_step),
            "text ms": _milliseconds(row.text_encoder),
            "VAE ms": _milliseconds(row.vae_decode),
            "host gap ms": _milliseconds(row.host_gap),
            "UNet TFLOP/s": f"{row.tflops:.3g}",
            "of GEMM peak": formatted(row.peak_share, ".0%"),
        }
        for row in speed.rows
    ]
    return Table.of(rows, main=(0, 1, 2, 3, 4, 6), narrow=(0, 1, 2, 3))


def ratio_table(speed: Speed) -> Table:
    """Speed-ups: whole images beside the ceiling of the counted operations, and the UNet step."""
    pairs: dict[tuple[RunnerMode, RunnerMode, int], dict[str, SpeedRatio]] = {}
    for ratio in speed.ratios:
        pairs.setdefault((ratio.slower, ratio.faster, ratio.batch_size), {})[ratio.part] = ratio
    rows = [
        {
            "": f"{variant_name(faster)} over {variant_name(slower)}",
            "batch": str(batch),
            f"whole images {_coverage(speed)}": formatted(parts["images"].estimate, ".2fx"),
            "ceiling": formatted(parts["images"].ceiling, ".2fx"),
            f"UNet step {_coverage(speed)}": formatted(parts["denoiser"].estimate, ".2fx"),
        }
        for (slower, faster, batch), parts in pairs.items()
    ]
    return Table.of(rows, narrow=(0, 1, 2))


def _gain(row: QualityRow, share: Estimate | None, figure: Estimate | float | None) -> str:
    """Cell of a share of the guidance gain: where there is none, whether that is for noise."""
    has_one = row.role == "student" and isinstance(figure, Estimate)
    return "gain within noise" if has_one and share is None else formatted(share, ".0%")


def quality_table(quality: Quality) -> Table:
    """Every row but the training-free baselines; a dash where nothing was measured."""
    label, rows = quality.caption_label, []
    for row in quality.main_rows():
        captions = {
            f"{label}": formatted(row.caption_score),
            f"Δ {label}": formatted(row.caption_delta_to_guided, "+.1f"),
            "its gain recovered": _gain(row, row.caption_gain_recovered, row.caption_score),
        }
        rows.append(
            {
                "sampling": row.name,
                "passes per step": f"{row.passes:g}",
                f"{quality.features} [95%]": formatted(row.distance_interval or row.distance),
                "ΔFD to the guided teacher": formatted(row.delta_to_guided, "+.1f"),
                "guidance gain recovered": _gain(row, row.gain_recovered, row.distance_interval),
                **(captions if label else {}),
                "KID ×1000 (± spread of subsets)": _kid_cell(row),
                "distance to the teacher's image": f"{row.distance_to_teacher_image:.3f}",
            }
        )
    return Table.of(rows, main=(0, 2, 3, 4, *((5,) if label else ())), narrow=(0, 2, 3))


def color_table(quality: Quality) -> Table:
    """Color of the images, and the difference to the guided teacher: a washed-out or burned look shows here."""
    rows = []
    for row in quality.main_rows():
        rows.append({"color, 0 to 100": row.name})
        for name in COLORS:
            color = row.colors[name]
            rows[-1] |= {name: f"{color.value:.1f}", f"Δ {name} [95%]": formatted(color.delta_to_guided, "+.1f")}
    return Table.of(rows, narrow=(0, 2, 4, 6))


def baselines_table(quality: Quality) -> Table:
    """The best setting of every method that needs no training at each cost, below the teacher and the students."""
    compared = [row for row in quality.main_rows() if row.role != "reseeded"]
    best = sorted(quality.best_baselines(), key=lambda row: (row.cost, row.method or ""))
    tried = Counter((row.method, row.cost) for row in quality.rows if row.role == "alternative")
    rows = [
        {
            "sampling": row.name,
            "method": row.method or NOTHING,
            "passes per image": str(row.cost),
            f"{quality.features} [95%]": formatted(row.distance_interval or row.distance),
            "ΔFD to the guided teacher": formatted(row.delta_to_guided, "+.1f"),
            quality.caption_label or "CLIP score": formatted(row.caption_score),
            "distance to the teacher's image": f"{row.distance_to_teacher_image:.3f}",
            "best of": str(tried[row.method, row.cost] or NOTHING),
        }
        for row in (*compared, *best)
    ]
    return Table.of(rows, main=(0, 2, 3), narrow=(0, 2, 4))


BASELINES_NOTE = (
    "Each method's settings were swept at the same cost or one pass less, and the best is shown. It was chosen on the "
    "images that it is compared by, which flatters it. Cost counts UNet passes, a guided step as two."
)


def speed_note(result: BenchResult) -> str:
    """How the speed was measured."""
    speed, flops = result.speed, result.speed.flops
    peaks = ", ".join(f"{_PRECISIONS.get(name, name)} {peak:.3g} TFLOP/s" for name, peak in speed.peaks.items())
    config = result.provenance["config"]
    live = f" ({flops.live_denoiser / 1e9:.3g} of the student, which reads two texts)" if flops.live_denoiser else ""
    return (
        f"{config['steps']} steps. Medians of {config['runs']} batches per variant, all variants interleaved after "
        f"discarded batches, from prompts to pixels. Intervals: order statistics, coverage {_coverage(speed)[1:-1]}. "
        'Ratios: of times in the same round. "Teacher, no CFG" is the no-CFG speed bound. Ceiling: counted operations, '
        f"{flops.denoiser / 1e9:.3g} GFLOP per UNet pass{live}, {flops.vae_decode / 1e9:.3g} per VAE decode, "
        f"{flops.text_encoder / 1e9:.2g} per prompt. Peak of matrix multiplication in the same run: {peaks}. Stock "
        "diffusers: its pipeline call, eager, with guidance."
    )


def intervals_note(images: int) -> str:
    """What the brackets of figures of so many images are."""
    if not (groups := len(leave_one_group_out(images))):
        return "So few images have no intervals: they begin with 4."
    return f"In brackets: 95%, jackknife over {groups} groups of prompts, the same in all rows."


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
        f"{note} {intervals_note(quality.images)} Gain recovered: share of "
        f"the teacher's gain by guidance; none is given where that gain is within noise. KID: mean of {KID_SUBSETS} "
        f"subsets of up to {KID_SUBSET} images, ± their standard deviation. "
        "Distance to the teacher's image: cosine distance of features, same seed."
    )
