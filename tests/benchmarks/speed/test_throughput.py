from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from boostdiff.benchmarks.speed import device, throughput
from boostdiff.benchmarks.speed.device import in_turns
from boostdiff.benchmarks.speed.flops import Flops, count_flops
from boostdiff.benchmarks.speed.throughput import RunnerMode, Speed, TimedVariant, measure
from boostdiff.engine.errors import BoostDiffError
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.schedulers import make_scheduler
from tiny import CPU


def called_in_turns(calls: list[tuple[str, Callable[[], float]]], rounds: int, **options: Any) -> Any:
    left_out: dict[str, str] = {}
    return in_turns(calls, rounds, device=CPU, left_out=left_out, report=lambda note: None, **options), left_out


@pytest.mark.parametrize(("count", "rounds"), [(2, 4), (3, 3), (6, 5)])
def test_calls_take_turns(count: int, rounds: int) -> None:
    turns: list[int] = []

    def call(index: int) -> float:
        turns.append(index)
        return len(turns)

    found, left_out = called_in_turns([(f"{index}", partial(call, index)) for index in range(count)], rounds)
    first, *orders = (turns[start : start + count] for start in range(0, len(turns), count))
    assert first == orders[0] == list(range(count))
    assert len(orders) == rounds
    assert all(one == other[::-1] for one, other in pairwise(orders))
    # Without what is discarded.
    assert found[0] == ([1 + turn for turn, index in enumerate(turns) if index == 0][1:], None)
    assert not left_out


def test_memory_that_was_let_go_of_is_taken_again_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where the cache is cleared before each row's warm-up."""
    turns: list[str] = []
    monkeypatch.setattr(device, "clear_device_cache", lambda: turns.append("clear"))
    monkeypatch.setattr(device, "memory_in_use", lambda _: 1)

    def call(name: str) -> int:
        turns.append(name)
        return len(turns)

    found, _ = called_in_turns([(name, partial(call, name)) for name in "ab"], 3)
    assert "".join(turns).replace("clear", "-") == "-a-a-b-b" + "ab" + "abbaab"
    assert found[0] == ([11, 14, 15], 1)


def test_the_peak_waits_for_the_device_that_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    waited, asked = list[torch.device](), torch.device("cpu", 0)
    monkeypatch.setattr(device, "synchronize", waited.append)
    monkeypatch.setitem(device.GEMM_SIZES, "cpu", 8)
    assert device.gemm_peak(asked, torch.float32) > 0
    assert waited == [asked] * 2 * device.PEAK_RUNS


def test_what_all_is_compared_with_must_not_fail() -> None:
    def fails() -> float:
        raise RuntimeError("out of memory")

    calls = [("a", lambda: 1.0), ("b", fails)]
    assert called_in_turns(calls, 2, needed=1) == ([([1.0, 1.0], None), ([], None)], {"b": "out of memory"})
    with pytest.raises(BoostDiffError, match="b can't be timed: out of memory"):
        called_in_turns(calls, 2, needed=2)


def measured(model: Model, variants: list[TimedVariant], *, steps: int, batch_sizes: tuple[int, ...]) -> Speed:
    return measure(
        variants,
        model,
        prompts=["a red cat"],
        guidance=3.0,
        make_scheduler=lambda: make_scheduler("ddim", model.pipeline.scheduler.config),
        steps=steps,
        batch_sizes=batch_sizes,
        runs=3,
    )


def test_the_ceiling_of_sd21_at_20_steps() -> None:
    """The figures of the model's counted operations, in GFLOP."""
    flops = Flops(denoiser=804, vae_decode=2515, text_encoder=45)
    assert flops.ceiling(steps=20, batch_size=1) == pytest.approx(1.865, abs=1e-3)
    assert flops.ceiling(steps=20, batch_size=8) == pytest.approx(1.863, abs=1e-3)
    assert Flops(denoiser=1, vae_decode=0, text_encoder=0).ceiling(steps=5, batch_size=4) == 2


def test_operations_are_counted(tiny: Model) -> None:
    flops = count_flops(tiny)
    conv_in = 2 * 4 * 16 * 9 * 8 * 8
    assert flops.denoiser > conv_in
    assert flops.vae_decode > 0
    assert flops.text_encoder > 2 * 16 * 32 * 32 * 4 * 2


def test_a_second_text_is_counted(tiny: Model) -> None:
    flops, tokens = count_flops(tiny, live=True), tiny.pipeline.tokenizer.model_max_length
    # Keys and values of the second text; queries of at most the latents' number are compared with them.
    crossing = [each for each in tiny.denoiser.modules() if getattr(each, "is_cross_attention", False)]
    least = sum(2 * 2 * tokens * each.to_k.in_features * each.to_k.out_features for each in crossing)
    most = least + sum(2 * 2 * 64 * tokens * each.to_k.out_features + 2 * 128 * each.heads for each in crossing)
    assert least < flops.of_pass(live=True) - flops.of_pass() <= most
    assert flops.denoiser == count_flops(tiny).denoiser
    assert count_flops(tiny).live_denoiser is None


@pytest.mark.parametrize(
    ("live", "expected"), [((), (2, 2)), (("student",), (1.6, 1.6)), (("teacher", "student"), (2, 2))]
)
def test_a_student_of_two_texts_has_a_ceiling_of_its_own(live: tuple[str, ...], expected: tuple[float, float]) -> None:
    measured = {RunnerMode("torch", mode): [{"total": 1.0, "denoiser": 1.0}] * 3 for mode in ("teacher", "student")}
    work = SimpleNamespace(prompts=["a"], teacher_passes=2, steps=4)
    flops = Flops(denoiser=4, live_denoiser=5, vae_decode=0, text_encoder=0)
    found = throughput._ratios(measured, work, flops, {RunnerMode("torch", mode) for mode in live})  # type: ignore[arg-type]
    ceilings = {ratio.part: ratio.ceiling for ratio in found}
    assert (ceilings["images"], ceilings["denoiser"]) == expected


class Refusing(TorchRunner):
    """Can't run more than two images, as an engine beyond its profile."""

    name = "refusing"

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(inputs["sample"]) > 2:
            raise RuntimeError("shape out of profile\nand more")
        return super().predict(inputs)


def test_what_cannot_run_is_left_out_with_its_reason(tiny: Model) -> None:
    runner = Refusing(tiny.denoiser)
    speed = measured(
        tiny, [TimedVariant(mode=mode, runner=runner) for mode in ("teacher", "student")], steps=2, batch_sizes=(1, 2)
    )
    assert [(row.mode, row.batch_size) for row in speed.rows] == [("teacher", 1), ("student", 1), ("student", 2)]
    assert speed.left_out == {"refusing teacher, batch 2": "shape out of profile"}
    assert {ratio.batch_size for ratio in speed.ratios} == {1}


def test_what_fails_while_it_is_timed_takes_no_other_row_along(tiny: Model) -> None:
    calls = []

    class Failing(TorchRunner):
        name = "failing"

        def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            calls.append(1)
            if len(calls) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return super().predict(inputs)

    runners = {
        "teacher": TorchRunner(tiny.denoiser),
        "unguided": Failing(tiny.denoiser),
        "student": TorchRunner(tiny.denoiser),
    }
    speed = measured(
        tiny, [TimedVariant(mode=mode, runner=runner) for mode, runner in runners.items()], steps=2, batch_sizes=(1,)
    )
    assert [row.mode for row in speed.rows] == ["teacher", "student"]
    assert speed.left_out == {"failing unguided, batch 1": "out of memory"}
    assert {(ratio.slower.mode, ratio.part) for ratio in speed.ratios} == {
        ("teacher", "images"),
        ("teacher", "denoiser"),
    }


def test_the_graph_of_live_negative_prompts_times_all_modes(tiny: Model) -> None:
    """It reads two texts per row, of which the teacher, at two rows an image, has one."""
    seen: dict[str, set[tuple[int, int]]] = {}

    class Live(TorchRunner):
        name = "live"

        def __init__(self, mode: str) -> None:
            super().__init__(tiny.denoiser)
            self.mode = mode
            self.config = dict(tiny.denoiser.config) | {"live_negative_prompt": True}

        def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            seen.setdefault(self.mode, set()).add(tuple(inputs["encoder_hidden_states"].shape[:2]))
            return super().predict(inputs)

    tokens = tiny.pipeline.tokenizer.model_max_length
    speed = measured(
        tiny,
        [TimedVariant(mode=mode, runner=Live(mode)) for mode in ("teacher", "student", "unguided")],
        steps=1,
        batch_sizes=(2,),
    )
    assert not speed.left_out
    assert seen == {"teacher": {(4, 2 * tokens)}, "student": {(2, 2 * tokens)}, "unguided": {(2, 2 * tokens)}}


@pytest.mark.parametrize(
    ("with_teacher", "compared"), [(["torch"], "torch"), (["torch", "fast"], "fast"), ([], "fast")]
)
def test_the_baselines_are_compared_with_what_the_verdict_speaks_of(with_teacher: list[str], compared: str) -> None:
    times = {"torch": 2.0, "fast": 1.0}
    measured = {RunnerMode(name, "student"): [{"total": t, "denoiser": t}] * 3 for name, t in times.items()}
    for name in (*with_teacher, "stock diffusers"):
        measured[RunnerMode(name, "teacher")] = [{"total": 4.0, "denoiser": 4.0}] * 3
    work = SimpleNamespace(prompts=["a"], teacher_passes=2, steps=4)
    ratios = throughput._ratios(measured, work, Flops(denoiser=1, vae_decode=1, text_encoder=1))  # type: ignore[arg-type]
    assert {ratio.faster.runner for ratio in ratios if ratio.slower.runner == "stock diffusers"} == {compared}


def test_the_fastest_teacher_is_compared_with_the_fastest_student_whatever_its_runner() -> None:
    times = {("fast", "student"): 1.0, ("fast", "teacher"): 4.0, ("torch", "student"): 2.0, ("other", "teacher"): 3.0}
    measured = {RunnerMode(*key): [{"total": t, "denoiser": t}] * 3 for key, t in times.items()}
    work = SimpleNamespace(prompts=["a"], teacher_passes=2, steps=4)
    ratios = throughput._ratios(measured, work, Flops(denoiser=1, vae_decode=1, text_encoder=1))  # type: ignore[arg-type]
    found = {(r.slower.runner, r.faster.runner): r.estimate.value for r in ratios if r.part == "images"}
    assert found == {("fast", "fast"): 4.0, ("other", "fast"): 3.0}


def test_a_variant_is_timed_at_its_own_batch_sizes(tiny: Model) -> None:
    runner = TorchRunner(tiny.denoiser)
    speed = measured(
        tiny,
        [TimedVariant(mode="teacher", runner=runner), TimedVariant(mode="student", runner=runner, batch_sizes=(2,))],
        steps=1,
        batch_sizes=(1, 2),
    )
    assert [(row.mode, row.batch_size) for row in speed.rows] == [("teacher", 1), ("teacher", 2), ("student", 2)]
    assert {ratio.batch_size for ratio in speed.ratios} == {2}


def test_the_memory_of_a_row_is_its_own(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a GPU's allocator stands one that counts images, and like it keeps what the largest batch took."""
    kept, cleared, shapes = [0], [], set()

    class Taking(TorchRunner):
        def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            images = len(inputs["sample"])
            # A graph of these shapes is compiled first.
            kept[0] = max(kept[0], images if images in shapes else 100)
            shapes.add(images)
            return super().predict(inputs)

    def clear() -> None:
        cleared.append(kept[0])
        kept[0] = 0

    monkeypatch.setattr(device, "clear_device_cache", clear)
    monkeypatch.setattr(device, "memory_in_use", lambda _: 1000 + kept[0])
    runner = Taking(tiny.denoiser)
    speed = measured(
        tiny, [TimedVariant(mode=mode, runner=runner) for mode in ("teacher", "student")], steps=1, batch_sizes=(1, 3)
    )
    assert {(row.mode, row.batch_size): row.memory_in_use for row in speed.rows} == {
        ("teacher", 1): 1002,
        ("student", 1): 1001,
        ("teacher", 3): 1006,
        ("student", 3): 1003,
    }
    # Never while rows are timed: it would slow them down.
    assert len(cleared) == 2 * len(speed.rows)
