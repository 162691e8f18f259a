"""The rates of training steps: what is counted, against closed forms, and the table of a short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation import step_rate
from evaluation.step_rate import RateConfig
from hypersd_ray.models.roles import TEACHER

ROOT = Path(__file__).parents[2]
TINY = RateConfig(shape="tiny", device="cpu", precision="fp32", batches=(2,), steps=1)


def test_products_are_counted_forwards_and_backwards():
    x, w = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    with step_rate.Flops() as counter:
        (x @ w).sum().backward()
    assert counter.total == 2 * 3 * 5 * 7 * 2, "the product and the gradient of w; x needs none"


@pytest.fixture(scope="module")
def forward():
    """FLOPs of the tiny UNet on one row."""
    settings = step_rate.recipe_of(TINY, "tscd", Path())
    batch, null = step_rate.inputs_of(settings, 1, torch.device("cpu"))
    training = step_rate.build(settings, "tscd", null, torch.device("cpu"))
    with step_rate.Flops() as counter, torch.no_grad(), training.roles.playing(TEACHER) as unet:
        unet(batch.x0, torch.zeros(1, dtype=torch.long), batch.cond.prompt_embeds)
    return counter.total


@pytest.mark.parametrize(
    ("build_as", "passes"),
    [
        # Teacher with and without the prompt, target, student; its backward pass: the inputs' and, in full, the weights'.
        ("full-unet", 3 + 1 + 2),
        ("tscd", 3 + 1 + 1),
    ],
)
def test_a_step_is_so_many_passes(build_as, passes, forward):
    settings = step_rate.recipe_of(TINY.model_copy(update={"adversarial": False}), "tscd", Path())
    batch, null = step_rate.inputs_of(settings, 1, torch.device("cpu"))
    flops = step_rate.model_flops(step_rate.build(settings, build_as, null, torch.device("cpu")), batch)
    # A LoRA of rank 64 adds its own products to layers that are hardly wider here.
    assert flops == pytest.approx(passes * forward, rel=0.03 if build_as == "full-unet" else 0.5)
    assert flops >= 0.97 * passes * forward


def test_batches_and_the_table():
    rates = step_rate.measure(TINY.model_copy(update={"batches": (1, 3), "peak_tflops": 0.5}), "onestep")
    assert [r.batch for r in rates] == [1, 3]
    assert rates[1].tflops == pytest.approx(3 * rates[0].tflops)
    for r in rates:
        assert r.utilisation == pytest.approx(r.tflops / r.seconds / 0.5)
        assert r.images_per_s == pytest.approx(r.batch / r.seconds)
    assert step_rate.table(rates).splitlines()[2].startswith("| onestep | 1 |")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "evaluation/step_rate.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_command(tmp_path):
    out = tmp_path / "rate.json"
    done = run("--shape", "tiny", "--device", "cpu", "--precision", "fp32", "--kinds", "full-unet", "--batches", "1",
               "--steps", "1", "--checkpointing", "--out", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| full-unet | 1 |" in done.stdout and "- | - |" in done.stdout, "a CPU's peak and memory are not known"
    (rate,) = json.loads(out.read_text())["rates"]
    assert rate["utilisation"] is None and rate["tflops"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: device=cuda: torch sees no GPU here")
