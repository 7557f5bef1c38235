"""A model in this process as the API's backend: one thread draws, one batch after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..engine.errors import BoostDiffError
from .image_model import Description, Drawn, ImageModel, Job


class LocalBackend:
    """See `api.Backend`; it draws each image alone, and `draw_together` several."""

    def __init__(self, model: ImageModel) -> None:
        self._model, self._thread = model, ThreadPoolExecutor(1)

    async def describe(self) -> Description:
        """See `api.Backend`."""
        return self._model.description

    async def draw_together(self, jobs: Sequence[Job]) -> list[Drawn | BoostDiffError]:
        """See `ImageModel.draw`; the jobs passed `check`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._model.draw, jobs)

    def check(self, job: Job) -> None:
        """See `ImageModel.check`."""
        self._model.check(job)

    async def draw(self, job: Job) -> Drawn:
        """See `api.Backend`."""
        self.check(job)
        return one_of(await self.draw_together([job]))

    async def stream(self, job: Job, previews: int) -> AsyncIterator[Drawn]:
        """See `api.Backend`; batches of others are drawn between the previews."""
        self.check(job)
        states = self._model.stream([job], previews)
        while drawn := await asyncio.get_running_loop().run_in_executor(self._thread, next, states, None):
            yield drawn[0]


def one_of(results: Sequence[Drawn | BoostDiffError]) -> Drawn:
    """The only result, or its error."""
    (result,) = results
    if isinstance(result, BoostDiffError):
        raise result
    return result
