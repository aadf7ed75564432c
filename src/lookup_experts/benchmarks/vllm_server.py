"""vLLM's server with the folders that `mole serve` takes, as `mole bench serve --peers` loads it.

It runs in the environment of the `vllm` on the path, in which this package has to be as well.
"""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lookup_experts.benchmarks.processes import free_port
from lookup_experts.errors import UserError

NAME = "served"
"""By which clients ask for the model."""
START_SECONDS = 300.0
VLLM_ENVIRONMENT = {
    # Left alone it computes on all cores but one: of two, half as fast.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What is said unless the environment says something else."""


def options_in_vllm(store: str, cache: str, streams: int) -> dict[str, tuple[object, ...]]:
    """The options of a server of each system, for as many streams.

    Args:
        store, cache: of MoLE's reader.

    Raises:
        UserError: `vllm` isn't on the path.
    """
    vllm_python()  # before there are folders to serve
    common = ("--max-num-seqs", streams)
    reader = json.dumps({"lookup_experts": {"store": store, "cache": cache}})
    return {"dense": common, "mole": (*common, "--additional-config", reader)}


def vllm_python() -> Path:
    """The Python of the `vllm` on the path, which runs the modules behind its commands.

    The command itself asks for the version of a package of the name vllm, which there isn't where
    vllm-cpu is installed.

    Raises:
        UserError: `vllm` isn't on the path.
    """
    command = shutil.which("vllm")
    if command is None:
        raise UserError(
            "--peers needs vllm on the path, of an environment that has this package as well "
            "(`make test-vllm` builds one: PATH=$PATH:$PWD/.venv-vllm/bin)."
        )
    return Path(command).with_name("python")


@contextmanager
def vllm_server(
    folder: Path, *options: object
) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], tuple[str, str, str]]]]:
    """A server that starts, with options of `vllm serve`; ends with the `with` block.

    What it says goes to `FOLDER.log`.

    Yields:
        Its process; and what waits until it serves, and gives the model's name, its address, and
        nothing that was said. That raises a `UserError` where it doesn't come to it.
    """
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    port = free_port()
    options = (*options, "--host", "127.0.0.1", "--port", port, "--served-model-name", NAME)
    said = Path(f"{folder}.log")
    with said.open("w") as log:
        process = subprocess.Popen(
            [str(word) for word in (*command, *options)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=VLLM_ENVIRONMENT | os.environ,
        )

        def wait() -> tuple[str, str, str]:
            until, url = time.monotonic() + START_SECONDS, f"http://127.0.0.1:{port}"
            while not _is_healthy(url):
                if process.poll() is not None or time.monotonic() > until:
                    raise UserError(f"vLLM did not start; {said} tells why.")
                time.sleep(0.2)
            return NAME, url, ""

        try:
            yield process, wait
        finally:
            process.terminate()  # it ends its own
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False
