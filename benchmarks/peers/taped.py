"""What tapegrad and TensorFlow are used alike for: one program, two modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.peers.base import Peer


class TapePeer(Peer):
    """A library with `GradientTape` and `Variable`, `tf`; `compiled` wraps functions to be fast."""

    tf: Any

    def compiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return f, compiled if this column compiles."""
        return f

    def array(self, value: Any) -> Any:
        """Return a tensor."""
        return self.tf.constant(value)

    def numpy(self, value: Any) -> Any:
        """Return the tensor's values."""
        return value.numpy()

    def gradient(
        self,
        f: Callable[..., Any],
        arrays: Sequence[Any],
        seed: Any = None,
        given: Sequence[Any] = (),
    ) -> Callable[[], Any]:
        """Return a function that runs f under a tape, with Variables."""
        sources = [self.tf.Variable(a) for a in arrays]
        upstream = None if seed is None else self.array(seed)
        constants, tape_of = [self.array(a) for a in given], self.tf.GradientTape

        def run(upstream: Any, *constants: Any) -> Any:
            with tape_of() as tape:
                value = f(*sources, *constants)
            return value, *tape.gradient(value, sources, output_gradients=upstream)

        function = self.compiled(run)
        return lambda: function(upstream, *constants)

    def forward(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that computes f of tensors that nothing watches.

        They are arguments: what a compiled function captures it may compute beforehand.
        """
        constants, function = [self.array(a) for a in arrays], self.compiled(f)
        return lambda: function(*constants)

    def jacobian(self, f: Callable[..., Any], array: Any) -> Callable[[], Any]:
        """Return a function that computes the Jacobian with a tape."""
        source = self.tf.Variable(array)

        def run() -> Any:
            with self.tf.GradientTape() as tape:
                value = f(source)
            return tape.jacobian(value, source)

        return self.compiled(run)

    def hvp(self, f: Callable[..., Any], array: Any, vector: Any) -> Callable[[], Any]:
        """Return a function that nests two tapes."""
        source, direction = self.tf.Variable(array), self.array(vector)

        def run() -> Any:
            with self.tf.GradientTape() as outer:
                with self.tf.GradientTape() as inner:
                    value = f(source)
                gradient = inner.gradient(value, source)
            return outer.gradient(gradient, source, output_gradients=direction)

        return self.compiled(run)
