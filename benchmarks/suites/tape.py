"""Suite `tape`: long and wide graphs, Jacobians, Hessian-vector products."""

from __future__ import annotations

from benchmarks.cases import Case, Suite


def _cases(tiny: bool) -> list[Case]:
    cases = []
    for nodes in (10,) if tiny else (100, 10_000):
        size = {"nodes": nodes}
        cases.append(Case(f"chain of {nodes:,} operations", "chain", size, divisor=nodes))
        cases.append(Case(f"fan-out, {nodes:,} operations", "fan_out", size, divisor=nodes))
    n, rows, width = (4, 4, 4) if tiny else (128, 128, 256)
    return [
        *cases,
        Case(f"Jacobian {n} x {n}", "jacobian_of_layer", {"size": n}),
        Case(
            f"Hessian-vector product, layer {rows} x {width} x {width}",
            "hvp_of_layer",
            {"rows": rows, "size": width},
        ),
    ]


SUITE = Suite(
    "tape",
    "The tape",
    "Value and gradient of graphs of scalars, time per operation; Jacobians and products with "
    "Hessians, time in all.",
    ("tapegrad", "tapegrad-cupy"),
    _cases,
)
