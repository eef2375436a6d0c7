"""The stored rows hold what Louver was designed from, within a fifth or better."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import expected


def test_rows_match_their_figures():
    assert expected.misses() == []


def test_a_row_that_misses_is_told(monkeypatch):
    """A control: the check can fail, over a figure and over a row that is not there."""
    section = expected.expected()["bounds-scanned"]
    line = section["lines"][0] | {"figures": {"20": 0.01, "0.07": 0.5}}
    changed = section | {"heads": {"20": "over", "0.07": "absent"}, "lines": [line]}
    monkeypatch.setattr(expected, "expected", lambda: {"within": 0.2, "bounds-scanned": changed})
    assert [told.split(":")[0].rsplit(", ", 1)[1] for told in expected.misses()] == ["over", "absent"]
    assert "| 1.0% / **" in expected.comparison("bounds-scanned")
