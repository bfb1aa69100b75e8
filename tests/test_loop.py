"""The shape of the code: GRPO on one screen in each script, and imports that point one way."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import train_cls
from tests.runs import ROOT

PATHS = sorted(ROOT.glob("train_*.py"))
SCRIPTS = [importlib.import_module(path.stem) for path in PATHS]
TRAIN = inspect.getsource(train_cls.train)
HOUSES = ("demo", "grpo", "models", "rewards", "data")
SOURCES = [path for house in HOUSES for path in (ROOT / house).rglob("*.py")]
SOURCES += PATHS


@pytest.mark.parametrize("name", ["judge", "train", "main"])
def test_the_loop_is_the_same_in_every_script_to_the_letter(name):
    """It stands in each, so that each can be read alone; it must not drift apart."""
    assert len(SCRIPTS) >= 2
    assert len({inspect.getsource(getattr(script, name)) for script in SCRIPTS}) == 1


def calls(source: str, first: int = 0) -> list[str]:
    """Names of what is called, in the order of the text, from line `first` on."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    nodes = [node for node in nodes if node.lineno >= first]
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return [ast.unparse(node.func) for node in nodes]


STEPS = [
    "sample_groups",
    "judge",
    "step_advantages",
    "minibatches",
    "pack_logps",
    "token_weights",
    "policy_loss",
    "loss.backward",
    "optimizer.step",
    "run.report",
]


def test_the_six_steps_are_in_the_loop_in_order():
    loop = calls(TRAIN, first=TRAIN[: TRAIN.index("# 1. Sample")].count("\n"))
    places = [loop.index(name) for name in STEPS]
    assert places == sorted(places)
    assert [n for n in re.findall(r"\b([1-6])\. [A-Zr]", TRAIN)] == list("123456")
    assert "score" in calls(inspect.getsource(train_cls.judge))


def test_without_the_lines_of_run_the_loop_is_still_grpo():
    kept = [line for line in TRAIN.splitlines() if not line.strip().startswith("run.")]
    left = calls("\n".join(kept))
    assert set(STEPS) - {"run.report"} <= set(left)


def test_the_loop_fits_a_screen_or_two():
    lines = TRAIN.splitlines()
    first = next(i for i, line in enumerate(lines) if "# 1. Sample" in line)
    last = next(i for i, line in enumerate(lines) if "run.report(" in line)
    assert last - first + 1 <= 80
    assert len(lines) < 115
    for script in SCRIPTS:  # 20 of train_det.py's are the help of its flags for frames and COCO
        assert len(inspect.getsource(script).splitlines()) <= 360


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    """A page that reads well may be longer: then raise the limit, and say why."""
    text = path.read_text()
    assert len(text.splitlines()) <= 365  # grpo/run/run.py: a run from its start to its end
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "train":
            assert node.end_lineno - node.lineno < 62, node.name


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = node.module
            inner = {f"{base}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if module_file(name)}
            found |= modules or {base}
    return {name for name in found if module_file(name)}


def module_file(name: str) -> Path | None:
    base = ROOT / name.replace(".", "/")
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file() and path in KNOWN:
            return path
    return None


KNOWN = set(SOURCES)

SHARED = ("data.errors", "data.files")  # what all rooms raise, and open files through

# room -> the rooms that it may import; the longest name that fits a file is its room
MAY_IMPORT = {
    **{path.stem: ("data", "grpo", "models", "rewards") for path in PATHS},
    "demo": ("demo", "data", "grpo", "models", "rewards"),
    "grpo.run": ("grpo", "models", "data", "rewards.parse"),
    "grpo.plan": ("grpo.plan", "grpo.flags", "grpo.engine", "grpo.rollout", "models", *SHARED),
    "grpo.flags": ("grpo.flags", "grpo.loss", "grpo.engine", "models", *SHARED),
    "grpo.engine": ("grpo.engine", "models", *SHARED),
    "grpo.report": ("grpo.report", "data", "rewards"),  # no torch: a run waits for it
    "grpo": ("grpo", "models", *SHARED),
    "models": ("models", *SHARED),
    "data": ("data",),
    "rewards": ("rewards", *SHARED),
}


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    room = next(room for room in MAY_IMPORT if inside(name, room))
    for imported in imports(path):
        assert any(inside(imported, allowed) for allowed in MAY_IMPORT[room]), imported
        if room == "grpo":  # the algorithm knows no run
            assert not imported.startswith(("grpo.run", "grpo.plan", "grpo.flags")), imported


def test_no_files_import_each_other_in_a_circle():
    graph = {path: {module_file(name) for name in imports(path)} - {path} for path in SOURCES}
    while graph:
        leaves = {path for path, needs in graph.items() if not needs & graph.keys()}
        assert leaves, sorted(str(path.relative_to(ROOT)) for path in graph)
        graph = {path: needs for path, needs in graph.items() if path not in leaves}


def test_the_life_of_a_run_computes_no_loss():
    """checks.py looks before the first step."""
    for path in (ROOT / "grpo" / "run").glob("*.py"):
        if path.name != "checks.py":
            assert not {"grpo.loss", "grpo.logps"} & imports(path), path.name
        if path.name != "checks.py":
            made = calls(path.read_text())
            assert not {"policy_loss", "loss.backward", "optimizer.step", "score"} & set(made)
