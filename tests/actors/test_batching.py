"""Joining, cutting and failing of calls, on an event loop without Ray."""

import asyncio

import numpy as np
import pytest

from hypersd_ray.actors.batching import MicroBatcher
from hypersd_ray.actors.messages import Answer


def model(images, told, gradient):
    """The mean plus a number that is told; its gradient is 1 / n."""
    if any(t == "bad" for t in told):
        raise ValueError("bad is not a number")
    values = images.mean((1, 2, 3)) + np.array([float(t) for t in told])
    if not gradient:
        return Answer(values, None, None)
    return Answer(values, np.ones_like(images), np.full(len(images), 1 / images[0].size))


def picture(value, count=1, side=4):
    return np.full((count, 3, side, side), value, np.float32)


def submit_all(batcher, calls):
    async def go():
        return await asyncio.gather(*(batcher.submit(*c) for c in calls), return_exceptions=True)

    return asyncio.run(go())


def test_calls_that_come_together_share_batches():
    batcher = MicroBatcher(model, max_batch=16, wait_s=0.05)
    answers = submit_all(batcher, [(picture(i), [str(i)], True) for i in range(64)])
    assert [a.values.tolist() for a in answers] == [[2.0 * i] for i in range(64)]
    assert all(a.direction.shape == (1, 3, 4, 4) for a in answers)
    assert batcher.counts.calls == batcher.counts.images == 64
    assert batcher.counts.batches <= 6


def test_a_long_call_is_cut():
    batcher = MicroBatcher(model, max_batch=4, wait_s=0.0)
    images = np.concatenate([picture(i) for i in range(10)])
    (answer,) = submit_all(batcher, [(images, ["0"] * 10, True)])
    assert answer.values.tolist() == list(range(10)) and len(answer.direction) == 10
    assert batcher.counts.batches == 3


def test_sizes_and_gradients_are_not_mixed():
    batcher = MicroBatcher(model, max_batch=16, wait_s=0.05)
    small, large, plain = submit_all(
        batcher, [(picture(1), ["0"], True), (picture(2, side=8), ["0"], True), (picture(3), ["0"], False)]
    )
    assert small.direction.shape[-1] == 4 and large.direction.shape[-1] == 8 and plain.direction is None
    assert [a.values[0] for a in (small, large, plain)] == [1, 2, 3]


def test_a_bad_call_fails_alone():
    batcher = MicroBatcher(model, max_batch=16, wait_s=0.05)
    good, bad, other = submit_all(
        batcher, [(picture(1), ["0"], True), (picture(1), ["bad"], True), (picture(5), ["0"], True)]
    )
    assert isinstance(bad, ValueError) and good.values[0] == 1 and other.values[0] == 5
    with pytest.raises(ValueError, match="bad is not a number"):
        raise bad


@pytest.mark.parametrize("given_up", ["0", "bad"])
def test_a_call_that_is_given_up_leaves_the_others_theirs(given_up):
    """A cancelled call among those of a batch, whether the model would have answered it or refused it."""
    batcher = MicroBatcher(model, max_batch=16, wait_s=0.05)

    async def go():
        calls = [(picture(1), [given_up], True), (picture(5), ["0"], True)]
        first, second = [asyncio.create_task(batcher.submit(*call)) for call in calls]
        await asyncio.sleep(0.01)  # both are in the queue
        first.cancel()
        return await asyncio.wait_for(second, 10)

    assert asyncio.run(go()).values[0] == 5
