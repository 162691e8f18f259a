"""Train the embedded world's denoiser and text encoder together: epsilon prediction on SD1.5's noise schedule.

Stable Diffusion's text encoder was trained elsewhere and frozen; here there is no elsewhere, so it learns with the UNet.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from hypersd_ray.embedded.pictures import to_unit
from hypersd_ray.embedded.training import Cycles

SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon",
)  # fmt: skip
"""SD1.5's scheduler config."""


def make_unet() -> UNet2DConditionModel:
    """SD1.5's UNet, narrower and with two levels: 2.4M parameters on 8x8x4 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents (N, 4, h, w) of uint8 images, scaled to unit variance."""
    parts = [vae.encode(to_unit(chunk.to(vae.device))).latent_dist.mode().cpu() for chunk in images.split(256)]
    return torch.cat(parts) * vae.config.scaling_factor


class Pretraining:
    """UNet and text encoder, their running averages, optimiser and data; one `step` at a time. A `unet` that is given goes
    on alone: the text encoder stays as it is."""

    def __init__(
        self,
        latents: torch.Tensor,
        tokens: torch.Tensor,
        empty: torch.Tensor,
        text: CLIPTextModel,
        steps: Sequence[int],
        batch: int,
        lr: float,
        device: str = "cpu",
        unet: UNet2DConditionModel | None = None,
    ):
        self.device = torch.device(device)
        self.unet, self.text = (unet or make_unet()).to(device), text.to(device).requires_grad_(unet is None)
        self.averages = [copy.deepcopy(self.unet), copy.deepcopy(self.text)]
        self.latents, self.tokens, self.empty, self.batch = latents, tokens, empty, batch
        self.parameters = [p for p in (*self.unet.parameters(), *self.text.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-3)
        self.schedule = Cycles(self.optimizer, steps, lr, warm=0.05)
        self.alphas_cumprod = DDIMScheduler(**SCHEDULER).alphas_cumprod

    def step(self, generator: torch.Generator) -> float:
        """One step of the epsilon loss, a tenth of the captions emptied for guidance; returns the loss."""
        index = torch.randint(len(self.latents), (self.batch,), generator=generator)
        t = torch.randint(1000, (self.batch,), generator=generator)
        x0, tokens = self.latents[index], self.tokens[index]
        tokens = torch.where(torch.rand(self.batch, 1, generator=generator) < 0.1, self.empty, tokens)
        eps = torch.randn(x0.shape, generator=generator)
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t, t, tokens, eps = (one.to(self.device) for one in (a.sqrt() * x0 + (1 - a).sqrt() * eps, t, tokens, eps))
        predicted = self.unet(x_t, t, self.text(tokens).last_hidden_state).sample
        loss = F.mse_loss(predicted, eps)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Move the averages: decay 0.9995 once warm."""
        decay = min(0.9995, (1 + step) / (10 + step))
        for average, model in zip(self.averages, (self.unet, self.text), strict=True):
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)

    def _parts(self) -> dict:
        return {
            "unet": self.unet, "text": self.text, "unet_average": self.averages[0], "text_average": self.averages[1],
            "optimizer": self.optimizer, "schedule": self.schedule,
        }  # fmt: skip

    def save(self, path: Path, step: int) -> None:
        """Everything that a resumed run needs."""
        part = path.with_suffix(".part")
        torch.save({name: one.state_dict() for name, one in self._parts().items()} | {"step": step}, part)
        part.replace(path)

    def load(self, path: Path) -> int:
        """Returns the step to go on from."""
        state = torch.load(path, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        return state["step"]


def save_pipeline(
    out: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """A `StableDiffusionPipeline` folder, safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(out, safe_serialization=True)


def train_unet(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, text: CLIPTextModel, images: torch.Tensor, captions: list[str],
    out: Path, steps: Sequence[int], batch: int = 64, lr: float = 1e-3, seed: int = 0, device: str = "cpu",
    unet: UNet2DConditionModel | None = None,
) -> None:  # fmt: skip
    """Train, or fine-tune `unet` beside a frozen text encoder, for cycles of `steps` batches, resuming from `out/unet_state.pt`; saves the pipeline to `out/teacher` every 1000 steps."""
    torch.manual_seed(seed)
    pad = dict(padding="max_length", truncation=True, return_tensors="pt")
    run = Pretraining(
        encode(vae.to(device), images),
        tokenizer(captions, **pad).input_ids,
        tokenizer([""], **pad).input_ids,
        text,
        steps,
        batch,
        lr,
        device,
        unet,
    )
    state_path = out / "unet_state.pt"
    first = run.load(state_path) if state_path.exists() else 0
    begun, total, last = time.monotonic(), 0.0, sum(steps)
    for step in range(first, last):
        total += run.step(torch.Generator().manual_seed(seed * 1_000_003 + step))
        run.average(step)
        if (step + 1) % 100 == 0:
            print(
                f"unet step {step + 1}/{last} loss {total / 100:.4f} {(time.monotonic() - begun) / (step + 1 - first):.3f} s/step",
                flush=True,
            )
            total = 0.0
        if (step + 1) % 1000 == 0 or step + 1 == last:
            run.save(state_path, step + 1)
            save_pipeline(out / "teacher", vae, run.averages[0].eval(), run.averages[1].eval(), tokenizer)
