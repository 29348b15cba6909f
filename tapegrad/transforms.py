"""Functions of functions: gradients, products with vectors, Hessians, without a tape in sight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tapegrad._structure import flatten, flatten_with_paths, map_structure, unflatten
from tapegrad._tape_arguments import is_floating, match_weights
from tapegrad.ops.creation import zeros_like
from tapegrad.ops.elementwise import positive
from tapegrad.tape import GradientTape
from tapegrad.tensor import Operand, Tensor, constant

ArgNums = int | Sequence[int]


def _as_sources(values: Any) -> Any:
    """Make every leaf a Tensor with an identity of its own, connected to what it was.

    A list of nothing but numbers is an array, as everywhere; other lists are structures.
    """
    leaves = flatten(values) if isinstance(values, (list, tuple)) else ()
    if leaves and all(isinstance(leaf, (int, float)) for leaf in leaves):
        return constant(values)
    return map_structure(lambda x: positive(x) if isinstance(x, Operand) else constant(x), values)


def _refuse_discrete(values: Any, name: str) -> None:
    for path, x in flatten_with_paths(values, name):
        if not is_floating(x.dtype):
            raise TypeError(f"{path} has dtype {x.dtype} and no gradient: write 3.0 for 3")


def value_and_grad(
    function: Callable[..., Any], argnums: ArgNums = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Return a function that computes `function` and its gradient for some arguments.

    argnums  the position of the argument, or several of them (then the gradient is a tuple).
             An argument may be a structure of tensors; its gradient has that structure.
    has_aux  whether `function` returns a pair, of which only the first is differentiated.

    The value must be a scalar: else `ValueError`. Where it does not depend on an argument the
    gradient is zero. Raises `TypeError` for integer arguments.

    >>> value, slope = tg.value_and_grad(lambda x: x**2)(3.0)
    >>> float(value), float(slope)
    (9.0, 6.0)
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        several = not isinstance(argnums, int)
        positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        call = list(args)
        for i in positions:
            if not -len(args) <= i < len(args):
                raise ValueError(f"argnums names argument {i}, but there are {len(args)}")
            call[i] = _as_sources(args[i])
            _refuse_discrete(call[i], f"args[{i}]")
        sources = [call[i] for i in positions]
        with GradientTape() as tape:
            tape.watch(sources)
            answer = function(*call, **kwargs)
        value = answer[0] if has_aux else answer
        if not isinstance(value, Operand) or value.size != 1:
            got = f"shape {value.shape}" if isinstance(value, Operand) else repr(value)
            raise ValueError(
                f"the function must return a scalar tensor, got {got}: sum it, or use vjp or "
                "GradientTape.jacobian"
            )
        gradients = tape.gradient(value, sources, unconnected_gradients="zero")
        return answer, (tuple(gradients) if several else gradients[0])

    return wrapper


def grad(
    function: Callable[..., Any], argnums: ArgNums = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Return a function that computes the gradient of `function`; arguments as `value_and_grad`.

    With `has_aux` it returns a pair: the gradient, and the second of what `function` returns.

    >>> float(tg.grad(tg.grad(lambda x: x**3))(2.0))
    12.0
    """
    both = value_and_grad(function, argnums, has_aux)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        answer, gradients = both(*args, **kwargs)
        return (gradients, answer[1]) if has_aux else gradients

    return wrapper


def vjp(
    function: Callable[..., Any], *primals: Any
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """Return `function(*primals)`, and a function from weights of the result to gradients.

    The second takes weights in the structure and shapes of the result, and returns a tuple: the
    vector-Jacobian product for each primal. It may be called again and again.

    >>> y, pull_back = tg.vjp(lambda x: x * x, [1.0, 2.0])
    >>> print(pull_back([1.0, 10.0])[0])
    tg.Tensor([ 2. 40.], shape=(2,), dtype=float32)
    """
    sources = [_as_sources(p) for p in primals]
    _refuse_discrete(sources, "primals")
    with GradientTape(persistent=True) as tape:
        tape.watch(sources)
        value = function(*sources)

    def pull_back(weights: Any) -> tuple[Any, ...]:
        found = tape.gradient(value, sources, weights, unconnected_gradients="zero")
        return tuple(found)

    return value, pull_back


def jvp(
    function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[Any, Any]:
    """Return `function(*primals)` and its derivative in the direction of `tangents`.

    primals, tangents  sequences of equal structure and shapes.

    Computed by two reverse passes: the vector-Jacobian product is linear in its weights, and its
    own vector-Jacobian product is the derivative wanted. Raises `ValueError` for tangents of
    another structure or shape.

    >>> value, slope = tg.jvp(lambda x: x**3, [3.0], [1.0])
    >>> float(slope)
    27.0
    """
    sources = [_as_sources(p) for p in primals]
    _refuse_discrete(sources, "primals")
    directions = match_weights(sources, list(tangents))
    with GradientTape() as outer:
        with GradientTape() as inner:
            inner.watch(sources)
            value = function(*sources)
        leaves = flatten(value)
        weights = [zeros_like(y) for y in leaves]
        outer.watch(weights)
        pulled = inner.gradient(leaves, flatten(sources), weights)
    # Only what depends on the weights counts, and is linear in them: a None is a zero.
    pairs = [(p, d) for p, d in zip(pulled, directions, strict=True) if p is not None]
    if not pairs:
        return value, map_structure(zeros_like, value)
    found = outer.gradient(
        [p for p, _ in pairs], weights, [d for _, d in pairs], unconnected_gradients="zero"
    )
    return value, unflatten(value, found)


def hvp(function: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """Return the Hessian of a scalar `function` at `primals`, times `tangents`.

    Answers in the structure of `primals`; raises as `jvp` and `grad` do.

    >>> (product,) = tg.hvp(lambda x: tg.sum(x**3), [[1.0, 2.0]], [[1.0, 1.0]])
    >>> print(product)
    tg.Tensor([ 6. 12.], shape=(2,), dtype=float32)
    """
    sources = [_as_sources(p) for p in primals]
    _refuse_discrete(sources, "primals")
    directions = match_weights(sources, list(tangents))
    with GradientTape() as outer:
        outer.watch(sources)
        slope = grad(function, tuple(range(len(sources))))(*sources)
    found = outer.gradient(flatten(slope), sources, directions, unconnected_gradients="zero")
    return type(primals)(found) if isinstance(primals, (list, tuple)) else found


def hessian(function: Callable[..., Any], argnum: int = 0) -> Callable[..., Any]:
    """Return a function that computes the second derivatives of a scalar `function`.

    argnum  the position of the argument, one tensor. The answer has the shape `x.shape + x.shape`,
            and is zero where `function` is linear.

    >>> print(tg.hessian(lambda x: tg.sum(x**3))([1.0, 2.0]))
    tg.Tensor(
    [[ 6.  0.]
     [ 0. 12.]], shape=(2, 2), dtype=float32)
    """

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        x = _as_sources(args[argnum])
        call = [*args]
        call[argnum] = x
        with GradientTape() as tape:
            tape.watch(x)
            slope = grad(function, argnum)(*call, **kwargs)
        return tape.jacobian(slope, x, unconnected_gradients="zero")  # type: ignore[no-any-return]

    return wrapper
