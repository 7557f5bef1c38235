"""The verdict on speed, of a report that is in the repository."""

from pathlib import Path
from typing import Any

import pytest
from boostdiff.benchmarks import bench
from boostdiff.benchmarks.bench import BenchResult
from boostdiff.benchmarks.speed.flops import Flops
from boostdiff.benchmarks.speed.throughput import RunnerMode, Speed, SpeedRatio, SpeedRow
from boostdiff.benchmarks.stats import Estimate, Percentiles
from boostdiff.engine.files import read_json

REPORT = Path(bench.__file__).parent / "results/h200-sd21-base.json"


@pytest.fixture(scope="module")
def result() -> BenchResult:
    """As it was measured on an H200: at batch 8 eager torch drew the teacher faster than CUDA graphs did."""

    def read(value: Any) -> Any:
        of_keys = {"median": Percentiles, "coverage": Estimate, "mode": RunnerMode}
        found = [made for key, made in of_keys.items() if isinstance(value, dict) and key in value]
        return found[0](**value) if found else value

    report = read_json(REPORT)
    speed = report["speed"]
    return BenchResult(
        speed=Speed(
            rows=[SpeedRow(**{name: read(value) for name, value in row.items()}) for row in speed["rows"]],
            ratios=[SpeedRatio(**{name: read(value) for name, value in row.items()}) for row in speed["ratios"]],
            flops=Flops(**speed["flops"]),
            peaks=speed["peaks"],
        ),
        skipped={},
        quality=None,
        prompts=[],
        provenance=report["provenance"],
    )


def without(result: BenchResult, runner: str) -> BenchResult:
    """The same, had the teacher not been timed on this runner."""
    speed = result.speed
    rows = [row for row in speed.rows if (row.runner, row.mode) != (runner, "teacher")]
    ratios = [ratio for ratio in speed.ratios if ratio.slower != RunnerMode(runner, "teacher")]
    changed = Speed(rows=rows, ratios=ratios, flops=speed.flops, peaks=speed.peaks)
    return BenchResult(speed=changed, skipped={}, quality=None, prompts=[], provenance=result.provenance)


def test_the_strongest_baseline_counts(result: BenchResult) -> None:
    same = (
        "The student makes images 1.68x [1.59, 1.70] as fast as the two-pass teacher on the same runner (captured, "
        "batch 8, 20 steps; counted operations allow 1.86x), "
    )
    stock = "and 1.57x [1.45, 1.63] as fast as stock diffusers with guidance"
    assert result.verdict() == (
        f"{same}1.57x [1.47, 1.58] as fast as the fastest two-pass teacher (torch), {stock}. Quality was not measured."
    )
    # Stock diffusers is named once, where it is the fastest; and so is the student's own runner.
    assert f"{same}{stock}, the fastest two-pass teacher. " in without(result, "torch").verdict()
    slower = without(without(result, "torch"), "stock diffusers").verdict()
    assert "fastest" not in slower
    assert "1.68x" in slower
