"""The trainer tests' Ray, micro pipeline and latents."""

from tests.trainer.conftest import cluster, latents, make_config, shards, teacher

__all__ = ["cluster", "latents", "make_config", "shards", "teacher"]
