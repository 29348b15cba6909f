"""Data to train on: named data sets, and readers for files that nobody vouches for."""

from tapegrad.data.batches import Batches
from tapegrad.data.datasets import Dataset, load
from tapegrad.data.formats import read_csv, read_idx
from tapegrad.data.npz import read_npz

__all__ = ["Batches", "Dataset", "load", "read_csv", "read_idx", "read_npz"]
