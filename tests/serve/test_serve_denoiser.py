"""A replica's own behaviour, without Serve around it."""

from __future__ import annotations

import asyncio

import pytest
import torch

from serve.denoiser import Denoiser
from serve.settings import Settings
from serve.work import BatchKey, DeviceLost, Shot, Work

KEY = BatchKey(32, 32, 8, 0.0, "none", 1.0, False)


async def replica(catalog, settings: Settings) -> Denoiser:
    made = Denoiser.__new__(Denoiser)
    await Denoiser.__init__(made, settings, catalog)

    async def enter(tickets):  # Serve's batcher, which stands here, needs a replica's context
        made.turns.enter(tickets)

    made._enter = enter
    return made


@pytest.fixture
def quick(settings) -> Settings:
    """No warm-up."""
    return settings.model_copy(update={"denoiser": settings.denoiser.model_copy(update={"warm_up": False})})


def test_images_of_clients_that_left_are_counted(catalog, quick, monkeypatch):
    async def main():
        one, counted = await replica(catalog, quick), []
        monkeypatch.setattr(one.metrics.abandoned, "inc", counted.append)
        task = asyncio.create_task(one.generate(Work(KEY, tuple(Shot("a cat", seed) for seed in range(6)))))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert counted == [6]

        async def first(work):
            async for _ in one.stream(work):
                return

        await first(Work(KEY, (Shot("a cat", 0, show_after=frozenset({1})), Shot("a cat", 1))))
        await one.generate(Work(KEY, (Shot("a cat", 3),)))
        assert sum(counted) == 8, "who stays is not counted"

    asyncio.run(main())


def test_a_lost_accelerator_is_told_as_a_loss(catalog, quick, monkeypatch):
    async def main():
        one = await replica(catalog, quick)

        def lost(*_):
            raise torch.AcceleratorError("CUDA error: an illegal memory access at /home/x")

        monkeypatch.setattr(one.engine, "run", lost)
        work = Work(KEY, (Shot("a cat", 0),))
        one.check_health()
        for _ in range(2):  # the one it happened to, and the next
            with pytest.raises(DeviceLost):
                await one.generate(work)
        with pytest.raises(DeviceLost):
            await anext(one.stream(work))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            one.check_health()

    asyncio.run(main())


def test_previews_are_a_stage_of_their_own(catalog, quick):
    async def main():
        one = await replica(catalog, quick)
        show = frozenset({2, 4, 6})
        *_, seen = [event async for event in one.stream(Work(KEY, (Shot("a cat", 0, show_after=show),)))]
        [unseen] = await one.generate(Work(KEY, (Shot("a cat", 0),)))
        assert seen.seconds["preview"] > 0 and "preview" not in unseen.seconds
        assert list(unseen.seconds) == ["text", "denoise", "decode"]

    asyncio.run(main())
