"""`mole` in this process."""

import sys
from typing import Any

import pytest

from lookup_experts import cli


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """`mole` with these arguments: exit code, stdout, stderr."""
    before, sys.argv = sys.argv, ["mole", *map(str, arguments)]
    try:
        cli.main()
        code: Any = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err
