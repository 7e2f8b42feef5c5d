"""The tables of docs/protocols.md, written from the study files.

    python -m tests.protocols

fills in what stands between `<!-- STUDY -->` and `<!-- end -->` on that page.
"""

from __future__ import annotations

import re

from effv2.config.layers import build
from effv2.config.schema import TrainConfig
from effv2.config.studies import Sources, open_study
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "protocols.md"
TABLE = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(name: str) -> str:
    """Return the settings of a study as a Markdown table: setting, value, how it is known, from where."""
    study = open_study(name)
    config = build(TrainConfig, study.base).flat()
    lines = ["| setting | value | known | from |", "|---|---|---|---|"]
    for kind in Sources.model_fields:
        for keys, source in getattr(study.protocol, kind).items():
            names = keys.split(", ")
            values = ", ".join(f"{config[key]}" or "none" for key in names if key in config)
            named = ", ".join(f"`{key}`" if key in config else key for key in names)
            lines.append(f"| {named} | {values} | {kind} | {source} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """Return the page with its tables as the study files have them."""
    return TABLE.sub(lambda found: f"<!-- {found[1]} -->\n{table(found[1])}\n<!-- end -->", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
