"""The order of rooms: imports go down only, lazy ones counted, and no two files need each other.

Read from the source, so that imports inside functions count, and those for types alone as well.
"""

import ast
from pathlib import Path

import pytest

import lookup_experts

PACKAGE = Path(lookup_experts.__file__).parent

ROOMS = (
    "foundation",
    "model",
    "table",
    "folders",
    "vllm_plugin",
    "offloading",
    "generation",
    "training",
    "evaluation",
    "serving",
    "benchmarks",
    "commands",
)
"""From the bottom to the top."""

FOUNDATION = ("__version__", "allocation", "console", "errors", "made_classes", "units")
"""Files beside the rooms, which know none of them."""

CONTRACT = {"model.rows"}
"""All that `table` may know of `model`."""


def _module(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_module(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(module: str) -> set[str]:
    """The modules of the package that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package == "lookup_experts":
                found.add(inner if inner in SOURCES else inner.rpartition(".")[0])
    return found - {module}


IMPORTS = {module: _imports(module) for module in SOURCES}


def _room(module: str) -> str:
    first = module.partition(".")[0]
    if first in ROOMS:
        return first
    return "commands" if first == "cli" else "foundation"


def _modules() -> list[str]:
    # The package itself says where its public names are.
    return [module for module in SOURCES if module]


@pytest.mark.parametrize("module", _modules())
def test_imports_go_down(module):
    level = ROOMS.index(_room(module))
    upwards = [name for name in IMPORTS[module] if ROOMS.index(_room(name)) > level]
    assert not upwards


@pytest.mark.parametrize("module", [name for name in _modules() if _room(name) == "table"])
def test_the_table_knows_of_the_model_only_the_contract(module):
    assert {name for name in IMPORTS[module] if _room(name) == "model"} <= CONTRACT


OUTSIDE = {
    "model": ("huggingface_hub", "safetensors"),
    "table": ("huggingface_hub", "transformers"),
}
"""What a room may not import: folders and the hub are not its matter."""


@pytest.mark.parametrize("module", [name for name in _modules() if _room(name) in OUTSIDE])
def test_mathematics_and_bytes_know_no_folder_and_no_hub(module):
    tree = ast.parse(SOURCES[module])
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    packages = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert not {name for name in packages if name.partition(".")[0] in OUTSIDE[_room(module)]}
    assert not {alias.name for node in imported for alias in node.names if "Auto" in alias.name}


def test_no_two_files_need_each_other():
    """Nor any ring of more: every file can be read after those that it imports."""
    left = {module: set(imports) & set(SOURCES) for module, imports in IMPORTS.items() if module}
    while left:
        done = {module for module, imports in left.items() if not imports & left.keys()}
        assert done, f"a ring among {sorted(left)}"
        left = {module: imports for module, imports in left.items() if module not in done}


def test_nothing_needs_the_registration():
    """It is what makes transformers know us; only the package itself starts it."""
    importers = [module for module, imports in IMPORTS.items() if "folders.registration" in imports]
    assert importers == [""]
