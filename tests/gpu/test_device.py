"""What only a device has: streams, its memory, other libraries' arrays there, sanitizers."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend
from tapegrad.kernels import kernel_names

from .conftest import STAND_IN, device_only

ROOT = Path(__file__).resolve().parents[2]


def step(seed: int = 0, rows: int = 65) -> list[np.ndarray[Any, Any]]:
    """Take a few training steps and return all that they made, as bits."""
    rng = np.random.default_rng(seed)
    tg.random.seed(seed)
    w = [tg.Variable(rng.normal(size=s).astype("f4") / 5) for s in ((7, 33), (33,), (33, 5), (5,))]
    table = tg.Variable(rng.normal(size=(9, 7)).astype("f4"))
    rows_of, labels = rng.integers(0, 9, rows), rng.integers(0, 5, rows)
    optimizer = tg.optimizers.Adam(0.01)
    losses = []
    for _ in range(3):
        with tg.GradientTape() as tape:
            x = tg.take(table, rows_of, axis=0)  # many rows are taken more than once
            hidden = tg.nn.dropout(tg.nn.linear_relu(x, w[0], w[1]), 0.2)
            loss = tg.nn.softmax_cross_entropy(tg.nn.linear(hidden, w[2], w[3]), labels)
        gradients = tape.gradient(loss, [*w, table])
        optimizer.apply_gradients(zip(gradients, [*w, table], strict=True))
        losses.append(loss.numpy())
    return [*losses, *[v.numpy() for v in (*w, table)]]


def assert_same_bits(got: list[Any], want: list[Any]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.tobytes() == b.tobytes()


# ---- determinism, streams, threads


def test_the_same_program_gives_the_same_bits() -> None:
    want = step()
    for _ in range(3):
        assert_same_bits(step(), want)


@pytest.mark.parametrize("kernels", [True, False])
def test_repeated_indices_add_up_in_one_order(
    kernels: bool, without_kernels: Callable[..., Any]
) -> None:
    """With atomics the last bits would change from run to run."""
    rng = np.random.default_rng(1)
    rows, upstream = rng.integers(0, 5, 20_000), rng.normal(size=(20_000, 3)).astype("f4")

    def gathered() -> bytes:
        v = tg.Variable(np.zeros((5, 3), "f4"))
        with tg.GradientTape() as tape:
            y = tg.take(v, rows, axis=0)
        return tape.gradient(y, v, output_gradients=upstream).numpy().tobytes()

    runs = {gathered() if kernels else without_kernels(gathered) for _ in range(5)}
    assert len(runs) == 1
    (found,) = runs
    want = np.zeros((5, 3))
    np.add.at(want, rows, upstream.astype("f8"))
    got = np.frombuffer(found, "f4").reshape(5, 3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_places_named_twice_are_assigned_the_last_value() -> None:
    rng = np.random.default_rng(2)
    rows, values = rng.integers(0, 50, 5000), rng.normal(size=(5000, 3)).astype("f4")
    v, want = tg.Variable(np.zeros((50, 3), "f4")), np.zeros((50, 3), "f4")
    v[rows].assign(values)
    want[rows] = values
    np.testing.assert_array_equal(v.numpy(), want)


@device_only
def test_a_stream_of_ones_own(cupy: ModuleType) -> None:
    want = step()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        got = step()
    assert_same_bits(got, want)


@device_only
def test_operations_wait_for_their_stream_and_for_nothing_else(cupy: ModuleType) -> None:
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) {'
        " const long long t = clock64(); while (clock64() - t < n); }",
        "spin",
    )
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        v = tg.Variable(np.zeros(1000, "f4"))
        threes = tg.full(1000, 3.0)

        def work() -> tg.Tensor:
            v.assign(threes)
            return tg.sum(v * 2.0)

        for ticks in (1, 1, 3_000_000_000):  # at first all is compiled and memory taken
            v.assign(tg.zeros(1000))
            stream.synchronize()
            spin((1,), (1,), (np.int64(ticks),))
            y = work()
        assert not stream.done, "an operation waited for the device"
        # On another stream the product would have been taken before the assignment.
        assert float(y) == 6000.0


@device_only
def test_large_updates_without_kernels_stay_on_the_stream(
    cupy: ModuleType, without_kernels: Callable[..., Any]
) -> None:
    """CuPy's current stream belongs to a thread: work handed to another thread would leave it."""
    others: list[str] = []
    original = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        others.append(thread.name)
        original(thread)

    with pytest.MonkeyPatch.context() as patch, cupy.cuda.Stream(non_blocking=True):
        patch.setattr(threading.Thread, "start", started)
        v = tg.Variable(np.ones(3_000_000, "f4"))  # on this stream, which would not wait for it
        g = tg.ones_like(v)
        without_kernels(tg.optimizers.Adam(0.5).apply_gradients, [(g, v)])
        np.testing.assert_allclose(v.numpy(), 0.5, rtol=1e-5)
    assert others == []


@device_only  # the kernels' stand-ins run one at a time
def test_two_threads() -> None:
    found: dict[int, Any] = {}
    ready = threading.Barrier(2)

    def work(seed: int) -> None:
        try:
            with tg.backend("cupy"):
                ready.wait(timeout=60)
                found[seed] = [step_of_its_own(seed) for _ in range(20)]
        except BaseException as error:
            found[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    for seed in (0, 1):
        assert isinstance(found[seed], list), found[seed]
        alone = step_of_its_own(seed)
        for got in found[seed]:
            assert_same_bits(got, alone)


def step_of_its_own(seed: int) -> list[np.ndarray[Any, Any]]:
    """Differentiate without the common stream of random numbers, which threads share."""
    rng = np.random.default_rng(seed)
    x, w, b = (tg.constant(rng.normal(size=s).astype("f4")) for s in ((33, 7), (7, 12), (12,)))
    labels = rng.integers(0, 12, 33)
    with tg.GradientTape() as tape:
        tape.watch([x, w, b])
        hidden = tg.nn.linear_relu(x, w, b)
        loss = tg.nn.softmax_cross_entropy(hidden, labels)
    return [g.numpy() for g in (loss, *tape.gradient(loss, [x, w, b]))]


# ---- memory


@device_only
def test_out_of_memory_says_what_was_asked_and_what_is_free(cupy: ModuleType) -> None:
    _, total = cupy.cuda.Device().mem_info
    length = total // 4 + 1  # of float32: more than there is
    x = tg.ones(3)
    wide = tg.broadcast_to(tg.ones(1), (length,))
    v = tg.Variable(np.ones(3, "f4"))
    for name, ask in {
        "multiply": lambda: wide * 2.0,
        "full": lambda: tg.zeros(length),
        "relu": lambda: tg.nn.relu(wide),
        "random_bits": lambda: tg.random.uniform(length),
    }.items():
        with pytest.raises(MemoryError) as caught:
            ask()
        text = str(caught.value)
        assert text.startswith(f"[{name}] out of memory allocating ")
        asked = int(text.split("allocating ")[1].split(" bytes")[0].replace(",", ""))
        assert asked >= 4 * length // 2
        assert f"of the GPU's {total:,} bytes are free" in text
        assert "smaller batches" in text
        del caught
        gc.collect()
        # The program goes on, and nothing was half written.
        np.testing.assert_array_equal((x * 2.0 + v).numpy(), [3.0, 3.0, 3.0])
    step()


@device_only
def test_memory_goes_back(cupy: ModuleType) -> None:
    step()
    gc.collect()
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    gc.disable()
    try:
        for _ in range(3):
            step()
        assert pool.used_bytes() <= before
    finally:
        gc.enable()


def test_views_of_a_variable_keep_their_values() -> None:
    """Copy on write: what was read before an assignment, and what a tape saved, stays."""
    start = np.arange(6, dtype="f4").reshape(2, 3)
    v = tg.Variable(start)
    with tg.GradientTape(persistent=True) as tape:
        views = {
            "read": (v.value(), start),
            "transposed": (tg.transpose(v), start.T),
            "sliced": (v[:, 1:], start[:, 1:]),
            "row": (tg.getitem(v, 1), start[1]),
            "reshaped": (tg.reshape(v, (3, 2)), start.reshape(3, 2)),
            "broadcast": (tg.broadcast_to(v, (2, 2, 3)), np.broadcast_to(start, (2, 2, 3))),
            "flipped": (tg.flip(v, 1), start[:, ::-1]),
            "diagonal": (tg.diagonal(v), start.diagonal()),
            "moved": (tg.moveaxis(v, 0, 1), start.T),
            "expanded": (tg.expand_dims(v, 1), start[:, None]),
            "einsum": (tg.einsum("ij->ji", v), start.T),
            "chained": (tg.reshape(tg.transpose(v[:, 1:]), (4,)), start[:, 1:].T.reshape(4)),
        }
        squares = {name: tg.sum(y * y) for name, (y, _) in views.items()}
    v.assign(np.full((2, 3), -7.0, "f4"))
    v[0].assign(9.0)
    v.assign_add(np.ones((2, 3), "f4"))
    np.testing.assert_array_equal(v.numpy(), [[10.0] * 3, [-6.0] * 3])
    for name, (y, want) in views.items():
        np.testing.assert_array_equal(y.numpy(), want, err_msg=name)
        gradient = tape.gradient(squares[name], v)
        counts = np.zeros((2, 3))
        places = {
            "sliced": np.s_[:, 1:],
            "row": np.s_[1],
            "diagonal": ([0, 1], [0, 1]),
            "chained": np.s_[:, 1:],
        }.get(name, np.s_[:])
        counts[places] = 2 if name == "broadcast" else 1
        np.testing.assert_array_equal(gradient.numpy(), 2 * start * counts, err_msg=name)


def test_a_packed_buffer_is_copied_on_write_too() -> None:
    a, b = tg.Variable(np.ones((2, 3), "f4")), tg.Variable(np.ones(5, "f4"))
    optimizer = tg.optimizers.SGD(0.5)
    ones = [(tg.ones_like(a), a), (tg.ones_like(b), b)]
    optimizer.apply_gradients(ones)  # packs the two into one buffer
    old, part = a.value(), tg.transpose(b[1:3])
    optimizer.apply_gradients(ones)
    np.testing.assert_array_equal(old.numpy(), np.full((2, 3), 0.5))
    np.testing.assert_array_equal(part.numpy(), [0.5, 0.5])
    np.testing.assert_array_equal(a.numpy(), np.zeros((2, 3)))


# ---- other arrays


def test_mixing_backends_raises() -> None:
    there = tg.ones(3)
    with tg.backend("numpy"):
        here = tg.ones(3)
        v = tg.Variable(np.ones(3, "f4"))
    for call in (
        lambda: there + here,
        lambda: here * there,
        lambda: tg.matmul(there, here),
        lambda: tg.nn.linear_relu(tg.ones((2, 3)), tg.ones((3, 3)), here),
        lambda: tg.concat([here, there]),
        lambda: v.assign(there),
    ):
        with pytest.raises(TypeError, match=r"different backends: argument 0 .*to_backend"):
            call()
    np.testing.assert_array_equal((tg.to_backend(here, "cupy") + there).numpy(), [2.0, 2.0, 2.0])


def test_a_gradient_crosses_to_the_host_and_back() -> None:
    v = tg.Variable(np.array([1.0, 2.0], "f4"))
    with tg.GradientTape() as tape:
        y = tg.sum(tg.to_backend(v, "numpy") ** 3)
    gradient = tape.gradient(y, v)
    assert (y.backend, gradient.backend) == ("numpy", "cupy")
    np.testing.assert_allclose(gradient.numpy(), [3.0, 12.0])


@device_only
def test_cupys_arrays(cupy: ModuleType) -> None:
    x = tg.constant([1.0, 2.0, 3.0])
    raw = cupy.array([2.0, 2.0, 2.0], np.float32)
    with tg.GradientTape() as tape:  # CuPy's operators leave the tensor to its own
        tape.watch(x)
        total = tg.sum(raw * x + x / raw - raw + (raw @ x) + raw**x)
    assert tape.gradient(total, x) is not None
    made = tg.constant(raw)
    raw[...] = 9.0
    np.testing.assert_array_equal(made.numpy(), [2.0, 2.0, 2.0])  # always a copy
    assert isinstance(x.array, cupy.ndarray)
    address = x.array.__cuda_array_interface__["data"][0]
    assert address == x.array.data.ptr
    assert not hasattr(x, "__cuda_array_interface__")
    with pytest.raises(TypeError):
        cupy.exp(x)  # rather than a result that no tape knows
    with pytest.raises(TypeError, match=r"x\.numpy\(\)"):
        np.asarray(x)


@device_only
def test_dlpack_both_ways(cupy: ModuleType) -> None:
    x = tg.constant(np.arange(6, dtype="f4").reshape(2, 3))
    out = cupy.from_dlpack(x)
    np.testing.assert_array_equal(out.get(), x.numpy())
    out[...] = 0  # a copy: the tensor is a value
    np.testing.assert_array_equal(x.numpy(), np.arange(6).reshape(2, 3))
    raw = cupy.arange(6.0).reshape(2, 3).T
    back = tg.from_dlpack(raw)
    raw[...] = 0
    assert back.backend == "cupy"
    np.testing.assert_array_equal(back.numpy(), np.arange(6.0).reshape(2, 3).T)
    assert x.__dlpack_device__()[0] == 2  # kDLCUDA
    with cupy.cuda.Stream(non_blocking=True):
        np.testing.assert_array_equal(cupy.from_dlpack(x * 2.0).get(), 2 * x.numpy())
    with tg.backend("numpy"):
        host = tg.from_dlpack(np.arange(3.0))
    assert host.backend == "numpy"


def test_pickles_and_copies_stay_on_the_device() -> None:
    x, v = tg.constant([1.0, 2.0]), tg.Variable([3.0, 4.0], name="w")
    for made in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x), copy.copy(x)):
        assert made.backend == "cupy"
        np.testing.assert_array_equal(made.numpy(), [1.0, 2.0])
    for made in (pickle.loads(pickle.dumps(v)), copy.deepcopy(v)):
        assert (made.backend, made.name) == ("cupy", "w")
        v.assign([0.0, 0.0])
        np.testing.assert_array_equal(made.numpy(), [3.0, 4.0])
        v.assign([3.0, 4.0])


# ---- the command line and the sanitizers


@device_only
def test_info_lists_the_kernels_in_use() -> None:
    facts = _backend.facts()
    assert facts["backend"] == "cupy"
    assert "sm_" in facts["device"]
    assert facts["cublaslt"].endswith(("in use", "CuPy's own products run"))
    for source, names in kernel_names().items():
        assert facts[f"kernels {source}"] == f"{len(names)} in use"
    done = subprocess.run(
        [sys.executable, "-m", "tapegrad", "info"],
        cwd=ROOT,
        env={**os.environ, "TAPEGRAD_BACKEND": "cupy"},
        capture_output=True,
        text=True,
        check=True,
    )
    for source in kernel_names():
        assert source in done.stdout
    assert "in use" in done.stdout


def sanitizer() -> str | None:
    """Return compute-sanitizer, which the CUDA toolkit installs off the path."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{root}/{part}" for root in roots if root for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


# memcheck finds accesses out of bounds, racecheck races on shared memory, initcheck reads of memory
# that nothing has written, synccheck barriers that some threads never reach.
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
ALL = os.environ.get("TAPEGRAD_SANITIZERS") == "all"  # `make test-gpu SANITIZERS=all`
# The largest sizes would take minutes each, with every access checked.
SMALL = "not 50257 and not 100003 and not 100001 and not 8200 and not every_kernel"


@pytest.mark.skipif(STAND_IN or sanitizer() is None, reason="needs compute-sanitizer and a device")
@pytest.mark.parametrize("tool", SANITIZERS if ALL else SANITIZERS[:1])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    found = sanitizer()
    assert found is not None
    # Calls that fail are no finding: libraries ask the driver what it has by trying, and what
    # matters CuPy raises. Kernels of others are not looked at, but for what they have written.
    ours = () if tool == "initcheck" else ("--kernel-regex", "kns=tapegrad")
    done = subprocess.run(
        [
            *(found, "--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no", *ours),
            *(sys.executable, "-m", "pytest", "-q", "tests/gpu/test_kernels.py", "-k", SMALL),
        ],
        cwd=ROOT,
        env={**os.environ, "TAPEGRAD_BACKEND": "cupy", "TAPEGRAD_GPU_TESTS": "no pool"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800 if ALL else 540,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
