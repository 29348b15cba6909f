"""`pytest benchmarks` times; elsewhere pytest-benchmark is turned off by pyproject.toml."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TAPEGRAD_BACKEND", "numpy")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Undo what pyproject.toml asks for, but not what the command line does."""
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False
