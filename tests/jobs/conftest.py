"""A real local cluster of its own, started in the checkout as a user would, with a dashboard that takes jobs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cluster:
    """Where jobs go, and with what environment."""

    dashboard: str
    environment: dict[str, str]
    home: Path
    temporary: Path

    def submit(self, *options: str, entrypoint: list[str], timeout: float = 550) -> subprocess.CompletedProcess[str]:
        """`ray job submit OPTIONS -- ENTRYPOINT`, from the checkout, to its end; output and errors as one."""
        return subprocess.run(
            [ray_command(), "job", "submit", "--address", self.dashboard, *options, "--", *entrypoint],
            cwd=ROOT, env=self.environment, text=True, check=False, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ray(self, *arguments: str) -> str:
        """`ray GROUP COMMAND --address=... REST`; output and errors as one."""
        words = 2 if arguments[0] in ("job", "list") else 1
        call = [ray_command(), *arguments[:words], f"--address={self.dashboard}", *arguments[words:]]
        return subprocess.run(
            call, cwd=ROOT, env=self.environment, text=True, check=False, timeout=200,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ).stdout  # fmt: skip


def ray_command() -> str:
    """`ray` of this environment."""
    return str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def serves(url: str) -> bool:
    """Whether something answers there."""
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` in the checkout. It and nothing else is stopped at the end: never `ray stop`, which ends all."""
    temporary = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # short: a socket's path has at most 107 characters
    home = tmp_path_factory.mktemp("home")
    ports = dict(zip(("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
                      "dashboard-agent-grpc-port", "metrics-export-port"), free_ports(6), strict=True))  # fmt: skip
    environment = {n: v for n, v in os.environ.items() if n not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(temporary), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }  # fmt: skip
    log = (temporary / "head.log").open("w")
    head = subprocess.Popen(
        [ray_command(), "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=true",
         "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
         f"--temp-dir={temporary}", *(f"--{name}={port}" for name, port in ports.items())],
        cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        until = time.monotonic() + 300
        while not serves(f"{dashboard}/api/jobs/"):
            assert head.poll() is None and time.monotonic() < until, (temporary / "head.log").read_text()
            time.sleep(0.5)
        yield Cluster(dashboard, environment, home, temporary)
    finally:
        _stop(head, temporary)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _stop(head: subprocess.Popen, temporary: Path) -> None:
    """End the head, and those of its processes that outlive it: all that name this cluster's own folder."""
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(timeout=60)
    except subprocess.TimeoutExpired:
        head.kill()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if str(temporary).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
