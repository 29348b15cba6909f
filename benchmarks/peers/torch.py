"""PyTorch: eager, `torch.compile` in its modes, and a whole step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers.base import Ops, Peer, Prepared, Training, Unsupported
from benchmarks.problems import Net

_MODES = {
    "compile": "default",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune",
}
_GRAPHS = {"reduce-overhead", "max-autotune"}


class Torch(Peer):
    """Variants: eager; compile, reduce-overhead, max-autotune; graph."""

    packages = ("torch",)
    ops = Ops(
        tanh=torch.tanh,
        sum=torch.sum,
        mean=torch.mean,
        matvec=torch.mv,
        relu=torch.relu,
        linear_relu=lambda x, w, b: torch.relu(torch.addmm(b, x, w)),
        cross_entropy=functional.cross_entropy,
    )

    def __init__(self, variant: str, device: str) -> None:
        super().__init__(variant, device)
        self._place = "cuda" if device == "gpu" else "cpu"
        self.clock = "torch" if device == "gpu" else None
        torch.set_float32_matmul_precision("highest")

    def _compiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        if self.variant in _MODES:
            return torch.compile(f, mode=_MODES[self.variant])
        if self.variant == "graph":
            raise Unsupported("only training steps are captured as a graph")
        return f

    def array(self, value: Any) -> Any:
        """Return a tensor on the device."""
        return torch.tensor(value, device=self._place)

    def _leaf(self, value: Any) -> Any:
        return self.array(value).requires_grad_()

    def numpy(self, value: Any) -> Any:
        """Return the tensor's values."""
        return value.detach().cpu().numpy()

    def wait(self, result: Any) -> None:
        """Wait for the GPU."""
        if self.device == "gpu":
            torch.cuda.synchronize()

    def device_bytes(self) -> int | None:
        """Return what the caching allocator had reserved at the most."""
        return torch.cuda.max_memory_reserved() if self.device == "gpu" else None

    def gradient(
        self,
        f: Callable[..., Any],
        arrays: Sequence[Any],
        seed: Any = None,
        given: Sequence[Any] = (),
    ) -> Callable[[], Any]:
        """Return a function that asks autograd for the gradients of leaves."""
        leaves = [self._leaf(a) for a in arrays]
        upstream = None if seed is None else self.array(seed)
        constants, f = [self.array(a) for a in given], self._compiled(f)

        def run() -> Any:
            value = f(*leaves, *constants)
            return value, *torch.autograd.grad(value, leaves, upstream)

        return run

    def recorded(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that builds the graph and asks for nothing."""
        leaves = [self._leaf(a) for a in arrays]
        f = self._compiled(f)
        return lambda: f(*leaves)

    def forward(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that computes f of tensors that need no gradient."""
        constants = [self.array(a) for a in arrays]
        f = self._compiled(f)
        return lambda: f(*constants)

    def jacobian(self, f: Callable[..., Any], array: Any) -> Callable[[], Any]:
        """Return torch.func.jacrev of f."""
        x, function = self.array(array), self._compiled(torch.func.jacrev(f))
        return lambda: function(x)

    def hvp(self, f: Callable[..., Any], array: Any, vector: Any) -> Callable[[], Any]:
        """Return a function that differentiates the gradient once more."""
        if self.variant in _MODES:
            raise Unsupported("torch.compile does not differentiate twice")
        x, direction = self._leaf(array), self.array(vector)

        def run() -> Any:
            (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
            return torch.autograd.grad(gradient, x, direction)[0]

        return run

    def _optimizer(self, kind: str, parameters: Any, rate: float) -> Any:
        # The fused updates are PyTorch's fastest, on a CPU too.
        if kind == "sgd":
            return torch.optim.SGD(parameters, rate, fused=True)
        capturable = {"capturable": True} if self.variant == "graph" else {}
        return torch.optim.Adam(parameters, rate, fused=True, **capturable)

    def mlp(self, net: Net) -> Training:
        """Return a step with nn.Sequential and torch.optim."""
        layers: list[nn.Module] = []
        for kernel, bias in net.weights():
            layer = nn.Linear(*kernel.shape, device=self._place)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(kernel.T))
                layer.bias.copy_(torch.from_numpy(bias))
            layers += [layer, nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        optimizer = self._optimizer(net.optimizer, model.parameters(), net.learning_rate)

        def loss_of(x: Any, y: Any) -> Any:
            return functional.cross_entropy(model(x), y)

        forward = self._compiled(loss_of) if self.variant != "graph" else loss_of

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = forward(x, y)
            loss.backward()
            optimizer.step()
            # Where the compiler makes CUDA graphs, the next run writes where this result lies.
            return loss.detach().clone() if self.variant in _GRAPHS else loss.detach()

        def predict(x: Any) -> Any:
            with torch.no_grad():
                return model(x)

        return (_captured(step, net) if self.variant == "graph" else step), predict

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return the fused optimiser's step for one long parameter."""
        p = nn.Parameter(self.array(parameters))
        p.grad = self.array(gradient)
        optimizer = self._optimizer("adam", [p], rate)

        def run() -> Any:
            optimizer.step()
            return p

        return run

    def copy(self, size: int) -> Prepared:
        """Copy one tensor into another."""
        x = torch.ones(size, device=self._place)
        y = torch.empty_like(x)
        return self._prepared(lambda: y.copy_(x))

    def gemm(self, size: int) -> Prepared:
        """Multiply two square matrices."""
        x = torch.full((size, size), 0.5, device=self._place)
        y = torch.empty_like(x)
        return self._prepared(lambda: torch.mm(x, x, out=y))


def _captured(step: Callable[..., Any], net: Net) -> Callable[..., Any]:
    """Return a whole step as one CUDA graph: inputs are copied to where it reads them."""
    x = torch.zeros((net.batch, net.widths[0]), device="cuda")
    y = torch.zeros(net.batch, dtype=torch.int64, device="cuda")
    state: dict[str, Any] = {}

    def run(images: Any, labels: Any) -> Any:
        x.copy_(images)
        y.copy_(labels)
        if state.get("steps", 0) < 3:  # warm up on a side stream, as PyTorch's manual says
            state["steps"] = state.get("steps", 0) + 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = step(x, y)
            torch.cuda.current_stream().wait_stream(side)
            return loss.clone()
        if "graph" not in state:
            state["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):  # records; nothing is computed yet
                state["loss"] = step(x, y)
        state["graph"].replay()
        return state["loss"].clone()

    return run


PEER = Torch
