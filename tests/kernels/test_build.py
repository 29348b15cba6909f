"""What can be said about the GPU build without a GPU: lazy, complete, compiles, does not spill."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nvrtc
import pytest

from tapegrad.kernels import _build, kernel_names

GROUPS = [
    pytest.param(source, group, id=f"{source.file}-{group[0].partition('<')[2].partition(',')[0]}")
    for source in _build.SOURCES
    for group in source.groups
]

needs_nvrtc = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))


@needs_nvrtc
@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize(("source", "group"), GROUPS)
def test_every_kernel_compiles_without_spills(source, group, architecture):
    usage = nvrtc.resource_usage(source.code(), architecture, group, _build.OPTIONS)
    assert len(usage) == len(group)
    for name, used in usage.items():
        assert used["stack"] == 0, (name, used)
        assert used["spilled"] == 0, (name, used)
        assert used["shared"] <= 48 << 10, (name, used)


@needs_nvrtc
def test_a_spill_would_be_seen():
    code = """extern "C" __global__ void __launch_bounds__(1024, 2) spill(double *x, int n) {
      double v[64];
      for (int i = 0; i < 64; ++i) v[i] = x[i * n];
      for (int k = 0; k < n; ++k)
        for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + k;
      for (int i = 0; i < 64; ++i) x[i * n] = v[i];
    }"""
    used = nvrtc.resource_usage(code, "sm_90")["spill"]
    assert used["stack"] > 0
    assert used["spilled"] > 0


def test_every_kernel_of_every_source_is_listed():
    for source in _build.SOURCES:
        kernels = set(re.findall(r"\b(tapegrad_\w+)\(", source.code()))
        listed = {re.sub("<.*", "", name) for name in kernel_names()[source.file]}
        assert kernels == listed
    files = {path.name for path in Path(_build.__file__).parent.glob("*.cu")}
    assert files == {source.file for source in _build.SOURCES}
    assert kernel_names()["ElementwiseKernel"] == ["tapegrad_scale", "tapegrad_relu_grad"]


def test_headers_are_pasted_in():
    """CuPy's cache of compiled kernels is keyed by the source alone."""
    for source in _build.SOURCES:
        assert '#include "' not in source.code()
        assert "using index_t" in source.code()


@pytest.mark.parametrize("source", _build.SOURCES, ids=lambda source: source.file)
def test_no_floating_atomics(source):
    assert "atomic" not in re.sub("//.*", "", source.code())


def test_a_group_is_built_once_and_at_first_use():
    built = []

    class Module:
        def __init__(self, **arguments):
            built.append(arguments)

        def get_function(self, name):
            return name

    source = _build.Source("philox.cu", ("a<1>", "a<2>"), ("b",))
    _build.SOURCES.remove(source)
    before, _build.raw_module = _build.raw_module, Module
    try:
        assert built == []
        assert [source.kernel(name) for name in ("a<2>", "a<1>", "a<2>")] == [
            "a<2>",
            "a<1>",
            "a<2>",
        ]
    finally:
        _build.raw_module = before
    assert built == [
        {
            "code": source.code(),
            "options": ("-std=c++17",),
            "name_expressions": ("a<1>", "a<2>"),
        }
    ]


def test_cupy_gets_the_source_and_the_names(monkeypatch):
    cupy = pytest.importorskip("cupy")
    seen = []
    monkeypatch.setattr(cupy, "RawModule", lambda **arguments: seen.append(arguments))
    _build.raw_module(code="code", options=_build.OPTIONS, name_expressions=("name",))
    assert seen == [{"code": "code", "options": _build.OPTIONS, "name_expressions": ("name",)}]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_loads_no_cupy_and_compiles_nothing():
    code = """
import sys, tapegrad.kernels
assert "cupy" not in sys.modules
from tapegrad.kernels import _build
assert not any(source._kernels for source in _build.SOURCES)
"""
    assert run_python(code).stderr == ""


def test_the_folder_is_no_package_of_its_own():
    folder = str(Path(_build.__file__).resolve().parent.parent)
    result = run_python(f"import sys; sys.path.insert(0, {folder!r}); import kernels")
    assert "ImportError: import tapegrad.kernels, not kernels" in result.stderr
