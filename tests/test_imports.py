"""What is imported when: the package and `mole --help` come without torch, in a blink."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lookup_experts.cli import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "safetensors", "datasets", "accelerate")
MOLE = Path(sys.executable).parent / "mole"

LOADED = """
import json, sys
{statement}
print(json.dumps([name for name in {heavy} if name in sys.modules]))
"""


def loaded_by(run_python, statement: str) -> list[str]:
    exit_code, out, err = run_python(LOADED.format(statement=statement, heavy=HEAVY))
    assert exit_code == 0, err
    return json.loads(out.splitlines()[-1])


def test_the_package_imports_nothing_heavy(run_python):
    statement = "import lookup_experts, lookup_experts.cli, lookup_experts.units"
    assert loaded_by(run_python, statement) == []


def test_command_modules_import_nothing_heavy(run_python):
    modules = ", ".join(f"lookup_experts.commands.{name}" for name in _existing_commands())
    assert loaded_by(run_python, f"import {modules}, lookup_experts.commands.options") == []


def _existing_commands() -> list[str]:
    import lookup_experts.commands

    folder = Path(lookup_experts.commands.__file__).parent
    return [name for name in COMMANDS if (folder / f"{name}.py").exists()]


def test_public_names_are_there_when_asked_for(run_python):
    statement = "import lookup_experts as le; assert set(le.__all__) <= set(dir(le))"
    assert loaded_by(run_python, statement) == []
    import lookup_experts as le

    for name in le.__all__:
        assert getattr(le, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        le.atach  # noqa: B018


def test_star_import_gives_the_public_names():
    names: dict = {}
    exec("from lookup_experts import *", names)
    assert {"attach", "load", "reparameterize", "UserError"} <= set(names)


EMPTY_PROGRAM = """
import sys, typer
app = typer.Typer(rich_markup_mode="markdown")
app.command("one")(lambda: None)
app.command("two")(lambda: None)
sys.argv = ["empty", "--help"]
app()
"""


def best_seconds(*commands: list[str], times: int = 7) -> list[float]:
    """The shortest time of each command, run in turn: so a busy machine slows all alike."""
    best = [float("inf")] * len(commands)
    for _ in range(times):
        for number, command in enumerate(commands):
            started_at = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            best[number] = min(best[number], time.perf_counter() - started_at)
    return best


def test_help_takes_little_more_than_that_of_an_empty_program():
    ours, empty = best_seconds([str(MOLE), "--help"], [sys.executable, "-c", EMPTY_PROGRAM])
    assert ours < 1.5 * empty


def test_importing_takes_less_than_an_empty_program():
    ours, empty = best_seconds(
        [sys.executable, "-c", "import lookup_experts"], [sys.executable, "-c", EMPTY_PROGRAM]
    )
    assert ours < empty


UPWARDS = {
    "model": ("table", "training", "generation", "evaluation", "benchmarks", "commands", "cli"),
    "table": ("training", "generation", "evaluation", "benchmarks", "commands", "cli"),
    "training": ("commands", "cli"),
    "generation": ("training", "evaluation", "benchmarks", "commands", "cli"),
    "serving": ("training", "evaluation", "benchmarks", "commands", "cli"),
    "offloading": ("training", "generation", "evaluation", "benchmarks", "commands", "cli"),
}
# transformers enters `from_pretrained` there, so opening the table goes upwards once.
ALLOWED = {("model/huggingface.py", "table")}


@pytest.mark.parametrize("package", UPWARDS)
def test_imports_go_one_way(package):
    import ast

    import lookup_experts

    root = Path(lookup_experts.__file__).parent
    for path in sorted((root / package).rglob("*.py")):
        where = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "lookup_experts" and len(parts) > 1 and parts[1] in UPWARDS[package]:
                    assert (where, parts[1]) in ALLOWED, f"{where} imports {name}"
