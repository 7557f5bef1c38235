import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from boostdiff.distill import loop
from boostdiff.distill.config import LEARNING_RATES, DistillConfig, RunConfig, learning_rate_at
from boostdiff.distill.distill import _affordable, distill, dry_run, resolve
from boostdiff.distill.loop import CHECKPOINT_FILE, Observers
from boostdiff.distill.monitoring import Throughput
from boostdiff.distill.objective import LOSS_WEIGHTS
from boostdiff.distill.run_folder import work_folder
from boostdiff.distill.source import Batch
from boostdiff.distill.trajectories import Trajectories
from boostdiff.engine.adapters import LORA_FILE, METHODS
from boostdiff.engine.compiled import TrainingRunner
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.model import ModelFiles, locate
from boostdiff.engine.student import StudentInfo, read_student
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tiny import make_pipeline, save_images, with_another_unet

SILENT = Observers(preview=False)


def logged(folder: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (folder / "log.jsonl").read_text().splitlines()]


def error(folder: Path, updates: slice) -> float:
    """The loss over that of who has learned nothing: losses depend much on the noise levels drawn."""
    return sum(logged(folder)[updates]) / sum(logged(folder, "unguided_loss")[updates])


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_training_brings_the_student_to_the_teacher(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, method: str
) -> None:
    config = DistillConfig(method=method, prompts=prompt_file, updates=80, batch_size=8, learning_rate=0.01)
    info = distill(tiny_files, config, output=tmp_path / "s", device="cpu")
    seen = logged(tmp_path / "s")
    assert len(seen) == 80
    assert error(tmp_path / "s", slice(-10, None)) < 0.6
    unguided = logged(tmp_path / "s", "unguided_loss")
    assert seen[0] == pytest.approx(unguided[0]), "an adapter begins as the teacher's conditional pass"
    assert info.result["guidance_r2"] == pytest.approx(1 - sum(seen[-8:]) / sum(unguided[-8:]))
    assert 0.4 < info.result["guidance_r2"] < 1
    assert info == read_student(tmp_path / "s", tiny_files)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        *info.adapter_files,
        "student.json",
        "config.json",
        "log.jsonl",
        "grid.png",
    }
    assert not work_folder(tmp_path / "s").exists()


NO_SIGNAL_AT_THE_END = {
    "v_prediction": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "sample": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
}


@pytest.mark.parametrize(("prediction_type", "untrained"), [("v_prediction", "snr"), ("sample", "min-snr")])
def test_a_last_timestep_without_signal_is_trained(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction_type: str, untrained: str
) -> None:
    pipeline = make_pipeline(prediction_type=prediction_type)
    pipeline.scheduler.register_to_config(**NO_SIGNAL_AT_THE_END[prediction_type])
    pipeline.save_pretrained(tmp_path / "model")
    files, notes = locate(str(tmp_path / "model")), list[str]()
    batch = Trajectories.batch
    # All at the last timestep, from which trailing sampling takes its first step.
    monkeypatch.setattr(
        Trajectories,
        "batch",
        lambda self, update: replace(batch(self, update), t=torch.full((2,), len(self.schedule) - 1)),
    )
    losses = {}
    for weight in (None, untrained):
        config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2, reuse=1, loss_weight=weight)  # type: ignore[arg-type]
        observers = Observers(preview=False, on_note=notes.append)
        info = distill(files, config, output=tmp_path / "s", device="cpu", observers=observers)
        losses[info.settings["loss_weight"]] = logged(tmp_path / "s")[0]
        said = [note for note in notes if "is not trained" in note]
        assert len(said) == (weight is not None)
    assert losses.pop("snr+1") > 1e-6
    assert losses.pop(untrained) < 1e-6


def test_training_on_images(tiny_files: ModelFiles, tmp_path: Path) -> None:
    save_images(tmp_path / "images", count=6)
    config = DistillConfig(images=str(tmp_path / "images"), updates=40, batch_size=4, learning_rate=0.01)
    distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert error(tmp_path / "s", slice(-10, None)) < 0.9


def test_half_precision_trains(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    config = DistillConfig(prompts=prompt_file, updates=30, batch_size=4, learning_rate=0.01, precision="bf16")
    distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert error(tmp_path / "s", slice(-5, None)) < 0.9


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_training_is_training(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    # Inductor's own code takes minutes; what dynamo makes of an adapter that goes on and off is here.
    made = []
    # Of one block each way: tracing takes time by the layer.
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    shape = {"block_out_channels": [16], "mid_block_type": None} | blocks
    files = locate(str(with_another_unet(tiny_files.folder, tmp_path / "model", **shape)))

    def compiled_runner(unet: UNet2DConditionModel) -> TrainingRunner:
        made.append(TrainingRunner(unet, backend=backend))
        return made[-1]

    monkeypatch.setattr(loop, "TrainingRunner", compiled_runner)
    settings = {"prompts": prompt_file, "updates": 2, "batch_size": 4, "learning_rate": 0.01, "guidance_max": 7.5}
    # In bfloat16, a CPU's default where it has it, dynamo's other order of operations changes the third digit.
    settings["precision"] = "fp32"
    students = {}
    for compiled in (False, True):
        output = tmp_path / f"{compiled}"
        config, execution = DistillConfig(**settings), RunConfig(compile=compiled)
        distill(files, config, execution, output=output, device="cpu", observers=SILENT)
        students[compiled] = load_file(output / LORA_FILE)
    assert len(made) == 1
    torch._dynamo.reset()
    assert logged(tmp_path / "True") == pytest.approx(logged(tmp_path / "False"), rel=1e-3)
    for name, tensor in students[False].items():
        torch.testing.assert_close(students[True][name], tensor, atol=1e-3, rtol=1e-2)


def test_compiling_without_a_compiler(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "boostdiff.distill.distill.missing_compiler", lambda device: "torch.compile needs a C++ compiler"
    )
    with pytest.raises(InputError, match=r"--compile: torch\.compile needs a"):
        distill(tiny_files, DistillConfig(prompts=prompt_file), RunConfig(compile=True), output=tmp_path / "s")
    assert not list(tmp_path.glob("s*"))


def test_throughput_leaves_out_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    throughput = Throughput(batch_size=10)
    assert throughput.images_per_second is None
    assert [throughput.after_update() for _ in range(3)] == [0.1, 5.0, 5.0]


def test_a_resumed_run_counts_the_seconds_before(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(report: object) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000)
        if report.update == 3:
            raise KeyboardInterrupt

    clock = time.monotonic
    config = DistillConfig(prompts=prompt_file, updates=4, batch_size=2)
    begun = Observers(preview=False, on_update=stop)
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_files, config, RunConfig(checkpoint_every=1), output=tmp_path / "s", device="cpu", observers=begun)
    monkeypatch.setattr(time, "monotonic", clock)
    resumed = distill(tiny_files, config, RunConfig(resume=True), output=tmp_path / "s", device="cpu", observers=SILENT)
    assert 1000 < resumed.result["seconds"] < 1600


def test_resume_refuses_other_settings_and_nothing(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    config = DistillConfig(prompts=prompt_file, updates=4, batch_size=2)
    resumed = RunConfig(resume=True, compile=False, gradient_checkpointing=True)
    with pytest.raises(InputError, match="nothing to resume"):
        distill(tiny_files, config, resumed, output=tmp_path / "s", device="cpu")

    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        distill(
            tiny_files,
            config,
            RunConfig(checkpoint_every=1),
            output=tmp_path / "s",
            device="cpu",
            observers=Observers(on_update=stop),
        )
    changed = replace(config, guidance=5.0)
    with pytest.raises(InputError, match=r"guidance was 3\.0, is 5\.0"):
        distill(tiny_files, changed, resumed, output=tmp_path / "s", device="cpu")
    path = work_folder(tmp_path / "s") / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="can't read the checkpoint"):
        distill(tiny_files, config, resumed, output=tmp_path / "s", device="cpu")


def test_resuming_where_the_run_has_ended_or_its_prompts_have_changed(
    tiny_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n")
    notes: list[str] = []

    def run(path: Path, execution: RunConfig, **callbacks: Any) -> StudentInfo:
        config = DistillConfig(prompts=path, updates=2, batch_size=2)
        observers = Observers(preview=False, on_note=notes.append, **callbacks)
        return distill(tiny_files, config, execution, output=tmp_path / "s", device="cpu", observers=observers)

    def stop(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "prompts.txt", RunConfig(checkpoint_every=1), on_update=stop)
    (tmp_path / "prompts.txt").write_text("a red cat\na cow\n")
    with pytest.raises(InputError, match="the content of prompts is another"):
        run(tmp_path / "prompts.txt", RunConfig(resume=True))
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    info = run(Path("prompts.txt"), RunConfig(resume=True, gradient_accumulation_steps=2, checkpoint_every=7))
    assert info.result["resumed_at"] == 1
    assert not notes
    assert run(tmp_path / "prompts.txt", RunConfig(resume=True)) == info
    assert "has ended" in notes[0]
    (tmp_path / "prompts.txt").write_text("a cow\n")
    with pytest.raises(InputError, match="has ended, under other settings"):
        run(tmp_path / "prompts.txt", RunConfig(resume=True))
    assert len(notes) == 1
    run(tmp_path / "prompts.txt", RunConfig())
    assert notes[1:] == [f"the student that was in {tmp_path / 's'} is replaced"]


def test_an_earlier_student_stays_until_the_new_one_is_whole(
    tiny_files: ModelFiles, prompt_file: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    output = shutil.copytree(students["lora"], tmp_path / "s")
    before = (output / LORA_FILE).read_bytes()
    diverging = DistillConfig(prompts=prompt_file, updates=5, batch_size=2, seed=1)

    def stop(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(tiny_files, diverging, output=output, device="cpu", observers=Observers(on_update=stop))
    assert (output / LORA_FILE).read_bytes() == before
    distill(tiny_files, diverging, output=output, device="cpu", observers=SILENT)
    assert (output / LORA_FILE).read_bytes() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"guidance": 0.5}, "above 1"),
        ({"guidance": float("nan")}, "above 1"),
        ({"guidance": 1e30}, "at most 10000"),
        ({"alpha": 1e300}, "at most 10000"),
        ({"guidance": 1.0}, "nothing to distill"),
        ({"updates": 0}, "--updates"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"loss_weight": "x"}, "unknown loss weight"),
        ({"preset": "x"}, "unknown preset"),
        ({"precision": "int3"}, "unknown precision"),
        ({"images": Path("x"), "prompts": Path("y")}, "not both"),
        ({"method": "bitfit", "rank": 4}, "--rank is not used with --method bitfit"),
        ({"tokens": 4}, "--tokens is not used with --method lora"),
    ],
)
def test_wrong_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillConfig(**changes)


def test_nothing_to_train_on(tiny_files: ModelFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass --prompts FILE or --images DIR"):
        distill(tiny_files, DistillConfig(), output=tmp_path / "s", device="cpu")


def test_the_papers_preset_and_what_overrides_it() -> None:
    paper = DistillConfig(preset="paper").resolved(in_bfloat16=False, embedded=True)
    assert (paper.updates, paper.batch_size, paper.learning_rate, paper.loss_weight) == (1600, 512, 5e-5, "constant")
    assert paper.prompts is not None
    other = DistillConfig(method="bitfit").resolved(in_bfloat16=False, embedded=False)
    assert (other.updates, other.batch_size, other.learning_rate) == (520, 16, pytest.approx(1e-2 / 40))
    assert DistillConfig(preset="paper", updates=7).resolved(in_bfloat16=False, embedded=True).updates == 7


def test_no_bfloat16_is_chosen_where_it_would_be_emulated() -> None:
    for method in LEARNING_RATES:
        config = DistillConfig(method=method)
        assert config.resolved(in_bfloat16=False, embedded=True).precision == "fp32"
        assert config.resolved(in_bfloat16=True, embedded=True).precision == "bf16"
    asked = DistillConfig(precision="bf16")
    assert asked.resolved(in_bfloat16=False, embedded=True).precision == "bf16"


def test_the_config_names_what_there_is() -> None:
    hints = get_type_hints(DistillConfig)
    assert set(get_args(hints["method"])) == set(METHODS) == set(LEARNING_RATES)
    assert set(get_args(hints["loss_weight"])) == set(LOSS_WEIGHTS)


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = DistillConfig(updates=100, learning_rate=1e-3)
    rates = torch.tensor([learning_rate_at(update, config) for update in range(100)])
    assert rates.argmax() in (4, 5)
    assert rates.max() == pytest.approx(1e-3)
    assert (rates[5:].diff() < 0).all()
    assert rates[-1] < 1e-5


def test_starting_over_sets_an_unfinished_run_aside(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        raise Stop

    def begin(**options: object) -> None:
        config = DistillConfig(prompts=prompt_file, updates=3, batch_size=2, **options)
        execution = RunConfig(checkpoint_every=1)
        observers = Observers(on_update=stop, on_note=notes.append)
        with pytest.raises(Stop):
            distill(tiny_files, config, execution, output=tmp_path / "s", device="cpu", observers=observers)

    notes: list[str] = []
    begin(seed=0)
    (work_folder(tmp_path / "s") / "stray").write_text("")
    assert not notes
    begin(seed=1, method="bitfit")
    assert str(tmp_path / "s.abandoned") in notes[0]
    assert (tmp_path / "s.abandoned" / CHECKPOINT_FILE).is_file()
    kept = (tmp_path / "s.abandoned" / CHECKPOINT_FILE).read_bytes()
    begin(seed=2)
    assert str(tmp_path / "s.abandoned-2") in notes[1]
    assert (tmp_path / "s.abandoned" / CHECKPOINT_FILE).read_bytes() == kept
    assert (tmp_path / "s.abandoned-2" / CHECKPOINT_FILE).is_file()
    assert {path.name for path in work_folder(tmp_path / "s").iterdir()} == {
        CHECKPOINT_FILE,
        "config.json",
        "log.jsonl",
    }


def test_two_runs_do_not_share_a_work_folder(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2)

    def needless(*args: object, **options: object) -> None:
        raise AssertionError("weights are read before the folder is held")

    def second(report: object) -> None:
        monkeypatch.setattr("boostdiff.distill.job.load", needless)
        for resume in (False, True):
            with pytest.raises(InputError, match="another run is at work"):
                distill(tiny_files, config, RunConfig(resume=resume), output=tmp_path / "s", device="cpu")

    distill(
        tiny_files, config, output=tmp_path / "s", device="cpu", observers=Observers(on_update=second, preview=False)
    )
    assert read_student(tmp_path / "s", tiny_files)


def test_a_picture_that_can_not_be_drawn_costs_no_student(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("boostdiff.distill.preview.generate", fail)
    notes: list[str] = []
    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2)
    observers = Observers(on_note=notes.append)
    info = distill(
        tiny_files, config, RunConfig(preview_every=1), output=tmp_path / "s", device="cpu", observers=observers
    )
    assert read_student(tmp_path / "s", tiny_files) == info
    assert [note.split(":")[1] for note in notes] == [" out of memory"] * 3


@pytest.mark.parametrize("batch_size", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_an_update_that_does_not_fit_into_memory_is_split(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    # Of eight samples, four are earlier ones.
    config = {"prompts": prompt_file, "updates": 3, "batch_size": batch_size, "learning_rate": 0.01}
    distill(
        tiny_files,
        DistillConfig(**config),
        RunConfig(gradient_accumulation_steps=4),
        output=tmp_path / "asked",
        device="cpu",
        observers=SILENT,
    )
    whole = loop.Run.student_x

    def bounded(run: loop.Run, z_t: torch.Tensor, t: torch.Tensor, *, batch: Batch) -> torch.Tensor:
        found = whole(run, z_t, t, batch=batch)
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(loop.Run, "student_x", bounded)
    notes: list[str] = []
    observers = Observers(on_note=notes.append, preview=False)
    info = distill(tiny_files, DistillConfig(**config), output=tmp_path / "s", device="cpu", observers=observers)
    # Neither all samples fit, nor a half of them.
    assert [re.search(r"steps (\d)", note)[1] for note in notes] == ["2", "4"]
    assert info.result["gradient_accumulation_steps"] == 4
    assert (tmp_path / "s" / LORA_FILE).read_bytes() == (tmp_path / "asked" / LORA_FILE).read_bytes()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_state_that_does_not_fit_into_memory_is_an_error_that_says_what_to_do(
    tiny_files: ModelFiles,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpointing: bool,
) -> None:
    def fail(run: loop.Run, batch: Batch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop.Run, "targets", fail)
    config, execution = (
        DistillConfig(prompts=prompt_file, updates=2, batch_size=2),
        RunConfig(gradient_checkpointing=checkpointing),
    )
    with pytest.raises(BoostDiffError, match="out of memory with one sample at a time") as caught:
        distill(tiny_files, config, execution, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert ("--gradient-checkpointing" in str(caught.value)) is not checkpointing
    assert not (tmp_path / "s").exists()


def test_other_errors_of_an_update_are_not_taken_for_memory(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: loop.Run, batch: Batch) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop.Run, "targets", fail)
    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)


def test_the_teacher_is_drawn_once_for_all_previews(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boostdiff.distill.preview as preview

    drawn = []
    generate = preview.generate
    monkeypatch.setattr(preview, "generate", lambda *a, **k: (drawn.append(type(a[1]).__name__), generate(*a, **k))[1])
    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2)
    distill(tiny_files, config, RunConfig(preview_every=1), output=tmp_path / "s", device="cpu")
    assert drawn == ["SinglePassDenoiser", "GuidedDenoiser", *["SinglePassDenoiser"] * 3]
    assert len(list((tmp_path / "s/previews").glob("*.png"))) == 2


def test_half_precision_where_it_overflows(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2, precision="fp16")
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        distill(tiny_files, config, output=tmp_path / "s", device="cpu")


def interrupted(files: ModelFiles, config: DistillConfig, output: Path) -> None:
    def stop(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(
            files,
            config,
            RunConfig(checkpoint_every=1),
            output=output,
            device="cpu",
            observers=Observers(on_update=stop),
        )


def test_resuming_with_other_captions_or_another_part_of_the_model(
    tiny_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = tmp_path / "model", tmp_path / "images"
    shutil.copytree(tiny_files.folder, model)
    save_images(images, count=3)
    files = locate(str(model))
    config = DistillConfig(images=str(images), updates=2, batch_size=2)
    interrupted(files, config, tmp_path / "s")
    resume = RunConfig(resume=True, max_bad_samples=2)

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            distill(files, config, resume, output=tmp_path / "s", device="cpu", observers=SILENT)

    (images / "1.txt").write_text("picture 7\n")
    refused("the content of images is another")
    (images / "1.txt").write_text("picture 1\n")
    for part in ("scheduler/scheduler_config.json", "vae/config.json", "text_encoder/config.json"):
        content = (model / part).read_text()
        (model / part).write_text(content + "\n")
        refused(f"the content of {part.split('/')[0]} is another")
        (model / part).write_text(content)
    monkeypatch.chdir(tmp_path)
    info = distill(
        files, replace(config, images="images"), resume, output=tmp_path / "s", device="cpu", observers=SILENT
    )
    assert info.result["resumed_at"] == 1


def test_what_of_the_data_is_not_used_is_said_once_and_recorded(tiny_files: ModelFiles, tmp_path: Path) -> None:
    long = " ".join(["cat"] * 30)
    (tmp_path / "prompts.txt").write_text(f"a red cat\n{long}\n{long} dog\n")
    save_images(tmp_path / "images", count=2)
    (tmp_path / "images" / "1.txt").write_text(long)
    (tmp_path / "images" / "2.heic").write_bytes(b"")
    expected = {
        "prompts": ["1 of 1 negative prompts are cut to 16 tokens", "2 of 3 prompts are cut to 16 tokens"],
        "images": [
            f"1 files in {tmp_path / 'images'} are not used: 1 .heic",
            "2 of 4 samples with a caption cut to 16 tokens",
        ],
    }
    for source, notes in expected.items():
        data: dict[str, Any] = (
            {"prompts": tmp_path / "prompts.txt", "negative_prompt": long}
            if source == "prompts"
            else {"images": str(tmp_path / "images")}
        )
        told: list[str] = []
        config = DistillConfig(updates=2, batch_size=2, reuse=1, **data)
        observers = Observers(preview=False, on_note=told.append)
        info = distill(tiny_files, config, output=tmp_path / f"of-{source}", device="cpu", observers=observers)
        assert told == info.result["notes"] == notes


def test_a_picture_that_would_take_longer_than_the_run_is_left_out(tmp_path: Path) -> None:
    denoiser = SimpleNamespace(num_parameters=lambda: 860_000_000)
    model = SimpleNamespace(files=SimpleNamespace(name="sd"), denoiser=denoiser)
    preview = SimpleNamespace(prompts=["a"] * 6, scales=[3.0], steps=20, run=SimpleNamespace(model=model))
    notes: list[str] = []

    def drawn(*, images_per_second: float, seconds: float, device: str = "cpu") -> bool:
        result = {"images_per_second": images_per_second, "seconds": seconds}
        observers = Observers(on_note=notes.append)
        return _affordable(preview, result, torch.device(device), observers, tmp_path)  # type: ignore[arg-type]

    # 480 passes at five a sample: 96 samples' time.
    assert drawn(images_per_second=10, seconds=1)
    assert drawn(images_per_second=0.1, seconds=2000)
    assert drawn(images_per_second=0.1, seconds=1, device="cuda")
    assert not notes
    assert not drawn(images_per_second=0.1, seconds=60)
    model.denoiser.num_parameters = lambda: 8_000_000
    assert drawn(images_per_second=0.1, seconds=60)
    assert len(notes) == 1
    assert "would take 16 minutes" in notes[0]
    assert "boostdiff generate" in notes[0]


@pytest.mark.parametrize(
    ("options", "execution", "message"),
    [
        ({"prompts": Path("missing.txt")}, {}, "can't read the prompt file missing.txt"),
        ({"images": "missing"}, {}, "there is no image folder"),
        ({"prompts": Path("missing.txt"), "method": "bitfit"}, {"format": "kohya"}, "--format is not used with"),
        ({"guidance": 2.0, "guidance_max": 5.0}, {"format": "kohya"}, "--format is not used with a range"),
        ({"targets": "to_q,to_vvv"}, {}, "no layer's name in the denoiser ends in 'to_vvv': check --targets"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    tiny_files: ModelFiles, options: dict[str, Any], execution: dict[str, Any], message: str
) -> None:
    device = torch.device("cpu")
    config = resolve(DistillConfig(**options), tiny_files, device)
    with pytest.raises(InputError, match=message):
        dry_run(tiny_files, config, RunConfig(**execution), device)
