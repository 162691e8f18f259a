"""A server of its own for a measurement: started, watched, ended."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import UNet2DConditionModel

from hypersd_ray.embedded import paths

ROOT = Path(__file__).resolve().parents[1]
Model = Literal["embedded", "wide"]


@dataclass(frozen=True)
class Server:
    """A running application."""

    url: str
    process: subprocess.Popen
    log: Path

    def replicas(self, name: str) -> list[int]:
        """Process ids of a deployment's replicas."""
        return [pid for pid, title in descendants(self.process.pid).items() if f":{name}" in title]

    def memory(self) -> dict[str, int]:
        """Bytes of private memory by deployment, proxy and controller."""
        kinds = {"Denoiser": "Denoiser", "Ingress": "Ingress", "ProxyActor": "proxy", "ServeController": "controller"}
        found: dict[str, int] = {}
        for pid, title in descendants(self.process.pid).items():
            for word, kind in kinds.items():
                if title.startswith("ray::") and word in title:
                    found[kind] = found.get(kind, 0) + private_bytes(pid)
        return found


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
        "ingress": {"cpus": 0.1, "page": False},
    }


@contextmanager
def running(args: dict[str, Any], folder: Path, seconds: float = 600) -> Iterator[Server]:
    """`serve run` with these settings, ready.

    Raises:
        ValueError: it ended, or was not ready in time.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = yaml.safe_load((ROOT / "serve/config/dev.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] = args
    path, log = folder / "config.yaml", folder / "log.txt"
    path.write_text(yaml.safe_dump(config))
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment = os.environ | {"RAY_TMPDIR": ray_folder, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
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
            yield Server(url, process, log)
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
