"""Counting rejects: each shard once, and one line when there are too many."""

from __future__ import annotations

import json

import fsspec
import pytest

from hypersd_ray.config.data import DataConfig
from hypersd_ray.data.rejects import GaugedCounter, RejectCounter, TooManyRejectsError, check, start_reject_log, told

BROKEN = [("broken_image", "k1"), ("broken_image", "k2"), ("empty_caption", "k3")]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_shard_counts_once_and_is_listed_once(tmp_path):
    path = tmp_path / "rejects.jsonl"
    counter = RejectCounter(str(path), 0.5, 0)
    counter.report("a.tar", 10, BROKEN)
    counter.report("a.tar", 10, BROKEN)
    counter.report("b.tar", 5, [])
    assert counter.summary() == {"seen": 15, "rejected": 3, "rejects": {"broken_image": 2, "empty_caption": 1}}
    assert counter.shard("a.tar") == {"seen": 10, "rejects": {"broken_image": 2, "empty_caption": 1}}
    assert lines(path)[0] == {"reason": "broken_image", "shard": "a.tar", "key": "k1"}
    assert len(lines(path)) == 3
    # A restarted job continues the file, even after a line that was cut.
    path.write_text(path.read_text() + '{"reason": "bro')
    again = RejectCounter(str(path), 0.5, 0)
    again.report("a.tar", 10, BROKEN)
    assert again.summary()["rejected"] == 3
    again.report("c.tar", 1, [("missing_image", "x")])
    assert [line["shard"] for line in lines(path) if line["key"] == "x"] == ["c.tar"]
    assert len(lines(path)) == 4


def test_a_shard_that_was_whole_and_is_lost_later_is_listed_and_its_rows_are_rejected(tmp_path):
    path = tmp_path / "rejects.jsonl"
    counter = RejectCounter(str(path), 0.5, 0)
    counter.report("a.tar", 10, BROKEN)
    for _ in range(2):
        counter.report("a.tar", 1, [("unreadable_shard", "")])
    assert counter.summary() == {
        "seen": 10, "rejected": 10, "rejects": {"unreadable_shard": 7, "broken_image": 2, "empty_caption": 1},
    }  # fmt: skip
    assert lines(path)[3:] == [{"reason": "unreadable_shard", "shard": "a.tar", "key": ""}]


def test_a_lost_shard_counts_as_many_rows_as_a_whole_one(tmp_path):
    """Nine of ten gone are 90% of the data, whatever comes first; of a cut one what was read is there."""
    counter = RejectCounter(None, 0.5, 1000)
    for name in "abcdefgh":
        counter.report(name, 1, [("unreadable_shard", "")])
    counter.report("cut", 101, [("truncated_shard", "k99")])
    assert counter.verdict() is None, "nothing is known of how many rows a shard has"
    counter.report("whole", 1000, [])
    assert counter.summary() == {
        "seen": 10_000, "rejected": 8900, "rejects": {"unreadable_shard": 8000, "truncated_shard": 900},
    }  # fmt: skip
    assert "8900 of 10000 rows rejected (89%)" in counter.verdict()


def test_the_gauge_hears_of_a_loss_in_a_later_epoch(monkeypatch):
    counter = GaugedCounter(None, 0.5, 0, "run")
    shown = {}
    monkeypatch.setattr(counter.gauge, "set", lambda value, tags: shown.update({tags["reason"]: value}))
    counter.report("a.tar", 10, BROKEN)
    counter.report("a.tar", 1, [("unreadable_shard", "")])
    assert shown == {"broken_image": 2, "empty_caption": 1, "unreadable_shard": 7}


def test_the_verdict_waits_for_the_grace_and_names_the_knob(tmp_path):
    counter = RejectCounter(str(tmp_path / "r.jsonl"), 0.25, grace=20)
    counter.report("a", 10, BROKEN)
    assert counter.verdict() is None
    counter.report("b", 10, [("empty_caption", "x")] * 2)
    assert counter.verdict() is None, "5 of 20 is not more than a quarter"
    counter.report("c", 1, [("empty_caption", "x")])
    text = counter.verdict()
    for part in ("6 of 21", "29%", "data.max_reject_share=0.25", "empty_caption (4)", str(tmp_path / "r.jsonl")):
        assert part in text
    assert "\n" not in text


@pytest.mark.usefixtures("ray_cluster")
def test_the_actor_raises_in_the_caller(tmp_path):
    import ray

    config = DataConfig(shards="x", max_reject_share=0.1, reject_grace=1)
    log = start_reject_log(config, str(tmp_path / "new" / "rejects.jsonl"))
    check(log)
    ray.get(log.report.remote("a", 3, BROKEN))
    with pytest.raises(TooManyRejectsError, match="3 of 3 rows rejected"):
        check(log)


def test_where_files_cannot_grow_each_report_is_a_file():
    """gcsfs writes "a" over what was there."""
    path = "memory://rejects-test/rejects.jsonl"
    filesystem, folder = fsspec.core.url_to_fs("memory://rejects-test")
    first = RejectCounter(path, 0.5, 0)
    first.report("a.tar", 4, [("broken_image", "1")])
    first.report("b.tar", 4, [])
    first.report("c.tar", 4, [("empty_caption", "2"), ("empty_caption", "3")])
    again = RejectCounter(path, 0.5, 0)
    again.report("a.tar", 4, [("broken_image", "1")])
    again.report("d.tar", 4, [("broken_image", "9")])
    names = sorted(filesystem.ls(folder, detail=False))
    assert [name.rpartition("/")[2] for name in names] == [f"rejects-{i:05d}.jsonl" for i in range(3)]
    listed = [json.loads(line) for name in names for line in filesystem.read_text(name).splitlines()]
    assert [(r["shard"], r["key"]) for r in listed] == [("a.tar", "1"), ("c.tar", "2"), ("c.tar", "3"), ("d.tar", "9")]
    assert told(again.summary(), path) == f"2 of 8 rows were rejected (broken_image 2), listed in {path}"
    assert told(RejectCounter(None, 0.5, 0).summary(), "x") == ""
