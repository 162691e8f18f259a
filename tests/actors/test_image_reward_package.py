"""The authors' own ImageReward, in its actor and environment, beside ours: the same scores from the same random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hypersd_ray.actors.client import RemoteBackend
from hypersd_ray.actors.placement import start_evaluators, stop_evaluators
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.rewards import PlacementConfig, RewardConfig
from hypersd_ray.models.rewards.image_reward import (
    _VISION,
    ImageReward,
    load_image_reward,
    make_tokenizer,
    text_config,
    vision_config,
)  # fmt: skip
from hypersd_ray.models.rewards.image_reward_package import load_image_reward_package, make_environment
from hypersd_ray.models.scoring import RewardClient, local_backend
from tests.helpers.rays import own_ray

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cat", "A cat, and a blue dog!", "the unknown dogs"]
PUBLISHED = {
    "embeddings.patch_embedding.": "patch_embed.proj.", "embeddings.position_embedding": "pos_embed",
    "embeddings.class_embedding": "cls_token", "encoder.layers.": "blocks.", ".self_attn.qkv.": ".attn.qkv.",
    ".self_attn.projection.": ".attn.proj.", ".layer_norm": ".norm", "post_layernorm.": "norm.",
}  # fmt: skip


def published_name(name: str) -> str:
    """Ours -> the authors'."""
    part, _, inner = name.partition(".")
    if part == "vision":
        for ours, theirs in PUBLISHED.items():
            inner = inner.replace(ours, theirs)
        return f"blip.visual_encoder.{inner}"
    return {"text": "blip.text_encoder.", "head": "mlp."}[part] + inner


def test_without_its_environment_it_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match=r"jobs/image_reward_env.py --out DIR"):
        load_image_reward_package(tmp_path / "ImageReward.pt", tmp_path / "vocab.txt")


def test_the_job_refuses_a_folder_that_is_there(tmp_path):
    command = [sys.executable, "jobs/image_reward_env.py", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "exists: name a new folder" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_the_package_gives_the_native_scores(tmp_path):
    """Scores to 1e-5 in the actor, gradients to half precision, and the package's own way from PIL pictures."""
    python = make_environment(tmp_path / "env")
    vocabulary = tmp_path / "vocab.txt"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "and",
        "the",
        "red",
        "blue",
        "cat",
        "dog",
        "##s",
        ",",
        "!",
    ]
    vocabulary.write_text("\n".join(words + [f"[unused{i}]" for i in range(30522 - len(words))]) + "\n")
    torch.manual_seed(0)
    native = ImageReward(vision_config(), text_config(), make_tokenizer(vocabulary))
    for parameter in native.head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # the authors' start is next to 0 for every picture
    torch.save({published_name(k): v for k, v in native.state_dict().items()}, tmp_path / "ImageReward.pt")
    del native
    files = {"checkpoint": str(tmp_path / "ImageReward.pt"), "tokenizer": str(vocabulary)}
    pixels = torch.randint(256, (3, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = RewardClient(local_backend([RewardConfig(name="image_reward", **files)], "cpu"))
    x = (pixels.float() / 255).half().float().requires_grad_(True)  # as the pictures travel
    expected = ours(x, {"image_reward": PROMPTS})["image_reward"].values
    expected.sum().backward()
    assert expected.std() > 1e-2

    with own_ray(2):
        reward = RewardConfig(name="image_reward_package", python=str(python), **files)
        handles = start_evaluators([reward], PlacementConfig(place_timeout_s=300), "package")
        theirs = RewardClient(RemoteBackend(handles))
        y = x.detach().clone().requires_grad_(True)
        found = theirs(y, {"image_reward_package": PROMPTS})["image_reward_package"].values
        found.sum().backward()
        stop_evaluators(handles)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.grad, x.grad, rtol=2e-3, atol=2e-3 * x.grad.abs().max().item())

    model = load_image_reward(files["checkpoint"], vocabulary)
    native_scores = model(pixels.float() / 255, PROMPTS)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    script = (
        "import sys; from pathlib import Path; from PIL import Image\n"
        "from hypersd_ray.models.rewards.image_reward_package import load_image_reward_package\n"
        "folder = Path(sys.argv[1])\n"
        "model = load_image_reward_package(folder / 'ImageReward.pt', folder / 'vocab.txt').model\n"
        "print(*[model.score(p, Image.open(folder / f'{i}.png')) for i, p in enumerate(sys.argv[2:])])\n"
    )
    done = subprocess.run(
        [str(python), "-c", script, str(tmp_path), *PROMPTS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    told = torch.tensor([float(word) for word in done.stdout.split()[-3:]])
    torch.testing.assert_close(told, native_scores, rtol=0, atol=1e-5)


def test_published_names_are_the_inverse_of_the_loader():
    from hypersd_ray.models.rewards.image_reward import from_published

    with torch.device("meta"):
        names = ImageReward(vision_config(), text_config(), None).state_dict()
    assert len(_VISION) == len(PUBLISHED)
    assert from_published({published_name(name): tensor for name, tensor in names.items()}).keys() == names.keys()


def test_a_run_says_so_before_it_starts(tmp_path):
    from hypersd_ray.embedded import paths
    from hypersd_ray.recipes.feedback import feedback_tiny
    from hypersd_ray.trainer.kinds.feedback import check

    (tmp_path / "file").write_bytes(b"")
    reward = RewardConfig(
        name="image_reward_package", checkpoint=str(tmp_path / "file"), tokenizer=str(tmp_path / "file")
    )
    config = feedback_tiny(str(paths.LORAS / "tscd-k1.safetensors"), "reward")
    with pytest.raises(ConfigError, match=r"rewards.image_reward_package with placement.where=actors"):
        check(config.model_copy(update={"rewards": (reward,)}))
