"""The command line: what it prints and writes, and one clear line for whatever is wrong."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tapegrad as tg
from tapegrad import _backend, cli, safetensors
from tapegrad.training import demo, runs

ROOT = Path(tg.__file__).parents[1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tapegrad(capsys, *arguments):
    """Run a command here; return exit code, lines of output and lines of errors."""
    if arguments[:1] in (("train",), ("evaluate",)) and "--backend" not in arguments:
        arguments += ("--backend", "numpy")
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def in_a_process(*arguments, memory=None, **environment):
    """Run `python -m tapegrad` elsewhere, with an address space of so many bytes."""

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-m", "tapegrad", *map(str, arguments)],
        env=inherited | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=None if memory is None else limit,
    )


def picture_size(path):
    """Return width and height of a PNG, from its first chunk."""
    content = Path(path).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[12:16] == b"IHDR"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


SMALL = ("--hidden", 16, "--epochs", 2, "--seed", 3)


@pytest.fixture
def trained(capsys):
    """A run's folder."""
    code, out, err = tapegrad(capsys, "train", *SMALL)
    assert code == 0, err
    return Path("runs/digits"), out, err


# ---- train and evaluate


def test_train_prints_and_writes(trained):
    folder, out, err = trained
    assert out[0] == "digits: 1,438 training and 359 test images of 64 numbers, 10 classes"
    assert out[1] == (
        "data digits, hidden 16, activation relu, dropout 0.0, optimizer adam, "
        "learning rate 0.001, batch size 128, epochs 2, seed 3"
    )
    assert re.fullmatch(r"test accuracy \d+\.\d\d%, loss \d\.\d{4}", out[2])
    assert out[3] == (
        f"wrote curves.png, weights.safetensors, history.json, settings.json to {folder}"
    )
    assert len(out) == 4
    line = r"Epoch {}/2 12/12 \[00:0\d, [\d.e+]+ batch/s\] loss=\S+ accuracy=\S+ val_loss=\S+ val_"
    assert len(err) == 2
    for epoch, text in enumerate(err, 1):
        assert re.match(line.format(epoch), text)


def test_what_the_files_hold(trained):
    folder, out, _ = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        "curves.png",
        "history.json",
        "settings.json",
        "weights.safetensors",
    ]
    width, height = picture_size(folder / "curves.png")
    assert 600 < width < 4000
    assert 200 < height < 2000
    history = json.loads((folder / "history.json").read_text())
    assert history["epoch"] == [0, 1]
    assert set(history) == {"epoch", "loss", "accuracy", "val_loss", "val_accuracy"}
    assert out[2] == (
        f"test accuracy {history['val_accuracy'][1]:.2%}, loss {history['val_loss'][1]:.4f}"
    )
    assert json.loads((folder / "settings.json").read_text()) == {
        "data": "digits",
        "hidden": [16],
        "activation": "relu",
        "dropout": 0.0,
        "optimizer": "adam",
        "learning_rate": None,
        "batch_size": 128,
        "epochs": 2,
        "seed": 3,
        "features": 64,
        "classes": list("0123456789"),
    }
    arrays, _ = safetensors.load(folder / "weights.safetensors")
    assert {name: array.shape for name, array in arrays.items()} == {
        "layers.0.kernel": (64, 16),
        "layers.0.bias": (16,),
        "layers.1.kernel": (16, 10),
        "layers.1.bias": (10,),
    }
    # The accuracy printed is that of these weights, by plain NumPy.
    digits = tg.data.load("digits")
    h = np.maximum(digits.test_images @ arrays["layers.0.kernel"] + arrays["layers.0.bias"], 0)
    scores = h @ arrays["layers.1.kernel"] + arrays["layers.1.bias"]
    hits = (scores.argmax(1) == digits.test_labels).mean()
    assert out[2].startswith(f"test accuracy {hits:.2%},")


def test_evaluate_finds_what_train_printed(trained, capsys):
    folder, printed, _ = trained
    assert tapegrad(capsys, "evaluate", folder) == (0, [printed[2]], [])
    assert tapegrad(capsys, "evaluate", folder, "--data", "digits") == (0, [printed[2]], [])


def weights(folder):
    return (Path(folder) / "weights.safetensors").read_bytes()


def test_a_seed_gives_the_same_weights(capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = (*SMALL[:-1], seed, "--dropout", 0.2, "--output", name)
        assert tapegrad(capsys, "train", *options)[0] == 0
        tg.random.normal((3,))  # what was drawn before does not matter
    assert weights("a") == weights("b") != weights("c")


def test_options_reach_the_training(capsys):
    code, out, _ = tapegrad(
        capsys, "train", "--hidden", 8, 4, "--activation", "tanh", "--optimizer", "nesterov",
        "--learning-rate", 0.5, "--batch-size", 500, "--epochs", 1, "--dropout", 0.25,
        "--output", "deep/er",
    )  # fmt: skip
    assert code == 0
    assert out[1] == (
        "data digits, hidden 8-4, activation tanh, dropout 0.25, optimizer nesterov, "
        "learning rate 0.5, batch size 500, epochs 1, seed 0"
    )
    settings, features, classes = runs.read_settings(Path("deep/er"))
    assert (features, classes) == (64, tuple("0123456789"))
    model = runs.build(settings, features, len(classes))
    assert [type(layer).__name__ for layer in model.layers] == [
        "Dense",
        "Dropout",
        "Dense",
        "Dropout",
        "Dense",
    ]
    assert model.layers[0].activation_name == "tanh"
    assert repr(model.optimizer) == "<SGD learning_rate=0.5, momentum=0.9>"
    assert model.optimizer._nesterov
    assert model.layers[1].rate == 0.25


@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"]
)
def test_every_optimizer_learns_with_its_usual_rate(capsys, name):
    code, _, err = tapegrad(capsys, "train", "--optimizer", name, "--epochs", 3, "--batch-size", 16)
    assert code == 0, err
    history = json.loads(Path("runs/digits/history.json").read_text())
    assert history["val_accuracy"][-1] > 0.85


def test_no_hidden_layer(capsys):
    assert tapegrad(capsys, "train", "--hidden", "--epochs", 1)[0] == 0
    arrays, _ = safetensors.load("runs/digits/weights.safetensors")
    assert arrays["layers.0.kernel"].shape == (64, 10)


def test_training_again_replaces_the_run(capsys, trained):
    folder, _, _ = trained
    before = weights(folder)
    assert tapegrad(capsys, "train", *SMALL[:-1], 5)[0] == 0
    assert weights(folder) != before


def write_data(path, labels, n=30):
    rng = np.random.default_rng(0)
    y = np.resize(labels, n)
    x = rng.normal(size=(n, 4)).astype(np.float32) + np.unique(y, return_inverse=True)[1][:, None]
    if path.endswith(".npz"):
        np.savez(path, images=x, labels=y)
    else:
        rows = [",".join(map(str, [*row, label])) for row, label in zip(x, y, strict=True)]
        Path(path).write_text("a,b,c,d,label\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("name", ["mine.npz", "mine.csv"])
def test_files_of_ones_own(capsys, name):
    write_data(name, [0, 1, 2])
    code, out, err = tapegrad(capsys, "train", "--data", name, "--epochs", 1, "--hidden", 4)
    assert code == 0, err
    assert out[0].endswith("24 training and 6 test images of 4 numbers, 3 classes")
    assert out[-1].endswith(f"to {Path('runs/mine')}")
    printed = next(line for line in out if line.startswith("test accuracy"))
    assert tapegrad(capsys, "evaluate", "runs/mine") == (0, [printed], [])


def test_classes_go_by_their_names(capsys):
    # A file without cats called its dogs class 0, which the model knows as cats.
    write_data("all.csv", ["cat", "dog", "fish"], n=60)
    assert tapegrad(capsys, "train", "--data", "all.csv", "--epochs", 1, "--hidden", 4)[0] == 0
    rows = Path("all.csv").read_text().splitlines()
    tested = [row for i, row in enumerate(rows[1:]) if i % 5 == 4 and not row.endswith("cat")]
    # Every fifth row of a file is tested.
    again = [rows[0], *(row for row in tested for _ in range(5))]
    Path("some.csv").write_text("\n".join(again) + "\n")
    some = tg.data.load("some.csv")
    assert some.classes == ("dog", "fish")
    arrays, _ = safetensors.load("runs/all/weights.safetensors")
    h = np.maximum(some.test_images @ arrays["layers.0.kernel"] + arrays["layers.0.bias"], 0)
    chosen = (h @ arrays["layers.1.kernel"] + arrays["layers.1.bias"]).argmax(1)
    expected = (chosen == some.test_labels + 1).mean()
    assert expected != (chosen == some.test_labels).mean()
    code, out, err = tapegrad(capsys, "evaluate", "runs/all", "--data", "some.csv")
    assert code == 0, err
    assert out[0].startswith(f"test accuracy {expected:.2%},")


def test_classes_that_the_model_does_not_know(capsys):
    write_data("pets.csv", ["cat", "dog"])
    assert tapegrad(capsys, "train", "--data", "pets.csv", "--epochs", 1, "--hidden", 4)[0] == 0
    write_data("birds.csv", ["dog", "duck", "hen"])
    message = r"runs.pets does not know the classes duck, hen of birds\.csv, only cat, dog$"
    wrong(capsys, "evaluate", "runs/pets", "--data", "birds.csv", match=message)


def test_evaluate_looks_in_the_data_folder(capsys):
    # The four files of MNIST, with other pixels to be tested in each of two folders.
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4), dtype="u1")
    labels = np.arange(20, dtype="u1") % 10
    for folder, shift in (("one", 0), ("two", 1)):
        Path(folder).mkdir()
        for part, array in {
            "train-images-idx3": pixels,
            "train-labels-idx1": labels,
            "t10k-images-idx3": np.roll(pixels, shift, 1),
            "t10k-labels-idx1": labels,
        }.items():
            head = struct.pack(f">2x2B{array.ndim}I", 8, array.ndim, *array.shape)
            Path(folder, f"{part}-ubyte").write_bytes(head + array.tobytes())
    options = ("--data", "mnist", "--data-folder", "one", "--hidden", 8, "--epochs", 1)
    code, out, err = tapegrad(capsys, "train", *options)
    assert code == 0, err
    printed = next(line for line in out if line.startswith("test accuracy"))
    evaluate = ("evaluate", "runs/mnist", "--data-folder")
    assert tapegrad(capsys, *evaluate, "one") == (0, [printed], [])
    code, out, err = tapegrad(capsys, *evaluate, "two")
    assert code == 0, err
    assert out != [printed]


@pytest.fixture
def ctrl_c():
    """Let SIGINT interrupt, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupting_keeps_what_was_trained(ctrl_c, capsys, monkeypatch):
    step = tg.Model.train_step
    steps = []

    def interrupted(self, *batch):
        steps.append(1)
        if len(steps) == 20:  # in the second epoch: the digits have twelve batches
            os.kill(os.getpid(), signal.SIGINT)
        step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(tg.Model, "train_step", interrupted)
        patch.setattr("tapegrad.training.model.function", lambda step, strict: step)
        code, out, err = tapegrad(capsys, "train", "--hidden", 16, "--epochs", 50)
    assert code in (0, 130)
    assert len(steps) == 20
    assert "interrupted in epoch 2: the weights are as trained" in err
    assert json.loads(Path("runs/digits/history.json").read_text())["epoch"] == [0]
    printed = next(line for line in out if line.startswith("test accuracy"))
    assert tapegrad(capsys, "evaluate", "runs/digits")[1] == [printed]


def test_interrupting_in_the_first_epoch(ctrl_c, capsys, monkeypatch):
    step = tg.Model.train_step

    def interrupted(self, *batch):
        os.kill(os.getpid(), signal.SIGINT)
        step(self, *batch)

    monkeypatch.setattr(tg.Model, "train_step", interrupted)
    code, out, err = tapegrad(capsys, "train", "--hidden", 16, "--epochs", 50)
    assert code in (0, 130), err
    assert "weights.safetensors" in out[-1]
    assert picture_size("runs/digits/curves.png")[0] > 300


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = tapegrad(capsys, "train", *SMALL)
    assert code == 0
    assert out[-1].startswith("wrote weights.safetensors, history.json, settings.json to ")
    assert err[-1] == (
        'no picture of the curves: pictures need matplotlib: pip install "tapegrad[plot]"'
    )
    code, out, err = tapegrad(capsys, "demo", "descent", "--steps", 1)
    assert code == 0
    assert len(out) == 2
    assert err == ['no picture of the path: pictures need matplotlib: pip install "tapegrad[plot]"']


# ---- demo and info

DESCENT = """\
k     x     y        z  dz/dx  lr*dz/dx  dz/dy  lr*dz/dy
0 -75.0  75.0  11250.0 -150.0     -30.0  150.0      30.0
1 -45.0  45.0   4050.0  -90.0     -18.0   90.0      18.0
2 -27.0  27.0   1458.0  -54.0     -10.8   54.0      10.8
3 -16.2  16.2    524.9  -32.4      -6.5   32.4       6.5
4  -9.7   9.7    189.0  -19.4      -3.9   19.4       3.9
5  -5.8   5.8     68.0  -11.7      -2.3   11.7       2.3
"""


def test_a_descent_that_climbs_has_a_table_and_no_picture(capsys):
    with np.errstate(all="ignore"):
        code, out, err = tapegrad(capsys, "demo", "descent", "--learning-rate", 5, "--steps", 400)
    assert (code, len(out), os.listdir()) == (2, 401, [])
    assert err == ["tapegrad demo: the steps grow past all numbers: take a learning rate below 1"]


def test_the_demonstration_of_gradient_descent(capsys):
    code, out, err = tapegrad(capsys, "demo", "descent", "--steps", 6)
    assert (code, err) == (0, [])
    assert [line.split() for line in out[:-1]] == [row.split() for row in DESCENT.splitlines()]
    assert len({len(line) for line in out[:-1]}) == 1  # columns that line up
    assert out[-1] == "wrote descent.png"
    width, height = picture_size("descent.png")
    assert 400 < width < 2000
    assert 400 < height < 2000


def test_the_options_of_the_demonstration(capsys):
    code, out, _ = tapegrad(
        capsys, "demo", "descent", "--learning-rate", 0.5, "--steps", 3, "--output", "path.svg"
    )
    assert code == 0
    assert [line.split()[1] for line in out[1:4]] == ["-75.0", "0.0", "0.0"]
    assert out[-1] == "wrote path.svg"
    assert "<svg" in Path("path.svg").read_text()
    assert len(tapegrad(capsys, "demo", "descent")[1]) == 1 + 20 + 1


def test_the_path_in_full_precision():
    for k, step in enumerate(demo.descent(0.2, 8)):
        assert step.k == k
        assert step.x == pytest.approx(-75 * 0.6**k, rel=1e-14)
        assert step.z == pytest.approx(11250 * 0.36**k, rel=1e-14)
        assert step.step_y == pytest.approx(0.4 * 75 * 0.6**k, rel=1e-14)


def test_info(capsys):
    code, out, err = tapegrad(capsys, "info")
    assert (code, err) == (0, [])
    found = dict(line.split(None, 1) for line in out if not line.startswith("kernels"))
    assert found["tapegrad"] == tg.__version__
    assert found["backend"] == "numpy"
    assert found["numpy"] == np.__version__
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert "cupy" in found
    assert found["cublaslt"] == "not in use: NumPy computes the same values"
    kernels = [line for line in out if line.startswith("kernels")]
    sources = sorted((ROOT / "kernels").glob("*.cu"))
    assert len(sources) >= 4
    for source in sources:
        (line,) = (line for line in kernels if source.name in line)
        assert "not in use" in line


# ---- python -m tapegrad, --help, --version


def test_python_m_tapegrad(tmp_path):
    done = in_a_process("train", *SMALL, "--backend", "numpy", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("digits: 1,438 training and 359 test images")
    again = in_a_process("evaluate", tmp_path / "run", "--backend", "numpy")
    assert again.returncode == 0
    assert again.stdout.rstrip() in done.stdout
    assert again.stderr == ""
    wrong = in_a_process("train", "--epochs", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("tapegrad train: argument --epochs: ")


def test_the_command_is_installed_under_its_name():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'tapegrad = "tapegrad.cli:main"' in text


def test_help(capsys):
    code, out, err = tapegrad(capsys, "--help")
    assert (code, err) == (0, [])
    text = "\n".join(out)
    for command in ("train", "evaluate", "info", "demo"):
        assert re.search(rf"^    {command} +\w", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            ["train"],
            "--data --hidden --activation --dropout --optimizer --learning-rate --batch-size "
            "--epochs --seed --output --data-folder --download --backend",
        ),
        (["evaluate"], "folder --data --data-folder --download --backend"),
        (["info"], "--help"),
        (["demo"], "descent"),
        (["demo", "descent"], "--learning-rate --steps --output"),
    ],
)
def test_help_of_a_command(capsys, command, options):
    code, out, err = tapegrad(capsys, *command, "--help")
    assert (code, err) == (0, [])
    assert out[0].startswith(f"usage: tapegrad {' '.join(command)}")
    text = " ".join(" ".join(out).split())
    for option in options.split():
        assert option in text
    if command == ["train"]:
        for default in ("(digits)", "(128)", "(relu)", "(adam)", "(10)", "(0)"):
            assert default in text


def test_version(capsys):
    assert tapegrad(capsys, "--version") == (0, [f"tapegrad {tg.__version__}"], [])


# ---- errors: exit code 2, one line, which says what to write instead


WRONG = [
    ((), "the following arguments are required: COMMAND"),
    (("trian",), "invalid choice: 'trian' (choose from .*train.*evaluate.*info.*demo"),
    (("train", "--epochs", "0"), "argument --epochs: must be a whole number above 0, got '0'"),
    (("train", "--epochs", "1.5"), "--epochs: must be a whole number above 0, got '1.5'"),
    (("train", "--epochs", "99999999999999"), "--epochs: must be a whole number above 0"),
    (("train", "--epochs"), "argument --epochs: expected one argument"),
    (("train", "--batch-size", "-4"), "--batch-size: (must be a whole number|expected one)"),
    (("train", "--hidden", "128", "zero"), "--hidden: must be a whole number above 0, got 'zero'"),
    (("train", "--hidden", "128", "0"), "--hidden: must be a whole number above 0, got '0'"),
    (("train", "--seed=-1"), "argument --seed: must be a whole number, 0 or above, got '-1'"),
    (("train", "--learning-rate", "0"), "--learning-rate: must be a number above 0, such as 0.001"),
    (("train", "--learning-rate", "nan"), "--learning-rate: must be a number above 0.* got 'nan'"),
    (("train", "--learning-rate", "inf"), "--learning-rate: must be a number above 0.* got 'inf'"),
    (
        ("train", "--dropout", "1"),
        "--dropout: must be a number from 0 to below 1, such as 0.3, got",
    ),
    (("train", "--dropout", "half"), "--dropout: must be a number from 0 to below 1, .*'half'"),
    (("train", "--optimizer", "adma"), "--optimizer: invalid choice: 'adma' (choose from .*adam"),
    (("train", "--activation", "rleu"), "--activation: invalid choice: 'rleu' (choose .*relu"),
    (("train", "--backend", "cuda"), "--backend: invalid choice: 'cuda' (choose .*numpy.*cupy"),
    (("train", "--layers", "3"), "unrecognized arguments: --layers 3"),
    (("train", "--data", "mnits"), "unknown data set 'mnits': give one of 'digits'.*fashion-mnist"),
    (("train", "--data", "none.npz"), "No such file or directory: 'none.npz'"),
    (("train", "--data", "none.csv"), "No such file or directory: 'none.csv'"),
    (("train", "--data", "mnist", "--data-folder", "nowhere"), "'mnist' needs the files .*nowhere"),
    (("evaluate",), "the following arguments are required: folder"),
    (("evaluate", "nowhere"), "No such file or directory: '.*nowhere.settings.json'"),
    (("demo",), "the following arguments are required: DEMO"),
    (("demo", "ascent"), "invalid choice: 'ascent' (choose from .*descent"),
    (("demo", "descent", "--steps", "0"), "--steps: must be a whole number above 0, got '0'"),
    (("demo", "descent", "--learning-rate", "x"), "--learning-rate: must be a number above 0"),
    (("demo", "descent", "--output", "path.xyz"), "xyz.* is not supported"),
    (("demo", "descent", "--output", "nowhere/path.png"), "No such file or directory"),
    (("info", "now"), "unrecognized arguments: now"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda x: " ".join(x)[:40])
def test_wrong_arguments(capsys, arguments, message):
    code, _, err = tapegrad(capsys, *arguments)
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith("tapegrad")
    assert re.search(message.replace("(choose", r"\(choose"), err[0])
    assert not Path("runs").exists()


def test_the_line_says_where_to_read_on(capsys):
    _, _, (line,) = tapegrad(capsys, "train", "--epochs", "0")
    assert line.endswith("(see tapegrad train --help)")
    _, _, (line,) = tapegrad(capsys, "demo", "descent", "--steps", "0")
    assert line.endswith("(see tapegrad demo descent --help)")


def wrong(capsys, *arguments, match):
    code, _, err = tapegrad(capsys, *arguments)
    assert code == 2
    assert len(err) == 1, err
    assert err[0].startswith(f"tapegrad {arguments[0]}: ")
    assert re.search(match, err[0]), err[0]


def test_an_output_folder_that_is_a_file(capsys):
    Path("taken").write_text("")
    wrong(capsys, "train", *SMALL, "--output", "taken", match="taken")
    assert Path("taken").read_text() == ""


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder of the system's")
def test_an_output_folder_that_cannot_be_written_to(capsys, monkeypatch):
    # It was found out when all was trained, and then all was lost.
    monkeypatch.setattr(tg.Model, "fit", lambda *_, **__: pytest.fail("trained"))
    wrong(capsys, "train", *SMALL, "--output", "/proc/self", match="/proc/self")


@pytest.mark.parametrize(
    ("labels", "match"),
    [([-1, 1], "label"), ([0, 1000000], "label")],
)
@pytest.mark.parametrize("name", ["mine.npz", "mine.csv"])
def test_labels_that_number_no_classes(capsys, name, labels, match):
    write_data(name, labels)
    wrong(capsys, "train", "--data", name, match=match)


def test_too_few_rows_to_test_on(capsys):
    # Every fifth row is for testing: of four there is none, and no accuracy to be printed.
    write_data("few.npz", [0, 1], n=4)
    code, out, err = tapegrad(capsys, "train", "--data", "few.npz", "--hidden", 4, "--epochs", 1)
    assert code == 2
    assert len(err) == 1
    assert not any("test accuracy" in line for line in out)


def test_broken_data_files(capsys):
    Path("broken.npz").write_bytes(b"PK\x03\x04 and so on")
    wrong(capsys, "train", "--data", "broken.npz", match=r"broken\.npz: byte \d+: ")
    Path("broken.csv").write_text("a,b,label\n1,2,0\n1,x,1\n")
    wrong(capsys, "train", "--data", "broken.csv", match=r"broken\.csv")


def test_data_of_another_width(trained, capsys):
    write_data("mine.npz", [0, 1, 2])
    message = r"the model in runs.digits takes 64 numbers an image, .*mine.* has 4"
    wrong(capsys, "evaluate", trained[0], "--data", "mine.npz", match=message)


def test_a_run_without_weights(trained, capsys):
    (trained[0] / "weights.safetensors").unlink()
    wrong(capsys, "evaluate", trained[0], match=r"No such file .*weights\.safetensors")


def test_broken_weights(trained, capsys):
    path = trained[0] / "weights.safetensors"
    content = path.read_bytes()
    for broken in (b"", content[:100], content[:-1], content + b"\0", b"\x80\x04" + content[2:]):
        path.write_bytes(broken)
        wrong(capsys, "evaluate", trained[0], match=r"weights\.safetensors: byte \d+: ")


def test_weights_of_another_model(trained, capsys):
    path = trained[0] / "weights.safetensors"
    arrays, _ = safetensors.load(path)
    safetensors.save(path, {"layers.0.kernel": arrays["layers.0.kernel"]})
    wrong(
        capsys, "evaluate", trained[0], match="the file is of another model; missing there: layers"
    )
    safetensors.save(path, {**arrays, "layers.1.bias": np.zeros(11, np.float32)})
    wrong(
        capsys,
        "evaluate",
        trained[0],
        match=r"layers\.1\.bias has shape \(11,\) in the file, \(10,\)",
    )


BROKEN_TEXTS = {
    "empty": b"",
    "half": b'{"data": "digits", "hidden": [16',
    "a list": b"[]",
    "a number": b"3",
    "no UTF-8": b'{"data": "\xff\xfe"}',
    "deep": b"[" * 60000,
    "digits without end": b"1" * 60000,
    "huge": b" " * (1 << 17),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("text", BROKEN_TEXTS.values(), ids=BROKEN_TEXTS)
def test_settings_that_are_no_settings(trained, capsys, text):
    (trained[0] / "settings.json").write_bytes(text)
    wrong(capsys, "evaluate", trained[0], match=r"settings\.json: byte \d+: ")


BROKEN_SETTINGS = {
    "no data": {"data": ...},
    "one more": {"module": "os"},
    "hidden a number": {"hidden": 16},
    "hidden of text": {"hidden": ["16"]},
    "hidden of floats": {"hidden": [16.0]},
    "hidden of booleans": {"hidden": [True]},
    "hidden of none": {"hidden": [0]},
    "hidden below none": {"hidden": [-16]},
    "hidden beyond all": {"hidden": [10**30]},
    "features below none": {"features": -64},
    "classes of text": {"classes": "10"},
    "no classes": {"classes": []},
    "classes of numbers": {"classes": [0, 1]},
    "unknown optimizer": {"optimizer": "os.system"},
    "optimizer a list": {"optimizer": ["adam"]},
    "optimizer a number": {"optimizer": 3},
    "unknown activation": {"activation": "eval"},
    "activation an object": {"activation": {"name": "relu"}},
    "dropout of text": {"dropout": "0.3"},
    "dropout of one": {"dropout": 1.0},
    "dropout a list": {"dropout": [0.3]},
    "rate of text": {"learning_rate": "fast"},
    "rate a list": {"learning_rate": [0.1]},
    "rate below none": {"learning_rate": -0.1},
    "data a number": {"data": 3},
    "data a list": {"data": ["digits"]},
    "data nothing": {"data": None},
}


@pytest.mark.parametrize("change", BROKEN_SETTINGS.values(), ids=BROKEN_SETTINGS)
def test_settings_that_are_wrong(trained, capsys, change):
    path = trained[0] / "settings.json"
    settings = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))
    wrong(capsys, "evaluate", trained[0], match=r"settings\.json: byte \d+: ")


def test_settings_of_a_model_beyond_the_memory(trained):
    # They lie: the weights beside them have 12 kB. One line, and not the machine's memory.
    pytest.importorskip("resource")
    path = trained[0] / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden": [8_000_000]}))
    done = in_a_process("evaluate", trained[0], "--backend", "numpy", memory=1 << 30)
    assert done.returncode == 2, done.stderr[-500:]
    assert len(done.stderr.splitlines()) == 1
    assert "settings.json" in done.stderr or "weights.safetensors" in done.stderr


def test_a_model_beyond_the_memory():
    pytest.importorskip("resource")
    done = in_a_process(
        "train", "--hidden", 8_000_000, "--epochs", 1, "--backend", "numpy", memory=1 << 30
    )
    assert done.returncode == 2, done.stderr[-500:]
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("tapegrad train: ")


def test_a_backend_that_cannot_be_had():
    done = in_a_process(
        "train", *SMALL, "--backend", "cupy", CUDA_VISIBLE_DEVICES="-1", TAPEGRAD_BACKEND="numpy"
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert 'the backend "cupy" cannot be used: ' in done.stderr


@pytest.mark.parametrize("command", ["train", "evaluate", "info"])
def test_the_environment_variable_chooses_the_backend(trained, capsys, monkeypatch, command):
    # As for every program; "auto" would ask for a GPU, and warn where a CuPy cannot be used.
    monkeypatch.setenv("TAPEGRAD_BACKEND", "numpy")
    monkeypatch.setattr(_backend, "_auto", None)
    monkeypatch.setattr(_backend, "_automatic", lambda: pytest.fail("asked for a GPU"))
    arguments = {"train": [*map(str, SMALL)], "evaluate": [str(trained[0])], "info": []}[command]
    assert cli.main([command, *arguments]) == 0
    assert "Warning" not in capsys.readouterr().err


def test_an_environment_variable_that_is_wrong():
    done = in_a_process("info", TAPEGRAD_BACKEND="gpu")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "TAPEGRAD_BACKEND must be one of 'auto', 'numpy', 'cupy', got 'gpu'" in done.stderr
