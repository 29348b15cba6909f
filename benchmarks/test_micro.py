"""Micro-benchmarks of tapegrad for pytest-benchmark and its comparison tools.

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tapegrad as tg
from benchmarks.peers.tapegrad import Tapegrad
from benchmarks.suites.steps import small_net

_PEER = Tapegrad("eager", "cpu")


@pytest.mark.parametrize("mode", ["plain", "recorded", "gradient"])
@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize("name", ["add", "tanh", "matmul"])
def test_ten_operations(benchmark: Any, name: str, size: int, mode: str) -> None:
    benchmark(_PEER.operation(name, size, mode, count=10).run)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("polynomial", {}),
        ("mlp_step", vars(small_net())),
        ("softmax_cross_entropy", {"rows": 128, "classes": 10}),
        ("bias_relu", {"rows": 128, "columns": 512}),
        ("linear_relu", {"rows": 128, "inputs": 64, "outputs": 64}),
        ("adam_update", {"size": 100_000}),
        ("chain", {"nodes": 1_000}),
        ("fan_out", {"nodes": 1_000}),
        ("jacobian_of_layer", {"size": 32}),
        ("hvp_of_layer", {"rows": 32, "size": 32}),
    ],
)
def test_case(benchmark: Any, kind: str, parameters: dict[str, Any]) -> None:
    benchmark(getattr(_PEER, kind)(**parameters).run)


def test_an_empty_tape(benchmark: Any) -> None:
    def run() -> None:
        with tg.GradientTape():
            pass

    benchmark(run)


def test_a_variable_is_assigned(benchmark: Any) -> None:
    variable, value = tg.Variable(np.ones(1_000)), tg.constant(np.ones(1_000))
    benchmark(lambda: variable.assign(value))
