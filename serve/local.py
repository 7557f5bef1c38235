"""A model in this process as the API's backend: one thread draws, one batch after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from .image_model import Description, Drawn, ImageModel, Job, Picture, encoded

WAIT_SHARE, MAX_WAIT_SECONDS = 0.02, 0.1
"""A batch that is not full waits for others for this share of the last one's duration, and so many seconds at most."""


class LocalBackend:
    """See `api.Backend`.

    A batch is put together when it can be drawn, of all that wait by then. Ray's `serve.batch` would cut it as soon as
    its first image has waited, however long the batch before it takes: four clients would get batches of one.
    """

    def __init__(self, model: ImageModel) -> None:
        self._model, self._thread, self._seconds = model, ThreadPoolExecutor(1), 0.0
        self._waiting: list[tuple[Job, asyncio.Future[Picture]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def describe(self) -> Description:
        """See `api.Backend`."""
        return self._model.description

    async def draw(self, job: Job) -> Drawn:
        """See `api.Backend`."""
        loop = asyncio.get_running_loop()
        drawn: asyncio.Future[Picture] = loop.create_future()
        self._waiting.append((self._model.completed(job), drawn))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._draw_all())
        # On another thread, while this one's draws the next batch.
        return await asyncio.to_thread(encoded, await drawn)

    async def stream(self, job: Job, previews: int) -> AsyncGenerator[Drawn, None]:
        """See `api.Backend`; batches and other streams are drawn between the previews."""
        states = self._model.stream([self._model.completed(job)], previews)
        while drawn := await asyncio.get_running_loop().run_in_executor(self._thread, next, states, None):
            yield await asyncio.to_thread(encoded, drawn[0])

    async def _draw_all(self) -> None:
        """Draw until nothing waits, always together with what waits longest."""
        most = self._model.description.max_batch
        while self._waiting:
            if len(self._batchable()) < most:
                await asyncio.sleep(min(MAX_WAIT_SECONDS, WAIT_SHARE * self._seconds))
            batch = self._batchable()[:most]
            self._waiting = [each for each in self._waiting if each not in batch]
            if batch:
                await self._draw(*zip(*batch, strict=True))

    def _batchable(self) -> list[tuple[Job, asyncio.Future[Picture]]]:
        """What can be drawn together with what waits longest; whoever was given up on is not drawn for."""
        self._waiting = [each for each in self._waiting if not each[1].done()]
        return [each for each in self._waiting if each[0].batch_key == self._waiting[0][0].batch_key]

    async def _draw(self, jobs: Sequence[Job], futures: Sequence[asyncio.Future[Picture]]) -> None:
        try:
            images = await asyncio.get_running_loop().run_in_executor(self._thread, self._model.draw, jobs)
        except Exception as error:
            if len(jobs) > 1:
                # One of them may be at fault, or there is no memory for all: the others have their images.
                for job, future in zip(jobs, futures, strict=True):
                    if not future.done():
                        await self._draw([job], [future])
            elif not futures[0].done():
                futures[0].set_exception(error)
            return
        self._seconds = images[0].seconds
        for future, image in zip(futures, images, strict=True):
            if not future.done():
                future.set_result(image)
