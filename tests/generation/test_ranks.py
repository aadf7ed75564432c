"""`mole reparameterize` by several processes, as torchrun starts them: real processes and gloo."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes_together import launch
from torch.distributed import TCPStore

import lookup_experts as le

# With small shards and chunks, and a pause before each chunk.
PROGRAM = """
import functools, sys, time
from lookup_experts import cli
from lookup_experts.generation import folding
from lookup_experts.table import build
build.plan_shards = functools.partial(build.plan_shards, max_shard_bytes=60_000)
folding.plan_folding.__kwdefaults__["chunk_budget_bytes"] = 200_000
encode, pause = build.encode_chunk, float(sys.argv.pop(1))
def slowly(*arguments):
    time.sleep(pause)
    encode(*arguments)
build.encode_chunk = slowly
cli.main()
"""


class Together:
    """Processes that fold a folder together.

    Args:
        folder, out: of `mole reparameterize`.
        number: of processes.
        pause: seconds before each chunk.
    """

    def __init__(self, folder: Path, out: Path, number: int = 2, pause: float = 0) -> None:
        # The port is open already, as torchrun's is: nobody can take it in between.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        words = ("reparameterize", str(folder), str(out), "--encoding", "float32")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(pause), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "RANK": str(rank),
                    "WORLD_SIZE": str(number),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self._store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                },
            )
            for rank in range(number)
        ]

    def ends(self) -> list[tuple[int, str]]:
        """Exit code of each, and what it said."""
        said = [process.communicate(timeout=150)[0] for process in self.processes]
        codes = [process.returncode for process in self.processes]
        return list(zip(codes, said, strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def by_one(training_folder, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("one") / "out"
    ((code, said),) = Together(training_folder, out, 1).ends()
    assert code == 0, said
    return contents(out)


@pytest.mark.timeout(300)
def test_each_writes_shards_of_its_own_and_all_is_as_by_one(training_folder, by_one, tmp_path):
    (main, said), (other, by_other) = Together(training_folder, tmp_path / "out").ends()
    assert (main, other) == (0, 0), said + by_other
    shards = [name for name in by_one if name.startswith("table/table-")]
    assert len(shards) > 2
    assert f"2 processes write {len(shards)} shards." in said
    assert "relative error" in said and "relative error" not in by_other
    assert contents(tmp_path / "out") == by_one
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_is_told_and_the_next_run_goes_on(
    training_folder, by_one, tmp_path, killed
):
    out = tmp_path / "out"
    together = Together(training_folder, out, pause=0.3)
    seconds = sorted(name for name in by_one if name.startswith("table/table-"))[1]
    while not (tmp_path / "out.partial" / seconds).exists():  # of the process of rank 1
        assert [process.poll() for process in together.processes] == [None, None]
        time.sleep(0.02)
    together.processes[killed].kill()
    ends = together.ends()
    code, said = ends[1 - killed]
    assert code == 2
    assert "Traceback" not in said
    assert ("Another of the processes has ended" in said) is (killed == 1)
    assert not out.exists()

    ends = Together(training_folder, out).ends()
    assert [code for code, _ in ends] == [0, 0], ends
    assert "Going on with the interrupted run" in ends[0][1]
    assert contents(out) == by_one


@pytest.mark.timeout(300)
def test_bad_input_is_told_once(training_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (main, said), (other, by_other) = Together(training_folder, tmp_path / "out").ends()
    assert (main, other) == (2, 2)
    lines = [line for line in said.splitlines() if line.startswith("mole:")]
    assert len(lines) == 1 and "exists already" in lines[0]
    assert "mole:" not in by_other and "Traceback" not in by_other


@pytest.mark.timeout(300)
def test_torchrun_starts_them(training_folder, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = ("lookup_experts.cli", "reparameterize", training_folder, tmp_path / "out")
    done = launch(*torchrun, "--nproc-per-node", 2, "-m", *command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes write 1 shard; 1 of them have nothing to do." in done.stderr
    assert contents(tmp_path / "out")["table/table.json"]
    le.load(tmp_path / "out")
