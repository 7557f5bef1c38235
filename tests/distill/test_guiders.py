"""Students of each guider: what they are trained towards, resumed, drawn and measured against."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.benchmarks import bench as bench_module
from boostdiff.benchmarks.config import BenchConfig, Metrics
from boostdiff.benchmarks.session import Session, Student, read_students
from boostdiff.benchmarks.speed.random_weights import locate_configs
from boostdiff.benchmarks.speed.throughput import MODES, TimedVariant, measure
from boostdiff.benchmarks.table1 import papers_figures
from boostdiff.distill import preview
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.distill.run_folder import work_folder
from boostdiff.distill.trajectories import Trajectories
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import InputError
from boostdiff.engine.generate import draw
from boostdiff.engine.guiders import GUIDERS, GuiderOptions
from boostdiff.engine.model import Model, ModelFiles, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import generate, to_uint8
from boostdiff.engine.schedulers import make_scheduler
from boostdiff.engine.student import read_student
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import _intended
from diffusers import guiders
from PIL import Image
from tiny import PROMPTS, make_pipeline

SILENT = Observers(preview=False)
SETTINGS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "rescale": {"guider": "rescale", "guidance_rescale": 0.6},
    "interval": {"guider": "interval", "guidance_interval": "0.3:0.7"},
    "apg": {"guider": "apg", "apg_norm_threshold": 2.5},
    "cfg-zero": {"guider": "cfg-zero"},
}
assert SETTINGS.keys() == GUIDERS.keys()


@pytest.fixture(scope="module")
def by_guider(tiny_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("guiders")
    for name, settings in SETTINGS.items():
        config = DistillConfig(prompts=prompt_file, updates=4, batch_size=4, learning_rate=0.02, **settings)
        distill(locate(str(tiny_folder)), config, output=root / name, device="cpu", observers=SILENT)
    return {name: root / name for name in SETTINGS}


def test_each_guider_gives_a_student_of_its_own_that_names_it(by_guider: dict[str, Path]) -> None:
    assert len({(folder / LORA_FILE).read_bytes() for folder in by_guider.values()}) == len(SETTINGS)
    for name, folder in by_guider.items():
        info = read_student(folder)
        assert info.guider == name
        assert info.guider_settings == GuiderOptions(**SETTINGS[name]).guider_settings
        assert info.settings["guider"] == name
        assert {key: info.settings[key] for key in info.guider_settings} == info.guider_settings
        assert np.isfinite(info.result["final_loss"])


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("rescale", {}),
        ("cfg-zero", {}),
        ("interval", {"guidance": 1.0, "guidance_max": 7.5}),
        ("apg", {"guidance": 1.0, "guidance_max": 7.5}),
    ],
)
def test_the_target_is_what_diffusers_guider_makes_of_the_predictions(
    tiny: Model,
    tiny_files: ModelFiles,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    scales: dict[str, float],
) -> None:
    seen: list[tuple[Any, torch.Tensor]] = []

    def advance(source: Trajectories, teacher_x: torch.Tensor) -> None:
        seen.append((source.batch(0), teacher_x))

    monkeypatch.setattr(Trajectories, "advance", advance)
    config = DistillConfig(
        prompts=prompt_file,
        updates=1,
        batch_size=6,
        precision="fp32",
        **scales,
        **SETTINGS[name],  # type: ignore[arg-type]
    )
    distill(tiny_files, config, RunConfig(gradient_accumulation_steps=4), output=tmp_path / "s", observers=SILENT)
    ((batch, teacher_x),) = seen
    kept = GuiderOptions(**SETTINGS[name]).guider_settings
    alphas = tiny.pipeline.scheduler.alphas_cumprod
    for i, (t, w) in enumerate(zip(batch.t.tolist(), batch.guidance.tolist(), strict=True)):
        z_t, one = batch.z_t[i : i + 1], batch.text[i : i + 1]
        with torch.no_grad():
            conditional = tiny.denoiser(z_t, t, one.conditional.encoder_hidden_states).sample
            unconditional = tiny.denoiser(z_t, t, one.unconditional.encoder_hidden_states).sample
        guider: Any = {
            "rescale": lambda w=w: guiders.ClassifierFreeGuidance(w, guidance_rescale=0.6),
            "interval": lambda w=w: guiders.ClassifierFreeGuidance(w, start=0.3, stop=0.7),
            "apg": lambda w=w: guiders.AdaptiveProjectedGuidance(
                w - 1, None, kept["apg_norm_threshold"], eta=0.0, use_original_formulation=True
            ),
            "cfg-zero": lambda w=w: guiders.ClassifierFreeZeroStarGuidance(w, zero_init_steps=0),
        }[name]()
        guider.set_state(999 - t, 1000, torch.tensor(t))
        noise = guider.forward(conditional, unconditional).pred
        expected = (z_t - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        torch.testing.assert_close(teacher_x[i : i + 1], expected, atol=1e-4, rtol=1e-4)


def test_zero_terminal_snr_with_rescale_trains(prompt_file: Path, tmp_path: Path) -> None:
    pipeline = make_pipeline(prediction_type="v_prediction")
    pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipeline.save_pretrained(tmp_path / "model")
    config = DistillConfig(prompts=prompt_file, updates=12, batch_size=4, learning_rate=0.02, **SETTINGS["rescale"])
    files = locate(str(tmp_path / "model"))
    info = distill(files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert 0 < info.result["guidance_r2"] < 1


def test_bench_compares_students_of_one_guider(
    by_guider: dict[str, Path], tiny_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="with different guiders: compare them one at a time"):
        read_students([by_guider["rescale"], by_guider["apg"]], tiny_files, None)
    manifest = SimpleNamespace(check_student=lambda *_, **__: None)
    monkeypatch.setattr(bench_module, "read_manifest", lambda folder: manifest)
    with pytest.raises(InputError, match="--alternatives is for teachers with plain guidance, not with the guider apg"):
        bench_module.bench(
            tiny_files,
            BenchConfig(samples=4, alternatives=True),
            students=[by_guider["apg"]],
            engine=tmp_path,
            prompts=list(PROMPTS),
            metrics=Metrics(),
        )


def test_a_manifest_names_the_guider(by_guider: dict[str, Path], tiny_files: ModelFiles) -> None:
    info = read_student(by_guider["rescale"])
    distilled = _intended(tiny_files, info, ExportConfig(), None).distilled
    assert (distilled.guider, distilled.guider_settings) == ("rescale", {"guidance_rescale": 0.6})


def test_the_paper_has_plain_guidance_alone(by_guider: dict[str, Path]) -> None:
    files = locate_configs("sd21-base")
    for name, folder in by_guider.items():
        student = Student(name="student lora", folder=folder, info=read_student(folder), denoiser=None)
        rows = {row for row, _, _ in papers_figures(files, [student])}
        assert rows == {"teacher w=3", "teacher w=1", *(["student lora"] if name == "cfg" else [])}


def test_speed_counts_the_passes_that_a_guider_makes(tiny: Model, by_guider: dict[str, Path]) -> None:
    speed = measure(
        [TimedVariant(mode=mode, runner=TorchRunner(tiny.denoiser)) for mode in MODES],
        tiny,
        prompts=PROMPTS,
        guidance=3.0,
        guider=read_student(by_guider["interval"]).teacher_guider,
        make_scheduler=partial(make_scheduler, "ddim", tiny.pipeline.scheduler.config),
        steps=5,
        batch_sizes=(1,),
        runs=3,
    )
    ceilings = {ratio.part: ratio.ceiling for ratio in speed.ratios if ratio.slower.mode == "teacher"}
    assert ceilings["denoiser"] == 7 / 5
    assert 1 < ceilings["images"] < 7 / 5


@pytest.mark.parametrize("name", ["interval", "apg"])
def test_stop_and_resume_give_the_same_bytes(
    by_guider: dict[str, Path], tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, name: str
) -> None:
    def stop(report: Any) -> None:
        if report.update == 3:
            raise KeyboardInterrupt

    config = DistillConfig(prompts=prompt_file, updates=4, batch_size=4, learning_rate=0.02, **SETTINGS[name])
    run = partial(distill, tiny_files, output=tmp_path / "s", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run(config, RunConfig(checkpoint_every=2), observers=Observers(preview=False, on_update=stop))
    resume = RunConfig(resume=True)
    other = {"interval": {"guidance_interval": "0.3:0.8"}, "apg": {"apg_eta": 0.5}}[name]
    for changes, message in (
        (SETTINGS["rescale"], f"guider was {name}, is rescale"),
        (SETTINGS[name] | other, "guidance_interval was 0.3:0.7, is 0.3:0.8|apg_eta was 0.0, is 0.5"),
    ):
        changed = DistillConfig(prompts=prompt_file, updates=4, batch_size=4, learning_rate=0.02, **changes)
        with pytest.raises(InputError, match=message):
            run(changed, resume, observers=SILENT)
    info = run(config, resume, observers=SILENT)
    assert info.result["resumed_at"] == 2
    assert (tmp_path / "s" / LORA_FILE).read_bytes() == (by_guider[name] / LORA_FILE).read_bytes()


def without_guider(path: Path) -> None:
    """As it was before there were guiders."""
    values = json.loads(path.read_text())
    for key in ("guider", *(name for own in GUIDERS.values() for name in own)):
        values.pop(key, None)
    path.write_text(json.dumps(values))


def test_runs_from_before_are_of_plain_guidance(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    def stop(report: object) -> None:
        raise KeyboardInterrupt

    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2)
    run = partial(distill, tiny_files, output=tmp_path / "s", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run(config, RunConfig(checkpoint_every=1), observers=Observers(preview=False, on_update=stop))
    without_guider(work_folder(tmp_path / "s") / "config.json")
    info = run(config, RunConfig(resume=True), observers=SILENT)
    notes: list[str] = []
    again = Observers(preview=False, on_note=notes.append)
    assert run(config, RunConfig(resume=True), observers=again) == info
    assert "has ended" in notes[0]


@pytest.fixture(scope="module")
def bold_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose guidance shows in its pictures."""
    pipeline, folder = make_pipeline(), tmp_path_factory.mktemp("bold")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight *= 4
        pipeline.unet.conv_out.weight *= 3
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("cfg", "apg") else ()) for name in SETTINGS]
)
def test_previews_generate_and_bench_have_the_same_teacher(
    bold_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    steps, columns, files = 5, list[dict[str, torch.Tensor]](), locate(str(bold_folder))

    def kept(shown: dict[str, torch.Tensor], prompts: list[str]) -> Image.Image:
        columns.append(shown)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(preview, "labelled_grid", kept)
    monkeypatch.setattr(preview, "PREVIEW_STEPS", steps)
    config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2, guidance=7.5, precision="fp32")
    config = replace(config, **SETTINGS[name])
    distill(files, config, output=tmp_path / "s", device="cpu")
    previewed = columns[0]["teacher w=7.5"].int()

    def drawn(**options: Any) -> torch.Tensor:
        settings = GenerateConfig(prompts=list(PROMPTS), teacher=True, guidance=7.5, steps=steps, **options)
        paths = draw(files, settings, output=tmp_path / "images", device="cpu")
        return torch.stack([torch.from_numpy(np.array(Image.open(path)).astype(int)) for path in paths])

    setting = BenchConfig(samples=4, steps=steps, compile=False)
    opened = Session.open(files, setting, students=[tmp_path / "s"], guidance=None, prompts=PROMPTS, device="cpu")
    with opened as session:
        session = session.at("ddim", steps)
        teacher, unguided = session.teacher(7.5), session.teacher(1.0)
        text = session.model.family.encode(session.model.pipeline, PROMPTS)
        sampling = {"text": text, "make_scheduler": teacher.make_scheduler, "steps": steps, "seed": 0}
        sampled = to_uint8(generate(session.model, teacher.open(), **sampling))
        passes = steps + {"interval": 2}.get(name, steps)
        assert (teacher.cost, unguided.cost) == (passes, steps)
        assert teacher.name == ("teacher w=7.5" if name == "cfg" else f"teacher w=7.5 {name}")
        assert unguided.identity == {"mode": "teacher", "guidance": 1.0}
        assert ("guider" in teacher.identity) == (name != "cfg")
        assert session.provenance(None)["guider"].startswith(name)
    assert (drawn(**SETTINGS[name]).permute(0, 3, 1, 2) - previewed).abs().max() <= 1
    assert (sampled.int() - previewed).abs().max() <= 1
    if name != "cfg":
        assert (drawn().permute(0, 3, 1, 2) - previewed).abs().max() > 2
