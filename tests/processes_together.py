"""Several processes on this machine that train together, as torchrun would start them."""

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

from lookup_experts.training.recipe import Recipe
from lookup_experts.training.train import train

# Imported once, by the server that the processes are forked from: they start at once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lookup_experts.training.train", "torch.utils.tensorboard"])


def start(recipe: Recipe, data: Any, out: Path, number: int, **options: Any) -> list[Any]:
    """Processes that are under way."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(number):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": number,
            "LOCAL_WORLD_SIZE": number,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        arguments = (recipe, data, out, environment, options)
        process = processes.Process(target=_train, args=arguments)
        process.start()
        started.append(process)
    return started


def run(recipe: Recipe, data: Any, out: Path, number: int, **options: Any) -> None:
    """Train to the end."""
    started = start(recipe, data, out, number, **options)
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0] * number


def _train(
    recipe: Recipe, data: Any, out: Path, environment: dict[str, Any], options: dict[str, Any]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    train(recipe, data, out, progress=False, **options)
