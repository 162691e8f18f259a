"""Train the embedded world's ImageReward and HPS: what the oracle of `preferences.py` would prefer (Eq. 11).

The published ones were pretrained on captions before they learned from comparisons; here the contrastive loss of captions
is beside Eq. 11 from the start.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_ray.embedded.preferences import Preferences
from hypersd_ray.embedded.pretrain_clip import contrastive_loss, save_clip, tokenize_all
from hypersd_ray.embedded.text import load_tokenizer
from hypersd_ray.embedded.training import train
from hypersd_ray.losses.feedback import loss_rm
from hypersd_ray.models.rewards.aesthetic import HeadV2
from hypersd_ray.models.rewards.clip import CONFIG, HPSv2, load_tower
from hypersd_ray.models.rewards.image_reward import (
    ImageReward,
    load_image_reward,
    save_image_reward,
    text_config,
    vision_config,
)
from hypersd_ray.models.rewards.protocol import RewardModel

INITIALIZER_RANGE = 0.02
"""Deviation of new vision weights. transformers' own, 1e-10, is for weights that are loaded over them (the committed
ImageReward did begin with it; whether it would know more without is not measured)."""
ALIGN = 96
"""Width of the embedding that the contrastive loss compares."""
HPS_SCALE = 100.0
"""Its cosines differ by hundredths."""


def new_image_reward(teacher: Path, seed: int = 0) -> ImageReward:
    """Untrained (1.9M parameters), with the teacher's tokenizer."""
    tokenizer = load_tokenizer(teacher / "tokenizer")
    torch.manual_seed(seed)
    model = ImageReward(
        vision_config(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                      image_size=32, patch_size=8, initializer_range=INITIALIZER_RANGE),
        text_config(vocab_size=len(tokenizer), hidden_size=96, encoder_hidden_size=128, intermediate_size=384,
                    num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32,
                    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                    sep_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
        tokenizer, mean=0.0, std=1.0,
    )  # fmt: skip
    # The authors' start of the head, 1 / width in five layers, is for features that are trained already: from scratch
    # next to no gradient would get through it.
    model.head = HeadV2(96)
    return model


class _Blip(nn.Module):
    """An ImageReward, and what its encoders are aligned by."""

    def __init__(self, reward: ImageReward):
        super().__init__()
        self.reward = reward
        self.image = nn.Linear(reward.vision.config.hidden_size, ALIGN)
        self.text = nn.Linear(reward.text.config.hidden_size, ALIGN)
        self.log_scale = nn.Parameter(torch.tensor(2.6))

    def align(self, patches: Tensor, captions: list[str]) -> Tensor:
        """Contrastive loss of pictures, as patches (B, L, D), and their captions."""
        told = self.reward.tokenizer(captions, padding="max_length", truncation=True,
                                     max_length=self.reward.tokens, return_tensors="pt").to(patches.device)  # fmt: skip
        out = self.reward.text(input_ids=told.input_ids, attention_mask=told.attention_mask, is_decoder=False)
        image = F.normalize(self.image(patches[:, 0]), dim=-1)
        text = F.normalize(self.text(out.last_hidden_state[:, 0]), dim=-1)
        return contrastive_loss(image, text, told.input_ids, self.log_scale.exp().clamp(max=100))


def train_image_reward(
    preferences: Preferences, teacher: Path, out: Path, folder: Path, steps: int, batch: int = 128, seed: int = 0,
    device: torch.device | str = "cpu",
) -> ImageReward:  # fmt: skip
    """Writes `folder`; its scores of the bank's pictures have mean 0 and deviation 1, as the published one's."""
    bank, blip = preferences.bank, _Blip(new_image_reward(teacher, seed)).train()
    reward, captions = blip.reward, bank.captions

    def loss(generator: torch.Generator) -> Tensor:
        drawn = preferences.draw(batch, generator)
        members = torch.cat([drawn.chosen, drawn.rejected])
        pixels = reward.preprocess(bank.take(*members.unbind(1)))
        patches = reward.vision(pixel_values=pixels).last_hidden_state
        prompts = [captions[i] for i in drawn.prompt.tolist()]
        r_w, r_l = reward.raw(patches, prompts * 2).chunk(2)
        return loss_rm(r_w, r_l).mean() + blip.align(patches, [captions[i] for i in members[:, 1].tolist()])

    train("image_reward", blip, loss, steps, 1e-3, out, seed, weight_decay=0.05, device=device)
    _standardise(reward.eval(), preferences)
    save_image_reward(reward.half(), folder)  # a repository is small
    return load_image_reward(folder)


@torch.no_grad()
def _standardise(reward: ImageReward, preferences: Preferences) -> None:
    drawn = preferences.draw(2048, torch.Generator().manual_seed(0))
    scores = torch.cat([_scores(reward, preferences, drawn.prompt, m) for m in (drawn.chosen, drawn.rejected)])
    reward.mean, reward.std = float(scores.mean()), float(scores.std())


def train_hps(
    preferences: Preferences, clip: Path, out: Path, folder: Path, steps: int, batch: int = 128, seed: int = 1,
    device: torch.device | str = "cpu",
) -> HPSv2:  # fmt: skip
    """The CLIP in the folder `clip`, tuned to preferences as HPS v2 was (logits are its scaled cosines); writes `folder`."""
    bank, tower = preferences.bank, load_tower("", clip, fit="pad")
    network = tower.clip.requires_grad_(True).train()
    ids = tokenize_all(tower, bank.captions).to(device)

    def loss(generator: torch.Generator) -> Tensor:
        drawn = preferences.draw(batch, generator)
        members = torch.cat([drawn.chosen, drawn.rejected])
        image = network.encode_image(tower.preprocess(bank.take(*members.unbind(1))), normalize=True)
        prompt = network.encode_text(ids[drawn.prompt.to(device)], normalize=True)
        r_w, r_l = (HPS_SCALE * image * prompt.repeat(2, 1)).sum(1).chunk(2)
        shown = ids[members[:, 1].to(device)]
        text = network.encode_text(shown, normalize=True)
        return loss_rm(r_w, r_l).mean() + contrastive_loss(image, text, shown, network.logit_scale.exp().clamp(max=100))

    train("hps", network, loss, steps, 5e-4, out, seed, weight_decay=0.05, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((clip / name).read_bytes())
    save_clip(network, folder)
    return HPSv2(load_tower("", folder, fit="pad"))


def _scores(model: RewardModel, preferences: Preferences, prompt: Tensor, members: Tensor) -> Tensor:
    """(N,), on the CPU."""
    told, bank, found = [preferences.bank.captions[i] for i in prompt.tolist()], preferences.bank, []
    for i in range(0, len(told), 256):
        pictures = bank.take(*members[i : i + 256].unbind(1)).to(model.device)
        found.append(model(pictures, told[i : i + 256]).cpu())
    return torch.cat(found)


@torch.no_grad()
def agreement(model: RewardModel, preferences: Preferences, pairs: int = 2048, seed: int = 0) -> dict[str, float]:
    """How often it prefers what the oracle does: of all pairs, and of those whose pictures both are of the caption."""
    drawn = preferences.draw(pairs, torch.Generator().manual_seed(seed))
    sides = [_scores(model, preferences, drawn.prompt, members) for members in (drawn.chosen, drawn.rejected)]
    hits = (sides[0] > sides[1]).float()
    own = (drawn.chosen[:, 1] == drawn.prompt) & (drawn.rejected[:, 1] == drawn.prompt)
    return {"accuracy": hits.mean().item(), "accuracy_of_marks": hits[own].mean().item()}
