"""The binding against the real cuBLASLt where it is installed: only a handle needs a driver."""

from __future__ import annotations

import ctypes
import gc
import sys
import types

import pytest
from cublaslt_emulation import FakeCublasLt

from tapegrad.kernels import cublaslt
from tapegrad.kernels.cublaslt import (
    Compute,
    CublasLtError,
    DataType,
    DescriptorAttribute,
    Epilogue,
    LayoutAttribute,
    PreferenceAttribute,
)


@pytest.fixture(scope="module")
def library():
    found, problem = cublaslt.load()
    if found is None:
        pytest.skip(problem)
    return found


def read_back(library, kind, made, attribute, ctype):
    """Ask the library for an attribute, through a function that the binding does not use."""
    get = getattr(library._functions, f"cublasLt{kind}GetAttribute")
    get.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    )
    value, written = ctype(), ctypes.c_size_t()
    status = get(
        *(made.pointer, attribute, ctypes.byref(value), ctypes.sizeof(value)), ctypes.byref(written)
    )
    assert status == 0
    assert written.value == ctypes.sizeof(value)
    return value.value


def test_version(library):
    assert library.version >= 120000
    major, minor, patch = map(int, library.version_text.split("."))
    assert library.version == major * 10000 + minor * 100 + patch


@pytest.mark.parametrize("epilogue", list(Epilogue))
@pytest.mark.parametrize(
    ("compute", "scale"),
    [
        (Compute.FLOAT32, DataType.FLOAT32),
        (Compute.TF32, DataType.FLOAT32),
        (Compute.FLOAT64, DataType.FLOAT64),
    ],
)
def test_descriptors(library, compute, scale, epilogue):
    made = library.descriptor(
        compute,
        scale,
        {
            DescriptorAttribute.TRANSPOSE_A: ctypes.c_int32(1),
            DescriptorAttribute.TRANSPOSE_B: ctypes.c_int32(0),
            DescriptorAttribute.EPILOGUE: ctypes.c_uint32(epilogue),
            DescriptorAttribute.AUX_LEADING: ctypes.c_int64(1 << 33),
        },
    )
    library.set_pointer(made, DescriptorAttribute.BIAS_POINTER, 0x7F00_1234_5670)
    library.set_pointer(made, DescriptorAttribute.AUX_POINTER, 0x7F00_1234_5680)
    for attribute, ctype, want in [
        (0, ctypes.c_int32, compute),  # CUBLASLT_MATMUL_DESC_COMPUTE_TYPE
        (1, ctypes.c_int32, scale),  # CUBLASLT_MATMUL_DESC_SCALE_TYPE
        (DescriptorAttribute.TRANSPOSE_A, ctypes.c_int32, 1),
        (DescriptorAttribute.TRANSPOSE_B, ctypes.c_int32, 0),
        (DescriptorAttribute.EPILOGUE, ctypes.c_uint32, epilogue),
        (DescriptorAttribute.BIAS_POINTER, ctypes.c_void_p, 0x7F00_1234_5670),
        (DescriptorAttribute.AUX_POINTER, ctypes.c_void_p, 0x7F00_1234_5680),
        (DescriptorAttribute.AUX_LEADING, ctypes.c_int64, 1 << 33),
    ]:
        assert read_back(library, "MatmulDesc", made, attribute, ctype) == want


@pytest.mark.parametrize("data", list(DataType))
def test_layouts(library, data):
    for batch, stride in ((1, 0), (3, 0), (7, 1 << 33)):
        made = library.layout(data, 5, 1 << 32, 8, batch, stride)
        for attribute, ctype, want in [
            (0, ctypes.c_uint32, data),  # CUBLASLT_MATRIX_LAYOUT_TYPE
            (1, ctypes.c_int32, 0),  # its order: CUBLASLT_ORDER_COL
            (2, ctypes.c_uint64, 5),  # rows
            (3, ctypes.c_uint64, 1 << 32),  # columns
            (4, ctypes.c_int64, 8),  # leading dimension
            (LayoutAttribute.BATCH_COUNT, ctypes.c_int32, batch),
            (LayoutAttribute.BATCH_STRIDE, ctypes.c_int64, stride),
        ]:
            assert read_back(library, "MatrixLayout", made, attribute, ctype) == want


def test_preferences(library):
    wanted = {
        PreferenceAttribute.MAX_WORKSPACE: ctypes.c_uint64(32 << 20),
        PreferenceAttribute.REDUCTION_SCHEMES: ctypes.c_uint32(2),
        PreferenceAttribute.ALIGNMENT_A: ctypes.c_uint32(4),
        PreferenceAttribute.ALIGNMENT_B: ctypes.c_uint32(8),
        PreferenceAttribute.ALIGNMENT_C: ctypes.c_uint32(16),
        PreferenceAttribute.ALIGNMENT_D: ctypes.c_uint32(16),
    }
    made = library.preference(wanted)
    for attribute, value in wanted.items():
        got = read_back(library, "MatmulPreference", made, attribute, type(value))
        assert got == value.value


def test_a_wrong_attribute_is_an_error(library):
    with pytest.raises(CublasLtError, match="DescSetAttribute failed with status 7: invalid value"):
        library.descriptor(Compute.FLOAT32, DataType.FLOAT32, {999: ctypes.c_int32(1)})


# ---- without the library


def test_version_text():
    for number, text in ((131000, "13.10.0"), (120803, "12.8.3"), (130005, "13.0.5")):
        assert cublaslt.Library(FakeCublasLt(version=number)).version_text == text


def test_objects_are_destroyed_with_their_owners():
    fake = FakeCublasLt()
    library = cublaslt.Library(fake)
    made = [library.layout(DataType.FLOAT32, 1, 1, 1, 1, 0), library.handle()]
    assert len(fake.objects) == 2
    del made
    gc.collect()
    assert fake.objects == {}


def test_the_structure_is_the_headers():
    result = cublaslt.HeuristicResult
    offsets = {name: getattr(result, name).offset for name, _ in result._fields_}
    assert offsets == {"algorithm": 0, "workspace": 64, "state": 72, "waves": 76, "reserved": 80}
    assert ctypes.sizeof(result) == 96


def test_constants():
    """The header's numbers (cublasLt.h, cublas_api.h, library_types.h), copied once more."""
    assert [*Epilogue] == [1, 4, 6, 6 | 128, 8 | 128 | 16, 256]
    assert [*DescriptorAttribute] == [2, 3, 4, 7, 8, 11, 12]
    assert [*LayoutAttribute] == [5, 6]
    assert [*PreferenceAttribute] == [1, 3, 5, 6, 7, 8]
    assert [*Compute] == [68, 70, 77]
    assert [*DataType] == [0, 1, 2, 14]


@pytest.fixture
def finder(monkeypatch):
    """What cuda.pathfinder and the system's loader find; the order in which they were asked."""
    asked = []
    found = types.SimpleNamespace(path=None, loads={}, asked=asked)
    pathfinder = types.ModuleType("cuda.pathfinder")

    def load_nvidia_dynamic_lib(name):
        asked.append(name)
        if found.path is None:
            raise RuntimeError("not found")
        return types.SimpleNamespace(abs_path=found.path)

    def load(name):
        asked.append(name)
        if name not in found.loads:
            raise OSError(f"{name}: cannot open shared object file")
        return found.loads[name]

    pathfinder.load_nvidia_dynamic_lib = load_nvidia_dynamic_lib
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    monkeypatch.setattr(ctypes, "CDLL", load)
    cublaslt.load.cache_clear()
    yield found
    cublaslt.load.cache_clear()


def test_pathfinder_is_asked_first(finder):
    finder.path = "/site-packages/nvidia/cu13/lib/libcublasLt.so.13"
    finder.loads = {finder.path: FakeCublasLt(), "libcublasLt.so.12": FakeCublasLt(version=120000)}
    library, problem = cublaslt.load()
    assert (library.version, problem) == (131000, "")
    assert finder.asked == ["cublasLt", finder.path]
    assert cublaslt.load()[0] is library
    assert len(finder.asked) == 2  # looked for once


@pytest.mark.parametrize("pathfinder", ["finds nothing", "is missing"])
def test_then_the_systems_loader(finder, monkeypatch, pathfinder):
    if pathfinder == "is missing":
        monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    finder.loads = {"libcublasLt.so.12": FakeCublasLt(version=120000)}
    assert cublaslt.load()[0].version == 120000
    assert finder.asked[-2:] == ["libcublasLt.so.13", "libcublasLt.so.12"]


def test_where_there_is_none_it_says_how_to_get_it(finder):
    too_old = types.SimpleNamespace(cublasLtGetVersion=FakeCublasLt().cublasLtGetVersion)
    finder.loads = {"libcublasLt.so.13": too_old}  # without the functions of today
    library, problem = cublaslt.load()
    assert library is None
    assert problem.startswith("libcublasLt was not found (pip install ")
