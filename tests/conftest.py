"""For every test: nothing is fetched, clusters of the tests' own ask for no token. After those of mark `chaos`: the table
of faults, and no process is left behind."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# The models are tiny: threads that wait for each other cost more than they bring, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers are at nice 15: under `-n 2` they would wait for the other process's tests.
os.environ.setdefault("RAY_worker_niceness", "0")

MARK = "HYPERSD_CHAOS_SESSION"
"""In the environment of whatever such a session starts."""


@pytest.fixture(scope="session", autouse=True)
def chaos_session(request: pytest.FixtureRequest) -> Iterator[None]:
    """Its end, after all clusters'."""
    if not any(item.get_closest_marker("chaos") for item in request.session.items):
        yield
        return
    os.environ[MARK] = uuid.uuid4().hex
    yield
    faults = sys.modules.get("tests.chaos.faults")
    if faults is not None and faults.ROWS:
        faults.write_table()
    until = time.monotonic() + 60
    while (left := _left_behind()) and time.monotonic() < until:
        time.sleep(1)
    assert not left, f"processes are left behind: {left}"


def _left_behind() -> list[str]:
    """Command lines of processes that this session started, at whatever remove."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                found.append(f"{entry.name} {b' '.join(words).decode(errors='replace')[:120]}")
        except OSError:
            continue  # gone, or another user's
    return found
