"""Fashion-MNIST, where its files are: the accuracy that other frameworks reach."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tapegrad as tg

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist

pytestmark = pytest.mark.skipif(
    not (FOLDER / "train-images-idx3-ubyte.gz").is_file(),
    reason="needs Debian's package dataset-fashion-mnist",
)


def test_three_epochs_with_the_defaults(tmp_path):
    # PyTorch, JAX and TensorFlow reach 85.5 to 86.0 % with Adam at 1e-3 and batches of 128.
    command = ["train", "--data", "fashion-mnist", "--hidden", "256", "--epochs", "3"]
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",  # spinning BLAS threads cost tenfold on a busy machine
        "PYTHONPATH": str(Path(tg.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tapegrad", *command, "--backend", "numpy", "--output", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "fashion-mnist: 60,000 training and 10,000 test images of 784 numbers, 10 classes"
    )
    assert "optimizer adam, learning rate 0.001, batch size 128" in lines[1]
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", done.stdout, re.MULTILINE)
    assert float(accuracy) >= 85.5
