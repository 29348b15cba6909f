"""Data to train on: mini-batches, named data sets, readers of files that nobody vouches for."""

from typing import TYPE_CHECKING, Any

from tapegrad.data.batches import Batches
from tapegrad.data.steps import Steps

if TYPE_CHECKING:
    from tapegrad.data.datasets import Dataset, load
    from tapegrad.data.formats import read_csv, read_idx
    from tapegrad.data.npz import read_npz

__all__ = ["Batches", "Dataset", "Steps", "load", "read_csv", "read_idx", "read_npz"]

# Loaded when first asked for: the readers import what a program that only wants a tape does not.
_HOMES = {
    "Dataset": "datasets",
    "load": "datasets",
    "read_csv": "formats",
    "read_idx": "formats",
    "read_npz": "npz",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
