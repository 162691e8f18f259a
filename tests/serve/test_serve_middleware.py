"""What is around every route, on a server of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest
import uvicorn
from fastapi.responses import JSONResponse

from serve import middleware
from serve.middleware import HearsOut


async def refuses(scope, receive, send):
    """An application that knows its answer before the body."""
    await JSONResponse({"why": "too much"}, 413)(scope, receive, send)


CLOSE = {"Connection": "close"}
"""With it uvicorn closes after its answer, read or not."""


@contextlib.contextmanager
def served(app):
    config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none")
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_refusal_reaches_a_client_that_is_still_sending(chunked):
    body = b"x" * 20_000_000
    with served(HearsOut(refuses)) as (host, port):
        for _ in range(3):
            connection = http.client.HTTPConnection(host, port, timeout=30)
            connection.request("POST", "/", iter([body]) if chunked else body, CLOSE, encode_chunked=chunked)
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())) == (413, {"why": "too much"})
            connection.close()


def test_a_client_that_sends_without_end_is_not_heard_out(monkeypatch):
    monkeypatch.setattr(middleware, "UNREAD_BYTES", 1_000_000)
    with served(HearsOut(refuses)) as (host, port):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            connection.request("POST", "/", (b"x" * 100_000 for _ in range(10_000)), CLOSE, encode_chunked=True)
        connection.close()


def test_a_client_that_sends_nothing_more_gets_its_answer(monkeypatch):
    monkeypatch.setattr(middleware, "UNREAD_S", 0.3)
    with served(HearsOut(refuses)) as (host, port):
        start = time.monotonic()
        with socket.create_connection((host, port), 30) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            assert client.recv(1000).startswith(b"HTTP/1.1 413")
        assert 0.3 <= time.monotonic() - start < 10
