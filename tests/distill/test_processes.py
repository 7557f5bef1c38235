"""Several processes, several passes, and runs that are stopped."""

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from boostdiff.distill import loop
from boostdiff.distill.checkpoint import load_training_state
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.image_files import open_images
from boostdiff.distill.images import ImageStream
from boostdiff.distill.job import TIMEOUT, Job
from boostdiff.distill.loop import CHECKPOINT_FILE, LOG_FILE, Observers, UpdateReport
from boostdiff.distill.monitoring import LossWatch
from boostdiff.distill.objective import NoiseSchedule
from boostdiff.distill.order import Share
from boostdiff.distill.run_folder import work_folder
from boostdiff.distill.trajectories import Trajectories
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.model import Model, ModelFiles
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import CPU, PROMPTS, save_images

SILENT = Observers(preview=False)


def run(
    files: ModelFiles, output: Path, execution: RunConfig | None = None, **changes: object
) -> dict[str, torch.Tensor]:
    settings = {"updates": 12, "batch_size": 6, "learning_rate": 0.01, "precision": "fp32"} | changes
    distill(files, DistillConfig(**settings), execution, output=output, device="cpu", observers=SILENT)
    return load_file(output / LORA_FILE)


def assert_same_adapter(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """As far as rounding allows: of a gradient near zero, Adam makes a whole step of either sign."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.linalg.norm(got[name] - tensor) < 1e-2 * torch.linalg.norm(tensor), name


def test_shares_make_up_the_batch() -> None:
    for count in (1, 2, 3, 5):
        shares = [Share(batch_size=7, rank=i, world_size=count).members for i in range(count)]
        assert [member for share in shares for member in share] == list(range(7))


def test_what_has_no_gradient_is_left_out_of_the_sum() -> None:
    """As the text's way out of Qwen-Image's last block."""
    used, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    used.grad = torch.ones(2)
    accelerator = SimpleNamespace(num_processes=2, reduce=lambda flat, reduction: 2 * flat)
    run = SimpleNamespace(accelerator=accelerator, parameters=[unused, used])
    assert loop.Run.reduce(run, torch.tensor([3.0, 4.0]), SimpleNamespace(name=None)) == (6.0, 8.0, False)
    assert used.grad.tolist() == [2.0, 2.0]
    assert unused.grad is None


def test_a_share_of_the_pool_is_a_slice_of_the_whole(tiny: Model) -> None:
    schedule = NoiseSchedule.of(tiny.pipeline.scheduler, CPU)

    def source(index: int, count: int) -> Trajectories:
        share = Share(batch_size=5, rank=index, world_size=count)
        return Trajectories(tiny, list(PROMPTS), schedule, share=share, seed=0, guidance=(1, 7))

    whole, parts = source(0, 1), [source(i, 2) for i in range(2)]
    for update in range(70):
        batch, pieces = whole.batch(update), [part.batch(update) for part in parts]
        for name in ("z_t", "t", "guidance"):
            torch.testing.assert_close(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
        hidden = [piece.text.conditional.encoder_hidden_states for piece in pieces]
        torch.testing.assert_close(torch.cat(hidden), batch.text.conditional.encoder_hidden_states)
        for one in (whole, *parts):
            one.advance(0.5 * one.z_t)
    assert whole.started > 5


def test_processes_wait_for_the_main_one_for_hours(tiny_files: ModelFiles, tmp_path: Path) -> None:
    """It draws pictures and encodes texts alone; NCCL gives up after ten minutes."""
    config = DistillConfig().resolved(in_bfloat16=False, embedded=False)
    shared: dict[str, Any] = {"files": tiny_files, "execution": RunConfig(), "device": CPU, "observers": SILENT}
    job = Job(config=config, prompts=list(PROMPTS), images=None, identity={}, **shared)
    assert job.accelerator(tmp_path).init_handler.to_kwargs() == {"timeout": TIMEOUT}
    assert timedelta(hours=1) < TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize("max_bad_samples", [0, 1])
def test_two_processes_stop_together_at_an_image_that_one_can_not_read(
    tiny_files: ModelFiles, tmp_path: Path, max_bad_samples: int
) -> None:
    save_images(tmp_path / "images", count=6)
    stream = ImageStream(open_images(str(tmp_path / "images")), height=16, width=16, batch_size=2, seed=0)
    batches = [[int(caption.split()[1]) for caption in stream.next_batch(range(2))[0]] for _ in range(3)]
    # The first process's share, and then the second's: together more than allowed.
    bad = [batches[2][1]] if max_bad_samples == 0 else [batches[1][0], batches[2][1]]
    for number in bad:
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no image")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "boostdiff"),
        *("distill", "--model", str(tiny_files.folder), "--images", str(tmp_path / "images"), "--updates", "5"),
        *("--batch-size", "2", "--reuse", "1", "--device", "cpu", "--output", str(tmp_path / "two")),
        *("--precision", "fp32", "--max-bad-samples", str(max_bad_samples)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "saved after update 2" in " ".join(done.stderr.split()), done.stderr
    assert load_training_state(work_folder(tmp_path / "two") / CHECKPOINT_FILE).step == 2


@pytest.mark.slow
@pytest.mark.parametrize("data", ["prompts", "images"])
def test_two_processes_train_the_same_adapter_as_one(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, data: str
) -> None:
    save_images(tmp_path / "images")
    path = prompt_file if data == "prompts" else tmp_path / "images"
    expected = run(tiny_files, tmp_path / "one", **{data: path if data == "prompts" else str(path)})
    command = [
        # On GPUs `accelerate launch` does this; on CPUs it starts several processes through MPI only.
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "boostdiff"),
        *("distill", "--model", str(tiny_files.folder), f"--{data}", str(path), "--updates", "12"),
        *("--batch-size", "6", "--learning-rate", "0.01", "--device", "cpu", "--output", str(tmp_path / "two")),
        *("--precision", "fp32", "--log-with", "tensorboard"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "student.json").read_text())["result"]["processes"] == 2
    assert_same_adapter(load_file(tmp_path / "two" / LORA_FILE), expected)
    # One process logs, in the student's folder.
    (events,) = (tmp_path / "two" / "boostdiff").glob("events.*")
    logged = EventAccumulator(str(events)).Reload()
    for name in ("loss", "unguided_loss"):
        one, two = (
            [json.loads(line)[name] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
            for run in ("one", "two")
        )
        assert [event.value for event in logged.Scalars(name)] == pytest.approx(two)
        assert two == pytest.approx(one, rel=1e-3)


def test_gradient_accumulation_and_checkpointing_change_nothing_but_memory(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    expected = run(tiny_files, tmp_path / "one", prompts=prompt_file)
    parts = run(tiny_files, tmp_path / "parts", RunConfig(gradient_accumulation_steps=4), prompts=prompt_file)
    assert_same_adapter(parts, expected)
    again = run(tiny_files, tmp_path / "again", RunConfig(gradient_checkpointing=True), prompts=prompt_file)
    assert_same_adapter(again, expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"guidance": 1.5, "guidance_max": 7.5}, marks=pytest.mark.slow),
        {"precision": "bf16"},
        {"images": "images"},
    ],
)
def test_a_run_cut_short_and_resumed_gives_the_same_bytes(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    if "images" in changes:
        save_images(tmp_path / "images")
        changes = {"images": str(tmp_path / "images"), "prompts": None}
    config = DistillConfig(**{"prompts": prompt_file, "updates": 14, "batch_size": 4, "learning_rate": 0.01} | changes)

    class Cut(Exception):
        pass

    def cut(report: UpdateReport) -> None:
        if report.update == 10:
            raise Cut

    execution, resumed = RunConfig(checkpoint_every=4), RunConfig(resume=True)
    distill(tiny_files, config, execution, output=tmp_path / "whole", device="cpu", observers=SILENT)
    observers = Observers(on_update=cut)
    with pytest.raises(Cut):
        distill(tiny_files, config, execution, output=tmp_path / "cut", device="cpu", observers=observers)
    info = distill(tiny_files, config, resumed, output=tmp_path / "cut", device="cpu", observers=SILENT)
    assert info.result["resumed_at"] == 8
    for name in info.adapter_files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_the_log_tells_is_read_again_on_resuming(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    config = DistillConfig(prompts=prompt_file, updates=21, batch_size=2)
    execution, resumed = RunConfig(checkpoint_every=20), RunConfig(resume=True)

    class Cut(Exception):
        pass

    def cut(report: UpdateReport) -> None:
        if report.update == 20:
            raise Cut

    whole = distill(tiny_files, config, output=tmp_path / "whole", device="cpu", observers=SILENT)
    with pytest.raises(Cut):
        distill(
            tiny_files,
            config,
            execution,
            output=tmp_path / "cut",
            device="cpu",
            observers=Observers(on_update=cut),
        )
    log = work_folder(tmp_path / "cut") / LOG_FILE
    kept = log.read_text()
    log.write_text(kept.replace("unguided_loss", "x"))
    with pytest.raises(InputError, match=r"can't resume: .*log.jsonl is damaged"):
        distill(tiny_files, config, resumed, output=tmp_path / "cut", device="cpu", observers=SILENT)
    log.write_text(kept)
    info = distill(tiny_files, config, resumed, output=tmp_path / "cut", device="cpu", observers=SILENT)
    # The mean of the last two updates: one before the cut, and one after it.
    assert info.result["resumed_at"] == 20
    assert info.result["guidance_r2"] == whole.result["guidance_r2"]
    assert info.result["final_loss"] == whole.result["final_loss"]


def test_a_checkpoint_of_another_shape_is_refused(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    config = DistillConfig(prompts=prompt_file, updates=4, batch_size=2)

    def cut(report: UpdateReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(
            tiny_files,
            config,
            RunConfig(checkpoint_every=1),
            output=tmp_path / "s",
            device="cpu",
            observers=Observers(on_update=cut),
        )
    path = work_folder(tmp_path / "s") / CHECKPOINT_FILE
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if ".lora_A" in name and name.startswith("weights/"))
    save_file(tensors | {name: tensors[name][:-1]}, path, metadata)
    with pytest.raises(InputError, match=r"can't resume: .* has shape"):
        distill(tiny_files, config, RunConfig(resume=True), output=tmp_path / "s", device="cpu")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_with_a_message(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def send(report: UpdateReport) -> None:
        if report.update == 3:
            signal.raise_signal(number)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    config, observers = DistillConfig(prompts=prompt_file, updates=9, batch_size=2), Observers(on_update=send)
    with pytest.raises(BoostDiffError, match=rf"stopped by {number.name} after update 4, saved: .* --resume") as ended:
        distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=observers)
    assert ended.value.exit_code == 1
    assert load_training_state(work_folder(tmp_path / "s") / CHECKPOINT_FILE).step == 4
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_adapter(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*arguments: object) -> torch.Tensor:
        calls.append(1)
        loss = original(*arguments)
        # Each update asks for the student's loss, then for the unguided one.
        return loss * float("nan") if len(calls) == 15 else loss

    calls: list[int] = []
    original = loop.distillation_loss
    monkeypatch.setattr(loop, "distillation_loss", poisoned)
    config = DistillConfig(prompts=prompt_file, updates=20, batch_size=2)
    with pytest.raises(BoostDiffError, match=r"the loss is nan at update 7: lower --learning-rate"):
        execution = RunConfig(checkpoint_every=5)
        distill(tiny_files, config, execution, output=tmp_path / "s", device="cpu", observers=SILENT)
    kept = load_file(work_folder(tmp_path / "s") / LORA_FILE)
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert load_training_state(work_folder(tmp_path / "s") / CHECKPOINT_FILE).step == 5
    assert not (tmp_path / "s").exists()


def test_divergence_is_seen() -> None:
    watch = LossWatch()

    def diverges(loss: float) -> bool:
        watch.add(loss, 1.0)
        return watch.diverges()

    assert not any(diverges(loss) for loss in [1.0, 3.0] * 30)
    assert any(diverges(30.0) for _ in range(10))


def test_samples_that_are_harder_are_no_divergence() -> None:
    watch = LossWatch()
    for scale in (1.0, 40.0):
        for _ in range(10):
            watch.add(0.5 * scale, scale)
    assert not watch.diverges()
    for _ in range(10):
        watch.add(400.0, 40.0)
    assert watch.diverges()


def test_what_is_learnt_is_told_by_the_newest_tenth_of_the_updates() -> None:
    watch = LossWatch()
    watch.add(2.0, 2.0)
    assert watch.guidance_r2() == 0
    for loss in [1.0] * 17 + [0.2, 0.6]:
        watch.add(loss, 2.0)
    assert watch.guidance_r2() == pytest.approx(0.8)
    assert watch.mean_loss() == pytest.approx(0.4)


def test_without_guidance_there_is_nothing_to_learn() -> None:
    watch = LossWatch()
    watch.add(0.0, 0.0)
    assert watch.guidance_r2() is None


def test_an_unknown_tracker() -> None:
    with pytest.raises(InputError, match="unknown log with 'paper'"):
        RunConfig(log_with="paper")


def test_previews_on_the_way(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    config = DistillConfig(prompts=prompt_file, updates=4, batch_size=2)
    execution = RunConfig(preview_every=2)
    distill(tiny_files, config, execution, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert sorted(path.name for path in (tmp_path / "s" / "previews").iterdir()) == ["000002.png", "000004.png"]
