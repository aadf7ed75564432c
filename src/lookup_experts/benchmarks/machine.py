"""Where and with what a figure was measured."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lookup_experts

PROGRAMS = ("torch", "transformers", "lookup-experts")


@dataclass(frozen=True)
class Machine:
    """A machine, the programs on it, and the moment."""

    cpu: str
    """The model's name."""
    vector_instructions: str
    """What torch uses of the processor: AVX2, AVX512 ...; without AVX512 it emulates bfloat16."""
    cores: int
    """Those that this process may use."""
    memory_bytes: int
    gpu: str | None
    """The name of the first one that torch can use; None where there is none."""
    system: str
    versions: dict[str, str]
    commit: str | None
    """Of this project's checkout, with `+` where the package was changed since; None outside of
    one."""
    date: str
    """ISO 8601, UTC."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def describe_machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_cpu_model(),
        vector_instructions=torch.backends.cpu.get_cpu_capability(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.release()}",
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in PROGRAMS},
        },
        commit=checkout_commit(Path(lookup_experts.__file__)),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cpu_model() -> str:
    """By /proc/cpuinfo; some processors have no name there, then the architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def checkout_commit(file: Path) -> str | None:
    """The commit of the git checkout that `file` belongs to; None if it belongs to none.

    With `+` where what lies in or below the folder of `file` was changed since: texts and results
    elsewhere make no other program.
    """
    # A package installed below somebody else's checkout lies in it without being part of it.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(file.parent, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changed = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or isn't installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
