"""Suite `steps`: whole training steps of multi-layer perceptrons, and the parts that dominate."""

from __future__ import annotations

from benchmarks.cases import Case, Suite
from benchmarks.problems import Net

_OPTIMIZERS = {"adam": "Adam", "sgd": "SGD"}
DEEP = "60 hidden layers of 512, batch 4096, SGD"


def net_case(net: Net, name: str | None = None, **options: object) -> Case:
    """Return the case of one training step of a net."""
    widths = "-".join(map(str, net.widths))
    return Case(
        name or f"{widths}, batch {net.batch}, {_OPTIMIZERS[net.optimizer]}",
        "mlp_step",
        vars(net) | {"widths": list(net.widths)},
        flops=net.flops,
        alive=float(net.bytes_alive),
        **options,  # type: ignore[arg-type]
    )


def polynomial() -> Case:
    """Return the case of the first example of every lecture."""
    return Case("(x² + y²)² with gradient", "polynomial")


def parts(tiny: bool) -> list[Case]:
    """Return the memory-bound parts of a step, forward and backward, with the bytes they need."""
    cases = []
    for rows, classes in [(16, 10)] if tiny else [(4096, 1000), (8192, 4000)]:
        cases.append(
            Case(
                f"softmax cross-entropy {rows} x {classes}",
                "softmax_cross_entropy",
                {"rows": rows, "classes": classes},
                flops=6 * rows * classes,  # maximum, difference, exp, sum, quotient, one-hot
                bytes=4 * 2 * rows * classes,  # logits read, gradient written
            )
        )
    rows, columns = (16, 8) if tiny else (4096, 4096)
    cases.append(
        Case(
            f"bias + ReLU {rows} x {columns}",
            "bias_relu",
            {"rows": rows, "columns": columns},
            flops=4 * rows * columns,  # sum, maximum, product, the bias's sum
            bytes=4 * 4 * rows * columns,  # x, upstream read; y, gradient written
        )
    )
    return cases


def small_net() -> Net:
    """Return the net that shows overhead: 3,500 parameters."""
    return Net((64, 32, 32, 10), 32, "adam", 1e-4)


def deep_net(tiny: bool = False) -> Net:
    """Return the net whose activations fill the memory: 60 hidden layers of 512."""
    if tiny:
        return Net((8,) * 5 + (4,), 16, "sgd", 1e-3)
    return Net((512,) * 61 + (10,), 4096, "sgd", 1e-3)


def _cases(tiny: bool) -> list[Case]:
    if tiny:
        nets = [Net((8, 6, 6, 4), 4, "adam", 1e-3), Net((8, 6, 4), 4, "sgd", 1e-2)]
        return [polynomial(), *map(net_case, nets), *parts(True)]
    nets = [
        small_net(),
        Net((784, 512, 512, 10), 128, "sgd", 1e-2),
        Net((784, 2048, 2048, 10), 512, "adam", 1e-4),
    ]
    deep = net_case(deep_net(), DEEP)
    return [polynomial(), *map(net_case, nets), deep, *parts(False)]


SUITE = Suite(
    "steps",
    "Training steps",
    "One step: forward, loss, gradients, optimiser. Every peer begins with the same weights and "
    "sees the same batches; the losses of the first 5 steps must agree. Then the parts of a step "
    "that memory bounds, forward and backward.",
    ("numpy-by-hand", "tapegrad-cupy", "tapegrad"),
    _cases,
)
