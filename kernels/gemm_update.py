"""Launcher of products that are added to what lies in memory: a weight's update inside the product
of its gradient, which then is never stored.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tapegrad.config import config

from . import cublaslt, gemm, gemm_choice, gemm_plan, optimizers
from ._build import Array, Module
from .cublaslt import Epilogue
from .gemm_choice import Candidate, Timed

_TYPES = ("float32", "float64")
_ALGORITHMS = 6  # that are timed

_planning = threading.Lock()
_plans: dict[Any, _Plan] = {}


class _Plan(NamedTuple):
    """A product with the algorithm that adds it to memory."""

    prepared: gemm._Prepared
    algorithm: Any  # by reference, to memory that lives as long
    memory: Any
    workspace: int


def add_product(xp: Module, c: Array, x: Array, w: Array, alpha: Array, beta: Array) -> bool | None:
    """Do c = beta * c + alpha * (x @ w) in place, in one launch.

    c is (n, o), float32 or float64, C-contiguous; x (n, i) and w (i, o) are of its type, in any
    layout; alpha and beta are 0-d arrays of it on the device, read when the product runs. The
    answer is True when it is done, None for arrays it was not written for. In TF32 where
    `tapegrad.config.tf32` allows it.

    Raises `NotPlanned` while the stream is captured, unless the same product has run before.
    """
    arrays = (c, x, w, alpha, beta)
    if not all(isinstance(a, xp.ndarray) and a.dtype == c.dtype for a in arrays):
        return None
    if alpha.shape != () or beta.shape != () or c.shape != (*x.shape[:1], *w.shape[1:]):
        return None
    if not c.flags.c_contiguous or c.data.ptr % gemm_plan.MAX_ALIGNMENT:
        return None
    plan = _plan(xp, x, w)
    if plan is None:
        return None
    plan.prepared.launch(
        *(xp, plan.algorithm, plan.workspace, [x.data.ptr, w.data.ptr], c.data.ptr),
        scales=(ctypes.c_void_p(alpha.data.ptr), ctypes.c_void_p(beta.data.ptr)),
    )
    return True


def _plan(xp: Module, x: Array, w: Array) -> _Plan | None:
    """Return how x @ w is added to memory, decided when it is met for the first time."""
    device = _device(x.dtype, xp)
    if device is None:
        return None
    pointers = [x.data.ptr, w.data.ptr]
    key = (
        *(device.number, x.dtype, x.shape, x.strides, w.shape, w.strides, config.tf32),
        *[gemm_plan.alignment(pointer) for pointer in pointers],
    )
    plan = _plans.get(key)
    if plan is None:
        prepared = _prepare(device, x, w)
        if prepared is None:
            return None
        if gemm._is_capturing(xp):
            raise gemm.NotPlanned(
                f"add_product of {x.dtype} {x.shape} and {w.shape} was met for the first time "
                "while its stream is captured; run it once before the capture"
            )
        with _planning:
            known = _times(device).get(_text(x.dtype, x.shape, w.shape[1]))
            timed = None if known is None else known.get("fused")
            if timed is None or not _can_run(device, prepared, timed):
                found = prepared.algorithms(1, device.workspace, pointers)
                if not found:
                    return None
                timed = Timed(0.0, *found[0])
            memory = ctypes.create_string_buffer(timed.algorithm, cublaslt.ALGORITHM_BYTES)
            plan = _Plan(prepared, ctypes.byref(memory), memory, timed.workspace)
            if len(_plans) >= gemm._MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def _device(dtype: Any, xp: Module) -> gemm._Device | None:
    library, _ = cublaslt.load()
    if xp is np or library is None or dtype.name not in _TYPES:
        return None
    return gemm._device(xp, library)


def _prepare(device: gemm._Device, x: Array, w: Array) -> gemm._Prepared | None:
    problem = gemm_plan.problem(x.shape, x.strides, w.shape, w.strides, x.itemsize)
    if problem is None or problem.batch > 1:
        return None
    kind = gemm_plan.TYPES[x.dtype.name]
    if config.tf32 and x.dtype == np.float32:
        kind = gemm_plan.TF32
    prepared = gemm._Prepared(device.library, device.handle, problem, kind, Epilogue.DEFAULT)
    device.library.read_scales_on_device(prepared.parts[1])
    return prepared


def _can_run(device: gemm._Device, prepared: gemm._Prepared, timed: Timed) -> bool:
    needed = device.library.accepts(prepared.parts, timed.algorithm)
    return needed is not None and needed <= timed.workspace <= device.workspace


def _times(device: gemm._Device) -> gemm_choice.Times:
    if device._times is None:
        device._times = gemm_choice.Times(device._facts)
    return device._times


def _text(dtype: Any, shape: tuple[int, ...], columns: int) -> str:
    """Return a weight's update as the file of times names it."""
    kind = "tf32" if config.tf32 and dtype == np.float32 else dtype.name
    return f"add_product {kind} {shape[0]}x{shape[1]} by {shape[1]}x{columns}"


# ---- whether it pays


class Rule(NamedTuple):
    """An optimiser's update of one weight, with its gradient apart and inside the product.

    apart   launches the update of flat arrays, of a gradient that was stored.
    beside  launches what is left to do when a product has taken the gradient; None for nothing.
    """

    name: str
    apart: Callable[[Module, Array, Array, Array, Array], object]
    beside: Callable[[Module, Array, Array], object] | None = None


SGD = Rule("sgd", lambda xp, p, v, g, rate: optimizers.sgd(xp, p, g, rate))
MOMENTUM = Rule(
    "momentum",
    lambda xp, p, v, g, rate: optimizers.momentum(xp, p, v, g, rate, rate, nesterov=False),
    lambda xp, p, v: xp.add(p, v, out=p),
)


def pays(rule: Rule, batch: int, rows: int, columns: int, dtype: Any, xp: Module) -> bool:
    """Tell whether a product that updates a weight (rows, columns) is faster than one that stores
    its gradient, and this weight's part of the update of all of them.

    It is timed when a size is met for the first time. False where timing must not decide, with
    `tapegrad.config.deterministic`, and while the stream is captured.
    """
    dtype = np.dtype(dtype)
    if config.deterministic or gemm._is_capturing(xp):
        return False
    device = _device(dtype, xp)
    if device is None:
        return False
    text = _text(dtype, (rows, batch), columns)
    with _planning:
        times = _times(device).get(text)
        if times is None or f"apart, {rule.name}" not in times:
            try:
                with gemm_choice.scratch_memory(xp):
                    times = _measure(device, rule, batch, rows, columns, dtype, xp) | (times or {})
            except MemoryError:  # there is none to try things out in
                return False
            if not times:
                return False
            _times(device).put(text, times)
    return times[f"fused, {rule.name}"].seconds < times[f"apart, {rule.name}"].seconds


def _measure(
    device: gemm._Device,
    rule: Rule,
    batch: int,
    rows: int,
    columns: int,
    dtype: np.dtype[Any],
    xp: Module,
) -> dict[str, Timed]:
    """Return the times of both ways for a rule, and of the product alone, "fused"; or nothing."""
    x, w = xp.empty((batch, rows), dtype).T, xp.empty((batch, columns), dtype)
    c, g = xp.zeros((rows, columns), dtype), xp.empty((rows, columns), dtype)
    scale, rate = xp.zeros((), dtype), xp.zeros((), np.float64)
    prepared = _prepare(device, x, w)
    if prepared is None:
        return {}
    pointers = [x.data.ptr, w.data.ptr]
    scales = ctypes.c_void_p(scale.data.ptr), ctypes.c_void_p(scale.data.ptr)

    def candidates() -> Iterator[Candidate]:
        for algorithm, workspace in prepared.algorithms(_ALGORITHMS, device.workspace, pointers):
            memory = ctypes.create_string_buffer(algorithm, cublaslt.ALGORITHM_BYTES)
            arguments = (xp, ctypes.byref(memory), workspace, pointers, c.data.ptr)
            launch = functools.partial(prepared.launch, *arguments, scales=scales)
            yield Candidate("fused", launch, algorithm, workspace)
        product = functools.partial(gemm.matmul, xp, x, w, (g,))
        if product() is None:  # CuPy's own is the fastest
            product = functools.partial(xp.matmul, x, w, out=g)
        yield Candidate("apart", product)

    timer = gemm.timer(xp)
    times = gemm_choice.measure(candidates(), timer)
    if times.keys() != {"fused", "apart"}:
        return {}

    def share(launch: Callable[..., object]) -> float:
        """Return how much longer an update takes for these elements: all share one launch."""
        flat = xp.zeros(c.size, dtype), xp.zeros(c.size, dtype), g.reshape(-1)
        few = tuple([array[:4] for array in flat])
        whole, least = (timer(functools.partial(launch, *arrays)) for arrays in (flat, few))
        return max(0.0, whole - least)

    apart = times["apart"].seconds + share(lambda p, v, g: rule.apart(xp, p, v, g, rate))
    beside, fused = rule.beside, times["fused"].seconds
    if beside is not None:
        fused += share(lambda p, v, g: beside(xp, p, v))
    return {
        "fused": times["fused"],
        f"fused, {rule.name}": Timed(fused),
        f"apart, {rule.name}": Timed(apart),
    }
