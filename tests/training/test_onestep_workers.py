"""Two workers of a one-step run: different data, the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank: int, folder: str) -> None:
    from hypersd_ray.training.watch import Looks
    from tests.helpers.distil import snapshot
    from tests.training.onestep_parts import batch_of, config, one_step

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    training = one_step(
        config(Path(folder), dmd={"warmup_share": 0.4}, optim={"batch": 8}, run={"workers": 2}), rank=rank
    )
    for step in range(3):
        batch = batch_of(seed=10 * step + rank)
        if step == 1 and rank == 1:
            batch.cond.prompt_embeds[-1] = torch.nan  # reaches both
        training.step(batch)
    looks = Looks((1, 2, 4), "cpu")  # of feedback's watch: the workers' samplers need not be of one length
    for steps, score in [[(1, 1.0), (1, 2.0)], [(1, 6.0), (4, 5.0)]][rank]:
        looks.add(steps, {"a": torch.tensor(score)}, {"b": torch.tensor(-score)})
    seen = (*looks.together(), float(looks.mean("b")))
    torch.save((snapshot(training), vars(training.progress), seen), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.processes
def test_workers_agree(tmp_path):
    mp.set_forkserver_preload(["tests.training.onestep_parts"])
    mp.start_processes(_work, (str(tmp_path),), nprocs=2, start_method="forkserver")
    (a, first, seen), (b, second, also_seen) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert first == second and first["skipped"] == 1
    assert seen == also_seen == ({"a": {1: 3.0, 4: 5.0}}, {"b": {1: -3.0, 4: -5.0}}, -3.5)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(tensor.abs().sum() > 0 for name, tensor in a.items() if name.startswith("fake/") and "lora_B" in name)
