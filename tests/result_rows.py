"""The tables that `docs/` makes of what a benchmark wrote."""

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


def result_rows(renderer: str, results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of the table that a renderer of `docs/result_tables.py` makes, by header."""
    sys.path.insert(0, str(DOCS))
    try:
        from result_tables import RENDERERS
    finally:
        sys.path.remove(str(DOCS))
    lines = RENDERERS[renderer]([{"results": results}]).splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]
