"""Build the wheel, install it into a fresh environment, and use it from another folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROGRAM = """
import os, sys
import tapegrad as tg
from tapegrad.kernels import kernel_names
here = os.path.realpath(sys.prefix)
assert os.path.realpath(tg.__file__).startswith(here), tg.__file__
for unwanted in ("cupy", "matplotlib"):
    assert unwanted not in sys.modules, unwanted
assert kernel_names(), "the kernels are missing"
from importlib.resources import files
sources = [f.name for f in files("tapegrad.kernels").iterdir()]
assert {"linear_relu.cu", "common.cuh"} <= set(sources), sources
assert (files("tapegrad") / "py.typed").is_file()
x = tg.Variable(3.0)
with tg.GradientTape() as tape:
    y = x * x
assert float(tape.gradient(y, x)) == 6.0
digits = tg.data.load("digits")
assert digits.train_images.shape[1] == 64
try:
    import kernels
except ImportError:
    pass
else:
    raise AssertionError("a top-level package `kernels` was installed")
print("the wheel works in", here)
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command; stop here if it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def main() -> None:
    """Do all of it in a temporary folder."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder,
            root, cwd=folder)  # fmt: skip
        (wheel,) = folder.glob("tapegrad-*.whl")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
        run(python, "-W", "error", "-c", PROGRAM, cwd=folder)
        run(folder / "env" / "bin" / "tapegrad", "info", cwd=folder)
        run(folder / "env" / "bin" / "tapegrad", "train", "--epochs", "2", cwd=folder)


if __name__ == "__main__":
    main()
