"""What is shown beside the bar."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from hypersd_ray.trainer.progress import Snapshot, bar_of, encoding_lines

LOSSES = {"consistency": 0.0123, "adversarial": 0.1, "discriminator": 1.9, "loss": 0.0123}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_is_cut_off_on_a_narrow_terminal(width):
    snapshot = Snapshot(0, 4, 8, 120, 160, LOSSES, 75.0, 0.001, 200.0)
    shown = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    with bar_of(console=Console(file=io.StringIO())) as bar:
        bar.add_task("x", total=10)
        bar.update(bar.task_ids[0], completed=4, description=snapshot.text())
        shown.print(bar.get_renderable())
    lines = shown.file.getvalue().splitlines()
    words = " ".join(" ".join(lines).replace("━", " ").replace("╺", " ").replace("╸", " ").split())
    assert words == " ".join(snapshot.text().split())
    assert "━" in lines[0] and all(len(line) <= width for line in lines)


def test_encoding_is_told_now_and_then_and_at_its_end(capsys):
    show = encoding_lines(every_s=3600)
    show(1, 3, 100)
    show(2, 3, 200)
    show(3, 3, 300)
    assert capsys.readouterr().out.splitlines() == [
        "encoding  shard 1/3  100 images",
        "encoding  shard 3/3  300 images",
    ]


DEAF = """
import os, signal, time, types
from hypersd_ray.trainer.stopping import stopping
board = types.SimpleNamespace(ask_to_stop=types.SimpleNamespace(remote=lambda: None))  # its workers never answer
with stopping(board, 0.5, folder="/runs/x"):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_job_whose_workers_take_too_long_to_stop_says_what_to_raise():
    ended = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "error: no checkpoint within 0.5 s of the signal: the same command goes on from the newest one in /runs/x; raise "
        "run.stop_patience_s=0.5"
    )
