"""Backends: which one is taken, what happens without a GPU, and that only primitives touch arrays.

`FakeCupy` stands in for CuPy where no GPU is.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import traceback
import types
from pathlib import Path

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend, _reverse, _storage, optimizers
from tapegrad.layers import Dense, Dropout
from tapegrad.primitive import Update, primitives
from tapegrad.training import runs
from tapegrad.variable import Variable
from tests.fake_cupy import FakeCupy

ROOT = str(Path(tg.__file__).parents[1])


def run(program, *, folder=None, **environment):
    """Run a program in a fresh interpreter, and return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TAPEGRAD", "PYTHON"))}
    paths = [str(folder), ROOT] if folder else [ROOT]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output(program, **options):
    done = run(program, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


# ---- import


HEAVY = [
    "cupy", "matplotlib", "scipy", "ml_dtypes", "argparse", "asyncio", "concurrent.futures",
    "csv", "email", "hashlib", "http", "json", "logging", "multiprocessing", "platform",
    "socket", "sqlite3", "ssl", "subprocess", "tempfile", "unittest", "urllib.request", "xml",
    "zipfile",
]  # fmt: skip


def test_import_takes_only_what_it_needs():
    program = """
        import sys, numpy
        before = set(sys.modules)
        import tapegrad
        print(*(set(sys.modules) - before))
    """
    loaded = output(program)
    assert "tapegrad.tape" in loaded
    assert [name for name in HEAVY if name in loaded] == []
    others = {name.split(".")[0] for name in loaded} - {"tapegrad"}
    assert len(others) <= 20, others  # small ones of the standard library


def test_import_asks_no_gpu(tmp_path):
    fake_package(tmp_path, "usable")
    for name in ("auto", "cupy", "numpy"):
        loaded = output(
            "import sys, tapegrad; print(*sys.modules)", folder=tmp_path, TAPEGRAD_BACKEND=name
        )
        assert "cupy" not in loaded
    # Nor does NumPy's backend, whatever is computed.
    program = """
        import sys, tapegrad as tg
        v = tg.Variable([1.0, 2.0])
        with tg.GradientTape() as tape:
            y = tg.sum(tg.nn.softmax(v) * tg.random.normal((2,)))
        tape.gradient(y, v)
        print(*sys.modules)
    """
    assert "cupy" not in output(program, folder=tmp_path, TAPEGRAD_BACKEND="numpy")


# ---- choosing, in interpreters of their own

CUPYS = {
    "usable": "",
    "no device": "count = 0",
    "no driver": "problem = RuntimeError('cudaErrorInsufficientDriver: too old')",
    "no memory": "fails = MemoryError('out of memory')",
    "no library": "raise ImportError('libcudart.so.13: cannot open shared object file')",
    "of another NumPy": "raise AttributeError(\"module 'numpy' has no attribute 'bool8'\")",
    "too old": "__version__ = '13.6.0'",
}


def fake_package(folder, kind):
    """Write a package `cupy` that is installed and in this state."""
    (folder / "cupy").mkdir()
    (folder / "cupy" / "__init__.py").write_text(
        textwrap.dedent(
            f"""
            import types, numpy
            count, problem, fails, __version__ = 1, None, None, "14.0.0"
            {CUPYS[kind]}
            class ndarray(numpy.ndarray):
                pass
            emptied = 0
            def empty(shape, dtype=float):
                global emptied
                emptied += 1
                if fails is not None:
                    raise fails
                return numpy.empty(shape, dtype).view(ndarray)
            def asarray(value, dtype=None):
                return numpy.asarray(value, dtype).view(ndarray)
            def device_count():
                if problem is not None:
                    raise problem
                return count
            cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=device_count))
            """
        )
    )


CHOICE = "import tapegrad as tg; print(tg.get_backend(), tg.constant([1.0]).backend)"


def test_auto_takes_cupy_where_it_is_usable(tmp_path):
    fake_package(tmp_path, "usable")
    assert output(CHOICE, folder=tmp_path) == ["cupy", "cupy"]  # auto is the default
    assert output(CHOICE, folder=tmp_path, TAPEGRAD_BACKEND="auto") == ["cupy", "cupy"]
    assert output(CHOICE, folder=tmp_path, TAPEGRAD_BACKEND="cupy") == ["cupy", "cupy"]
    assert output(CHOICE, folder=tmp_path, TAPEGRAD_BACKEND="numpy") == ["numpy", "numpy"]


def test_cupy_is_tried_out_once(tmp_path):
    """Trying it is a launch, and every new array asks where to go."""
    fake_package(tmp_path, "usable")
    program = """
        import cupy, tapegrad as tg
        for _ in range(3):
            tg.constant([1.0])
        tg.set_backend("cupy")
        with tg.backend("cupy"):
            tg.constant([2.0])
        print(cupy.emptied)
    """
    assert output(program, folder=tmp_path, TAPEGRAD_BACKEND="cupy") == ["1"]


@pytest.mark.parametrize("kind", [kind for kind in CUPYS if kind != "usable"])
def test_a_cupy_that_cannot_run_falls_back_with_one_warning(tmp_path, kind):
    fake_package(tmp_path, kind)
    program = """
        import warnings, threading, tapegrad as tg
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tg.constant([1.0])
            x = tg.constant([1.0]) * 2.0 + tg.random.normal((1,))
            tg.get_backend()
            tg.set_backend("auto")
            with tg.backend("auto"):
                tg.ones(3)
            thread = threading.Thread(target=lambda: tg.zeros(3))
            thread.start()
            thread.join()
        print(x.backend)
        for w in caught:
            print(w.category.__name__, w.message)
    """
    done = run(program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == "numpy"
    assert lines[1].startswith("RuntimeWarning CuPy is installed but cannot be used (")
    cause = {
        "no device": "no CUDA device was found",
        "no driver": "cudaErrorInsufficientDriver",
        "no memory": "out of memory",
        "no library": "libcudart.so.13",
        "of another NumPy": "no attribute 'bool8'",
        "too old": "this is CuPy 13.6.0, and tapegrad needs 14 or later: pip install",
    }[kind]
    assert cause in lines[1]
    assert "tapegrad uses NumPy" in lines[1]
    assert "TAPEGRAD_BACKEND=numpy" in lines[1]


ASK = """
    import tapegrad as tg
    for ask in (
        lambda: tg.set_backend("cupy"),
        lambda: tg.backend("cupy").__enter__(),
        lambda: tg.to_backend(tg.constant(1.0), "cupy"),
    ):
        try:
            ask()
        except RuntimeError as error:
            print(error)
    print(tg.get_backend())
"""
BY_NAME = "import tapegrad as tg; print('imported', flush=True); tg.constant(1.0)"


@pytest.mark.parametrize("kind", [kind for kind in CUPYS if kind != "usable"])
def test_a_cupy_that_cannot_run_asked_for_by_name(tmp_path, kind):
    fake_package(tmp_path, kind)
    done = run(ASK, folder=tmp_path, TAPEGRAD_BACKEND="numpy")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines[:3]:
        assert line.startswith('the backend "cupy" cannot be used: ')
        assert "nvidia-smi" in line  # the cure
        assert 'use the backend "numpy"' in line
    assert lines[3] == "numpy"  # nothing was changed by asking
    by_name = run(BY_NAME, folder=tmp_path, TAPEGRAD_BACKEND="cupy")
    assert by_name.returncode == 1
    assert by_name.stdout == "imported\n"  # the error comes with the first array
    assert 'RuntimeError: the backend "cupy" cannot be used: ' in by_name.stderr


BLOCKED = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "cupy":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Blocker())
"""


def test_without_cupy_nothing_is_said():
    assert output(BLOCKED + "    " + CHOICE, TAPEGRAD_BACKEND="auto") == ["numpy", "numpy"]


def test_without_cupy_it_cannot_be_asked_for_by_name():
    done = run(BLOCKED + ASK, TAPEGRAD_BACKEND="numpy")
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    for line in lines[:3]:
        assert line.startswith('the backend "cupy" cannot be used: CuPy is not installed; ')
        assert 'pip install "tapegrad[cuda13]"' in line
        assert "cuda12" in line


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy, but no GPU")
def test_the_real_cupy_without_a_device():
    # However it is installed: no device is visible to it, or there is no driver.
    program = """
        import warnings, tapegrad as tg
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(tg.get_backend(), tg.constant([1.0]).backend)
        print(len([w for w in caught if "CuPy is installed but cannot be used" in str(w.message)]))
        try:
            tg.set_backend("cupy")
        except RuntimeError as error:
            print(error)
    """
    done = run(program, TAPEGRAD_BACKEND="auto", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["numpy numpy", "1"]
    assert lines[2].startswith('the backend "cupy" cannot be used: ')
    assert "nvidia-smi" in lines[2]


def test_the_warning_is_shown_to_the_user():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy, but no GPU")
    done = run(CHOICE, TAPEGRAD_BACKEND="auto", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 0
    assert done.stderr.count("RuntimeWarning: CuPy is installed but cannot be used") == 1


def test_unknown_names():
    wanted = "must be one of 'auto', 'numpy', 'cupy', got"
    for name in ("cuda", "NumPy", "", None):
        with pytest.raises(ValueError, match=rf"set_backend\(name\) {wanted} {name!r}"):
            tg.set_backend(name)
        with (
            pytest.raises(ValueError, match=rf"backend\(name\) {wanted} {name!r}"),
            tg.backend(name),
        ):
            pass
    with pytest.raises(ValueError, match=f"backend {wanted} 'cuda'"):
        tg.to_backend(tg.constant(1.0), "cuda")
    done = run(BY_NAME, TAPEGRAD_BACKEND="gpu")
    assert done.stdout == "imported\n"
    assert f"the environment variable TAPEGRAD_BACKEND {wanted} 'gpu'" in done.stderr


# ---- a CuPy in this process


@pytest.fixture
def cupy(monkeypatch):
    """A usable CuPy that is installed but not yet asked for, and the default setting `auto`."""
    module = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delenv("TAPEGRAD_BACKEND")
    for name, value in {
        "_cupy": None,
        "cupy_ndarray": None,
        "numpy_alone": True,
        "_auto": None,
        "_setting": None,
        "_kernels_enabled": False,
    }.items():
        monkeypatch.setattr(_backend, name, value)
    # The common stream of random numbers moves to where numbers are drawn: it is left alone.
    monkeypatch.setattr(tg.random, "_default", tg.random.Generator(0))
    return module


@pytest.mark.parametrize("value", [2.0, [2.0]])
def test_what_was_read_of_a_variable_stays(cupy, value):
    v = tg.Variable(value)
    assert v.backend == "cupy"
    read = tg.asarray(v)
    v.assign(v * 0.5)
    assert read.numpy() == 2.0


def in_a_thread(function):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join(timeout=30)
    return answers[0]


def test_new_arrays_are_made_where_one_says(cupy):
    assert tg.get_backend() == "cupy"  # auto
    assert tg.constant([1.0]).backend == tg.ones(2).backend == "cupy"
    assert tg.Variable(1.0).backend == tg.random.normal((2,)).backend == "cupy"
    tg.set_backend("numpy")
    assert tg.get_backend() == tg.constant([1.0]).backend == "numpy"
    assert tg.Variable(1.0).backend == tg.random.normal((2,)).backend == "numpy"
    tg.set_backend("cupy")
    assert tg.constant([1.0]).backend == "cupy"
    assert tg.constant([1.0]).device == "<CUDA Device 0>"
    tg.set_backend("auto")
    assert tg.constant([1.0]).backend == "cupy"


def test_the_environment_variable_counts_least(cupy, monkeypatch):
    monkeypatch.setenv("TAPEGRAD_BACKEND", "numpy")
    assert tg.get_backend() == "numpy"
    tg.set_backend("cupy")
    assert tg.get_backend() == "cupy"
    with tg.backend("numpy"):
        assert tg.get_backend() == "numpy"


def test_nested_overrides(cupy):
    tg.set_backend("numpy")
    with tg.backend("cupy"):
        assert tg.get_backend() == "cupy"
        with tg.backend("numpy"):
            assert tg.get_backend() == "numpy"
            tg.set_backend("cupy")  # for later: the block goes on
            assert tg.get_backend() == "numpy"
            with tg.backend("auto"):
                assert tg.get_backend() == "cupy"
        assert tg.get_backend() == "cupy"
        tg.set_backend("numpy")
        assert tg.get_backend() == "cupy"
    assert tg.get_backend() == "numpy"


def test_an_override_ends_with_an_error(cupy):
    tg.set_backend("numpy")
    with pytest.raises(ZeroDivisionError), tg.backend("cupy"):
        _ = 1 / 0
    assert tg.get_backend() == "numpy"
    with pytest.raises(ValueError, match="got 'gpu'"), tg.backend("gpu"):
        pass
    assert tg.get_backend() == "numpy"


def test_an_override_is_of_one_thread_and_a_setting_of_all(cupy):
    tg.set_backend("numpy")
    with tg.backend("cupy"):
        assert in_a_thread(tg.get_backend) == "numpy"
        assert tg.get_backend() == "cupy"
    tg.set_backend("cupy")
    assert in_a_thread(tg.get_backend) == "cupy"

    def override():
        with tg.backend("numpy"):
            entered.set()
            left.wait(timeout=30)
            return tg.get_backend()

    entered, left = threading.Event(), threading.Event()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(override()))
    thread.start()
    entered.wait(timeout=30)
    assert tg.get_backend() == "cupy"
    left.set()
    thread.join(timeout=30)
    assert answers == ["numpy"]


def test_operations_follow_their_arrays(cupy):
    with tg.backend("cupy"):
        x, v = tg.constant([1.0, 2.0]), tg.Variable([3.0, 4.0])
    with tg.backend("numpy"):
        y = x * 2.0 + [1.0, 1.0]  # numbers and lists go where the others are
        assert y.backend == "cupy"
        assert (v + x).backend == tg.sum(x).backend == tg.exp(v).backend == "cupy"
        assert tg.zeros_like(x).backend == "cupy"
        np.testing.assert_array_equal(y.numpy(), [3.0, 5.0])
        v.assign([5.0, 6.0])
        assert v.backend == "cupy"
        np.testing.assert_array_equal(v.numpy(), [5.0, 6.0])


def test_moving_between_backends(cupy):
    with tg.backend("numpy"):
        here = tg.constant([1.0, 2.0])
    there = tg.to_backend(here, "cupy")
    assert (here.backend, there.backend) == ("numpy", "cupy")
    back = tg.to_backend(there, "numpy")
    np.testing.assert_array_equal(back, [1.0, 2.0])
    v = tg.Variable(here)
    with tg.GradientTape() as tape:
        y = tg.sum(tg.to_backend(v, "cupy") ** 2)
    gradient = tape.gradient(y, v)
    assert (y.backend, gradient.backend) == ("cupy", "numpy")
    np.testing.assert_array_equal(gradient, [2.0, 4.0])


def test_no_array_reaches_the_host_silently(cupy):
    x = tg.constant([1.0, 2.0])
    with pytest.raises(TypeError, match=r"is not copied to the host silently: write x\.numpy\(\)"):
        np.asarray(x)
    np.testing.assert_array_equal(x.numpy(), [1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("add", lambda a, b: a + b),
        ("matmul", lambda a, b: tg.matmul(a, b)),
        ("where", lambda a, b: tg.where(a > 0, b, 0.0)),
        ("concat", lambda a, b: tg.concat([a, b])),
        ("linear_relu", lambda a, b: tg.nn.linear_relu(a, tg.reshape(b, (2, 1)), [0.0])),
        ("assign_add", lambda a, b: tg.Variable(a).assign_add(b)),
    ],
)  # fmt: skip
def test_mixing_backends(cupy, name, operation):
    with tg.backend("numpy"):
        here = tg.constant([1.0, 2.0])
    there = tg.to_backend(here, "cupy")
    for a, b in ((here, there), (there, here)):
        with pytest.raises(TypeError) as caught:
            operation(tg.asarray(a), b)
        text = str(caught.value)
        assert name in text
        assert "arguments are on different backends: argument" in text
        assert "(numpy, shape (" in text
        assert "(cupy, shape (" in text
        assert 'tapegrad.to_backend(x, "numpy" or "cupy")' in text


def test_numpys_arrays_become_constants_where_new_arrays_are_made(cupy):
    x = np.array([1.0, 2.0])
    there = tg.ones(2)
    assert {tg.constant(x).backend, tg.Variable(x).backend, (x * there).backend} == {"cupy"}
    with tg.backend("numpy"):
        assert tg.constant(x).backend == "numpy"
        with pytest.raises(TypeError, match="different backends"):
            tg.multiply(x, there)


def test_the_mixture_is_described(cupy):
    with tg.backend("numpy"):
        here = tg.ones((2, 3))
    with pytest.raises(TypeError) as caught:
        here * tg.ones(3)
    assert str(caught.value).startswith(
        "[multiply] arguments are on different backends: argument 0 (numpy, shape (2, 3)), "
        "argument 1 (cupy, shape (3,)); nothing is copied silently: "
    )


def train(backend, move):
    """Train a small model for a few epochs; return its numbers, weights and predictions."""
    rng = np.random.default_rng(0)
    with tg.backend(backend):
        x = move(rng.normal(size=(12, 3)).astype(np.float32))
        y = move(rng.integers(0, 4, 12))
        tg.random.seed(0)
        model = tg.Sequential([Dense(5, "relu"), Dropout(0.25), Dense(4)])
        loss = tg.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, ["accuracy"])
        history = model.fit(x, y, batch_size=5, epochs=3, seed=1, validation_split=0.25)
        assert {v.backend for v in model.variables} == {backend}
        assert {v.backend for v in model.optimizer._hyperparameters.values()} == {backend}
        numbers = {**history.history, "evaluated": model.evaluate(x, y)}
        return numbers, [*(v.numpy() for v in model.variables), model.predict(x, 5)]


@pytest.mark.parametrize("data", ["where the model is", "NumPy's arrays"])
def test_the_same_program_on_both_backends(cupy, data):
    def move(x):
        return x if data == "NumPy's arrays" else tg.to_backend(tg.constant(x), tg.get_backend())

    numbers, weights = train("numpy", move)
    again, same = train("cupy", move)
    assert set(numbers) == {"loss", "accuracy", "val_loss", "val_accuracy", "evaluated"}
    for name, values in numbers.items():
        assert again[name] == pytest.approx(values, rel=1e-5)
    for a, b in zip(weights, same, strict=True):
        assert isinstance(b, np.ndarray)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_command_line_on_both_backends(cupy, tmp_path):
    digits = tg.data.load("digits")
    settings = runs.Settings(hidden=(8,), epochs=1)
    found = [runs.train(settings, digits, tmp_path / n, n, 0)[1] for n in ("numpy", "cupy")]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert runs.evaluate(tmp_path / "cupy", digits, "numpy") == pytest.approx(found[1], rel=1e-5)


# ---- nothing touches an array outside a primitive


class Touched(AssertionError):
    """An array operation outside a primitive's meaning."""


def refuse(what):
    place = next(
        (
            f"{frame.filename}:{frame.lineno}: {frame.line}"
            for frame in reversed(traceback.extract_stack())
            if f"{os.sep}tapegrad{os.sep}" in frame.filename
        ),
        "outside tapegrad",
    )
    raise Touched(f"{what} outside a primitive, at {place}")


class Guarded(np.ndarray):
    """An array of which only shape, dtype and the like may be asked."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        refuse(ufunc.__name__)

    def __array_function__(self, function, kinds, inputs, options):
        refuse(function.__name__)


FACTS = {"shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides", "base", "flags"}
KEPT = FACTS | {
    "__array_interface__",
    "__array_finalize__",
    "__array_ufunc__",
    "__array_function__",
    "__new__",
    "__len__",
}


def refusing(name):
    def touched(self, *inputs, **options):
        refuse(name)

    return touched


for attribute, value in vars(np.ndarray).items():
    if attribute in KEPT or attribute == "__doc__":
        continue
    if callable(value):
        setattr(Guarded, attribute, refusing(attribute))
    else:
        setattr(Guarded, attribute, property(refusing(attribute)))


def guard(array):
    return np.ndarray.view(np.asarray(array), Guarded)


def unguard(array):
    if not isinstance(array, Guarded):
        return array
    array = np.ndarray.view(array, np.ndarray)
    return array if array.ndim else array[()]  # 0-d results are NumPy's scalars


class GuardedNumPy:
    """NumPy, whose functions refuse guarded arrays: `np.array` asks no method of theirs."""

    def __getattr__(self, name):
        value = getattr(np, name)
        if not isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            return value

        def function(*inputs, **options):
            if any(isinstance(x, Guarded) for x in (*inputs, *options.values())):
                refuse(f"np.{name}")
            return value(*inputs, **options)

        return function


def meaning(forward, writes=0):
    """Let a meaning see plain arrays, and all others only what it gives."""

    def guarded_forward(xp, *arrays, **params):
        views = [np.ndarray.view(a, np.ndarray) for a in arrays[:writes]]
        y = forward(xp, *views, *[unguard(a) for a in arrays[writes:]], **params)
        if isinstance(y, tuple):
            return tuple(None if each is None else guard(each) for each in y)
        return None if y is None else guard(y)

    return guarded_forward


def guarded_constant(value):
    tensor = tg.constant(0.0)
    tensor._array = guard(value)
    return tensor


@contextlib.contextmanager
def only_primitives_touch_arrays():
    """Guard every array of a Tensor or Variable against all but meanings."""
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "tapegrad"]
    updates = {id(x): x for m in modules for x in vars(m).values() if isinstance(x, Update)}
    stand_in = GuardedNumPy()
    with pytest.MonkeyPatch.context() as patch:
        for primitive in primitives.values():
            patch.setattr(primitive, "forward", meaning(primitive.forward))
        for update in updates.values():
            patch.setattr(update, "forward", meaning(update.forward, update.writes))
        for module in modules:
            if vars(module).get("np") is np:
                patch.setattr(module, "np", stand_in)
        # Reverse programs are NumPy's own: they compare constants, and write some meanings out.
        patch.setattr(_reverse, "on", False)
        place, version = Variable._place, Variable._version

        def guarded_version(variable):
            # Reading a Variable is a primitive, `read`, in all but its class: recorders see it.
            if not isinstance(variable._array, Guarded):
                return version(variable)
            return guarded_constant(unguard(variable._array))

        patch.setattr(
            Variable, "_place", lambda self, buffer, array: place(self, buffer, guard(array))
        )
        patch.setattr(Variable, "_version", guarded_version)
        members = [
            member
            for ref in list(_storage._buffers.values())
            if (buffer := ref()) is not None
            for member_ref in buffer._members
            if (member := member_ref()) is not None
            # The counter is read as a number by design: the node has it as a parameter.
            if member is not tg.random.default_generator().counter
        ]
        before = [(member, member._array) for member in members]
        for member in members:
            member._array, member._tensor = guard(member._array), None
        try:
            yield
        finally:
            for member, array in before:
                member._array, member._tensor = array, None


def test_the_guard_refuses():
    x, v = tg.constant([1.0, 2.0]), tg.Variable([1.0, 2.0])
    with only_primitives_touch_arrays():
        x._array = guard(x._array)
        for touch in (
            lambda: x._array + 1,
            lambda: 1 - x._array,
            lambda: x._array[0],
            lambda: x._array.sum(),
            lambda: x._array.astype(np.float64),
            lambda: x._array.T,
            lambda: np.exp(x._array),
            lambda: np.concatenate([x._array, x._array]),
            lambda: _backend.np.array(x._array),
            lambda: v._array.copy(),
            lambda: float(v._array[0]),
            lambda: (x * v)._array.reshape(2, 1),
            lambda: x.numpy(),
        ):
            with pytest.raises(Touched, match="outside a primitive"):
                touch()
        assert (x * v).shape == (2,)
    assert v.numpy().tolist() == [1.0, 2.0]


def model_and_batch(optimizer, loss, metrics, labels):
    rng = np.random.default_rng(0)
    tg.random.seed(0)
    model = tg.Sequential([Dense(6, "relu"), Dropout(0.25), Dense(5, "tanh"), Dense(4, labels)])
    model.compile(optimizer, loss, metrics, weighted_metrics=metrics)
    x, weights = rng.normal(size=(8, 3)), rng.uniform(size=8)  # float64: the layers cast it
    y = {
        "softmax": rng.integers(0, 4, 8),
        "sigmoid": rng.integers(0, 2, (8, 4)).astype(np.float32),
        "linear": rng.normal(size=(8, 4)),
    }[labels]
    return model, (x, y, weights)


STEPS = {
    "sgd": (lambda: "sgd", lambda: "mse", ["mae", "mse"], "linear"),
    "nesterov": (
        lambda: optimizers.SGD(0.01, 0.9, nesterov=True),
        lambda: "mae",
        ["mse", lambda t, p: tg.max(p, axis=-1)],
        "linear",
    ),
    "adagrad": (lambda: "adagrad", lambda: "huber", ["mae"], "linear"),
    "rmsprop": (lambda: "rmsprop", lambda: "binary_crossentropy", ["binary_accuracy"], "sigmoid"),
    "adam": (
        lambda: "adam",
        lambda: tg.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2),
        ["accuracy", tg.metrics.TopKAccuracy(2)],
        "softmax",
    ),
    "adamw": (
        lambda: "adamw",
        lambda: "sparse_categorical_crossentropy",
        ["sparse_categorical_accuracy"],
        "softmax",
    ),
    "categorical": (
        lambda: "adam",
        lambda: tg.losses.CategoricalCrossentropy(label_smoothing=0.1),
        ["categorical_accuracy"],
        "sigmoid",
    ),
    "kl": (lambda: "adam", lambda: "kl_divergence", ["accuracy"], "sigmoid"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_training_step_touches_arrays_in_primitives_only(name):
    optimizer, loss, metrics, labels = STEPS[name]
    values = {}
    for guarded in (False, True):
        model, batch = model_and_batch(optimizer(), loss(), metrics, labels)
        model.train_step(*map(tg.constant, batch))  # builds the layers and packs the buffers
        if guarded:
            with only_primitives_touch_arrays():
                inputs = [guarded_constant(x) for x in batch]
                for _ in range(2):
                    model.train_step(*inputs)
                model.test_step(*inputs)
                results = [metric.result() for metric in (model._loss_mean, *model._metrics)]
                numbers = [float(unguard(result._array)) for result in results]
        else:
            for _ in range(2):
                model.train_step(*map(tg.constant, batch))
            model.test_step(*map(tg.constant, batch))
            numbers = [float(m.result()) for m in (model._loss_mean, *model._metrics)]
        values[guarded] = numbers, [v.numpy() for v in model.variables]
    # The guarded steps were steps: they gave the same numbers.
    assert values[False][0] == values[True][0]
    for a, b in zip(values[False][1], values[True][1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_explicit_loop_touches_arrays_in_primitives_only():
    rng = np.random.default_rng(1)
    w, b, unused = (tg.Variable(rng.normal(size=s)) for s in ((3, 2), (2,), (4,)))
    x, y = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(5, 1))

    def step(x, y, optimizer):
        with tg.GradientTape(persistent=True) as outer:
            with tg.GradientTape() as tape:
                h = tg.nn.softplus(x @ w + b)
                parts = tg.split(tg.concat([h, h * b], axis=1), 2, axis=1)
                loss = tg.mean(tg.square(parts[0] - y) + tg.exp(-parts[1][:, ::-1]))
                loss = loss + tg.norm(w) + tg.logsumexp(tg.gather(h, [0, 2, 2]))
            gradients = tape.gradient(loss, [w, b])
            penalty = tg.sum(gradients[0] ** 2) + tg.sum(gradients[1] ** 2)
        second = outer.gradient(penalty, [w, b, unused], unconnected_gradients="zero")
        again = outer.gradient([loss, penalty], [w, b], output_gradients=[loss * 0 + 1, None])
        pairs = zip([*again, second[2]], [w, b, unused], strict=True)
        optimizer.apply_gradients(pairs)
        return loss

    optimizer = optimizers.Adam(0.01)
    step(tg.constant(x), tg.constant(y), optimizer)
    plain_loss = float(step(tg.constant(x), tg.constant(y), optimizer))
    assert np.isfinite(plain_loss)
    with only_primitives_touch_arrays():
        loss = step(guarded_constant(x), guarded_constant(y), optimizer)
    assert float(unguard(loss._array)) != plain_loss
