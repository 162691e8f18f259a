"""docs/cluster.md: its commands are read by the jobs' own parsers, its figures are calculated again from the code."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.cli import parse, read_options
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.run import RunConfig
from hypersd_ray.config.sweep import SweepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.checkpoint import Family, read_base
from hypersd_ray.models.discriminator import LatentDiscriminator
from hypersd_ray.models.shapes import write_shape
from hypersd_ray.recipes import FEEDBACK_RECIPES, RECIPES, SWEEP_RECIPES
from hypersd_ray.recipes.tscd import sd15, sdxl
from hypersd_ray.tuning.plan import Hardware, filled, row, work_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text()
COMMANDS = re.findall(r"-- (python jobs/.*?)(?:  #.*)?$", re.sub(r"\\\n\s*", "", PAGE), flags=re.MULTILINE)


def read(command: str, local: Path):
    """The configuration that a command gives, with files that are there in place of those under /shared."""
    words = shlex.split(command)
    assert words[0] == "python" and (ROOT / words[1]).is_file()
    words = [str(local / "prompts.txt") if w.endswith("prompts.txt") else w for w in words]
    words = [str(local) if w.startswith("/shared/") and "lora" not in w else w for w in words]
    words = [str(local / "lora.safetensors") if w.startswith("/shared/") else w for w in words]
    if words[1] == "jobs/precompute.py":
        sys.path.insert(0, str(ROOT / "jobs"))
        try:
            kind = importlib.import_module("precompute").PrecomputeConfig
        finally:
            sys.path.remove(str(ROOT / "jobs"))
        return read_options(kind, words[2:], "")
    recipes, kind = {
        "jobs/tscd.py": (RECIPES, TSCDConfig),
        "jobs/feedback.py": (FEEDBACK_RECIPES, FeedbackConfig),
        "jobs/sweep.py": (SWEEP_RECIPES, SweepConfig),
    }[words[1]]
    return parse(recipes, kind, "", words[2:])


@pytest.fixture
def local(tmp_path) -> Path:
    """A folder with a file that a LoRA could be, and prompts."""
    (tmp_path / "lora.safetensors").touch()
    (tmp_path / "prompts.txt").write_text("".join(f"a picture of {i} cats\n" for i in range(600)))
    return tmp_path


def test_the_commands_are_all_read(local):
    assert len(COMMANDS) == 5
    configs = {command.split()[1]: read(command, local) for command in COMMANDS}
    encode, feedback = configs["jobs/precompute.py"], configs["jobs/feedback.py"]
    assert encode.data.encoder.label_selector == {"hypersd/pool": "encode"}
    assert (encode.data.encoder.num_cpus, encode.data.encoder.num_gpus) == (0, 0.5)
    assert feedback.placement.label_selector == {"hypersd/pool": "reward"}
    needed = feedback.placement.replicas * len(feedback.models) * feedback.placement.num_gpus
    assert 3 < needed <= 4, "four L4s"
    with pytest.raises(ConfigError, match="label-selectr"):
        read(COMMANDS[0] + " --data.encoder.label-selectr x y", local)


def test_the_settings_it_names_exist():
    fields = {"run": RunConfig.model_fields}
    for name in ("max_failures", "checkpoint_every", "keep_checkpoints", "out", "name", "workers"):
        assert name in fields["run"]
    for path in re.findall(r"`((?:cluster|serve|tests|jobs)/[\w./]+\.\w+)`", PAGE):
        assert (ROOT / path).is_file(), path


def figure(row: str) -> str:
    """The figure in a row of the last table."""
    (value,) = re.findall(rf"^\| {row} \| (.*?) \|", PAGE, flags=re.MULTILINE)
    return value


def test_the_figures_follow_from_the_code(tmp_path):
    config = sdxl(str(tmp_path))
    gpus, batch, steps = config.run.workers, config.optim.batch, config.distill.steps_list
    assert (gpus, batch, set(steps)) == (32, 512, {5000})
    hours = len(steps) * 200 / gpus
    second = hours / len(steps) * 3600 / steps[0]
    row = (4 * 128 * 128 + 77 * 2048 + 1280) * 2 + 6 * 4
    heads = LatentDiscriminator({"block_out_channels": [320, 640, 1280]}, seed=0)
    checkpoint = 4 * 787.0e6 + 3 * 4 * sum(p.numel() for p in heads.parameters())
    assert figure("nodes") == f"{gpus / 8:g}"
    assert figure("hours") == f"{hours:g}" and figure("node-hours") == f"{gpus / 8 * hours:g}"
    assert figure("seconds a step") == f"{second:.1f}" and figure("images a second") == f"{batch / second:.0f}"
    assert figure("images seen") == f"{sum(steps) * batch / 1e6:.2f} million"
    assert figure("a latent row") == f"{row / 1e3:.0f} kB" and figure("a million latents") == f"{row / 1e3:.0f} GB"
    assert figure("reading them") == f"{batch / second * row / 1e6:.0f} MB/s"
    assert figure("a checkpoint") == f"{checkpoint / 1e9:.1f} GB"
    assert figure("checkpoints kept") == f"{(config.run.keep_checkpoints + 1) * checkpoint / 1e9:.1f} GB"
    assert figure("LoRAs") == f"{len(steps) * 2 * 0.787:.1f} GB"
    pool = config.data.encoder
    assert f"{gpus} x {pool.min_size} x {pool.num_gpus} = {gpus * pool.min_size * pool.num_gpus:g}" in PAGE
    assert pool.max_size is not None
    assert f"{gpus} x {pool.max_size} x {pool.num_gpus} = {gpus * pool.max_size * pool.num_gpus:g}" in PAGE


def test_the_plans_are_what_the_code_plans(tmp_path):
    shapes: tuple[Family, ...] = ("sd", "sdxl")
    for family in shapes:
        write_shape(tmp_path / family, family)
    small, large = sd15(str(tmp_path / "sd")), sdxl(str(tmp_path / "sdxl"))
    full = large.model_copy(update={"full_unet": True})
    lines, reduce_bites_from = {w: f"| {w} |" for w in (8, 16, 32, 64, 128, 256)}, []
    for config in (small, large, full):
        info = read_base(config.teacher)
        work, hardware = work_of(config, info), filled(Hardware(), config, info)
        rows = [row(work, hardware, w) for w in lines]
        for r in rows:
            shares = f"{r.all_reduce / r.step:.1%} | {r.checkpoint / r.step:.1%}"
            lines[r.workers] += f" {r.images_s:.1f} | {shares} | {r.encoders} |"
        reduce_bites_from.append(next((r.workers for r in rows if "all-reduce" in r.limits), None))
    assert "\n".join(lines.values()) in PAGE
    assert reduce_bites_from == [256, None, 64]
    assert "from 256 GPUs on" in PAGE and "from 64 GPUs on" in PAGE
