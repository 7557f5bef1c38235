"""Samples that are used several times: which are drawn, what it costs, and that none of it depends on processes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from boostdiff.distill import replay
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import Observers, distill
from boostdiff.distill.order import Share
from boostdiff.distill.replay import Replay
from boostdiff.distill.source import Batch, Source
from boostdiff.engine.errors import InputError
from boostdiff.engine.model import ModelFiles
from tiny import save_images

SOURCE = cast(Source, SimpleNamespace(text=lambda prompts, negatives: (list(prompts), list(negatives))))

SAMPLE = 8 * 4 * 2 * 2
"""Bytes of latents and target."""


def batch_of(update: int, members: Sequence[int]) -> Batch:
    """Samples whose numbers say which they are."""
    numbers = torch.tensor([100.0 * update + member for member in members])
    latents = numbers[:, None, None, None].expand(-1, 4, 2, 2)
    names = [f"{update}, {member}" for member in members]
    return Batch(
        z_t=latents,
        t=numbers.long(),
        prompts=names,
        negative_prompts=[f"no {name}" for name in names],
        text=cast(Any, None),
        guidance=numbers,
        teacher_x=-latents,
    )


def drawn(
    updates: int,
    share: Share,
    uses: int,
    *,
    stop_at: int | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Batch]:
    """What is trained on, update by update; through a checkpoint where it is stopped."""
    memory, found = Replay(share, uses=uses, seed=3), []
    for update in range(updates):
        if update == stop_at:
            # Files hold tensors one element behind the other.
            state = {name: tensor.contiguous() for name, tensor in memory.state().items()}
            memory = Replay(share, uses=uses, seed=3)
            memory.restore(state)
        batch = batch_of(update, share.members)
        batch = replace(batch, z_t=batch.z_t.contiguous(memory_format=layout))
        found.append(memory.extended(batch, SOURCE, update))
        memory.add(batch)
    return found


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [batch.t.tolist() for batch in batches]


def test_a_checkpoint_changes_no_layout() -> None:
    """Of latents in another one, as a VAE in channels-last gives them, other kernels round otherwise."""
    share = Share(batch_size=3)
    whole, cut = (drawn(6, share, 3, stop_at=at, layout=torch.channels_last) for at in (None, 3))
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one.z_t, other.z_t)
        assert one.z_t.stride() == other.z_t.stride()


def test_each_sample_is_used_so_often_on_average_and_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "BYTES", 10 * 3 * SAMPLE)
    batches = drawn(200, Share(batch_size=3), 4)
    assert {len(batch) for batch in batches} == {12}
    # The first update has itself alone, later ones what is not too old.
    assert {number % 100 for number in batches[0].t.tolist()} == {0, 1, 2}
    assert batches[0].t.max() < 100
    for update, batch in enumerate(batches[1:], start=1):
        assert batch.t[:3].tolist() == [100 * update + member for member in range(3)]
        ages = update - batch.t[3:] // 100
        assert ((ages >= 1) & (ages <= 10)).all()
        # A member's own past, in its place.
        assert (batch.t % 100).tolist() == [0, 1, 2] * 4
        assert torch.equal(batch.z_t[:, 0, 0, 0], batch.t.float())
        assert torch.equal(batch.teacher_x, -batch.z_t)
        assert torch.equal(batch.guidance, batch.t.float())
        names = [f"{number // 100}, {number % 100}" for number in batch.t.tolist()]
        assert batch.text == (names, [f"no {name}" for name in names]) == (batch.prompts, batch.negative_prompts)
    used = Counter(number for batch in batches[:-10] for number in batch.t.tolist())
    middle = [used[100 * update + member] for update in range(20, 170) for member in range(3)]
    assert sum(middle) / len(middle) == pytest.approx(4, abs=0.2)


def test_used_once_nothing_is_kept() -> None:
    memory, batch = Replay(Share(batch_size=3), uses=1, seed=0), batch_of(0, range(3))
    memory.add(batch)
    assert memory.extended(batch, SOURCE, 1) is batch
    assert not memory.state()
    memory.restore({})


@pytest.mark.parametrize("stop_at", [1, 7, 19])
def test_a_resumed_run_draws_the_same(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    monkeypatch.setattr(replay, "BYTES", 9 * 3 * SAMPLE)
    whole, resumed = (drawn(25, Share(batch_size=3), 3, stop_at=stop) for stop in (None, stop_at))
    assert numbers(whole) == numbers(resumed)
    assert [batch.prompts for batch in whole] == [batch.prompts for batch in resumed]


def test_processes_draw_together_what_one_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = drawn(12, Share(batch_size=5), 3)
    shares = [Share(batch_size=5, rank=index, world_size=2) for index in range(2)]
    together = [drawn(12, share, 3) for share in shares]
    for update, batch in enumerate(alone):
        assert sorted(batch.t.tolist()) == sorted(number for part in together for number in part[update].t.tolist())
    # A checkpoint of two processes, continued by one.
    memories = [Replay(share, uses=3, seed=3) for share in shares]
    for memory, share in zip(memories, shares, strict=True):
        for update in range(4):
            memory.add(batch_of(update, share.members))
    others: dict[str, Any] = {}

    def gather(share: Share, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([others["rows"].pop(0), rows]) if share.rank else rows

    def gather_list(share: Share, items: list[Any]) -> list[Any]:
        return others["lists"].pop(0) + items if share.rank else items

    monkeypatch.setattr(Share, "gather", gather)
    monkeypatch.setattr(Share, "gather_list", gather_list)
    first = memories[0].state()
    others["rows"] = [first[f"{replay.PREFIX}{name}"] for name in replay.TENSORS]
    others["lists"] = [[(past.prompts, past.negative_prompts) for past in memories[0]._past]]
    one = Replay(Share(batch_size=5), uses=3, seed=3)
    one.restore(memories[1].state())
    assert one.extended(batch_of(4, range(5)), SOURCE, 4).prompts == alone[4].prompts


def test_large_latents_are_kept_for_fewer_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Share(batch_size=3)
    for room, kept in ((20.5, 20), (3, replay.FEWEST), (10**6, 50)):
        monkeypatch.setattr(replay, "BYTES", int(3 * SAMPLE * room))
        memory = Replay(share, uses=2, seed=0)
        for update in range(50):
            memory.add(batch_of(update, share.members))
        assert len(memory._past) == kept


@pytest.mark.parametrize("source", ["prompts", "images", "live", "stages"])
def test_what_a_run_costs(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, source: str) -> None:
    save_images(tmp_path / "images", count=4)
    options: dict[str, Any] = {"prompts": prompt_file}
    if source == "images":
        options = {"images": str(tmp_path / "images")}
    if source == "live":
        options |= {"negative_prompt": "live", "guidance_max": 5.0}
    if source == "stages":
        options |= {"few_steps": "4:2", "stage_updates": 3}
    config = DistillConfig(updates=3, batch_size=4, reuse=2, learning_rate=0.01, **options)
    observers = Observers(preview=False)
    info = distill(tiny_files, config, output=tmp_path / "student", device="cpu", observers=observers)
    for result in info.result["stages"] if source == "stages" else [info.result]:
        assert result["teacher_evaluations"] == 6
        assert result["forward_passes"] == 2 * 6 + 12
        assert result["backward_passes"] == 12
    assert info.settings["reuse"] == 2


def test_how_often_is_chosen() -> None:
    def chosen(**options: Any) -> int:
        return DistillConfig(**options).resolved(in_bfloat16=False, embedded=True).reuse

    assert [chosen(batch_size=size) for size in (1, 5, 6, 16)] == [1, 1, 2, 2]
    assert chosen() == 2
    assert chosen(reuse=1) == 1
    assert chosen(preset="paper") == 1
    assert chosen(preset="paper", reuse=8) == 8
    with pytest.raises(InputError, match="--batch-size 6 must be a multiple of --reuse 4"):
        chosen(batch_size=6, reuse=4)
    with pytest.raises(InputError, match="--reuse must be at least 1"):
        DistillConfig(reuse=0)
