"""Products through cuBLASLt inside CUDA graphs: planned before a capture, captured, replayed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from cublaslt_emulation import FakeCublasLt, cublaslt_on_cpu, fake

import tapegrad as tg
from tapegrad.kernels import gemm
from tapegrad.primitive import primitives
from tapegrad.tensor import wrap
from tests.function import test_graphs
from tests.function.compiled import assert_same
from tests.function.test_graphs import Trainer, gpu

cupy = test_graphs.cupy
on_device = test_graphs.on_device


@pytest.fixture
def lt(
    on_device: None, cupy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeCublasLt]:
    monkeypatch.setattr(primitives["matmul"], "kernel", gemm.matmul)
    monkeypatch.setattr(primitives["linear"], "kernel", gemm.linear)
    with cublaslt_on_cpu(cupy, tmp_path) as made:
        yield made


def nodes() -> list[str]:
    """Return the names of the launches in the graphs that are alive."""
    return [node.name for ref in gpu.graphs if (graph := ref()) for node in graph._nodes]


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_training_step(
    lt: FakeCublasLt, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg.config, "deterministic", deterministic)
    found = []
    for graph in (True, False):
        trainer = Trainer("adam", graph)
        before = gpu.launched_graphs
        results = [trainer(i) for i in range(8)]
        assert gpu.launched_graphs - before == (4 if graph else 0)
        found.append((results, [x.numpy() for x in trainer.state()]))
        if graph:
            products = nodes().count("cublasLtMatmul")
            assert products == 4  # one forward, two of weights, one of inputs
            assert nodes().count("matmul") == 4  # of fused ones, whose kernels need a compiler
    assert_same(found[0], found[1])
    assert bool(lt.timer.timed) is not deterministic


def test_nothing_is_asked_or_timed_during_a_capture(lt: FakeCublasLt) -> None:
    step = tg.function(lambda x, w: tg.matmul(x, w))
    x, w = tg.ones((4, 3)), tg.ones((3, 5))
    for _ in range(2):
        step(x, w)
    asked, timed = len(lt.preferences), len(lt.timer.timed)
    for _ in range(3):
        np.testing.assert_array_equal(step(x, w).numpy(), np.full((4, 5), 3.0))
    assert (len(lt.preferences), len(lt.timer.timed)) == (asked, timed)
    assert nodes() == ["cublasLtMatmul"]


def test_the_memory_for_timing_is_not_kept_by_a_graph(lt: FakeCublasLt) -> None:
    """Timing fills 64 MiB on a device; a graph keeps what its pool has once had."""
    step = tg.function(lambda x, w: tg.matmul(x, w))
    for _ in range(4):
        step(tg.ones((4, 3)), tg.ones((3, 5)))
    (graph,) = [graph for ref in gpu.graphs if (graph := ref())]
    assert graph._pool().total_bytes() <= 3 * 512


@pytest.mark.parametrize("layout", ["aligned", "misaligned", "transposed"])
def test_inputs_in_another_layout_than_the_graphs_own(lt: FakeCublasLt, layout: str) -> None:
    """A graph's inputs are copied to memory of its own, where they lie in rows, aligned."""
    step = tg.function(lambda x, w: tg.matmul(x, w))
    x = np.arange(12, dtype="f4").reshape(4, 3)
    for _ in range(4):
        memory = np.zeros(20, "f4")
        first = (-memory.ctypes.data // 4) % 4 + (layout == "misaligned")
        mine = memory[first : first + 12].reshape(4, 3)
        if layout == "transposed":
            mine = memory[first : first + 12].reshape(3, 4).T
        mine[...] = x
        w = tg.ones((3, 5))
        np.testing.assert_array_equal(step(wrap(fake(mine)), w).numpy(), x @ np.ones((3, 5)))
    assert nodes() == ["cublasLtMatmul"]
