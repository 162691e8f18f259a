"""What the commands of this folder say and leave: progress on stderr, a table on stdout, a report as a JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hypersd_ray.config.base import RunError


def progress(line: str) -> None:
    """A line that tells how far it is."""
    print(line, file=sys.stderr, flush=True)


def save_report(out: Path, report: Any) -> None:
    """Write it, and say where.

    Raises:
        RunError: it cannot be written; one line.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(f"\nwritten to {out}", file=sys.stderr)
