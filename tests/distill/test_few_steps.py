"""Few-step students: the target, the stages, their states, and where such a student can be used."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.benchmarks.config import BenchConfig, Table1Config
from boostdiff.benchmarks.session import Session, with_sampling
from boostdiff.benchmarks.table1 import table1_columns
from boostdiff.cli import app
from boostdiff.distill import few_steps
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill, dry_run, resolve
from boostdiff.distill.few_steps import FrozenStudent, Stage, adopted_in_words
from boostdiff.distill.loop import Observers, Run, UpdateReport
from boostdiff.distill.objective import NoiseSchedule, ddim_step, x_from_ddim_step
from boostdiff.distill.order import Share
from boostdiff.distill.run_folder import work_folder
from boostdiff.distill.source import Batch
from boostdiff.distill.trajectories import GridTrajectories
from boostdiff.engine.adapters import LORA_FILE, METHODS
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance_input import make_adapter
from boostdiff.engine.live_negative import LIVE_FILE
from boostdiff.engine.manifest import read_manifest
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.schedulers import make_scheduler
from boostdiff.engine.student import read_student
from boostdiff.export.export import export
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny import CPU, ONNX_FROM_PART, PROMPTS, few_step_copy, graphs_of, save_images
from typer.testing import CliRunner

SILENT = Observers(preview=False)
SETTINGS: dict[str, Any] = {"updates": 3, "stage_updates": 3, "batch_size": 4, "learning_rate": 0.1}


@pytest.fixture
def four_steps(students: dict[str, Path], tmp_path: Path) -> Path:
    return few_step_copy(students["lora"], tmp_path / "four", 4)


@pytest.mark.parametrize("steps", [1, 3, 4, 16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_with_the_target_is_two_steps_of_the_sampler(
    tiny: Model, students: dict[str, Path], steps: int, prediction_type: str
) -> None:
    """The two steps are those of the sampler that `generate` runs, at every timestep of the grid, the last included."""
    stage = Stage(steps=steps, folder=students["lora"], before=read_student(students["lora"]))
    adapter = make_adapter("lora", tiny.denoiser)
    config = {**tiny.pipeline.scheduler.config, "prediction_type": prediction_type}
    tiny.pipeline.scheduler = DDIMScheduler.from_config(config)
    frozen = FrozenStudent(tiny, adapter, stage, CPU)
    finer, coarser = (make_scheduler("ddim", config, spacing="trailing") for _ in range(2))
    finer.set_timesteps(2 * steps)
    coarser.set_timesteps(steps)
    assert frozen.timesteps == coarser.timesteps.tolist() == finer.timesteps.tolist()[::2]
    assert frozen.timesteps[0] == 999

    def prediction(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * z + 0.01 * t.view(-1, 1, 1, 1))

    def x_at(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = frozen.schedule.at(t)
        if prediction_type == "epsilon":
            return (z - sigma * prediction(z, t)) / alpha
        return alpha * z - sigma * prediction(z, t)

    left: list[int] = []
    for index, t in enumerate(frozen.timesteps):
        z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(index))
        both = torch.tensor([t, t])
        target, untrained = frozen.targets(z, both, x_at)
        assert torch.equal(untrained, x_at(z, both))
        alpha, sigma = frozen.schedule.at(both)
        if (alpha > sigma).all():
            assert torch.equal(target, untrained), "where the signal prevails, a step stays as it is"
            left.append(t)
            continue
        expected = z
        for part in finer.timesteps[2 * index : 2 * index + 2]:
            expected = finer.step(prediction(expected, part.expand(2)), part, expected, return_dict=False)[0]
        # What a student with this x̂ predicts, and the sampler makes of it.
        noise, v = (z - alpha * target) / sigma, (alpha * z - target) / sigma
        got = coarser.step(noise if prediction_type == "epsilon" else v, t, z, return_dict=False)[0]
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
        assert (target - untrained).abs().max() > 1e-3
    assert left == frozen.timesteps[steps - len(left) :]
    assert (steps > 1) <= len(left) <= steps / 2


def test_the_target_is_exact_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    z, x, x_mid = torch.randn(3, 5, 4, 8, 8, dtype=torch.float64, generator=generator)
    angles = torch.tensor(
        [[1.5, 1.1, 0.9], [0.9, 0.5, 0.3], [0.3, 0.1, 0.0], [0.2, 0.1, 0.03], [torch.pi / 2, 1.2, 1.0]]
    )
    at, mid, end = (
        (angle.cos().view(-1, 1, 1, 1), angle.sin().view(-1, 1, 1, 1)) for angle in angles.double().unbind(dim=1)
    )
    arrived = ddim_step(ddim_step(z, x, *at, *mid), x_mid, *mid, *end)
    target = x_from_ddim_step(z, arrived, *at, *end)
    torch.testing.assert_close(ddim_step(z, target, *at, *end), arrived, atol=1e-12, rtol=1e-12)


def test_every_timestep_of_the_grid_comes_equally_often(tiny: Model) -> None:
    schedule = NoiseSchedule.of(make_scheduler("ddim", tiny.pipeline.scheduler.config), CPU)
    grid = [999, 749, 499, 249]

    def source() -> GridTrajectories:
        share = Share(batch_size=8)
        return GridTrajectories(tiny, list(PROMPTS), schedule, share=share, seed=0, guidance=(3, 3), timesteps=grid)

    def run(trajectories: GridTrajectories, updates: range) -> list[Batch]:
        batches = []
        for update in updates:
            batch = trajectories.batch(update)
            batches.append(replace(batch, z_t=batch.z_t.clone()))
            trajectories.advance(batch.z_t * 0.5)
        return batches

    first = source()
    batches = run(first, range(6))
    assert set(batches[0].t.tolist()) == {999}
    for batch in batches[3:]:
        assert Counter(batch.t.tolist()) == dict.fromkeys(grid, 2)
    # A state is where the target, here half of it, has led from the one before.
    member = batches[4].t.tolist().index(749)
    alpha, sigma, after, sigma_after = (float(each) for t in (999, 749) for each in schedule.at(torch.tensor([t])))
    before = batches[3].z_t[member]
    expected = after * 0.5 * before + sigma_after * (before - alpha * 0.5 * before) / sigma
    torch.testing.assert_close(batches[4].z_t[member], expected)
    # Restored, it goes on the same.
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    other = source()
    other.restore(state, Counter())
    for one, another in zip(run(first, range(6, 12)), run(other, range(6, 12)), strict=True):
        assert torch.equal(one.z_t, another.z_t)
        assert torch.equal(one.t, another.t)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [{}, {"guidance_input": True}, {"live_negative_prompt": True}])
def test_an_adapter_is_read_from_what_it_saved(
    tiny: Model, tiny_files: ModelFiles, tmp_path: Path, method: str, more: dict[str, bool]
) -> None:
    if method == "soft-prompt" and more:
        pytest.skip("its tokens join the prompt")
    options: dict[str, Any] = {"rank": 4, "alpha": 2.0, **more}
    adapter = make_adapter(method, tiny.denoiser, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(torch.randn_like(parameter))
    adapter.save(tmp_path, tiny.pipeline)
    other = make_adapter(method, load(tiny_files, device=CPU).denoiser, **options)
    other.load_for_training(tmp_path)
    weights = {name: parameter.detach().clone() for name, parameter in other.parameters().items()}
    for name, parameter in adapter.parameters().items():
        assert torch.equal(weights[name], parameter)
    swapped = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    with other.swapped(swapped):
        assert not any(parameter.any() for parameter in other.parameters().values())
    for name, parameter in other.parameters().items():
        assert torch.equal(parameter, weights[name])


def test_the_teacher_of_a_stage_is_the_student_before_as_it_was(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FrozenStudent] = []
    seen: list[list[torch.Tensor]] = []
    states: list[torch.Tensor] = []

    class Recorded(FrozenStudent):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

        def targets(self, z_t: torch.Tensor, t: torch.Tensor, x_at: Callable[..., torch.Tensor]) -> Any:
            states.append(z_t.clone())

            def recorded(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                seen.append([p.detach().clone() for p in self.adapter.parameters().values()])
                return x_at(z, t)

            return super().targets(z_t, t, recorded)

    monkeypatch.setattr("boostdiff.distill.distill.FrozenStudent", Recorded)
    config = DistillConfig(prompts=prompt_file, few_steps="4:1", **SETTINGS)
    info = distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert [frozen.stage.steps for frozen in made] == [2, 1]
    assert len(seen) == 2 * 2 * 3, "a target costs two passes"
    assert not torch.equal(states[0], states[3]), "each stage has noise of its own"
    output = tmp_path / "s"
    for number, (frozen, folder) in enumerate(
        zip(made, (output / "stages/guidance", output / "stages/2"), strict=True)
    ):
        adapter = make_adapter("lora", load(tiny_files, device=CPU).denoiser)
        adapter.load_for_training(folder)
        before = list(adapter.parameters().values())
        for weights in [*seen[6 * number : 6 * number + 6], list(frozen.weights.values())]:
            assert all(map(torch.equal, weights, before))
    saved = [load_file(folder / LORA_FILE) for folder in (output / "stages/guidance", output / "stages/2", output)]
    assert all(saved[0].keys() == tensors.keys() for tensors in saved)
    for one, other in ((0, 1), (1, 2)):
        assert any((saved[one][name] - saved[other][name]).abs().max() > 1e-3 for name in saved[0])
    # What is on disk.
    two, one = read_student(output / "stages/2", tiny_files), read_student(output, tiny_files)
    assert (two.steps, one.steps, one.sampler, one.timestep_spacing) == (2, 1, "ddim", "trailing")
    assert read_student(output / "stages/guidance").steps is None
    assert one == info
    assert [(each["steps"], each["updates"], each["teacher_evaluations"]) for each in info.result["stages"]] == [
        (None, 3, 6),
        (2, 3, 6),
        (1, 3, 6),
    ]
    assert info.result["forward_passes"] == 2 * 6 + 12
    assert sorted(path.name for path in (output / "stages").iterdir()) == ["2", "guidance"]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(lines[0]["before_loss"]), "a stage begins as the student before"
    assert not work_folder(output).exists()


def test_a_stage_brings_the_student_to_two_steps_of_the_one_before(
    tiny_files: ModelFiles, students: dict[str, Path], prompt_file: Path, tmp_path: Path
) -> None:
    config = DistillConfig(
        prompts=prompt_file,
        start_from=students["lora"],
        few_steps="4:2",
        stage_updates=40,
        batch_size=8,
        learning_rate=0.1,
    )
    info = distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert info.result["stage_r2"] > 0.15
    assert "guidance_r2" not in info.result
    assert [each["steps"] for each in info.result["stages"]] == [None, 2]
    assert not (tmp_path / "s/stages/guidance").exists()


@pytest.mark.parametrize("kind", ["bitfit", "live range", "images"])
def test_stages_of_other_students(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {
        "bitfit": {"method": "bitfit"},
        "live range": {"negative_prompt": "live", "guidance": 2.0, "guidance_max": 5.0, "adapter_scale": 2.0},
        "images": {"images": str(tmp_path / "images")},
    }[kind]
    if kind == "images":
        save_images(tmp_path / "images")
    else:
        options["prompts"] = prompt_file
    few = {"updates": 2, "stage_updates": 2, "batch_size": 2, "learning_rate": 1e-3, "few_steps": "2:1"}
    info = distill(tiny_files, DistillConfig(**few, **options), output=tmp_path / "s", device="cpu", observers=SILENT)
    live = kind == "live range"
    assert (info.steps, info.live_negative_prompt, info.guidance_range is not None) == (1, live, live)
    if live:
        rises = [load_file(folder / LIVE_FILE)["rise"] for folder in (tmp_path / "s", tmp_path / "s/stages/guidance")]
        assert rises[0] == rises[1] > 0, "the scale of the student of guidance goes on"
    drawing = GenerateConfig(prompts=["a red cat"], student=tmp_path / "s")
    (path,) = draw(tiny_files, drawing, output=tmp_path / "o", device="cpu")
    assert (Image.open(path).text["sampler"], Image.open(path).text["steps"]) == ("ddim", "1")


@pytest.fixture(scope="module")
def unbroken(tiny_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages that was not stopped."""
    output = tmp_path_factory.mktemp("unbroken") / "s"
    config = DistillConfig(prompts=prompt_file, few_steps="2:1", **SETTINGS)
    distill(locate(str(tiny_folder)), config, output=output, device="cpu", observers=SILENT)
    return output


@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(
    tiny_files: ModelFiles, prompt_file: Path, unbroken: Path, tmp_path: Path, stop_at: int
) -> None:
    """At the last update of stage 0, at the first of the next before its checkpoint, and after that one."""
    config = DistillConfig(prompts=prompt_file, few_steps="2:1", **SETTINGS)
    count = 0

    def stop(report: UpdateReport) -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    execution, cut = RunConfig(checkpoint_every=2), tmp_path / "cut"
    stopped = Observers(on_update=stop, preview=False)
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_files, config, execution, output=cut, device="cpu", observers=stopped)
    assert not cut.exists()
    resume, started = replace(execution, resume=True), list[int]()
    with pytest.raises(InputError, match=r"few_steps was 2:1, is 4:1"):
        distill(tiny_files, replace(config, few_steps="4:1"), resume, output=cut, device="cpu", observers=SILENT)
    observers = Observers(on_start=started.append, preview=False)
    distill(tiny_files, config, resume, output=cut, device="cpu", observers=observers)
    assert started == {3: [2, 0], 4: [3, 0], 6: [3, 2]}[stop_at]
    for name in (LORA_FILE, "log.jsonl"):
        for part in (".", "stages/guidance"):
            assert (cut / part / name).read_bytes() == (unbroken / part / name).read_bytes(), (part, name)
    notes: list[str] = []
    ended = Observers(on_note=notes.append, preview=False)
    assert distill(tiny_files, config, resume, output=cut, device="cpu", observers=ended) == read_student(cut)
    assert "has ended" in notes[0]


def test_a_run_killed_while_its_folder_is_named(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    config = DistillConfig(prompts=prompt_file, few_steps="2:1", **SETTINGS)
    notes: list[str] = []
    for name in ("write_json", "publish"):
        monkeypatch.setattr(few_steps, name, killed)
        with pytest.raises(KeyboardInterrupt):
            execution = RunConfig(resume=name == "publish")
            distill(tiny_files, config, execution, output=tmp_path / "s", device="cpu", observers=SILENT)
        monkeypatch.undo()
    observers = Observers(on_note=notes.append, preview=False)
    info = distill(tiny_files, config, RunConfig(resume=True), output=tmp_path / "s", device="cpu", observers=observers)
    assert read_student(tmp_path / "s", tiny_files) == info
    assert sorted(path.name for path in (tmp_path / "s/stages").iterdir()) == ["guidance"]
    assert not notes


def test_the_student_to_start_from_is_not_replaced(
    tiny_files: ModelFiles,
    students: dict[str, Path],
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = shutil.copytree(students["lora"], tmp_path / "student")
    config = DistillConfig(prompts=prompt_file, start_from=student, few_steps="4:2", stage_updates=1, batch_size=2)
    monkeypatch.chdir(tmp_path)
    for output in (student, Path("student")):
        with pytest.raises(InputError, match=r"--start-from .* would be lost with .*student: pass another --output"):
            distill(tiny_files, config, output=output, device="cpu", observers=SILENT)
    assert read_student(student, tiny_files).steps is None


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("start", ["student/stages/8", "student.unfinished/stages/guidance", "link/8"])
def test_a_stage_of_the_output_is_no_student_to_start_from(
    tiny_files: ModelFiles, students: dict[str, Path], prompt_file: Path, tmp_path: Path, start: str, resume: bool
) -> None:
    (tmp_path / "link").symlink_to("student/stages")
    few_step_copy(students["lora"], tmp_path / "student", 4)
    few_step_copy(students["lora"], tmp_path / "student/stages/8", 8)
    shutil.copytree(students["lora"], tmp_path / "student.unfinished/stages/guidance")
    before = sorted(tmp_path.rglob("*"))
    config = DistillConfig(prompts=prompt_file, start_from=tmp_path / start, few_steps="8:4", stage_updates=1)
    with pytest.raises(InputError, match=f"{start} would be lost with .*: pass another --output"):
        distill(
            tiny_files, config, RunConfig(resume=resume), output=tmp_path / "student", device="cpu", observers=SILENT
        )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("start_from", [False, True])
def test_the_time_of_all_stages_is_kept_and_printed(
    tiny_folder: Path,
    students: dict[str, Path],
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_from: bool,
) -> None:
    took = iter([30.0, 500.0, 7000.0])
    train = Run.train

    def timed(self: Run, *args: Any) -> dict[str, Any]:
        return train(self, *args) | {"seconds": next(took)}

    words = ["distill", "--model", tiny_folder, "--prompts", prompt_file, "--device", "cpu", "--batch-size", 2]
    words += ["--few-steps", "4:1", "--stage-updates", 1, "--output", tmp_path / "s"]
    student = Path(shutil.copytree(students["lora"], tmp_path / "student"))
    info = read_student(student)
    replace(info, result=info.result | {"seconds": 200.0}).write(student)
    words += ["--start-from", student] if start_from else ["--updates", 1]
    monkeypatch.setattr(Run, "train", timed)
    shown = CliRunner().invoke(app, [str(word) for word in words])
    assert shown.exit_code == 0, shown.output
    expected = [200, 30, 500] if start_from else [30, 500, 7000]
    result = read_student(tmp_path / "s").result
    assert [each["seconds"] for each in result["stages"]] == expected
    assert result["seconds"] == expected[-1]
    assert f"{sum(expected)} s)" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"few_steps": text}, "write START:END") for text in ("30:4", "4:4", "4:8", "8", "8:0", "x:4", "12:5", "")),
        ({"stage_updates": 5}, "--stage-updates is not used without --few-steps"),
        ({"start_from": Path("x")}, "--start-from is not used without --few-steps"),
        ({"few_steps": "4:2", "start_from": Path("x"), "updates": 5}, "--updates is not used with --start-from"),
        ({"few_steps": "4:2", "start_from": Path("x"), "loss_weight": "snr"}, "--loss-weight is not used with"),
        ({"few_steps": "4:2", "start_from": Path("x"), "preset": "paper"}, "--preset is not used with"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillConfig(**changes)


def test_stages_halve() -> None:
    assert DistillConfig(few_steps="32:4").stages == [16, 8, 4]
    assert DistillConfig(few_steps="12:3").stages == [6, 3]
    assert DistillConfig().stages == []


def test_what_can_not_be_trained_is_refused_before_anything_is_written(
    tiny_files: ModelFiles,
    students: dict[str, Path],
    four_steps: Path,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(message: str, **options: Any) -> None:
        config = DistillConfig(prompts=prompt_file, **options)
        for attempt in (
            lambda: distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT),
            lambda: dry_run(tiny_files, resolve(config, tiny_files, CPU), RunConfig(), CPU),
        ):
            with pytest.raises(InputError, match=message):
                attempt()
        assert not list(tmp_path.glob("s*"))

    refused("--few-steps 2048:4 can't be used: 2048 steps do not go with", few_steps="2048:4")
    refused("there is no student in", few_steps="8:4", start_from=tmp_path / "missing")
    refused("takes 4 steps: pass --few-steps 4:END", few_steps="8:2", start_from=four_steps)
    one_step = few_step_copy(students["lora"], tmp_path / "one", 1)
    refused("takes 1 steps, which can't be halved", few_steps="8:2", start_from=one_step)
    refused("--guidance 5.0: the student in", few_steps="8:4", start_from=students["lora"], guidance=5.0)
    refused("--rank 4: the student in", few_steps="8:4", start_from=students["lora"], rank=4)
    refused("--method bitfit: the student in", few_steps="8:4", start_from=students["lora"], method="bitfit")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("one process", few_steps="8:4")


def test_a_dry_run_shows_the_stages(tiny_files: ModelFiles, students: dict[str, Path], prompt_file: Path) -> None:
    config = DistillConfig(prompts=prompt_file, few_steps="8:2", start_from=students["bitfit"])
    shown = dry_run(tiny_files, resolve(config, tiny_files, CPU), RunConfig(), CPU)
    assert (shown["few_steps"], shown["stage_updates"], shown["updates"]) == ("8:2", 520, None)
    assert shown["method"] == "bitfit"
    assert resolve(DistillConfig(prompts=prompt_file), tiny_files, CPU).stage_updates is None


@pytest.mark.parametrize(("kind", "said"), [("lora", ""), ("bitfit", "trained on with the student's method bitfit")])
def test_what_is_taken_from_the_student_is_said_and_nothing_else(
    tiny_files: ModelFiles, students: dict[str, Path], prompt_file: Path, kind: str, said: str
) -> None:
    config = DistillConfig(prompts=prompt_file, few_steps="8:2", start_from=students[kind])
    assert adopted_in_words(resolve(config, tiny_files, CPU)) == said


def stock_images(folder: Path, student: Path, steps: int) -> np.ndarray:
    """The three lines of the docs."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(student)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    images = pipe(list(PROMPTS), num_inference_steps=steps, guidance_scale=1.0, generator=generator).images
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.mark.parametrize("steps", [4, 16])
def test_stock_diffusers_draws_the_same(
    tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path, steps: int
) -> None:
    student = few_step_copy(students["lora"], tmp_path / "few", steps)
    paths = draw(
        tiny_files, GenerateConfig(prompts=list(PROMPTS), student=student), output=tmp_path / "o", device="cpu"
    )
    ours = np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])
    assert np.abs(ours - stock_images(tiny_files.folder, student, steps)).max() <= 1
    # The folder's own spacing gives other images.
    plain = GenerateConfig(prompts=list(PROMPTS), student=students["lora"], steps=steps)
    paths = draw(tiny_files, plain, output=tmp_path / "plain", device="cpu")
    assert np.abs(ours - np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])).max() > 2


def test_generate_refuses_other_steps(tiny_files: ModelFiles, four_steps: Path, tmp_path: Path) -> None:
    for options, asked in (
        ({"steps": 20}, "20 steps of ddim"),
        ({"sampler": "dpm++"}, r"4 steps of dpm\+\+"),
        ({"steps": 4, "lora_scale": 0.5}, "not few-step ones"),
    ):
        config = GenerateConfig(prompts=["a"], student=four_steps, **options)
        with pytest.raises(InputError, match=asked):
            draw(tiny_files, config, output=tmp_path / "o", device="cpu")
    assert not (tmp_path / "o").exists()
    # The teacher takes any.
    draw(tiny_files, GenerateConfig(prompts=["a"], teacher=True, steps=2), output=tmp_path / "o", device="cpu")


@pytest.mark.slow
def test_an_engine_of_a_few_step_student(
    tiny_files: ModelFiles,
    four_steps: Path,
    engines: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The same weights as those of the engine's student.
    monkeypatch.setattr(ONNX_FROM_PART, graphs_of(engines["lora"]))
    manifest = export(tiny_files, student=four_steps, output=tmp_path / "engine", device="cpu")
    assert (manifest.student["steps"], manifest.student["sampler"]) == (4, "ddim")
    assert {check["steps"] for check in manifest.pipeline.values()} == {4}
    paths = draw(tiny_files, GenerateConfig(prompts=["a"], student=four_steps), output=tmp_path / "torch", device="cpu")
    config = GenerateConfig(prompts=["a"], engine=tmp_path / "engine", runner="onnx")
    paths += draw(None, config, output=tmp_path / "onnx", device="cpu")
    with Engine.load(tmp_path / "engine", runner="onnx", device="cpu") as engine:
        (image,) = engine("a")
        assert engine.model.pipeline.scheduler.config.timestep_spacing == "trailing", "stock's call draws the same"
        with pytest.raises(InputError, match="distilled for 4 steps of ddim and can't make 20 steps of ddim"):
            engine("a", steps=20)
        with pytest.raises(InputError, match="can't make 4 steps of unipc"):
            next(engine.stream("a", sampler="unipc"))
        assert len(list(engine.stream("a"))) == 4
    first, *others = (np.asarray(each).astype(int) for each in (*map(Image.open, paths), image))
    for other in others:
        assert np.abs(first - other).max() <= 1
    with pytest.raises(InputError, match="can't make 5 steps"):
        draw(None, replace(config, steps=5), output=tmp_path / "onnx", device="cpu")
    # Manifests from before name no steps.
    values = {name: value for name, value in manifest.student.items() if name not in ("steps", "sampler")}
    assert replace(read_manifest(engines["lora"]), student=values).distilled.steps is None


def test_bench_takes_the_students_steps(
    tiny_files: ModelFiles, students: dict[str, Path], four_steps: Path, tmp_path: Path
) -> None:
    eight = few_step_copy(students["lora"], tmp_path / "eight", 8)
    plain = students["lora"]
    chosen = with_sampling(BenchConfig(), [four_steps])
    assert (chosen.sampler, chosen.steps) == ("ddim", 4)
    chosen = with_sampling(BenchConfig(), [plain, four_steps])
    assert (chosen.sampler, chosen.steps) == ("ddim", 4)
    assert with_sampling(BenchConfig(), [plain]).steps == 20
    for config, folders in (
        (BenchConfig(steps=20), [four_steps]),
        (BenchConfig(sampler="euler"), [four_steps]),
        (BenchConfig(), [four_steps, eight]),
    ):
        with pytest.raises(InputError, match="this few-step student was distilled for"):
            with_sampling(config, folders)
    with pytest.raises(InputError, match="distilled for trailing timesteps: leave --timestep-spacing out"):
        with_sampling(BenchConfig(timestep_spacing="leading"), [four_steps])
    leading = GenerateConfig(prompts=["a"], student=four_steps, timestep_spacing="leading")
    with pytest.raises(InputError, match="distilled for trailing timesteps"):
        draw(tiny_files, leading, output=tmp_path / "images", device="cpu")
    with pytest.raises(InputError, match="which no column has: pass --samplers ddim and --steps with 8"):
        with_sampling(Table1Config(steps=(4, 20)), [four_steps, eight])
    for spacing in ("leading", "trailing"):
        asked = BenchConfig(timestep_spacing=spacing, samples=2)  # type: ignore[arg-type]
        opened = Session.open(tiny_files, asked, students=[plain], guidance=None, prompts=list(PROMPTS), device="cpu")
        with opened as session:
            assert session.make_scheduler().config.timestep_spacing == spacing
    config = Table1Config(samplers=("ddim",), steps=(4, 8, 5), samples=2)
    opened = Session.open(
        tiny_files, config, students=[plain, four_steps, eight], guidance=None, prompts=list(PROMPTS), device="cpu"
    )
    with opened as session:
        variants = [each for column in table1_columns(session, config).values() for each in column]
        spacings = {(each.steps, each.make_scheduler().config.timestep_spacing, each.role) for each in variants}
    names = [each.name for each in variants if each.name.startswith("student")]
    assert [name.partition(" (")[0] for name in names] == [
        "student lora",
        "student lora, 4 steps",
        "student lora",
        "student lora, 8 steps",
        "student lora",
    ]
    roles = ("teacher", "unguided", "student")
    assert spacings == {
        *((steps, "trailing", role) for steps in (4, 8) for role in roles),
        *((5, "leading", role) for role in roles),
    }
