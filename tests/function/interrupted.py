"""Programs that are interrupted again and again; run as `python interrupted.py NAME [argument]`.

In a process of their own: an interrupt that arrives a moment late would hit whoever runs the tests.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import numpy as np

import tapegrad as tg

SECONDS = 8.0


class Counting:
    """A step whose Variables are all equal after whole steps."""

    def __init__(self, size):
        self.variables = [tg.Variable(np.zeros(size)) for _ in range(6)]
        ones = tg.ones(size, dtype="f8")
        self.one = tg.constant(np.float64(1.0))

        def step(x):
            for v in self.variables:
                v.assign_add(ones * x)
            return self.variables[-1] + self.variables[0]

        function = tg.function(step)
        self.run = lambda: function(self.one)

    def check(self):
        values = {float(k) for v in self.variables for k in np.unique(v.numpy())}
        assert len(values) == 1, values
        return values.pop()


class Training:
    """A step of a classifier with dropout, an optimiser and a counter of its own."""

    def __init__(self):
        rng = np.random.default_rng(0)
        variables = [tg.Variable(rng.normal(size=s)) for s in [(4, 8), (8,), (8, 3), (3,)]]
        optimizer, steps = tg.optimizers.Adam(0.01), tg.Variable(0)
        x, labels = tg.ones((3, 4), dtype="f8"), tg.constant([0, 1, 2])

        def step(x, labels):
            with tg.GradientTape() as tape:
                h = tg.nn.dropout(tg.nn.linear_relu(x, *variables[:2]), 0.2)
                loss = tg.nn.softmax_cross_entropy(tg.nn.linear(h, *variables[2:]), labels)
            optimizer.apply(tape.gradient(loss, variables), variables)
            steps.assign_add(1)
            return loss

        function = tg.function(step)
        self.run = lambda: function(x, labels)
        self.variables, self.counters = variables, (optimizer.iterations, steps)

    def check(self):
        first, second = map(int, self.counters)
        assert first == second, (first, second)  # the counter's steps are the optimiser's
        assert all(np.isfinite(v.numpy()).all() for v in self.variables)
        return first


class Shooter(threading.Thread):
    """Interrupts the main thread at a random moment, once each time that it is armed."""

    def __init__(self):
        super().__init__(daemon=True)
        self.armed = self.stopped = False

    def run(self):
        rng = np.random.default_rng(1)
        while not self.stopped:
            time.sleep(rng.uniform(1e-4, 2e-3))
            if self.armed:
                self.armed = False
                os.kill(os.getpid(), signal.SIGINT)


def interrupted(program):
    """Run the program's steps under fire; check it after each interrupt, and count these."""
    for _ in range(3):
        program.run()
    shooter = Shooter()
    shooter.start()
    count, deadline = 0, time.monotonic() + SECONDS
    while count < 200 and time.monotonic() < deadline:
        try:
            shooter.armed = True
            while time.monotonic() < deadline:
                program.run()
        except KeyboardInterrupt:
            program.check()
            count += 1
    try:
        shooter.stopped = True
        shooter.join()  # which may have fired once more
    except KeyboardInterrupt:
        shooter.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert count >= 50, count
    done = program.check()
    program.run()
    assert program.check() == done + 1


def one_interrupt():
    """An interrupt is let through after the step in which it came, and not lost."""
    v, w = tg.Variable([0.0]), tg.Variable(np.zeros(300_000))

    def step(x):
        v.assign_add(x)
        for _ in range(30):
            w.assign_add(w * 0.5 + 1.0)
        v.assign_add(x)
        return x * 1.0

    f = tg.function(step)
    one = tg.constant([1.0])
    for _ in range(3):
        f(one)
    seen = 0
    timer = threading.Timer(0.02, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        for _ in range(100_000):
            f(one)
            seen += 1
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the interrupt was lost")
    timer.join()
    steps = (float(v[0]) - 6) / 2
    assert steps == int(steps)
    assert 0 <= steps - seen <= 1, (steps, seen)


PROGRAMS = {
    "small": lambda: interrupted(Counting(3)),
    "large": lambda: interrupted(Counting(20_000)),
    "training": lambda: interrupted(Training()),
    "once": one_interrupt,
}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs are born deaf to it
    PROGRAMS[sys.argv[1]]()
