"""The ingress's side of a call to a replica: time limit, full queue, lost replica, client gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from serve.errors import ApiError, busy, failed, lost, too_late
from serve.settings import NO_LORA
from serve.work import DeviceLost, Picture, Preview, Refused, Work

logger = logging.getLogger("ray.serve")


def is_lost(error: BaseException) -> bool:
    """Whether it is the replica that is at fault, and not what was asked of it: another one may do it."""
    if isinstance(error, DeviceLost) or isinstance(getattr(error, "cause", None), DeviceLost):
        return True
    if isinstance(error, DeploymentUnavailableError | ReplicaUnavailableError):
        return True
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)  # the latter is an exception of the code


def explained(error: Exception, retry_after: int, what: str) -> Exception:
    """What to tell the client of a failed call to `what`; the reason, which may name paths, goes to the log alone."""
    if isinstance(error, BackPressureError):
        return busy(retry_after)
    if is_lost(error):
        logger.warning("%s lost: %s: %s", what, type(error).__name__, error)
        return lost(retry_after)
    if isinstance(error, RayTaskError):
        logger.error("%s failed: %s", what, error)
        return failed(what)
    return error


async def replied(call: Callable[[], DeploymentResponse], retry_after: int, what: str) -> Any:
    """The result of a call that may be made twice.

    Raises:
        ApiError: busy, lost twice, or failed.
    """
    try:
        try:
            return await _once(call)
        except Exception as error:
            if not is_lost(error):
                raise
        # An image is a function of the request: asking another replica is safe. Once, so that a request that kills
        # its replica does not go through them all.
        return await _once(call)
    except Exception as error:
        raise explained(error, retry_after, what) from error


async def _once(call: Callable[[], DeploymentResponse]) -> Any:
    response = call()
    try:
        return await response
    except (asyncio.CancelledError, RequestCancelledError):
        if _leaving():
            _give_up(response)  # the client has gone or the time is up: out of the queue
            raise asyncio.CancelledError from None
        raise RequestCancelledError from None


def _give_up(response: DeploymentResponse | DeploymentResponseGenerator) -> None:
    """Nobody waits for it any more. Serve raises what ended a call (a full queue, say) once more where it is cancelled."""
    with contextlib.suppress(Exception):
        response.cancel()


def _leaving() -> bool:
    """Whether it is this side that is cancelled: Serve has the same exception for a replica that ends its work."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Calls:
    """Requests to the denoiser's replicas."""

    def __init__(self, denoiser: DeploymentHandle, seconds: float):
        self.denoiser, self.seconds = denoiser, seconds
        self._recent = 1.0  # running mean of a request's seconds, for Retry-After

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a place in the queue is likely."""
        return max(1, math.ceil(self._recent))

    async def pictures(self, work: Work) -> list[Picture]:
        """All images of `work`, in order. The time limit is the caller's.

        Raises:
            ApiError: refused, busy, lost twice, or failed.
        """
        begun = time.monotonic()
        result = await replied(lambda: self._handle(work).generate.remote(work), self.retry_after, "model")
        if isinstance(result, Refused):
            raise ApiError(400, result.message, result.param, result.code)
        self._recent += 0.1 * (time.monotonic() - begun - self._recent)
        return result

    async def events(self, work: Work, until: float) -> AsyncGenerator[Preview | Picture, None]:
        """Previews as they come, and the images, until a time of the event loop's clock.

        Raises:
            ApiError: as `pictures`, or too late; also between events.
        """
        begun = time.monotonic()
        responses = self._handle(work).options(stream=True).stream.remote(work)
        iterator = aiter(responses)
        done = False
        try:
            while True:
                try:
                    async with asyncio.timeout_at(until) as limit:
                        event = await anext(iterator, None)
                except (TimeoutError, RequestCancelledError, asyncio.CancelledError) as error:
                    if limit.expired():
                        raise too_late(self.seconds) from error
                    if isinstance(error, asyncio.CancelledError) and not _leaving():
                        raise RequestCancelledError from None
                    raise
                if event is None:
                    done = True
                    break
                if isinstance(event, Refused):
                    raise ApiError(400, event.message, event.param, event.code)
                yield event
        except ApiError:
            raise
        except Exception as error:
            raise explained(error, self.retry_after, "model") from error
        finally:
            if not done:
                _give_up(responses)
        self._recent += 0.1 * (time.monotonic() - begun - self._recent)

    def _handle(self, work: Work) -> DeploymentHandle:
        name = "" if work.key.lora == NO_LORA else work.key.lora
        return self.denoiser.options(multiplexed_model_id=name)
