"""The configuration of an evaluation: which models, which prompts, which judges, on what."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hypersd_ray.config.base import Strict
from hypersd_ray.config.data import ActorPool

SchedulerName = Literal["auto", "edges", "tcd", "ddim", "lcm"]
EMBEDDED_TEACHER = str(Path(__file__).resolve().parents[1] / "embedded" / "teacher")
"""As `hypersd_ray/embedded/paths.py` has it, which is a room above this one."""
PromptSet = Literal["embedded", "coco5k", "parti", "file"]


class JudgesConfig(Strict):
    """Where the judges' weights lie; an empty one is not asked. The embedded model brings its own."""

    clip_score: str = ""
    """OpenAI's CLIP ViT-B/32 in open_clip's layout (or a folder in it); its image features serve diversity too."""
    clip_large: str = ""
    """OpenAI's CLIP ViT-L/14, the tower below the aesthetic predictors."""
    aesthetic_v1: str = ""
    """LAION's sa_0_4_vit_l_14_linear.pth."""
    aesthetic_v2: str = ""
    """LAION's sac+logos+ava1-l14-linearMSE.pth."""
    image_reward: str = ""
    """ImageReward.pt."""
    image_reward_tokenizer: str = ""
    """bert-base-uncased's vocab.txt."""
    pick_score: str = ""
    """Folder of yuvalkirstain/PickScore_v1."""
    hps_v21: str = ""
    """HPS_v2.1_compressed.pt."""
    lpips: str = ""
    """AlexNet in torchvision's layout (alexnet-owt-7be5be79.pth): LPIPS between pictures of one prompt, with images_per_prompt
    of 2 and more. The extra `lpips` has the rest of it."""
    solo: str = ""
    """solo_r50_fpn in mmdetection's layout, or a folder: average precision of the objects that prompts name."""
    annotations: str = ""
    """COCO instances of the pictures whose captions are the prompts; needed by `solo`."""
    captions: str = ""
    """COCO captions of the same pictures; needed by `solo`."""

    @property
    def is_empty(self) -> bool:
        """Whether none is named."""
        return not any(self.model_dump().values())


class EvaluateConfig(Strict):
    """Few-step models beside each other: quality with intervals, diversity, fidelity, latency, memory."""

    base: str = EMBEDDED_TEACHER
    """Folder of the base model in diffusers' layout."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Sampling steps."""
    scheduler: SchedulerName = "auto"
    """"auto": as a run's recipe or a LoRA's metadata says, else TCD; "edges": the training edges; or diffusers' own."""
    eta: float | None = Field(default=None, ge=0, le=1)
    """TCD's gamma; None is the model's own, else 0."""
    guidance: float = Field(default=1.0, ge=1)
    """Guidance of the few-step models, as uncond + guidance (cond - uncond); 1 is none."""
    prompts: PromptSet = "embedded"
    """"embedded": the embedded model's held-out captions; "coco5k": jobs/coco5k.py's manifest; "parti": PartiPrompts;
    "file": a text file, one prompt a line, or parquet with a column caption, prompt or text."""
    prompts_file: str = ""
    """Where it is: the manifest, PartiPrompts.tsv, the text or the parquet file."""
    limit: int | None = Field(default=None, ge=2)
    """The first so many prompts; None is all."""
    images_per_prompt: int = Field(default=1, ge=1)
    """Pictures of each prompt, each from noise of its own; diversity between seeds needs 2."""
    seed: int = 0
    """Noise is a function of it, the picture's number and the prompt; the bootstrap too."""
    baseline: str = ""
    """The model (as MODEL is named) that paired differences are taken to; "teacher" is the base, guided."""
    teacher_steps: int = Field(default=25, ge=1, le=1000)
    """DDIM steps of the baseline "teacher"."""
    reference_steps: int = Field(default=50, ge=0, le=1000)
    """The teacher's DDIM steps that fidelity is measured to, from the same noise; 0 leaves fidelity out."""
    teacher_guidance: float = Field(default=3.0, ge=1)
    """The teacher's guidance scale; SD1.5 and SDXL: 7.5."""
    judges: JudgesConfig = JudgesConfig()
    """Their weights; all empty takes the embedded ones where the base or the prompts are the embedded ones."""
    reference_pictures: str = ""
    """Shards of real pictures (webdataset) for CMMD; empty leaves it out."""
    latency_repeats: int = Field(default=5, ge=0)
    """Pictures, one at a time, over which latency and memory are measured; 0 leaves them out."""
    per_shard: int = Field(default=64, ge=1)
    """Pictures of one file: what is lost when the job is killed."""
    generators: ActorPool = ActorPool(batch_size=64, max_size=None)
    """Actors that make pictures."""
    scorers: ActorPool = ActorPool(batch_size=64, max_size=None)
    """Actors that judge them."""
    where: Literal["ray", "local"] = "ray"
    """"ray": pools of actors, on as many nodes as there are; "local": in this process, for a few pictures."""
    out: str = "runs/evaluation"
    """Folder of pictures, scores and results, or an fsspec URL every node reaches. It may be shared by evaluations."""
    export_images: str = ""
    """Folder for a folder of each model's pictures at each number of steps, as jobs/study.py takes them; empty is none."""
    resamples: int = Field(default=2000, ge=100)
    """Of the bootstrap."""
