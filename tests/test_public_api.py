"""What every user sees: docstrings and their examples, imports, and which module may use which."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend

MODULES = ["tapegrad"] + [
    found.name
    for found in pkgutil.walk_packages(tg.__path__, "tapegrad.")
    if found.name != "tapegrad.__main__"
]
DOCUMENTED = [name for name in MODULES if not name.startswith("tapegrad.kernels")]


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def public_objects() -> dict[str, Any]:
    """Return functions, classes and methods that users reach as attributes of the package."""
    found: dict[str, Any] = {f"tapegrad.{name}": getattr(tg, name) for name in tg.__all__}
    for module_name, module in [item for item in found.items() if inspect.ismodule(item[1])]:
        for name, value in vars(module).items():
            if getattr(value, "__module__", "").startswith(module_name) and is_public(name):
                found[f"{module_name}.{name}"] = value
    found = {k: v for k, v in found.items() if inspect.isfunction(v) or inspect.isclass(v)}
    for name, value in list(found.items()):
        if inspect.isclass(value):
            for member, made in vars(value).items():
                if is_public(member) and (inspect.isfunction(made) or isinstance(made, property)):
                    found[f"{name}.{member}"] = made
    return found


PUBLIC = public_objects()


# ---- docstrings


def test_the_public_names_are_there() -> None:
    assert len(PUBLIC) > 250
    assert len(tg.__all__) == len(set(tg.__all__))
    public = {
        name
        for name, value in vars(tg).items()
        if is_public(name) and not inspect.ismodule(value) and value is not importlib
    }
    assert public - set(tg.__all__) == set()
    for name in tg.__all__:
        assert hasattr(tg, name)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_begins_with_one_sentence(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name])
    assert text, f"{name} has no docstring"
    first = text.splitlines()[0]
    assert re.search(r"[.:]$|[.]`$", first), f"{name}: {first!r}"
    inside = re.search(r"(?<![A-Z])[.!?] +[A-Z]", first)  # but not after an initial
    assert not inside, f"{name}: more than one sentence in {first!r}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_module_says_what_it_is_for(name: str) -> None:
    text = importlib.import_module(name).__doc__
    assert text
    assert text.splitlines()[0].endswith(".")


def documented_functions() -> list[str]:
    return [
        name for name, value in PUBLIC.items() if name.count(".") == 1 and inspect.isfunction(value)
    ]


@pytest.mark.parametrize("name", documented_functions())
def test_a_public_function_shows_an_example(name: str) -> None:
    assert ">>>" in (PUBLIC[name].__doc__ or "")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # log(0) warns, as NumPy's does
@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_backend, "_setting", None)  # which an example sets
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for test in doctest.DocTestFinder().find(module, globs={"tg": tg, "np": np}):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_examples_are_found() -> None:
    finder = doctest.DocTestFinder()
    examples = [
        example
        for name in DOCUMENTED
        for test in finder.find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(examples) > 250


# ---- what an import brings with it


def modules_after(statement: str) -> set[str]:
    """Return the names of all modules in a fresh interpreter after a statement."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TAPEGRAD")}
    root = str(Path(tg.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(json.loads(done.stdout))


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_import_brings_numpy_and_the_standard_library_only() -> None:
    before = top_level(modules_after("import numpy"))
    after = top_level(modules_after("import tapegrad"))
    assert after - before - set(sys.stdlib_module_names) == {"tapegrad"}


def test_computing_brings_nothing_more() -> None:
    """Neither do a gradient, a layer and an optimiser's step, on the NumPy backend."""
    program = """
import tapegrad as tg
tg.set_backend("numpy")
model = tg.Sequential([tg.layers.Dense(3, activation="relu"), tg.layers.Dense(2)])
with tg.GradientTape() as tape:
    loss = tg.nn.softmax_cross_entropy(model([[1.0, 2.0]]), [1])
gradients = tape.gradient(loss, model.trainable_variables)
tg.optimizers.Adam().apply_gradients(zip(gradients, model.trainable_variables))
"""
    before = top_level(modules_after("import numpy.random"))
    assert top_level(modules_after(program)) - before - set(sys.stdlib_module_names) == {"tapegrad"}


# ---- which module may use which

# From the bottom up: a module imports from lower layers, or within its own without a circle.
LAYERS: list[list[str]] = [
    ["_backend", "_files", "_recording", "config", "errors", "kernels", "kernels.*"],
    ["_blocks", "_host_memory", "_quiet", "_storage", "_structure"],
    ["tensor"],
    ["_index", "primitive"],
    ["_flat_parameters", "_flat_update", "_update_rules", "linear", "printing", "variable"],
    ["_pullback", "_reverse", "_reverse_text", "_tape_arguments", "formulas", "tape"],
    ["ops", "ops.*"],
    ["activations", "fused", "nn", "random"],
    ["_function", "_function.*", "custom", "testing", "transforms"],
    ["_targets", "data", "data.*", "initializers", "layers", "losses", "metrics", "optimizers"],
    ["safetensors"],
    ["training", "training.*"],
    [""],  # the package itself: the public names
    ["cli"],
]


def layer_of(module: str) -> int:
    """Return the height of a module, whose name comes without the package's."""
    family = module.split(".")[0] + ".*" if "." in module else module
    found = [i for i, names in enumerate(LAYERS) if module in names or family in names]
    assert len(found) == 1, f"tapegrad.{module} is in {len(found)} layers: enter it in LAYERS"
    return found[0]


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def top_level_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from top_level_imports(other)
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from top_level_imports(child)


def imported(module: str) -> set[str]:
    """Return the modules of the package that a module imports at its top level."""
    found: set[str] = set()
    is_package = hasattr(importlib.import_module(module), "__path__")
    for statement in top_level_imports(ast.parse(source_of(module))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names if alias.name in MODULES}
            continue
        base = statement.module or ""
        if statement.level:
            parents = module.split(".")
            kept = len(parents) - statement.level + is_package
            base = ".".join([*parents[:kept], *([base] if base else [])])
        for alias in statement.names:
            whole = f"{base}.{alias.name}"
            if whole in MODULES:
                found.add(whole)
            elif base in MODULES:
                found.add(base)
    return found - {module}


GRAPH = {module: imported(module) for module in MODULES}


def short(module: str) -> str:
    return module.removeprefix("tapegrad").removeprefix(".")


def test_the_graph_is_the_real_one() -> None:
    """Guard the reading of imports: known ones are found, in each way of writing them."""
    assert "tapegrad.ops.elementwise" in GRAPH["tapegrad.nn"]  # from package import module as
    assert "tapegrad.linear" in GRAPH["tapegrad.tape"]  # from module import name
    assert "tapegrad.kernels._build" in GRAPH["tapegrad.kernels.elementwise"]  # from . import
    assert "tapegrad.fused" in GRAPH["tapegrad.nn"]
    assert sum(map(len, GRAPH.values())) > 150


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    height = layer_of(short(module))
    for other in GRAPH[module]:
        assert layer_of(short(other)) <= height, f"{module} imports {other}, which is above it"


def test_imports_have_no_circle() -> None:
    left = {module: set(others) for module, others in GRAPH.items()}
    while left:
        free = {module for module, others in left.items() if not others & left.keys()}
        assert free, f"imports in a circle among {sorted(left)}"
        left = {module: others for module, others in left.items() if module not in free}


def test_kernels_know_arrays_only() -> None:
    # Besides arrays: settings, and how a file is written. Neither knows of anything else.
    allowed = {"tapegrad.config", "tapegrad._files"}
    for module in MODULES:
        if module.startswith("tapegrad.kernels"):
            others = GRAPH[module] - allowed
            assert all(other.startswith("tapegrad.kernels") for other in others)
    assert set().union(*(GRAPH[module] for module in allowed)) == {"tapegrad.errors"}


OUTSIDE = {"numpy"}  # at the top level; what is optional is imported where it is used
CUPY_DOORS = {"tapegrad._backend", "tapegrad.kernels._build"}


@pytest.mark.parametrize("module", MODULES)
def test_other_packages_come_in_where_they_are_used(module: str) -> None:
    tree = ast.parse(source_of(module))
    at_top = list(top_level_imports(tree))
    for statement in ast.walk(tree):
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(statement, ast.ImportFrom):
            names = {(statement.module or "").split(".")[0]} if not statement.level else set()
        else:
            names = {alias.name.split(".")[0] for alias in statement.names}
        foreign = names - set(sys.stdlib_module_names) - OUTSIDE - {"tapegrad"}
        if statement in at_top:
            assert not foreign, f"{module} imports {foreign} at its top level"
        assert "cupy" not in foreign or module in CUPY_DOORS, f"{module} imports CuPy"
