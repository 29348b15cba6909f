"""The block in which NumPy does not warn: it is quiet inside, and leaves what was set outside."""

from __future__ import annotations

import contextvars
import threading
import warnings

import numpy as np
import pytest

from tapegrad import _quiet
from tapegrad._quiet import quiet

ONE, ZERO, LARGE = np.float32(1.0), np.float32(0.0), np.full(3, 1e30, np.float32)


def disturb() -> None:
    """Do what each kind of warning is about."""
    assert np.isinf(ONE / ZERO)
    assert np.isnan(ZERO / ZERO)
    assert np.isinf(LARGE * LARGE).all()
    assert np.isnan(np.log(-LARGE)).all()


@pytest.fixture(params=["context variable", "a NumPy without one"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a NumPy without one":
        monkeypatch.setattr(_quiet, "_found", None)
    else:
        assert _quiet._found is not None


def test_nothing_is_said_inside_and_all_outside() -> None:
    with np.errstate(all="raise"):
        before = np.geterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with quiet():
                disturb()
                with quiet():
                    disturb()
                disturb()
        assert np.geterr() == before
        with pytest.raises(FloatingPointError):
            _ = LARGE * LARGE


def test_it_ends_with_an_error_too() -> None:
    before = np.geterr()
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert np.geterr() == before


def test_other_threads_and_contexts_keep_theirs() -> None:
    found = []
    with quiet():
        thread = threading.Thread(target=lambda: found.append(np.geterr()))
        thread.start()
        thread.join()
    assert found == [np.geterr()]
    contextvars.copy_context().run(quiet().__enter__)
    assert np.geterr() == found[0]
