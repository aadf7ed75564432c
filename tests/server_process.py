"""The real server in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

MOLE = Path(sys.executable).parent / "mole"


class Server:
    """`mole serve` in a process of its own, listening when this returns.

    Args:
        folder: of the model.
        options: of the command.
    """

    def __init__(self, folder: Path, *options: object, port: int = 0) -> None:
        command = [str(MOLE), "serve", str(folder), "--port", str(port), *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        self.said = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if match := re.search(r"Serving (\S+) at (http://\S+:(\d+))", line):
                self.name, self.url, self.port = match[1], match[2], int(match[3])
                return
        raise AssertionError(f"the server did not start: {self.said}")

    def stop(self, name: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; gives the exit code."""
        self.process.send_signal(name)
        _, rest = self.process.communicate(timeout=40)
        self.said += rest
        return self.process.returncode

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
