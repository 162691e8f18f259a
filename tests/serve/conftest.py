"""The embedded model with random LoRAs, as an engine and as a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import ControlNetModel, UNet2DConditionModel

from hypersd_ray.embedded import paths
from hypersd_ray.trainer.local import free_port
from serve.discovery import read_catalog
from serve.engine import Engine
from serve.settings import Settings
from tests.helpers.pipelines import build_pipeline
from tests.serve.loras import write_lora

ROOT = Path(__file__).resolve().parents[2]
# `serve run CONFIG` but for Ray's dashboard, which takes longer to start than all the rest
RUN = """
import os, signal, sys, threading, time
sys.path.insert(0, ".")
signal.signal(signal.SIGINT, signal.default_int_handler)  # what the shell started behind it ignores it

def end_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)  # pytest was killed: no cluster may stay behind

threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
import ray
ray.init(include_dashboard=False, num_cpus=4, namespace="serve")
print("metrics", ray.nodes()[0]["NodeManagerAddress"], ray.nodes()[0]["MetricsExportPort"], flush=True)
from ray.serve.scripts import cli
cli(["run", sys.argv[1]])
"""
KEY = "a key of the tests"


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory) -> Path:
    """k8, k1, and one that keeps guidance."""
    folder = tmp_path_factory.mktemp("loras")
    unet = UNet2DConditionModel.from_pretrained(paths.TEACHER / "unet", local_files_only=True)
    write_lora(folder, "k8", unet, k=8, seed=1)
    write_lora(folder, "k1", unet, k=1, seed=2)
    write_lora(folder, "cfg", unet, k=4, seed=3, guidance=True)
    return folder


@pytest.fixture(scope="session")
def control_folder(tmp_path_factory) -> Path:
    """A ControlNet of the embedded UNet, random where a new one is zero and does nothing."""
    unet = UNet2DConditionModel.from_pretrained(paths.TEACHER / "unet", local_files_only=True)
    torch.manual_seed(0)
    # the embedded autoencoder is f4: two halvings, as many as between three widths
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96))
    with torch.no_grad():
        for layer in (control.controlnet_cond_embedding.conv_out, *control.controlnet_down_blocks):
            torch.nn.init.normal_(layer.weight, std=0.05)
    folder = tmp_path_factory.mktemp("control") / "edges"
    control.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(lora_folder) -> Settings:
    """The embedded model with these LoRAs."""
    return Settings.model_validate({"model": {"loras": [str(lora_folder)]}})


@pytest.fixture(scope="session")
def catalog(settings):
    """What they are."""
    return read_catalog(settings.model)


@pytest.fixture(scope="package")
def engine(settings, catalog) -> Engine:
    """One engine; LoRAs may be switched on it."""
    return Engine(settings.model, catalog)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline folder."""
    return build_pipeline("sdxl", tmp_path_factory.mktemp("pipelines") / "tiny-sdxl")


@dataclass(frozen=True)
class Server:
    """A running application, and two more without a replica until one is asked for.

    /strict: a key, a word list, and no time to wait for a replica. /asleep: time enough, a ControlNet, a checker.
    """

    url: str
    strict: str
    asleep: str
    log: Path
    ray_folder: Path


@pytest.fixture(scope="package")
def server(lora_folder, control_folder, tmp_path_factory) -> Iterator[Server]:
    """The application of dev.yaml in a process and a cluster of its own."""
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    config = yaml.safe_load((ROOT / "serve/config/dev.yaml").read_text())
    config["http_options"]["port"] = port
    one = config["applications"][0]
    one["args"] = {
        "model": {"loras": [str(lora_folder)]},
        "limits": {"queued": 4},
        "denoiser": {"max_batch": 4, "ongoing": 4, "cpus": 0.2},
        "ingress": {"cpus": 0.1, "image_folder": str(folder / "images")},
    }
    strict = {
        "model": {"loras": []},
        "limits": {"seconds": 0.5, "body_bytes": 2000},
        "denoiser": {"cpus": 0.2, "replicas": 0, "min_replicas": 0, "max_replicas": 1, "upscale_delay_s": 3600},
        "ingress": {"cpus": 0.1, "require_api_key": True, "api_key_env": "HYPERSD_TEST_KEY"},
        "safety": {"blocked_words": ["gore"]},
    }
    asleep = {
        "model": {"controlnets": {"edges": str(control_folder)}},
        "denoiser": {"cpus": 0.2, "replicas": 0, "max_replicas": 1, "upscale_delay_s": 0, "downscale_delay_s": 3},
        "ingress": {"cpus": 0.1},
        "safety": {"checker": "tests.serve.red:RefusesRed", "cpus": 0.1},
    }
    for name, args in (("strict", strict), ("asleep", asleep)):
        config["applications"].append(one | {"name": name, "route_prefix": f"/{name}", "args": args})
    path, log = folder / "config.yaml", folder / "log.txt"
    path.write_text(yaml.safe_dump(config))
    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment = os.environ | {
            "RAY_TMPDIR": ray_folder, "HYPERSD_TEST_KEY": KEY, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", RUN, str(path)]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        url = f"http://127.0.0.1:{port}"
        try:
            for root in (url, f"{url}/strict", f"{url}/asleep"):
                _wait_for(f"{root}/health", process, log)
            yield Server(url, f"{url}/strict", f"{url}/asleep", log, Path(ray_folder))
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 600) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"{url} is not ready after {seconds} s: {log.read_text()[-3000:]}")
