"""Settings of the whole process: `tapegrad.config`."""

from __future__ import annotations

from typing import Any

_CHOICES: dict[str, tuple[Any, ...]] = {
    "cuda_graphs": (True, False),
    "debug": (False, True),
    "scalar_targets": ("sum", "warn", "raise"),
    "tf32": (False, True),
    "deterministic": (False, True),
}


class Config:
    """Settings, assigned as attributes: `tg.config.scalar_targets = "raise"`.

    cuda_graphs     whether compiled functions on a GPU are replayed as CUDA graphs: True, or False
                    to launch their operations one by one.
    debug           whether operations on a GPU wait for it to check what only it sees, and raise:
                    labels that are no class, whose loss is NaN otherwise, and in compiled functions
                    indices out of range, of which otherwise a later call or look tells. Compiled
                    functions then launch their operations one by one.
    scalar_targets  what a gradient of a target that is no scalar does: `"sum"` (as TensorFlow:
                    the gradient of the sum of its elements), `"warn"` or `"raise"`.
    tf32            whether matrix products of float32 tensors on a GPU may round their factors to
                    TF32, 10 bits of mantissa: several times faster on its tensor cores.
    deterministic   whether nothing may be decided by timing: matrix products on a GPU then take
                    the algorithm that cuBLASLt proposes, and the same program gives the same
                    bits in every process. By default the candidates for each shape are timed
                    when it is first met, and the times kept for later processes.

    Raises `AttributeError` for an unknown setting, `ValueError` for an unknown value.
    """

    cuda_graphs: bool = True
    debug: bool = False
    scalar_targets: str = "sum"
    tf32: bool = False
    deterministic: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CHOICES:
            raise AttributeError(f"there is no setting {name!r}; there are {', '.join(_CHOICES)}")
        # 1 == True, but True is what to write.
        if (type(value), value) not in [(type(choice), choice) for choice in _CHOICES[name]]:
            choices = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"config.{name} must be one of {choices}, got {value!r}")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _CHOICES)
        return f"<tapegrad.config {settings}>"


config = Config()
