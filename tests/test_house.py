"""The house's own rules: who may import whom, and that importing anything reaches for no network."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("reward", "rl", "finetune", "tinyworld")
SHARED = {
    "reward.feedback",
    "reward.draw",
    "reward.arguments",
    "reward.checkpoint_folders",
    "reward.curves",
    "reward.engines",
    "reward.folder_lock",
    "reward.training_arguments",
}  # what rl may know of reward
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]


def imports_of(path: Path) -> set[str]:
    """Every module of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            found |= {f"{node.module}.{alias.name}" if node.module in ROOMS else node.module for alias in node.names}
    return {name for name in found if name.split(".")[0] in (*ROOMS, "run_ddpo")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_rule(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = {
        "reward": lambda name: name.startswith("reward"),
        "rl": lambda name: name.startswith("rl") or name in SHARED,
        "finetune": lambda name: name.split(".")[0] in ("reward", "rl", "finetune"),
        "tinyworld": lambda name: name.split(".")[0] != "run_ddpo",
    }[room]
    broken = {name for name in imports_of(path) if not allowed(name)}
    assert not broken, f"{path.relative_to(ROOT)} may not import {', '.join(sorted(broken))}"


def test_only_tinyworld_itself_imports_tinyworld():
    assert not {name for name in imports_of(ROOT / "run_ddpo.py") if name.startswith("tinyworld")}


def test_importing_opens_no_connection():
    """Every module, in one fresh interpreter whose sockets fail, and tell of it also where the failure is caught."""
    code = textwrap.dedent("""
        import importlib, socket, sys, traceback
        opened = []
        def refuse(*args, **kwargs):
            opened.append("".join(traceback.format_stack()))
            raise OSError("no network here")
        socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
        sys.path.insert(0, "benchmarks")
        for name in sys.argv[1:]: importlib.import_module(name)
        sys.exit("an import opened a connection: " + opened[0] if opened else 0)
    """)
    benchmarks = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"trl_ddpo"}  # that one is another's room
    names = [*MODULES, "run_ddpo", *sorted(benchmarks)]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
