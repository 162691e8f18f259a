"""ImageReward as its authors' package `image-reward` computes it: an alternative to `image_reward.py`, in an environment
of its own.

The package pins libraries of 2023 and does not import beside today's transformers. `make_environment` (or
`jobs/image_reward_env.py`) puts it, at the versions of `image_reward_requirements.txt`, above the environment that runs
now: everything that is not in that file, torch first of all, is shared and not copied.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from hypersd_ray.models.rewards.image_reward import TOKENS, UNUSED
from hypersd_ray.models.rewards.preprocess import Preprocess
from hypersd_ray.models.rewards.protocol import RewardModel, check_images
from hypersd_ray.models.rewards.weights import read_tensors

REQUIREMENTS = Path(__file__).with_name("image_reward_requirements.txt")
MED_CONFIG = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip
"""BLIP's med_config.json, which the package would download."""


class PackagedImageReward(RewardModel):
    """`ImageReward.ImageReward` behind this project's face."""

    convention = (
        "ImageReward by the image-reward package, (r - 0.1672) / 1.0333, bicubic to the short side, centre crop"
    )

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.preprocess = model, Preprocess(224)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        self.model.device = self.device  # type: ignore[assignment]  # the package's own attribute, not a module's
        told = self.model.blip.tokenizer(  # type: ignore[operator,union-attr]
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = self.preprocess(images.float())
        return self.model.score_gard(told.input_ids, told.attention_mask, pixels).squeeze(-1).float()  # type: ignore[operator]


def load_image_reward_package(checkpoint: str | Path, vocabulary: str | Path | None) -> PackagedImageReward:
    """The published `ImageReward.pt` with bert-base-uncased's vocabulary, into the package's own classes.

    Raises:
        ValueError: this environment has no image-reward, or a file is missing or does not fit; one line.
    """
    try:
        from ImageReward.ImageReward import ImageReward
        from ImageReward.models.BLIP import blip_pretrain
        from transformers import BertTokenizer
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"image_reward_package: image-reward cannot be imported here ({error}): `python jobs/image_reward_env.py "
            "--out DIR` makes its environment; set the reward's `python` to DIR/bin/python and placement.where=actors"
        ) from None
    if vocabulary is None or not Path(vocabulary).is_file():
        raise ValueError(
            f"{vocabulary} is not a file: ImageReward needs bert-base-uncased's vocab.txt: set the reward's `tokenizer`"
        )

    def tokenizer() -> BertTokenizer:  # the package would ask the hub
        made = BertTokenizer(str(vocabulary))
        made.add_special_tokens({"bos_token": "[DEC]"})
        made.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return made

    blip_pretrain.init_tokenizer = tokenizer
    tensors = read_tensors(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "med_config.json"
        config.write_text(json.dumps(MED_CONFIG))
        model = ImageReward(med_config=str(config))
    wrong = model.load_state_dict(tensors, strict=False)
    # the position ids are 0, 1, 2, ...; older versions store them and newer ones do not
    missing = [name for name in wrong.missing_keys if not name.startswith(UNUSED) and not name.endswith("position_ids")]
    if missing or wrong.unexpected_keys:
        raise ValueError(
            f"{checkpoint} does not fit the package's ImageReward: {len(missing)} missing ({missing[:1]}), "
            f"{len(wrong.unexpected_keys)} unexpected ({wrong.unexpected_keys[:1]})"
        )
    return PackagedImageReward(model).eval().requires_grad_(False)


def make_environment(folder: str | Path) -> Path:
    """An environment at `folder` with the package's pins above the one that runs now; returns its interpreter.

    Raises:
        RuntimeError: pip failed, with its last line.
    """
    folder = Path(folder)
    venv.EnvBuilder(with_pip=True).create(folder)
    python = folder / "bin" / "python"
    own = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # addsitedir and not a bare path: what is installed here as editable is found by a .pth of its own
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(shared)]
    (own / "shared.pth").write_text("\n".join(lines) + "\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return python
