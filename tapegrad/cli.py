"""The command `tapegrad`: train, evaluate, info and demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tapegrad
from tapegrad import _backend, data
from tapegrad.errors import FormatError
from tapegrad.layers import ACTIVATIONS
from tapegrad.training import demo, runs


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and how to see what is right."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _number(
    kind: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return convert


_positive = _number(int, lambda n: 0 < n < 1 << 24, "a whole number above 0")
_count = _number(int, lambda n: n >= 0, "a whole number, 0 or above")
_rate = _number(float, lambda x: 0 < x < float("inf"), "a number above 0, such as 0.001")
_share = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1, such as 0.3")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-folder", metavar="DIR", help="where the files of a named data set are"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch a named data set that is not there"
    )
    parser.add_argument(
        "--backend", choices=_backend.NAMES, help="where to compute (TAPEGRAD_BACKEND, else auto)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tapegrad", description="Train multi-layer perceptrons, watch the tape.")
    parser.add_argument("--version", action="version", version=f"tapegrad {tapegrad.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    defaults = runs.Settings()

    train = commands.add_parser("train", help="train a multi-layer perceptron on images")
    train.add_argument(
        "--data",
        default=defaults.data,
        metavar="NAME",
        help="digits, fashion-mnist, mnist, or the path of an .npz or .csv file (digits)",
    )
    train.add_argument(
        "--hidden",
        type=_positive,
        nargs="*",
        default=list(defaults.hidden),
        metavar="UNITS",
        help="sizes of the hidden layers (128)",
    )
    train.add_argument(
        "--activation", choices=sorted(ACTIVATIONS), default="relu", metavar="NAME", help="(relu)"
    )
    train.add_argument(
        "--dropout", type=_share, default=0.0, metavar="RATE", help="after each hidden layer (0)"
    )
    train.add_argument(
        "--optimizer", choices=list(runs.OPTIMIZERS), default=defaults.optimizer, help="(adam)"
    )
    train.add_argument(
        "--learning-rate",
        type=_rate,
        metavar="RATE",
        help="(the optimizer's usual one, 0.001 for adam)",
    )
    train.add_argument(
        "--batch-size", type=_positive, default=defaults.batch_size, metavar="N", help="(128)"
    )
    train.add_argument(
        "--epochs", type=_positive, default=defaults.epochs, metavar="N", help="(10)"
    )
    train.add_argument("--seed", type=_count, default=defaults.seed, metavar="N", help="(0)")
    train.add_argument("--output", metavar="DIR", help="folder for the results (runs/NAME)")
    _add_common(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="test a trained model")
    evaluate.add_argument("folder", help="what `tapegrad train` wrote, such as runs/digits")
    evaluate.add_argument("--data", metavar="NAME", help="another data set than it was trained on")
    _add_common(evaluate)
    evaluate.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="show backend, device, versions and kernels")
    info.set_defaults(run=_info)

    demos = commands.add_parser("demo", help="show how something works")
    kinds = demos.add_subparsers(dest="demo", required=True, metavar="DEMO")
    descent = kinds.add_parser("descent", help="gradient descent on x**2 + y**2, step by step")
    descent.add_argument("--learning-rate", type=_rate, default=0.2, metavar="RATE", help="(0.2)")
    descent.add_argument("--steps", type=_positive, default=20, metavar="N", help="(20)")
    descent.add_argument("--output", default="descent.png", metavar="FILE", help="(descent.png)")
    descent.set_defaults(run=_descent)
    return parser


def _load(name: str, arguments: argparse.Namespace) -> data.Dataset:
    return data.load(name, arguments.data_folder, arguments.download)


def _train(arguments: argparse.Namespace) -> None:
    settings = runs.Settings(
        data=arguments.data,
        hidden=tuple(arguments.hidden),
        activation=arguments.activation,
        dropout=arguments.dropout,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        seed=arguments.seed,
    )
    dataset = _load(settings.data, arguments)
    output = Path(arguments.output or Path("runs") / Path(settings.data).stem)
    print(
        f"{dataset.name}: {len(dataset.train_images):,} training and "
        f"{len(dataset.test_images):,} test images of {dataset.train_images.shape[1]} numbers, "
        f"{len(dataset.classes)} classes"
    )
    print(runs.describe(settings))
    verbose = 1 if sys.stderr.isatty() else 2
    history, final = runs.train(settings, dataset, output, arguments.backend, verbose)
    print(f"test accuracy {final['accuracy']:.2%}, loss {final['loss']:.4f}")
    written = [runs.WEIGHTS, runs.HISTORY, runs.SETTINGS]
    try:
        history.plot(output / runs.CURVES)
        written.insert(0, runs.CURVES)
    except ImportError as error:
        print(f"no picture of the curves: {error}", file=sys.stderr)
    print(f"wrote {', '.join(written)} to {output}")


def _evaluate(arguments: argparse.Namespace) -> None:
    folder, name = Path(arguments.folder), arguments.data
    if name is None:
        name = runs.read_settings(folder)[0].data
    found = runs.evaluate(folder, _load(name, arguments), arguments.backend)
    print(f"test accuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}")


def _info(arguments: argparse.Namespace) -> None:
    found = {"tapegrad": tapegrad.__version__} | _backend.facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def _descent(arguments: argparse.Namespace) -> None:
    path = demo.descent(arguments.learning_rate, arguments.steps)
    print(demo.table(path))
    try:
        demo.draw(path, arguments.output)
    except ImportError as error:
        print(f"no picture of the path: {error}", file=sys.stderr)
    else:
        print(f"wrote {arguments.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except MemoryError as error:
        print(f"{parser.prog} {parsed.command}: not enough memory: {error}", file=sys.stderr)
        return 2
    except (ValueError, FormatError, OSError, RuntimeError) as error:
        # One line, whatever it was: what is wrong, and by tapegrad's own habit what to do.
        text = " ".join(str(error).split())
        print(f"{parser.prog} {parsed.command}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
