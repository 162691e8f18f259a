"""`jobs/pretrain.py` for a few steps on a few of the committed pictures: stopped, gone on with, and what it leaves."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from hypersd_ray.config.base import ConfigError
from hypersd_ray.embedded import paths

JOB = Path(__file__).parents[2] / "jobs" / "pretrain.py"


def pretrain(data: Path, out: Path, vae: list[int], unet: list[int]) -> subprocess.CompletedProcess:
    steps = ["--vae-steps", *map(str, vae), "--unet-steps", *map(str, unet)]
    command = [sys.executable, JOB, "--data", data, "--out", out, *steps]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_a_teacher_comes_out_and_more_cycles_go_on(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    shutil.copy(paths.DATA / "val-00001.tar", data / "train-00000.tar")
    done = pretrain(data, out, [2], [3])
    assert done.returncode == 0, done.stderr
    assert "vae step 2/2" in done.stdout and "unet step 3/3" not in done.stdout  # a line each 100 steps
    first = load_file(out / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(out / "teacher", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a noto panda", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    done = pretrain(data, out, [2], [3, 2])
    assert done.returncode == 0, done.stderr
    assert "vae step" not in done.stdout, "what is finished is not trained again"
    second = load_file(out / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not first[name].equal(second[name]) for name in first)
    wrong = pretrain(data, out, [2], [4, 2])
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    missing = pretrain(tmp_path, tmp_path / "other", [1], [1])
    assert missing.returncode == 2 and "build them with jobs/build_emoji.py" in missing.stderr


def test_a_style_is_another_base_model_in_its_unet_alone(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(paths.DATA / "val-00001.tar", tmp_path / "data" / "train-00000.tar")
    command = [sys.executable, JOB, "--data", tmp_path / "data", "--out", tmp_path / "out", "--start", paths.TEACHER]
    run = lambda *more: subprocess.run(list(map(str, [*command, *more])), capture_output=True, text=True, check=False)
    done = run("--style", "noto", "--start-steps", "3")
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[0]) < int(done.stdout.split()[2])
    for part, same in (("unet", False), ("vae", True), ("text_encoder", True)):
        ours, theirs = (
            load_file(next((folder / part).glob("*.safetensors")))
            for folder in (tmp_path / "out/teacher", paths.TEACHER)
        )
        assert set(ours) == set(theirs) and all(ours[n].equal(theirs[n]) for n in ours) == same, part
    nothing = run("--style", "fluent")
    assert nothing.returncode == 2 and "--style fluent: 0 of" in nothing.stderr and nothing.stderr.count("\n") == 1


def test_a_base_of_pickles_is_refused(tmp_path):
    """Loading it would run what it holds. The job's own function, in this process: a start costs more than the test."""
    shutil.copy(paths.DATA / "val-00001.tar", tmp_path / "train-00000.tar")
    shutil.copytree(paths.TEACHER, tmp_path / "pickled")
    file = next((tmp_path / "pickled" / "unet").glob("*.safetensors"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    job = runpy.run_path(str(JOB))
    config = job["PretrainConfig"](out=tmp_path / "out", data=tmp_path, start=tmp_path / "pickled", start_steps=(2,))
    with pytest.raises(ConfigError, match=r"--start .*/pickled cannot be loaded: ") as caught:
        job["fine_tune"](config, config.start)
    assert "\n" not in str(caught.value)
