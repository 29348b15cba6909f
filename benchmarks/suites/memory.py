"""Suite `memory`: the peak of a training step against the sum of what must live."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases import Case, Suite
from benchmarks.problems import Net
from benchmarks.suites.steps import DEEP, deep_net, net_case


def _cases(tiny: bool) -> list[Case]:
    wide = Net((784, 16, 10) if tiny else (784, 2048, 2048, 10), 8 if tiny else 512, "adam", 1e-4)
    deep = replace(deep_net(tiny), batches=1), None if tiny else DEEP
    nets = [deep, (replace(wide, batches=1), None)]
    return [net_case(net, name, measure="memory") for net, name in nets]


SUITE = Suite(
    "memory",
    "Memory",
    "The highest resident memory over building the net and 6 steps, in a fresh process, above what "
    "was resident when the library was imported and the data made; compilers' own memory is "
    "included. What must live: parameters, gradients, the optimiser's slots, hidden activations, "
    "two gradients of the widest hidden layer.",
    ("tapegrad", "tapegrad-cupy"),
    _cases,
)
