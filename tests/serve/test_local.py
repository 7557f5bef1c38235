"""What draws in turn, and what beside it; by a model that draws nothing."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
from boostdiff.serve import local
from boostdiff.serve.image_model import Drawn, Job, Picture, encoded
from boostdiff.serve.local import LocalBackend
from PIL import Image


class Model:
    """Draws one color; tells of what it began."""

    description = SimpleNamespace(max_batch=1)

    def __init__(self) -> None:
        self.began, self.second = list[str](), threading.Event()

    def completed(self, job: Job) -> Job:
        return job

    def picture(self, job: Job, *, preview: bool = False) -> Picture:
        facts = {"step": 1, "passes": 1, "seconds": 0.0, "batch": 1, "width": 8, "height": 8}
        return Picture(image=Image.new("RGB", (8, 8)), seed=job.seed, preview=preview, **facts)

    def draw(self, jobs: Sequence[Job]) -> list[Picture]:
        self.began.append(jobs[0].prompt)
        if len(self.began) == 2:
            self.second.set()
        return [self.picture(job) for job in jobs]

    def stream(self, jobs: Sequence[Job], previews: int) -> Iterator[list[Picture]]:
        for number in range(previews + 1):
            self.began.append(f"{jobs[0].prompt}{number}")
            yield [self.picture(jobs[0], preview=number < previews)]


def test_a_batch_is_drawn_while_the_one_before_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()

    def slow(picture: Picture) -> Drawn:
        assert model.second.wait(20), "the second batch waits for the first one's files"
        return encoded(picture)

    monkeypatch.setattr(local, "encoded", slow)

    async def both() -> None:
        backend = LocalBackend(model)  # type: ignore[arg-type]
        await asyncio.gather(*(backend.draw(Job(prompt=prompt, seed=0)) for prompt in "ab"))

    asyncio.run(both())
    assert model.began == ["a", "b"]


def test_streams_and_batches_take_turns() -> None:
    model = Model()

    async def by_turns() -> None:
        backend = LocalBackend(model)  # type: ignore[arg-type]
        a, b = (backend.stream(Job(prompt=prompt, seed=0), 2) for prompt in "ab")
        assert (await anext(a)).preview
        assert (await anext(b)).preview
        await backend.draw(Job(prompt="c", seed=0))
        assert [drawn.preview async for drawn in a] == [drawn.preview async for drawn in b] == [True, False]

    asyncio.run(by_turns())
    assert model.began == ["a0", "b0", "c", "a1", "a2", "b1", "b2"]
