"""Puts ../cpu_cuda on the path, and this folder: their modules are imported by name."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent / "cpu_cuda"), str(_HERE)]
