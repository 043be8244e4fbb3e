"""Checks of numbers and points, for modules that know nothing of reinforcement learning.

The arguments of the algorithms are checked in :mod:`sb3_rfm.arguments`.
"""

import math
import numbers
from typing import Any, TypeGuard

import torch
from torch import Tensor


def check_integer(name: str, value: object, least: int) -> None:
    """Check that an argument is an integer ``>= least``.

    :raises ValueError: if it is not
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a finite real number."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def check_points(x_t: Tensor, t: Tensor, guess: Tensor | None) -> None:
    """Check points of a path.

    :param x_t: Points, (B, D)
    :param t: Their times, (B,)
    :param guess: A guess of the data mean there, (B, D)
    :raises ValueError: for what is no finite tensor of these shapes, of one dtype and on one device, and for times outside
        (0, 1)
    """
    inputs: dict[str, Any] = {"x_t": x_t, "t": t} | ({} if guess is None else {"guess": guess})
    for name, value in inputs.items():
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            got = f"one of {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} must be a tensor of floating-point numbers, got {got}.")
    if x_t.dim() != 2 or x_t.shape[1] == 0:
        raise ValueError(f"x_t must have shape (B, D), got {tuple(x_t.shape)}.")
    if t.shape != x_t.shape[:1]:
        raise ValueError(f"t must have shape (B,) = ({x_t.shape[0]},) to match x_t, got {tuple(t.shape)}.")
    if guess is not None and guess.shape != x_t.shape:
        raise ValueError(f"guess must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(guess.shape)}.")
    for name, value in inputs.items():
        if value.device != x_t.device:
            raise ValueError(f"{name} must be on the device of x_t, {x_t.device}, got {value.device}.")
    outside = ~((t > 0) & (t < 1))
    if outside.any():
        raise ValueError(
            "t must lie strictly between 0 and 1, as at the ends one of the two posteriors is a point; "
            f"got {t[outside][:8].tolist()}."
        )
    for name, value in inputs.items():
        if value.dtype != x_t.dtype:
            raise ValueError(f"{name} must have the dtype of x_t, {x_t.dtype}, got {value.dtype}.")
        rows = sorted({row[0] for row in (~torch.isfinite(value)).nonzero().tolist()})
        if rows:
            raise ValueError(f"{name} must be finite, but is not in rows {rows[:8]}.")
