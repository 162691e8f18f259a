"""Rows of the paper's own tables (COCO-5k, SD1.5 and SDXL), to stand beside ours where the setting is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypersd_ray.models.checkpoint import BaseInfo


@dataclass(frozen=True)
class PaperRow:
    """A model at a number of steps: CLIP score (ViT-B/32), LAION aesthetic, ImageReward, PickScore."""

    family: str
    model: str
    steps: int
    clip_score: float
    aesthetic_v2: float
    image_reward: float
    pick_score: float


TABLE_2 = (
    PaperRow("sd", "SD15-Base", 25, 31.88, 5.26, 0.18, 0.217),
    PaperRow("sd", "SD15-LCM", 4, 30.36, 5.66, -0.37, 0.212),
    PaperRow("sd", "SD15-TCD", 4, 30.62, 5.45, -0.15, 0.214),
    PaperRow("sd", "PeRFlow", 4, 30.77, 5.64, -0.35, 0.208),
    PaperRow("sd", "Hyper-SD15", 1, 30.87, 5.79, 0.29, 0.215),
    PaperRow("sdxl", "SDXL-Base", 25, 33.16, 5.54, 0.87, 0.229),
    PaperRow("sdxl", "SDXL-LCM", 4, 32.43, 5.42, 0.48, 0.224),
    PaperRow("sdxl", "SDXL-TCD", 4, 32.45, 5.42, 0.67, 0.226),
    PaperRow("sdxl", "SDXL-Lightning", 4, 32.40, 5.63, 0.72, 0.229),
    PaperRow("sdxl", "Hyper-SDXL", 4, 32.56, 5.74, 0.93, 0.232),
    PaperRow("sdxl", "SDXL-Turbo (UNet)", 1, 32.33, 5.33, 0.78, 0.228),
    PaperRow("sdxl", "SDXL-Lightning (UNet)", 1, 32.17, 5.34, 0.54, 0.223),
    PaperRow("sdxl", "Hyper-SDXL (UNet)", 1, 32.85, 5.85, 1.19, 0.231),
)
"""Table 2; the base with guidance, the others without."""
CONFERENCE = (
    PaperRow("sdxl", "TCD, no feedback", 2, 32.36, 5.62, 0.29, 0.217),
    PaperRow("sdxl", "TCD, no feedback", 4, 32.45, 5.42, 0.67, 0.226),
    PaperRow("sdxl", "TCD, no feedback", 8, 32.47, 5.78, 0.76, 0.229),
    PaperRow("sdxl", "TSCD, no feedback", 2, 32.49, 5.58, 0.64, 0.222),
    PaperRow("sdxl", "TSCD, no feedback", 4, 32.53, 5.66, 0.78, 0.229),
    PaperRow("sdxl", "TSCD, no feedback", 8, 32.46, 5.85, 0.77, 0.229),
    PaperRow("sdxl", "TSCD + feedback", 1, 32.59, 5.69, 1.06, 0.226),
    PaperRow("sdxl", "TSCD + feedback", 2, 32.61, 5.84, 1.04, 0.232),
    PaperRow("sdxl", "TSCD + feedback", 4, 32.56, 5.74, 0.93, 0.232),
    PaperRow("sdxl", "TSCD + feedback", 8, 32.56, 5.89, 0.93, 0.232),
    PaperRow("sdxl", "unified LoRA", 1, 32.59, 5.69, 1.06, 0.226),
    PaperRow("sdxl", "unified LoRA", 2, 32.59, 5.71, 1.15, 0.234),
    PaperRow("sdxl", "unified LoRA", 4, 32.51, 5.52, 1.15, 0.234),
    PaperRow("sdxl", "unified LoRA", 8, 32.54, 5.83, 1.14, 0.233),
)
"""Of the conference version."""
MEASURES = ("clip_score", "aesthetic_v2", "image_reward", "pick_score")
FID_REMARK = (
    "No FID: the paper does not report it, as its authors observe that it cannot well reflect the quality of the "
    "generated pictures."
)


COCO_IMAGES = [5000, 139, 581781]
"""COCO2017-val: how many pictures, the least and the greatest of their ids."""
WIDTHS = {"sd": 768, "sdxl": 2048}
"""family -> cross_attention_dim of the paper's UNet: SD2 and small models are of other widths."""
NOTE = (
    "The paper's rows are of the original bases, Stable Diffusion 1.5 and SDXL 1.0; a fine-tune of one cannot be told "
    "from it by its sizes, and its numbers do not compare."
)


def comparable(base: BaseInfo, prompts: dict[str, Any]) -> tuple[PaperRow, ...]:
    """The rows whose setting is ours; none where it is another model or other prompts, or not all of them. `prompts` as in the
    results of an evaluation."""
    same_base = (
        base.unet_config.get("cross_attention_dim") == WIDTHS[base.family] and base.parameterization == "epsilon"
    )
    whole = prompts["name"] == "coco5k" and prompts["count"] == COCO_IMAGES[0] and prompts.get("images") == COCO_IMAGES
    if not same_base or not whole:
        return ()
    return tuple(row for row in (*TABLE_2, *CONFERENCE) if row.family == base.family)
