"""Settings of the whole process: `tapegrad.config`."""

from __future__ import annotations

from typing import Any

_CHOICES: dict[str, tuple[Any, ...]] = {
    "debug": (False, True),
    "scalar_targets": ("sum", "warn", "raise"),
}


class Config:
    """Settings, assigned as attributes: `tg.config.scalar_targets = "raise"`.

    debug           whether operations on a GPU wait for it to check what only it sees, and raise:
                    labels that are no class, whose loss is NaN otherwise.
    scalar_targets  what a gradient of a target that is no scalar does: `"sum"` (as TensorFlow:
                    the gradient of the sum of its elements), `"warn"` or `"raise"`.

    Raises `AttributeError` for an unknown setting, `ValueError` for an unknown value.
    """

    debug: bool = False
    scalar_targets: str = "sum"

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CHOICES:
            raise AttributeError(f"there is no setting {name!r}; there are {', '.join(_CHOICES)}")
        if value not in _CHOICES[name]:
            choices = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"config.{name} must be one of {choices}, got {value!r}")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _CHOICES)
        return f"<tapegrad.config {settings}>"


config = Config()
