"""What clients are told when something inside goes wrong: the ingress's whole application before deployments that fail."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
import pytest
import ray
from fastapi.testclient import TestClient
from ray import serve as ray_serve
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request

from serve import routes
from serve import status as status_module
from serve.access import digest
from serve.calls import Calls
from serve.catalog import Catalog, LoRAInfo
from serve.errors import ApiError
from serve.generation import Generation
from serve.links import Links
from serve.metrics import IngressMetrics
from serve.routes import make_app
from serve.safety import Guard
from serve.settings import Settings
from serve.status import Health, Status
from serve.work import DeviceLost, Picture, Preview

CATALOG = Catalog(
    id="m", aliases=(), base="x", family="sd", sizes=("64x64",), default_lora="auto",
    loras=(LoRAInfo(name="k4", path="", k=4),), controlnets={}, created=0,
)  # fmt: skip
SECRET = "/home/somebody/weights.safetensors"


def fault(word: str) -> Exception:
    """The exception that a prompt of that name brings about, as a handle raises it."""
    made = {
        "busy": lambda: BackPressureError(num_queued_requests=4, max_queued_requests=4),
        "unavailable": lambda: ActorUnavailableError("gone", None),
        "node": lambda: NodeDiedError("gone"),
        "device": lambda: RayTaskError("f", "", DeviceLost("the device failed")).as_instanceof_cause(),
        "code": lambda: RayTaskError("f", "", ValueError(SECRET)).as_instanceof_cause(),
        "odd": lambda: KeyError(SECRET),
    }
    return made[word]()


class Faulty:
    """A denoiser and a checker in one: does what the first word of the prompt says."""

    judges_prompts = True

    def __init__(self):
        self.calls = 0

    async def _act(self, prompt: str):
        word, _, times = prompt.partition(" ")
        self.calls += 1
        if word == "slow":
            await asyncio.sleep(5)
        if word not in ("fine", "slow") and self.calls <= int(times or 99):
            raise fault(word)

    async def generate(self, work):
        await self._act(work.shots[0].prompt)
        return [self._picture(i) for i in range(len(work.shots))]

    async def stream(self, work):
        for step in sorted(work.shots[0].show_after):
            yield Preview(0, step, np.zeros((8, 8, 3), np.uint8))
        await self._act(work.shots[0].prompt)
        yield self._picture(0)

    def _picture(self, i):
        return Picture(i, np.zeros((8, 8, 3), np.uint8), 1, 3, {"text": 0.001, "denoise": 0.002, "decode": 0.001})

    async def check_prompt(self, prompt):
        await self._act(prompt.removeprefix("check "))
        return False

    def check(self, pictures):
        return [False] * len(pictures)


def serve_one(keys=(), checked=False, **args):
    """A client of the application before a deployment of `Faulty`."""
    settings = Settings.model_validate({"ingress": {"page": False}} | args)
    handle = ray_serve.run(ray_serve.deployment(Faulty).bind(), _local_testing_mode=True)
    checker = (
        ray_serve.run(ray_serve.deployment(Faulty).bind(), name="c", _local_testing_mode=True) if checked else None
    )
    app = make_app(
        settings, CATALOG, keys, Calls(handle, settings.limits.seconds), Guard(settings.safety, checker, checked),
        Links(None, 10, 2**20), IngressMetrics(), Status(False),
    )  # fmt: skip
    return TestClient(app, raise_server_exceptions=False)


def draw(client, prompt, headers=None, **fields):
    body = {"prompt": prompt, "num_inference_steps": 4} | fields
    return client.post("/v1/images/generations", json=body, headers=headers)


@pytest.mark.parametrize(
    ("prompt", "status", "code", "headers"),
    [
        ("busy", 429, "queue_full", {"retry-after"}), ("unavailable", 503, "replica_lost", {"retry-after"}),
        ("node", 503, "replica_lost", {"retry-after"}), ("device", 503, "replica_lost", {"retry-after"}),
        ("code", 500, "model_failed", {"x-should-retry"}), ("odd", 500, "internal", set()),
        ("node 1", 200, None, set()), ("device 1", 200, None, set()), ("fine", 200, None, set()),
    ],
)  # fmt: skip
def test_every_fault_has_its_answer(prompt, status, code, headers):
    answer = draw(serve_one(), prompt)
    assert answer.status_code == status
    assert {"retry-after", "x-should-retry"} & set(answer.headers) == headers
    if code:
        assert answer.json()["error"]["code"] == code
    assert SECRET not in answer.text


@pytest.mark.parametrize(("word", "status"), [("busy", 429), ("node", 503), ("code", 500), ("odd", 500)])
def test_the_checkers_faults_are_told_like_the_models(word, status):
    answer = draw(serve_one(checked=True), f"check {word}")
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == {429: "queue_full", 503: "replica_lost"}.get(
        status, {"code": "safety_checker_failed", "odd": "internal"}.get(word)
    )
    assert SECRET not in answer.text


@pytest.mark.parametrize(("word", "code"), [("node", "replica_lost"), ("code", "model_failed"), ("odd", "internal")])
def test_a_stream_ends_with_the_fault(word, code):
    answer = draw(serve_one(), word, stream=True, partial_images=1)
    *_, last = answer.text.strip().split("\n\n")
    assert last.startswith("event: error\n")
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == code
    assert SECRET not in answer.text


def test_the_time_limit_is_around_everything():
    limited = serve_one(limits={"seconds": 0.3})
    answer = draw(limited, "slow")
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    text = draw(limited, "slow", stream=True, partial_images=1).text
    assert "partial_image" in text and '"code": "timeout"' in text

    begun = time.monotonic()
    checked = serve_one(checked=True, limits={"seconds": 0.3})
    assert draw(checked, "check slow").status_code == 504
    assert time.monotonic() - begun < 10


def test_a_slow_upload_is_too_late():
    async def main():
        generation = Generation(
            Settings.model_validate({"limits": {"seconds": 0.1}}), CATALOG, None, None, None, IngressMetrics()
        )

        async def receive():
            await asyncio.sleep(5)

        headers = [(b"content-type", b"application/json")]
        with pytest.raises(ApiError) as caught:
            await generation.answer(Request({"type": "http", "method": "POST", "headers": headers}, receive))
        assert (caught.value.status, generation._in_flight) == (504, 0)

    asyncio.run(main())


def test_stages_add_up_to_the_whole():
    timings = draw(serve_one(), "fine", n=2).json()["timings"]
    total = timings.pop("total")
    assert {"read", "queue", "text", "denoise", "decode", "check", "encode"} == set(timings)
    assert sum(timings.values()) == pytest.approx(total, rel=0.2, abs=0.006)  # 4 ms of it are pretended


def test_a_wrong_key_is_counted_and_logged(monkeypatch):
    counted, lines = [], []
    client = serve_one(keys=(digest("right"),))
    monkeypatch.setattr("ray.serve.metrics.Counter.inc", lambda self, n, tags: counted.append(tags))
    monkeypatch.setattr(routes.logger, "info", lambda text, *given, **more: lines.append(text % given))
    assert draw(client, "fine", {"Authorization": "Bearer wrong"}).status_code == 401
    assert counted == [{"status": "401", "code": "invalid_api_key"}]
    assert lines == ["/v1/images/generations 401 invalid_api_key"]
    assert client.get("/v1/models").status_code == 401 and len(counted) == 1


def test_pages_of_an_allowed_origin_may_read_what_they_need():
    client = serve_one(ingress={"page": False, "cors_origins": ["https://there"]})
    asked = {"Origin": "https://there", "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,x-request-id"}
    answer = client.options("/v1/images/generations", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://there")
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    for prompt in ("busy", "odd", "fine"):
        answer = draw(client, prompt, {"Origin": "https://there"})
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {"retry-after", "x-request-id"} <= exposed
    elsewhere = client.options("/v1/images/generations", headers=asked | {"Origin": "https://elsewhere"})
    assert "access-control-allow-origin" not in elsewhere.headers


def test_health_while_the_controller_is_away(monkeypatch):
    def away(self):
        raise ray.exceptions.RayActorError()

    client = serve_one()
    monkeypatch.setattr(Status, "_ask", away)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")


@pytest.mark.parametrize(("model", "checker", "ok"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_health_counts_the_checker(monkeypatch, model, checker, ok):
    def state(count):
        return type("Deployment", (), {"replica_states": {"RUNNING": count} if count else {"STARTING": 1}})

    found = type(
        "Found",
        (),
        {
            "applications": {
                "a": type("A", (), {"deployments": {"Denoiser": state(model), "SafetyChecker": state(checker)}})
            }
        },
    )
    monkeypatch.setattr(status_module.ray_serve, "get_replica_context", lambda: type("C", (), {"app_name": "a"}))
    monkeypatch.setattr(status_module.ray_serve, "status", lambda: found)
    health: Health = asyncio.run(Status(False, checked=True).health())
    assert (health.status == "ok") == ok
    assert health.checkers


def test_a_client_that_leaves_before_the_first_event_is_no_longer_in_flight():
    async def main():
        settings = Settings()
        handle = ray_serve.run(ray_serve.deployment(Faulty).bind(), _local_testing_mode=True)
        generation = Generation(
            settings, CATALOG, Calls(handle, 60), Guard(settings.safety, None), Links(None, 10, 2**20), IngressMetrics()
        )
        body = json.dumps({"prompt": "fine", "stream": True, "num_inference_steps": 4}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            return next(messages)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        response = await generation.answer(Request(scope, receive))
        assert generation._in_flight == 1

        async def send(message):
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
        assert generation._in_flight == 0

    asyncio.run(main())
