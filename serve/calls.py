"""The ingress's side of a call to the denoiser: time limit, full queue, lost replica, client gone."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from serve.errors import ApiError, busy, lost, too_late
from serve.settings import NO_LORA
from serve.work import Picture, Preview, Refused, Work

LOST = (RayActorError, ActorUnavailableError)


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
        """All images of `work`, in order.

        Raises:
            ApiError: refused, busy, lost twice, or too late.
        """
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self.seconds):
                try:
                    result = await self._once(work)
                except LOST:
                    # An image is a function of the request: asking another replica is safe. Once, so that a request
                    # that kills its replica does not go through them all.
                    result = await self._once(work)
        except Exception as error:
            raise self._explained(error) from error
        if isinstance(result, Refused):
            raise ApiError(400, result.message, result.param, result.code)
        self._recent += 0.1 * (time.monotonic() - begun - self._recent)
        return result

    async def _once(self, work: Work) -> list[Picture] | Refused:
        response = self._handle(work).generate.remote(work)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # the client has gone or the time is up: out of the queue
            raise

    async def events(self, work: Work) -> AsyncGenerator[Preview | Picture, None]:
        """Previews as they come, and the images.

        Raises:
            ApiError: as `pictures`; also between events.
        """
        begun = time.monotonic()
        responses = self._handle(work).options(stream=True).stream.remote(work)
        iterator = aiter(responses)
        done = False
        try:
            while True:
                async with asyncio.timeout(self.seconds - (time.monotonic() - begun)):
                    event = await anext(iterator, None)
                if event is None:
                    done = True
                    break
                if isinstance(event, Refused):
                    raise ApiError(400, event.message, event.param, event.code)
                yield event
        except ApiError:
            raise
        except Exception as error:
            raise self._explained(error) from error
        finally:
            if not done:
                responses.cancel()
        self._recent += 0.1 * (time.monotonic() - begun - self._recent)

    def _handle(self, work: Work) -> DeploymentHandle:
        name = "" if work.key.lora == NO_LORA else work.key.lora
        return self.denoiser.options(multiplexed_model_id=name)

    def _explained(self, error: Exception) -> Exception:
        """What to tell the client."""
        if isinstance(error, BackPressureError):
            return busy(self.retry_after)
        if isinstance(error, TimeoutError):
            return too_late(self.seconds)
        if isinstance(error, (*LOST, RequestCancelledError, TaskCancelledError, DeploymentUnavailableError)):
            return lost(self.retry_after)
        if isinstance(error, RayTaskError):
            reason = (str(error.cause).splitlines() or [type(error.cause).__name__])[0]
            return ApiError(500, f"the model failed: {reason}", code="model_failed")
        return error
