"""The published results are what their exported data give."""

from __future__ import annotations

import re
from pathlib import Path

from effv2.cli.main import report
from tests.conftest import ROOT, invoke

RESULTS = ROOT / "docs" / "results"
NUMBERS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def test_the_published_report_follows_from_its_exported_data(tmp_path: Path) -> None:
    assert invoke(report, "--from-export", RESULTS, "--export", tmp_path).exit_code == 0
    published = (RESULTS / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == published
    counts = re.search(r"claims: (\d+) supported, (\d+) contradicted", published)
    assert counts is not None
    supported, contradicted = (NUMBERS[int(each)] for each in counts.groups())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"support {supported} and contradict {contradicted} so far" in readme
    shown = set(re.findall(r"\(figures/([\w.-]+)\)", published))
    assert shown == {path.name for path in (RESULTS / "figures").iterdir()}
