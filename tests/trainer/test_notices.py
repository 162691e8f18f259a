"""What workers hear of a node that will be taken away."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import ray.train
import torch

from hypersd_ray.trainer import notices
from hypersd_ray.trainer.notices import Notice, Notices


@pytest.mark.parametrize("deadline", [True, False])
def test_a_node_that_will_go_is_saved_for_at_its_notice_and_before_its_end(monkeypatch, deadline):
    monkeypatch.setattr(notices, "watched", lambda: True)
    monkeypatch.setattr(Notices, "LAST_CALL_S", 0.5)
    hear = Notices(None, 0, torch.device("cpu"))  # type: ignore[arg-type]
    hear.next_ask = math.inf  # nobody is asked whether the job is to stop
    told = SimpleNamespace(preempted_node_ids=["a"], deadline_ms=(time.time() + 1.5) * 1000 if deadline else None)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: told)
    heard = []
    until = time.monotonic() + 1.4
    while time.monotonic() < until:
        heard.append((hear(), time.monotonic()))
        hear.next_look = min(hear.next_look, 0.0)  # it looks at every step here
        time.sleep(0.01)
    saves = [when for notice, when in heard if notice == Notice.SAVE]
    assert {notice for notice, _ in heard} == {Notice.NOTHING, Notice.SAVE}
    assert heard[0][0] == Notice.SAVE and len(saves) == (2 if deadline else 1)
    if deadline:
        assert 0.9 <= saves[1] - saves[0] < 1.4
