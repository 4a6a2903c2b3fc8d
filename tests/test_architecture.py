"""The house rules that a machine can check: imports go down, communication has one room, files stay small."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "vqscale").rglob("*.py"))
BENCH = sorted((ROOT / "tools" / "bench").glob("*.py"))
SOURCES = PACKAGE + [path for room in ("launch", "tools") for path in sorted((ROOT / room).rglob("*.py"))]

# What each room may import of the package, beside itself. A room that is not here is one that nobody has decided on.
GROUND = {"config", "errors", "seed"}
BESIDE = GROUND | {"parallel"}
MODELS = BESIDE | {"disk", "codes", "quantizers", "nets", "signals", "tokenizer", "priors"}
MAY_IMPORT = {
    "config": GROUND,
    "errors": GROUND,
    "matmul": GROUND,
    "seed": GROUND,
    "parallel": GROUND,
    "disk": BESIDE,
    "engine": BESIDE | {"disk", "matmul"},
    "codes": BESIDE | {"matmul", "nets"},  # of a head over the digits of a token
    "data": BESIDE | {"disk"},
    "quantizers": BESIDE | {"codes"},
    "nets": GROUND | {"matmul"},
    "metrics": BESIDE | {"disk", "codes", "data"},
    "show": GROUND | {"disk", "metrics"},
    "signals": BESIDE | {"disk", "nets", "data", "metrics", "show"},
    "tokenizer": BESIDE | {"disk", "codes", "quantizers", "nets", "signals"},
    "priors": BESIDE | {"disk", "codes", "quantizers", "nets", "signals", "tokenizer"},
    "run": BESIDE | {"disk"},
    "train": MODELS | {"engine", "data", "metrics", "show", "run"},
    "plan": MODELS | {"engine", "train"},
    "programs": MODELS | {"engine", "data", "metrics", "show", "run", "train", "plan"},
}
TOP = {"__init__", "__main__"}  # it may import everything

# What the folders inside a room may import of each other; files beside them serve all, and use what they like.
INSIDE = {
    "codes": {"softmax": set(), "search": set(), "heads": set(), "convex": set(), "gpu": {"softmax"}},
    "data": {"shards": set(), "made": {"shards"}, "tokens": {"shards"}},
    "nets": {"config": set(), "waves": {"config"}},
    "priors": {"config": set()},
    "train": {"config": set()},
    "programs": {
        "claims": {"studies"},
        "commands": {"claims", "sampling", "soak", "studies"},
        "sampling": set(),
        "soak": set(),
        "studies": set(),
    },
}


@cache
def _tree(path):
    return ast.parse(path.read_text())


def _name(path):
    return path.relative_to(ROOT).as_posix()


def _imports(path):
    """(line, dotted name) of everything that a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            # The benchmark goes by two names, in a checkout and in a wheel, so its files find each other relatively.
            if node.level == 1 and path in BENCH:
                continue
            assert node.level == 0, f"{_name(path)}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _room(path):
    return path.relative_to(ROOT / "vqscale").parts[0].removesuffix(".py")


def _wing(parts):
    """The folder inside a room that a module lies in; None for files of the room itself."""
    return parts[2] if len(parts) > 2 and (ROOT.joinpath(*parts[:3])).is_dir() else None


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_imports_go_downward_only(path):
    room = _room(path)
    if room in TOP:
        return
    assert room in MAY_IMPORT, f"{_name(path)}: say in tests/test_architecture.py what this room may import"
    wing = _wing(path.relative_to(ROOT).parts)
    for line, name in _imports(path):
        if name.split(".")[0] != "vqscale" or name == "vqscale":
            continue
        other = name.split(".")[1]
        assert other == room or other in MAY_IMPORT[room], f"{_name(path)}:{line}: {room} imports {other}"
        beside = _wing(name.split("."))
        if other == room and wing and beside and beside != wing:
            allowed = INSIDE.get(room, {}).get(wing, set())
            assert beside in allowed, f"{_name(path)}:{line}: {room}/{wing} imports {room}/{beside}"


def test_every_room_knows_its_folders():
    """A new folder inside a room says what it may import, or may import none of its neighbours."""
    for room, wings in INSIDE.items():
        inside = {path.parent.name for path in (ROOT / "vqscale" / room).glob("*/__init__.py")}
        assert inside == set(wings), f"{room}: {sorted(inside ^ set(wings))}"


def test_no_rooms_import_each_other():
    for room, allowed in MAY_IMPORT.items():
        for other in allowed - {room}:
            assert room in GROUND or room not in MAY_IMPORT[other], f"{room} and {other} import each other"


def test_no_modules_import_each_other_when_they_are_imported():
    """No circle of imports at the top of modules, through however many of them."""
    modules = {_module(path): path for path in PACKAGE + BENCH}
    graph = {name: _at_the_top(path) & set(modules) - {name} for name, path in modules.items()}
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert not graph, f"in a circle, or above one: {sorted(graph)}"


def _module(path):
    return _name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _at_the_top(path):
    """Dotted names that a module imports while it is imported itself, each with the module that it may lie in."""
    found = set()
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom):
            above = _module(path.parent) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_parallel_talks_and_only_the_engine_knows_deepspeed(path):
    """torch.distributed is in vqscale/parallel alone, deepspeed in vqscale/engine, imported or through torch."""
    home = {"parallel": "deepspeed.", "engine": "torch.distributed."}.get(path.parent.name)
    foreign = (home,) if home else ("torch.distributed.", "deepspeed.")
    reached = {f"{_dotted(node)}." for node in ast.walk(_tree(path)) if isinstance(node, ast.Attribute)}
    for name in {f"{name}." for _, name in _imports(path)} | reached:
        assert not name.startswith(foreign), f"{_name(path)} uses {name[:-1]}"


def _dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


# Configs, the ground and the doors of the rooms answer --help and errors of a config without torch.
DOORS = ("config.py", "tokenizer/config.py", "__init__.py")
LIGHT = [path for path in PACKAGE if path.name in DOORS or path.parent.name == "config" or _room(path) in GROUND]


def test_configs_need_no_torch():
    modules = [_module(path) for path in LIGHT]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    for heavy in ("torch", "deepspeed", "zarr", "webdataset", "matplotlib"):
        assert heavy not in sys.modules, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_stay_small_and_say_what_they_are_for(path):
    text = path.read_text()
    assert text.count("\n") <= 300, f"{_name(path)} has {text.count(chr(10))} lines, the limit is 300: split it"
    assert ast.get_docstring(_tree(path)), f"{_name(path)} does not begin with what it is for"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_tokens_by_codes_has_no_name(path):
    """A tensor of tokens x codes is for the slow definitions alone, each a file dense.py."""
    if re.fullmatch(r"vqscale/codes/(\w+/)?dense\.py", _name(path)):
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            assert not re.search(r"_NK|_BK", token.string), f"{_name(path)}:{token.start[0]}: {token.string}"


def test_rooms_without_a_meaning_do_not_exist():
    forbidden = {"utils", "util", "helpers", "common", "misc", "manager", "handler"}
    for path in SOURCES:
        assert not forbidden & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}, _name(path)


def test_an_installed_package_has_every_folder():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {_module(path) for path in PACKAGE if path.name == "__init__.py"}
    wrong = set(asked) ^ (folders | {"vqscale_bench"})
    assert not wrong, f"packages in pyproject.toml and the folders that there are differ in {sorted(wrong)}"


def test_no_path_of_one_machine():
    """Paths that exist on one machine only, in everything that is kept under version control."""
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = kept.stdout.split("\0")[:-1] or [_name(path) for path in SOURCES]
    somewhere = re.compile(r"(?<![\w.}])/(?:work|home|root|Users|tmp|mnt|scratch)/\w")
    for name in names:
        path = ROOT / name
        if path.suffix in (".py", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".md", ".cfg") and path.is_file():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not somewhere.search(line), f"{name}:{number}: {line.strip()}"


@pytest.mark.parametrize(("page", "least"), [("vqscale/README.md", 20), (".github/SECURITY.md", 60)])
def test_every_rule_of_the_design_and_every_attack_names_a_test_that_exists(page, least):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / page).read_text())
    assert len(named) > least
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"


def test_the_map_of_the_design_has_every_room():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "vqscale" / "README.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)/`", row)}
    rooms = {path.parent.name for path in (ROOT / "vqscale").glob("*/__init__.py")}
    assert named == rooms, sorted(named ^ rooms)
