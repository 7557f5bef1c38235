"""What 8 bits cost and gain: student and teacher before and in INT8 or FP8, on ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from ...engine.conditions import TextEmbeddings
from ...engine.errors import InputError
from ...engine.files import read_json, sha256_of, write_json
from ...engine.guidance import Denoiser, GuidedDenoiser
from ...engine.guidance_term import State, r2_of, trajectory
from ...engine.manifest import Manifest, read_manifest
from ...engine.merge import CHECK_TIMESTEPS
from ...engine.model import Model
from ...engine.options import ENGINE_FOLDER, EngineOption, SamplerOption, SeedOption
from ...engine.runners import MADE_BY, GraphRunner, Runner
from ...engine.sampling import initial_noise
from ...engine.sessions import OnnxSession
from ...export.calibration import Calibration, calibration_prompts
from ...export.config import ExportConfig
from ...export.eight_bits import SCHEMES, Scheme
from ...export.graph import onnx_from_part
from ...export.parts import denoiser_part
from ...export.quantize import layers_of, quantized
from ..config import BenchConfig
from ..quality.distances import paired_feature_distance
from ..quality.quality import Figures
from ..quality.samples import SampleCache, SamplingVariant, code_sha256
from ..report.tables import NOTHING, Table, formatted
from ..session import Session
from ..stats import median_of
from .held_out import Runs, Samples, Steps, Work, held_out

R2_PROMPTS = 24
"""Held-out prompts that R² is measured on."""


def student_graphs(manifest: Manifest, engine: Path, scheme: Scheme) -> dict[str, Path]:
    """The student's UNet before and in 8 bits, by precision.

    Raises:
        InputError: the engine has none in 8 bits, or of an earlier version.
    """
    graphs = {
        entry["precision"]: engine / name
        for name, entry in manifest.artefacts.items()
        if name.startswith("unet/") and name.endswith(".onnx")
    }
    if scheme.precision not in graphs:
        made_by = MADE_BY[scheme.precision]
        raise InputError(
            f"the engine in {engine} has no {scheme.precision} UNet: `boostdiff export {made_by}` makes it"
        )
    measured = manifest.artefacts[f"unet/model.{scheme.precision}.onnx"]["quantized"].keys()
    if not measured <= layers_of(graphs[scheme.source]).keys():
        raise InputError(f"the engine in {engine} is of a version that measured groups of layers: export it again")
    return {precision: graphs[precision] for precision in (scheme.source, scheme.precision)}


def teacher_graphs(session: Session, manifest: Manifest, folder: Path, scheme: Scheme) -> dict[str, Path]:
    """The teacher's UNet likewise, made by the student's recipe: its layers, prompts and number of states."""
    graphs = {precision: folder / f"model.{precision}.onnx" for precision in (scheme.source, scheme.precision)}
    record, entry = folder / f"made.{scheme.precision}.json", manifest.artefacts[f"unet/model.{scheme.precision}.onnx"]
    made = {"inputs": manifest.inputs, "kept": sorted(entry["kept"]), "code": code_sha256()}
    if record.exists() and read_json(record) == made:
        return graphs
    folder.mkdir(parents=True, exist_ok=True)
    model, (student,), config = session.model, session.students, ExportConfig(quantize="int8")
    text = model.family.encode(model.pipeline, session.prompts[:2]).conditional
    part = denoiser_part(model, deepcopy(model.denoiser), text, config, CHECK_TIMESTEPS)
    if scheme.source == "fp16":
        part.to_half()
    onnx_from_part(part, graphs[scheme.source])
    calibration = Calibration.of_teacher(model, calibration_prompts(config, model.files), student.info)
    calibration.add_states(
        model, lambda runner: GuidedDenoiser(runner, session.guidance, session.guider), student.info.negative_prompt
    )
    layers = layers_of(graphs[scheme.source])
    nodes = [node for name in entry["quantized"] for node in layers[name]]
    quantized(graphs[scheme.source], graphs[scheme.precision], nodes, calibration.states, scheme=scheme)
    write_json(record, made)
    return graphs


@dataclass(frozen=True, kw_only=True)
class Row:
    """One UNet in one precision.

    Attributes:
        name: label.
        graph: path.
        denoiser: of a runner.
        like: the session's variant of the same UNet.
        baseline: name of the row before 8 bits that it is compared with; None for that row.
    """

    name: str
    graph: Path
    denoiser: Callable[[Runner], Denoiser]
    like: SamplingVariant
    baseline: str | None = None


def rows_of(session: Session, graphs: dict[str, Path], teacher: dict[str, Path], scheme: Scheme) -> list[Row]:
    """Teacher and student before, then in 8 bits."""
    (student,), scale = session.students, session.guidance

    def guided(runner: Runner) -> Denoiser:
        return GuidedDenoiser(runner, scale, session.guider)

    of_teacher, of_student = session.teacher(scale), session.student(student, scale)
    rows = []
    for precision, like in ((scheme.source, None), (scheme.precision, scheme.source)):
        label = precision.upper()
        for name, of, denoiser, variant in (
            ("teacher, two passes", teacher, guided, of_teacher),
            ("student, one pass", graphs, student.info.denoiser, of_student),
        ):
            baseline = f"{name}, {like.upper()}" if like else None
            rows.append(
                Row(name=f"{name}, {label}", graph=of[precision], denoiser=denoiser, like=variant, baseline=baseline)
            )
    return rows


@contextmanager
def runner_of(graph: Path, model: Model) -> Iterator[Runner]:
    """On the CPU."""
    session = OnnxSession(graph, device=torch.device("cpu"))
    with GraphRunner(session, family=model.family, denoiser_config=dict(model.denoiser.config)) as runner:
        yield runner


def quality(
    session: Session, cache: SampleCache, rows: list[Row], states: Sequence[State], text: TextEmbeddings
) -> Table:
    """R², distance, caption score, and what each loses to its own FP32 graph."""
    measured: dict[str, tuple[float, Figures]] = {}
    lines = []
    for row in rows:
        with runner_of(row.graph, session.model) as runner:
            graph = [sha256_of(path) for path in (row.graph, row.graph.with_name(f"{row.graph.name}.data"))]
            variant = replace(
                row.like,
                name=row.name,
                open=partial(row.denoiser, runner),
                identity={**row.like.identity, "graph": graph},
            )
            measured[row.name] = r2, found = r2_of(row.denoiser(runner), states, text), Figures.of(cache, variant)
        r2_before, before = measured[row.baseline or row.name]
        apart = paired_feature_distance(found.sampled.features, before.sampled.features)
        lines.append(
            [
                row.name,
                f"{r2:.3f}",
                f"{r2_before - r2:.4f}" if row.baseline else NOTHING,
                formatted(found.distance.value if found.distance else None),
                formatted(found.distance.delta_to(before.distance) if found.distance else None, "+.2f"),
                formatted(found.caption.value if found.caption else None),
                formatted(found.caption.delta_to(before.caption) if found.caption else None, "+.2f"),
                f"{apart:.4f}" if row.baseline else NOTHING,
            ]
        )
    headings = ["row", "R²", "loss of R²", "FD-EffNetLite0", "ΔFD", "caption score", "Δ", "feature distance"]
    return Table(headings=headings, cells=lines)


def seconds_by_operator(graph: Path, feeds: dict[str, Any], runs: int) -> dict[str, float]:
    """Seconds of a pass by operator, from ONNX Runtime's profile, which slows it a little."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    seconds: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["args"]["op_name"]
            seconds[name] = seconds.get(name, 0.0) + event["dur"] / 1e6 / runs
    return seconds


def speed(session: Session, graphs: dict[str, Path], runs: int) -> list[Table]:
    """One pass of the student's UNet, FP32 and INT8 in turn, and where its time goes at batch 8."""
    lines = []
    for batch in (1, 8):
        inputs = session.model.family.example_inputs(session.model.pipeline, batch, session.students[0].denoiser)
        inputs["sample"] = initial_noise(session.model.latent_shape, count=batch, seed=0)
        times: dict[str, list[float]] = {name: [] for name in graphs}
        with runner_of(graphs["fp32"], session.model) as full, runner_of(graphs["int8"], session.model) as small:
            for _ in range(runs + 2):
                for name, runner in (("fp32", full), ("int8", small)):
                    began = time.perf_counter()
                    runner.predict(inputs)
                    times[name].append(time.perf_counter() - began)
        ratios = [a / b for a, b in zip(times["fp32"][2:], times["int8"][2:], strict=True)]
        ratio = median_of(ratios)
        lines.append([str(batch), f"{ratio:.2fx}", str(runs)])
    feeds = {name: tensor.float().numpy() for name, tensor in inputs.items()}
    spent = {name: seconds_by_operator(path, feeds, 5) for name, path in graphs.items()}
    wholes = [sum(of.values()) for of in spent.values()]
    names = sorted(spent["fp32"].keys() | spent["int8"].keys(), key=lambda n: -max(s.get(n, 0) for s in spent.values()))
    shares = [
        [name, *(f"{of.get(name, 0) / whole:.1%}" for of, whole in zip(spent.values(), wholes, strict=True))]
        for name in names[:12]
    ]
    return [
        Table(headings=["batch", f"FP32's time over INT8's [{ratio.coverage:.0%}]", "runs"], cells=lines),
        Table(headings=["operator, share of the time at batch 8", "FP32", "INT8"], cells=shares),
    ]


def int8(
    student: Annotated[Path, typer.Argument(help="A student of the embedded model.")],
    work: Work,
    engine: EngineOption = ENGINE_FOLDER,
    precision: Annotated[Literal["int8", "fp8"], typer.Option(help="Of the 8-bit UNet.")] = "int8",
    samples: Samples = 200,
    sampler: SamplerOption = "ddim",
    steps: Steps = 20,
    seed: SeedOption = 0,
    runs: Runs = 21,
) -> None:
    """What 8 bits cost student and teacher, and what they gain, on `emoji64` and its held-out prompts.

    The engine is the student's, exported with --quantize. The teacher is quantized by the same recipe: the same
    layers, calibrated on its own trajectories, both passes. Prints Markdown tables: differences are those to the same
    UNet before, FP32 or, of FP8, FP16. FP8 has no speed on a CPU.
    """
    manifest, scheme = read_manifest(engine), SCHEMES[precision]
    if manifest.distilled.guidance_range:
        raise InputError("8 bits are measured at one guidance scale, and this student takes a range")
    graphs = student_graphs(manifest, engine, scheme)
    config = BenchConfig(samples=samples, sampler=sampler, steps=steps, seed=seed, compile=False)
    with held_out([student], config, work=work) as (session, cache):
        info = session.students[0].info
        manifest.check_student(info, engine=engine)
        teacher = teacher_graphs(session, manifest, work / "teacher" / "unet", scheme)
        rows = rows_of(session, graphs, teacher, scheme)
        model = session.model
        text = model.family.encode(model.pipeline, session.prompts[:R2_PROMPTS], negative_prompt=info.negative_prompt)
        states = trajectory(model, text, session.guidance, session.guider)
        print(f"N = {samples}, {sampler}, {steps} steps\n")
        print(quality(session, cache, rows, states, text).markdown(), flush=True)
        for table in speed(session, graphs, runs) if precision == "int8" else ():
            print(f"\n{table.markdown()}", flush=True)
