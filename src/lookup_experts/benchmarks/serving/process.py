"""`mole serve` in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

from lookup_experts.errors import UserError

_COMMAND = "from lookup_experts.cli import main; main()"


class ServerProcess:
    """A running server, ready when this returns; ends with the `with` block.

    Args:
        folder: of the model.
        options: of `mole serve`.

    Raises:
        UserError: it did not start.
    """

    def __init__(self, folder: Path, *options: object) -> None:
        words = ["serve", str(folder), "--port", "0", *map(str, options)]
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", _COMMAND, *words],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr is not None
        said = ""
        for line in self._process.stderr:
            said += line
            if match := re.search(r"Serving (\S+) at (http://\S+)", line):
                self.model, self.url = match[1], match[2]
                return
        self._process.wait()
        raise UserError(f"mole serve did not start: {said.strip() or 'it said nothing'}")

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
