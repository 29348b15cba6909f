"""The suites, by name, in the order in which they run."""

from benchmarks.cases import Suite
from benchmarks.suites import kernels, memory, ops, scaling, startup, steps, tape, training

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (steps, kernels, training, memory, scaling, tape, ops, startup)
}
