"""Products added to what lies in memory: their values, what is declined, and when they pay."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cublaslt_emulation import FakeCublasLt, cublaslt_on_cpu, fake

import tapegrad as tg
from tapegrad.kernels import gemm, gemm_update
from tests.fake_cupy import FakeCupy, Stream, device


@pytest.fixture
def xp() -> Any:
    return FakeCupy()


@pytest.fixture
def lt(xp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCublasLt]:
    monkeypatch.setattr(gemm_update, "_plans", {})
    with cublaslt_on_cpu(xp, tmp_path) as made:
        yield made


def normal(*shape: int, dtype: Any = "f4", seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def scalar(value: float, dtype: Any = "f4") -> Any:
    return fake(np.array(value, dtype))


LAYOUTS = {
    "rows": lambda n, m, dtype, seed: normal(n, m, dtype=dtype, seed=seed),
    "columns": lambda n, m, dtype, seed: normal(m, n, dtype=dtype, seed=seed).T,
    "part": lambda n, m, dtype, seed: normal(n, m + 3, dtype=dtype, seed=seed)[:, 1:-2],
}


@pytest.mark.parametrize("scales", [(-0.1, 1.0), (-0.1, 0.9), (2.0, 0.0)])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("w_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_values(
    x_layout: str, w_layout: str, dtype: str, scales: tuple[float, float], xp: Any, lt: FakeCublasLt
) -> None:
    for n, k, m in [(1, 1, 1), (12, 16, 8), (33, 7, 10), (5, 64, 1)]:
        c, x = normal(n, m, dtype=dtype), LAYOUTS[x_layout](n, k, dtype, 1)
        w = LAYOUTS[w_layout](k, m, dtype, 2)
        on_device = fake(c)
        alpha, beta = (scalar(s, dtype) for s in scales)
        assert gemm_update.add_product(xp, on_device, fake(x), fake(w), alpha, beta)
        want = scales[1] * c.astype("f8") + scales[0] * (x.astype("f8") @ w.astype("f8"))
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(on_device.get(), want, 2 * eps, 4 * eps * np.abs(want).max())
    assert len(lt.launches) == 4


C, A, B = normal(12, 8), normal(12, 16), normal(16, 8)
ONE = np.array(1.0, "f4")


@pytest.mark.parametrize(
    "arguments",
    [
        (normal(8, 12).T, A, B, ONE, ONE),
        (normal(12, 9)[:, 1:], A, B, ONE, ONE),
        (normal(97)[1:].reshape(12, 8), A, B, ONE, ONE),  # not aligned
        (C, A, B, ONE.astype("f8"), ONE),
        (C, A, B, ONE, ONE.reshape(1)),
        (C, A.astype("f8"), B, ONE, ONE),
        (C, A[:, 1:], B, ONE, ONE),
        (C, A, B[:, 1:], ONE, ONE),
        (normal(2, 12, 8), normal(2, 12, 16), B, ONE, ONE),
        (C, normal(12, 32)[:, ::2], B, ONE, ONE),
        tuple(x.astype("f2") for x in (C, A, B, ONE, ONE)),
        tuple(x.astype(ml_dtypes.bfloat16) for x in (C, A, B, ONE, ONE)),
    ],
)
def test_declined(arguments: Any, xp: Any, lt: FakeCublasLt) -> None:
    arrays = [fake(a) for a in arguments]
    before = arrays[0].get()
    assert gemm_update.add_product(xp, *arrays) is None
    assert lt.launches == []
    np.testing.assert_array_equal(arrays[0].get(), before)
    if arguments[0] is C:
        assert gemm_update.add_product(xp, *arrays[:3], ONE, ONE) is None  # NumPy's


def test_there_must_be_an_algorithm(xp: Any, lt: FakeCublasLt) -> None:
    lt.found = 0
    assert gemm_update.add_product(xp, *map(fake, (C, A, B, ONE, ONE))) is None
    assert not pays(xp, lt)


def test_a_graph_reads_the_scales_when_it_runs(xp: Any, lt: FakeCublasLt) -> None:
    c, x, w, alpha, beta = map(fake, (C, A, B, ONE, ONE))
    gemm.matmul(xp, w, w.T)  # cuBLASLt is in use already
    stream = Stream(non_blocking=True)
    stream.wait_event(device.stream.record())
    collects = gc.isenabled()
    gc.disable()
    try:
        with stream:
            stream.begin_capture()
            with pytest.raises(gemm.NotPlanned, match=r"add_product of float32 .* first time"):
                gemm_update.add_product(xp, c, x, w, alpha, beta)
            stream.end_capture()
            gemm_update.add_product(xp, fake(C), x, w, alpha, beta)
            stream.begin_capture()
            gemm_update.add_product(xp, c, x, w, alpha, beta)
            graph = stream.end_capture()
    finally:
        if collects:
            gc.enable()
    want = C.astype("f8")
    for scales in [(0.5, 1.0), (-0.1, 0.9), (0.0, 1.0)]:
        with stream:
            alpha[...], beta[...] = scales
        graph.launch(stream)
        stream.synchronize()
        want = scales[1] * want + scales[0] * (A.astype("f8") @ B)
        np.testing.assert_allclose(c.get(), want, 1e-5, 1e-5)


def test_tf32_is_opt_in(xp: Any, lt: FakeCublasLt, monkeypatch: pytest.MonkeyPatch) -> None:
    for tf32 in (False, True):
        monkeypatch.setattr(tg.config, "tf32", tf32)
        gemm_update.add_product(xp, *map(fake, (C, A, B, ONE, ONE)))
    assert [launch.compute for launch in lt.launches] == [68, 77]


# ---- whether it pays


class Clock:
    """Takes what runs for the time of its kind: a product into memory, a fused one, an update."""

    def __init__(self, lt: FakeCublasLt, product: float, fused: float, **updates: float) -> None:
        self.lt, self.seconds = lt, {"product": product, "fused": fused}
        self.updates = updates
        self.asked: list[str] = []

    def __call__(self, run: Any) -> float:
        assert device.allocators, "what is only tried out stays in the user's memory"
        launches = len(self.lt.launches)
        answer = run()
        if len(self.lt.launches) == launches:
            if not isinstance(answer, tuple):
                return 1e9  # CuPy's own product
            name, size = answer
            self.asked.append(name)
            return self.updates[name] * size + 3.0  # whatever its size, a launch takes so long
        kind = "product" if answer is not None else "fused"
        self.asked.append(kind)
        return self.seconds[kind] + self.lt.launches[-1].algorithm


RULE = gemm_update.Rule(
    "rule", lambda xp, p, v, g, rate: ("apart", g.size), lambda xp, p, v: ("beside", p.size)
)
ALONE = RULE._replace(name="alone", beside=None)


def pays(xp: Any, lt: FakeCublasLt, clock: Clock | None = None, rule: Any = RULE) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "timer", lambda xp: clock or Clock(lt, 100, 1, apart=1, beside=0))
        return gemm_update.pays(rule, 16, 12, 8, "f4", xp)


@pytest.mark.parametrize(
    ("product", "fused", "apart", "beside", "rule", "answer"),
    [
        (100, 110, 0.2, 0.0, RULE, True),  # 100 + 0.2 * (96 - 4) against 110
        (100, 110, 0.1, 0.0, RULE, False),
        (100, 110, 0.2, 0.1, RULE, False),  # against 110 + 0.1 * 92
        (100, 110, 0.2, 0.1, ALONE, True),  # where nothing is left to be done beside
        (100, 100, 0.0, 0.0, ALONE, False),
        (100, 90, 0.0, 0.0, ALONE, True),
    ],
)
def test_it_pays_where_its_time_is_the_least(
    product: float, fused: float, apart: float, beside: float, rule: Any, answer: bool,
    xp: Any, lt: FakeCublasLt,
) -> None:  # fmt: skip
    clock = Clock(lt, product, fused, apart=apart, beside=beside)
    assert pays(xp, lt, clock, rule) is answer
    asked = len(clock.asked)
    assert pays(xp, lt, clock, rule) is answer
    assert len(clock.asked) == asked  # once for each size


def test_the_fastest_algorithm_runs(xp: Any, lt: FakeCublasLt) -> None:
    lt.algorithms[1] = 3
    clock = Clock(lt, 100, 1, apart=1, beside=0)
    clock.seconds["fused"] = 10
    times = {0: 5.0, 1: -5.0, 2: 3.0}
    original = clock.__call__

    def timer(run: Any) -> float:
        seconds = original(run)
        return seconds + times[lt.launches[-1].algorithm] if clock.asked[-1] == "fused" else seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "timer", lambda xp: timer)
        assert gemm_update.pays(RULE, 16, 12, 8, "f4", xp)
    x = fake(normal(16, 12)).T
    gemm_update.add_product(xp, fake(C), x, fake(B), fake(ONE), fake(ONE))
    assert lt.launches[-1].algorithm == 1


def test_times_are_kept_in_the_file(
    xp: Any, lt: FakeCublasLt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pays(xp, lt)
    assert pays(xp, lt, rule=ALONE)
    monkeypatch.setattr(gemm, "_devices", {})  # as in the next process
    refuse: Any = lambda run: pytest.fail("timed again")
    assert pays(xp, lt, refuse)
    assert pays(xp, lt, refuse, ALONE)
    (entry, *_) = gemm._devices  # it was made anew
    (path,) = Path(gemm._devices[entry][0]._times.path).parent.iterdir()  # type: ignore[union-attr]
    problems = json.loads(path.read_text())["problems"]
    (ways,) = [ways for name, ways in problems.items() if name.startswith("add_product")]
    assert ways.keys() == {
        "fused", "fused, rule", "apart, rule", "fused, alone", "apart, alone"
    }  # fmt: skip


def test_an_algorithm_of_the_file_that_cannot_run_is_not_taken(
    xp: Any, lt: FakeCublasLt, monkeypatch: pytest.MonkeyPatch
) -> None:
    lt.failing = {(1, 0)}
    assert pays(xp, lt)
    lt.failing, x = set(), fake(normal(16, 12)).T
    for known, algorithm in [(None, 1), (set(), 0)]:
        monkeypatch.setattr(gemm_update, "_plans", {})
        lt.known = known
        assert gemm_update.add_product(xp, fake(C), x, fake(B), fake(ONE), fake(ONE))
        assert lt.launches[-1].algorithm == algorithm


@pytest.mark.parametrize("why", ["deterministic", "capturing", "no memory", "half a float"])
def test_it_does_not_pay_where_it_cannot_be_timed(
    why: str, xp: Any, lt: FakeCublasLt, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "deterministic":
        monkeypatch.setattr(tg.config, "deterministic", True)
    if why == "capturing":
        lt.capturing = True
    if why == "no memory":

        def full(*_: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(gemm.gemm_choice, "measure", full)
    if why == "half a float":
        assert not gemm_update.pays(RULE, 16, 12, 8, "f2", xp)
    else:
        assert not pays(xp, lt)
    assert why == "half a float" or not lt.timer.timed


def test_a_way_that_fails_is_none(xp: Any, lt: FakeCublasLt) -> None:
    lt.failing = {(1, i) for i in range(6)}
    with pytest.raises(gemm.cublaslt.CublasLtError):
        gemm_update.add_product(xp, *map(fake, (C, A, B, ONE, ONE)))
    assert not pays(xp, lt)
