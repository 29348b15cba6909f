"""tg.print: as Python's own, and in every call of a compiled function, between its writes."""

from __future__ import annotations

import tapegrad as tg


def test_prints_as_python_does(capsys):
    tg.print("x =", tg.constant([1.0, 2.0]), 3, None, sep="|", end="!\n")
    tg.print()
    assert capsys.readouterr().out == "x =|[1. 2.]|3|None!\n\n"


def test_is_no_use_of_a_tensor_on_a_tape():
    x = tg.Variable(2.0)
    with tg.GradientTape() as tape:
        y = x * x
        tg.print(y)
    assert float(tape.gradient(y, x)) == 4.0


def test_a_compiled_function_prints_in_every_call_and_in_order(capsys):
    v = tg.Variable(1.0)

    @tg.function
    def add(x):
        tg.print("before", v, x)
        v.assign_add(x)
        tg.print("after", v)

    for _ in range(4):
        add(tg.constant(1.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(add.programs) == 1
    assert lines == [f"{word} {n}.0{more}" for n in range(1, 5) for word, n, more in
                     (("before", n, " 1.0"), ("after", n + 1, ""))]  # fmt: skip
