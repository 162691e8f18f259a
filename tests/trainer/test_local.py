"""A Ray of this machine's own leaves the cores to those who train."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hypersd_ray.trainer.local import WATCHER

SCRIPT = """
import json, os, sys
import ray
from hypersd_ray.trainer.local import start_local, step_first, unwatched, watched

start_local()

@ray.remote(num_cpus=0)
class Worker:
    def watches(self):
        return os.getppid(), os.sched_getscheduler(0)

    def trains(self):
        step_first()
        return os.sched_getscheduler(0)

worker = Worker.remote()
raylet, watches = ray.get(worker.watches.remote())
trains = ray.get(worker.trains.remote())
with unwatched():
    meanwhile = watched()
json.dump([os.sched_getscheduler(0), os.sched_getscheduler(raylet), watches, trains, meanwhile, watched()], sys.stdout)
"""


@pytest.mark.cluster
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's")
def test_rays_processes_do_not_interrupt_a_training():
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", WATCHER)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    driver, raylet, watches, trains, meanwhile, after = json.loads(done.stdout.splitlines()[-1])
    assert (driver, trains) == (os.SCHED_OTHER, os.SCHED_OTHER)
    assert (raylet, watches) == (os.SCHED_BATCH, os.SCHED_BATCH)
    assert (meanwhile, after) == (False, True), "nobody takes this node away; another Ray's may go"
