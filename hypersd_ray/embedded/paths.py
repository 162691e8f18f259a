"""Where the committed embedded model and data are."""

from pathlib import Path

ROOT = Path(__file__).parent
TEACHER = ROOT / "teacher"
"""A `StableDiffusionPipeline` folder."""
DATA = ROOT / "data"
"""WebDataset shards train-*.tar, val-*.tar and COCO annotations."""
LORAS = ROOT / "loras"
"""The LoRAs of `jobs/tscd.py tiny --budget full`, one a stage."""
EVALUATORS = ROOT / "evaluators"
"""Small reward and perception models of the published classes: clip/, clip_large/ with
aesthetic.safetensors above it, image_reward/, hps/, solo/."""
