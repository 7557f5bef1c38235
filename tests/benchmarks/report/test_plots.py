import matplotlib.pyplot as plt
from boostdiff.benchmarks.report.plots import speed_plot
from boostdiff.benchmarks.speed.flops import Flops
from boostdiff.benchmarks.speed.throughput import MODES, Speed, SpeedRow
from boostdiff.benchmarks.stats import Estimate, Spread

RUNNERS = ("torch", "stock diffusers", "captured", "compiled", "tensorrt", "onnx", "onnx-tensorrt")


def row(runner: str, mode: str, batch_size: int) -> SpeedRow:
    spread = Spread.of([1.0, 2.0])
    return SpeedRow(
        mode=mode,
        runner=runner,
        device="cpu",
        precision="float32",
        batch_size=batch_size,
        steps=2,
        latency=spread,
        images_per_second=Estimate(value=2.0, low=1.0, high=3.0, coverage=0.94),
        unet_step=spread,
        text_encoder=None,
        vae_decode=None,
        host_gap=None,
        tflops=1.0,
        peak_share=None,
        joules_per_image=None,
        memory_in_use=None,
    )


def test_every_runner_has_a_line_of_its_own() -> None:
    rows = [row(runner, mode, batch) for runner in RUNNERS for mode in MODES for batch in (1, 2)]
    figure = speed_plot(Speed(rows=rows, ratios=[], flops=Flops(unet=1, vae_decode=1, text_encoder=1), peaks={}))
    (axes,) = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert len(labels) == len(RUNNERS) * len(MODES)
    assert all(any(label.startswith(f"{runner},") for label in labels) for runner in RUNNERS)
    looks = {(bars[0].get_color(), bars[0].get_linestyle(), bars[0].get_marker()) for bars in axes.containers}
    assert len(looks) == len(labels)
    plt.close(figure)
