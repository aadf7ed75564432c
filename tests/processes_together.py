"""Several processes on this machine that train together, as torchrun would start them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from lookup_experts.training.recipe import RecipeFile
from lookup_experts.training.train import train

# Imported once, by the server that the processes are forked from: they start at once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lookup_experts.training.train", "torch.utils.tensorboard"])


class Group(list[Any]):
    """Processes that are under way, and the store by which they find each other.

    The store's port is one that is open already, as torchrun's is: nobody can take it in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes; None of a process that had to be ended."""
        deadline = time.monotonic() + seconds
        for process in self:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self]
        for process in self:
            process.kill()
            process.join()
        return codes


def start(
    recipe: RecipeFile,
    data: Any,
    out: Path,
    number: int,
    told: dict[str, str] | None = None,
    **options: Any,
) -> Group:
    """Processes that are under way; `told`: what else a launcher tells by the environment."""
    started = Group()
    for rank in range(number):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": number,
            "LOCAL_WORLD_SIZE": number,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": started.store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            **(told or {}),
        }
        arguments = (recipe, data, out, environment, options)
        process = processes.Process(target=_train, args=arguments)
        process.start()
        started.append(process)
    return started


def run(recipe: RecipeFile, data: Any, out: Path, number: int, **options: Any) -> None:
    """Train to the end."""
    assert start(recipe, data, out, number, **options).wait(200) == [0] * number


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end; one that takes too long is ended with all that it has started."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def told_by_accelerate(configuration: Path, folder: Path) -> dict[str, str]:
    """What `accelerate launch` with this configuration tells its processes.

    Seconds faster than to have them train: they needn't import anything.
    """
    script = folder / "tell.py"
    script.write_text(
        "import json, os, sys\n"
        "with open(sys.argv[1] + os.environ['RANK'], 'w') as told:\n"  # a pipe would mix them
        "    json.dump(dict(os.environ), told)\n"
    )
    options = ("--num_processes", 2, "--main_process_port", 0)  # any port that is free
    accelerate = (sys.executable, "-m", "accelerate.commands.launch")
    told_by = folder / "told-by-"
    done = launch(*accelerate, "--config_file", configuration, *options, script, told_by)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(Path(f"{told_by}{rank}").read_text()) for rank in range(2)]
    assert [environment["WORLD_SIZE"] for environment in told] == ["2", "2"]
    names = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in told[0].items() if name.startswith(names)}


def _train(
    recipe: RecipeFile, data: Any, out: Path, environment: dict[str, Any], options: dict[str, Any]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    train(recipe, data, out, progress=False, **options)
