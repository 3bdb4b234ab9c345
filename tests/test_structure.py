"""How the package is put together: imports go one way, files stay readable, the core needs only torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_noneuclid"
EXPERIMENTS = f"{PACKAGE}.experiments"

# What the parts of the experiments may import from one another: those that stand before them.
PARTS = ("common", "secrets", "costs", "training", "sweeping", "reporting", "publishing")
COMMANDS = ("sweep", "report", "routes", "plan", "benchmark", "publish")
COMMAND_LINE = ("cli", "__main__")
NEEDS_TRANSFORMERS = ("trainer", "engine", "observation")


def name_of(path: Path) -> str:
    """The dotted name of a module of the package."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
CORE = [
    name for name in MODULES if not name.startswith(EXPERIMENTS) and name.split(".")[-1] not in COMMAND_LINE
]


def imports_of(name: str) -> set[str]:
    """The dotted names that a module imports anywhere, also inside functions."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def parts_imported(name: str) -> set[str]:
    """The parts of the experiments that a module imports."""
    inside = (
        found.removeprefix(f"{EXPERIMENTS}.") for found in imports_of(name) if found.startswith(EXPERIMENTS)
    )
    return {found.partition(".")[0] for found in inside} & {*PARTS, *COMMANDS}


def modules_of(part: str) -> list[str]:
    return [name for name in MODULES if f"{name}.".startswith(f"{EXPERIMENTS}.{part}.")]


def test_imports_are_found_in_all_their_forms():
    """The tests below would pass if nothing were found."""
    assert {f"{PACKAGE}.register", f"{PACKAGE}.log.show_log", "sys"} <= imports_of(f"{PACKAGE}.cli")
    assert "common" in parts_imported(f"{EXPERIMENTS}.publish")
    assert "publishing" in parts_imported(f"{EXPERIMENTS}.publish")
    assert {name.split(".")[2] for name in MODULES if name.startswith(f"{EXPERIMENTS}.")} >= {
        *PARTS,
        *COMMANDS,
    }


@pytest.mark.parametrize("name", CORE)
def test_the_core_does_not_import_experiments_or_the_command_line(name):
    above = (EXPERIMENTS, *(f"{PACKAGE}.{module}" for module in COMMAND_LINE))
    assert [found for found in imports_of(name) if found.startswith(above)] == []


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_experiments_imports_only_what_stands_before_it(part):
    allowed = {*PARTS[: PARTS.index(part) + 1]}
    wrong = {name: parts_imported(name) - allowed for name in modules_of(part)}
    assert {name: parts for name, parts in wrong.items() if parts} == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_other_command(command):
    assert parts_imported(f"{EXPERIMENTS}.{command}") & {*COMMANDS} == set()


def test_there_is_no_other_part():
    """A new part has to find its place in the order above."""
    assert {name.split(".")[2] for name in MODULES if name.startswith(f"{EXPERIMENTS}.")} == {
        *PARTS,
        *COMMANDS,
    }


def private_names(name: str) -> set[str]:
    """What a module of the experiments imports from the core under a private name."""
    core = (
        found for found in imports_of(name) if found.startswith(PACKAGE) and not found.startswith(EXPERIMENTS)
    )
    return {found for found in core if any(re.match("_[^_]", part) for part in found.split("."))}


def test_the_experiments_import_no_private_name_of_the_core():
    found = {name: private_names(name) for name in MODULES if name.startswith(EXPERIMENTS)}
    assert {name: names for name, names in found.items() if names} == {}


def test_files_of_the_experiments_are_neither_fragments_nor_endless():
    lengths = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in MODULES.items()
        if name.startswith(EXPERIMENTS) and path.name != "__init__.py"
    }
    assert {name: length for name, length in lengths.items() if length < 40} == {}
    commands = {f"{EXPERIMENTS}.{command}" for command in COMMANDS}
    assert sum(length for name, length in lengths.items() if name not in commands) <= 6850
    assert sum(length for name, length in lengths.items() if name in commands) <= 600


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_a_recipe_fits_on_a_page(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 130


IMPORT_CORE = """
import importlib, sys
import torch, numpy

before = {name.partition(".")[0] for name in sys.modules}

class Refuse:
    '''Refuses every package that torch and numpy have not imported themselves.'''
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {*before, *sys.stdlib_module_names, "hf_noneuclid"}:
            raise ModuleNotFoundError(f"{top} is neither torch nor numpy", name=top)

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_the_core_needs_only_torch_and_numpy(tmp_path):
    names = [name for name in CORE if name.split(".")[-1] not in NEEDS_TRANSFORMERS]
    command = [sys.executable, "-c", IMPORT_CORE, *names]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
