"""Puts this folder on the path: its modules are imported by name from here and from ../kernels."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
