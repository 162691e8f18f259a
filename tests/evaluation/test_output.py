"""Where a command's report goes."""

from __future__ import annotations

import json

import pytest

from evaluation.output import save_report
from hypersd_ray.config.base import RunError


def test_a_report_goes_where_it_is_asked_for_and_says_so(tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    save_report(out, {"rows": [1.5]})
    assert json.loads(out.read_text()) == {"rows": [1.5]}
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"\nwritten to {out}\n")


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "report.json"
    with pytest.raises(RunError, match=rf"^--out {out} cannot be written: ") as caught:
        save_report(out, {})
    assert "\n" not in str(caught.value)
