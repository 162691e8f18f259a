"""The load script's bookkeeping: against a server that fails in every way, nothing is lost and nothing looks better."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from evaluation.clients import Answer, Tally, ask, client
from evaluation.load import Soak, back, growth


def answered(kind: str, **body) -> Tally:
    """One request to a server that behaves as `kind` says."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if kind == "plain":
            return web.Response(status=502, text="Bad Gateway")
        if kind == "lost":
            return web.json_response({"error": {"message": "lost"}}, status=503, headers={"Retry-After": "1"})
        if kind == "full":
            return web.json_response({"error": {"message": "full"}}, status=429, headers={"Retry-After": "1"})
        if kind == "hangs up":
            request.transport.close()
        if kind == "wrong seed":
            return web.json_response({"data": [{"seed": 6, "b64_json": "x"}], "batch_size": 1})
        if kind == "stream":
            text = 'event: error\ndata: {"error": {"message": "lost midway"}}\n\n'
            return web.Response(text=text, content_type="text/event-stream")
        return web.json_response({"data": [{"seed": 5, "b64_json": "x"}], "batch_size": 3})

    async def run() -> Tally:
        app, tally = web.Application(), Tally()
        app.router.add_post("/v1/images/generations", handler)
        async with TestServer(app) as server, client() as session:
            where = SimpleNamespace(url=f"http://{server.host}:{server.port}")
            await ask(session, where, {"seed": 5, "num_inference_steps": 1} | body, tally)
        return tally

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "body", "status", "error"),
    [
        ("plain", {}, 502, "502: no envelope: Bad Gateway"), ("lost", {}, 503, "503: lost"), ("full", {}, 429, ""),
        ("hangs up", {}, None, "no status: ServerDisconnectedError"), ("wrong seed", {}, 200, "200: ValueError: seeds [6]"),
        ("stream", {"stream": True}, 200, "200: ValueError: in the stream: lost midway"), ("fine", {}, 200, ""),
    ],
)  # fmt: skip
def test_every_failure_is_counted_as_what_it_is(kind, body, status, error):
    tally = answered(kind, **body)
    report = tally.report()
    assert report["requests"] == report["answered"] + report["unanswered"] == 1
    assert report["statuses"] == ({} if status is None else {str(status): 1})
    assert "".join(report["errors"]).startswith(error) and bool(report["errors"]) == bool(error)
    assert report["failures_with_retry_after"] == ({str(status): 1} if kind in ("lost", "full") else {})
    assert len(tally.good()) == (kind == "fine") and tally.batch_size() == 3 * (kind == "fine")
    assert (tally.in_flight, tally.most_in_flight) == (0, 1)


def test_the_rate_does_not_depend_on_where_the_window_cuts_the_batches():
    tally = Tally(
        [Answer(when=0.4 * i + 0.001 * j, status=200, seconds=1, images=1) for i in range(40) for j in range(8)]
    )
    for begin in (1.0, 1.19, 1.2, 1.2005, 1.21):
        assert tally.rate_of_batches(begin, begin + 2, 0.4) == pytest.approx(20, rel=0.01)
    assert abs(tally.rate(1.19, 3.21) / 20 - 1) > 0.1, "which counts whole batches too many"


def test_back_is_where_the_rate_is_that_of_before_from_then_on():
    assert back([(0.0, 9), (0.5, 10), (1.0, 3), (1.5, 10)], 9.5) == 1.5
    assert back([(0.0, 10), (0.5, 3)], 9.5) is None
    assert back([(0.0, 10)], 9.5) == 0.0
    assert back([(0.0, 3), (0.5, 10), (1.0, 9), (1.5, 10)], 9.5) == 0.5, "noise is no fall"


def test_growth_is_by_kind_and_after_the_warm_up():
    memory = [{"a": 10 if i < 2 else 100 + i, "b": 50} for i in range(10)]
    found = growth(memory)
    assert found["b"] == 0 and found["a"] == pytest.approx(108.5 / 102.5 - 1)


def test_the_mix_visits_every_combination():
    body = Soak().mixed(["x", "y"])
    bodies = [body(i) for i in range(48)]
    kinds = {
        (b["lora"], b["num_inference_steps"], "stream" in b, "response_format" in b, b.get("n", 1)) for b in bodies
    }
    assert len(kinds) == 48
    assert {b["lora"] for b in bodies} == {"x", "y", "none"} and {b["num_inference_steps"] for b in bodies} == {
        1,
        2,
        4,
        8,
    }
    assert all(
        b["lora"] != c["lora"] or b["num_inference_steps"] != c["num_inference_steps"]
        for b, c in itertools.pairwise(bodies)
    )
    assert Soak(mix=False).mixed(["x"])(3) == Soak().body(3)
