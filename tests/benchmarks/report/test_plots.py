import matplotlib.pyplot as plt
from boostdiff.benchmarks.report.plots import speed_plot, svg_of
from boostdiff.benchmarks.speed.flops import Flops
from boostdiff.benchmarks.speed.throughput import MODES, Speed, SpeedRow
from boostdiff.benchmarks.stats import Estimate, Percentiles

RUNNERS = ("torch", "stock diffusers", "compiled", "tensorrt", "onnx", "another")


def row(runner: str, mode: str, batch_size: int) -> SpeedRow:
    percentiles = Percentiles.of([1.0, 2.0])
    return SpeedRow(
        mode=mode,
        runner=runner,
        precision="float32",
        batch_size=batch_size,
        latency=percentiles,
        images_per_second=Estimate(value=2.0, low=1.0, high=3.0, coverage=0.94),
        denoiser_step=percentiles,
        text_encoder=None,
        vae_decode=None,
        host_gap=None,
        tflops=1.0,
        peak_share=None,
        memory_in_use=None,
    )


def test_every_runner_and_batch_size_has_bars_of_its_own() -> None:
    rows = [row(runner, mode, batch) for runner in RUNNERS for mode in MODES for batch in (1, 2)]
    figure = speed_plot(Speed(rows=rows, ratios=[], flops=Flops(denoiser=1, vae_decode=1, text_encoder=1), peaks={}))
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"{runner}, batch {batch}" for runner in RUNNERS for batch in (1, 2)]
    bars = [bar for bar in axes.patches if bar.get_width() == 2.0]
    assert len({bar.get_y() for bar in bars}) == len(rows)
    assert len({bar.get_facecolor() for bar in bars}) == len(MODES)
    plt.close(figure)


def test_a_name_is_no_formula() -> None:
    """A path with two dollars in it stood for mathematics, and a wrong one ended the report."""
    speed = Speed(
        rows=[row("a$_^b$", "student", 1)],
        ratios=[],
        flops=Flops(denoiser=1, vae_decode=1, text_encoder=1),
        peaks={},
    )
    assert b"a$_^b$, batch 1" in svg_of(speed_plot(speed))
