"""A server of its own for a measurement: started, watched, ended."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import UNet2DConditionModel

from hypersd_ray.embedded import paths
from hypersd_ray.trainer.local import free_port

ROOT = Path(__file__).resolve().parents[1]
Model = Literal["embedded", "wide"]


MEMORY = "private dirty pages of the processes (smaps_rollup): what is shared, such as libraries, is not counted"
KINDS = {"Denoiser": "Denoiser", "Ingress": "Ingress", "ProxyActor": "proxy", "ServeController": "controller"}
"""A word of a process's title -> what it is."""
GAUGES = ("hypersd_images_waiting", "hypersd_requests_in_flight", "serve_deployment_queued_queries")
"""Lengths of queues among Ray's metrics."""


@dataclass(frozen=True)
class Server:
    """A running application."""

    url: str
    process: subprocess.Popen
    log: Path
    ray_folder: Path

    def processes(self) -> dict[str, list[int]]:
        """Process ids by deployment, proxy and controller."""
        found: dict[str, list[int]] = {}
        for pid, title in sorted(descendants(self.process.pid).items()):
            for word, kind in KINDS.items():
                if title.startswith("ray::") and word in title:
                    found.setdefault(kind, []).append(pid)
        return found

    def replicas(self, name: str) -> list[int]:
        """Process ids of a deployment's replicas."""
        return self.processes().get(name, [])

    def memory(self) -> dict[str, int]:
        """Bytes of `MEMORY` by deployment, proxy and controller."""
        return {kind: sum(map(private_bytes, pids)) for kind, pids in self.processes().items()}

    def environment(self, kind: str, name: str) -> str | None:
        """A variable that the first process of a kind was started with."""
        for pid in self.processes().get(kind, [])[:1]:
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(f"{name}=".encode()):
                    return entry.partition(b"=")[2].decode()
        return None

    def gauges(self) -> dict[str, float]:
        """Queue lengths as Ray's metrics have them, summed over processes; Ray exports them every few seconds.

        Raises:
            OSError: there is nobody to ask.
            ValueError: Ray has not said yet where to ask.
        """
        try:
            places = json.loads((self.ray_folder / "ray" / "prom_metrics_service_discovery.json").read_text())
        except OSError as error:
            raise ValueError(f"where Ray's metrics are is not known: {error}") from None
        found: dict[str, float] = {}
        answered = False
        for address in {address for place in places for address in place["targets"]}:
            with suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                answered = True
                for line in answer.read().decode().splitlines():
                    name, value = line.partition("{")[0].partition(" ")[0].removeprefix("ray_"), line.rpartition(" ")[2]
                    if name in GAUGES:
                        found[name] = found.get(name, 0.0) + float(value)
        if not answered:
            raise OSError("none of Ray's metrics exporters answers")
        return found

    async def until_running(self, count: int, seconds: float, beside: Sequence[int] = ()) -> float:
        """Wait for `count` running replicas of the denoiser, one of them not among the processes `beside`.

        Returns:
            how many seconds that took.

        Raises:
            ValueError: there are not so many within `seconds`.
        """
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            new = not beside or set(await asyncio.to_thread(self.replicas, "Denoiser")) - set(beside)
            if new and await asyncio.to_thread(self._running) == count:
                return time.monotonic() - begun
            await asyncio.sleep(0.5)
        raise ValueError(f"there were not {count} replicas within {seconds:g} s")

    def _running(self) -> int:
        with suppress(OSError, ValueError), urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
            return json.load(answer)["replicas"].get("RUNNING", 0)
        return 0


def descendants(root: int) -> dict[int, str]:
    """Process id -> command line of every process that `root` started, or their children."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it may have ended
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    found: dict[int, str] = {}
    edge = {root}
    while edge:
        edge = {pid for pid, parent in parents.items() if parent in edge}
        found |= {pid: titles[pid] for pid in edge}
    return found


def private_bytes(pid: int) -> int:
    """What only this process has in memory: what it shares (libraries, the object store) is not its own."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) * 1024
    return 0


def wide_model(folder: Path, width: int) -> Path:
    """The embedded pipeline with a wider UNet of random weights: its quality is none, its time is what is wanted."""
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        (folder / part).symlink_to(paths.TEACHER / part)
    (folder / "model_index.json").write_bytes((paths.TEACHER / "model_index.json").read_bytes())
    config = json.loads((paths.TEACHER / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config | {"block_out_channels": [width, 2 * width]}).save_pretrained(
        folder / "unet"
    )
    return folder


def settings_of(model: Model, folder: Path, width: int, max_batch: int, queued: int, replicas: int) -> dict[str, Any]:
    """`args` of the application."""
    base = {"base": str(wide_model(folder, width)), "loras": []} if model == "wide" else {}
    return {
        "model": base,
        "limits": {"queued": queued, "images": max(8, max_batch)},
        "denoiser": {"max_batch": max_batch, "replicas": replicas, "cpus": 0.5, "ongoing": 4 * max_batch},
        "ingress": {"cpus": 0.1, "page": False, "image_folder": str(folder / "images"), "image_seconds": 60},
    }


@contextmanager
def running(args: dict[str, Any], folder: Path, threads: int, seconds: float = 600) -> Iterator[Server]:
    """`serve run` with these settings and OMP_NUM_THREADS, ready.

    Raises:
        ValueError: it ended, or was not ready in time.
    """
    port = free_port()
    config = yaml.safe_load((ROOT / "serve/config/dev.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] = args
    path, log = folder / "config.yaml", folder / "log.txt"
    path.write_text(yaml.safe_dump(config))
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment = os.environ | {
            "RAY_TMPDIR": ray_folder, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads),
        }  # fmt: skip
        environment.pop("RAY_ADDRESS", None)
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log, seconds)
            yield Server(url, process, log, Path(ray_folder))
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _end_with_parent() -> None:
    """In the child: SIGINT when this process is killed, so that no cluster stays behind. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def _wait(url: str, process: subprocess.Popen, log: Path, seconds: float) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
    raise ValueError(f"the server was not ready within {seconds:g} s: {last}")
