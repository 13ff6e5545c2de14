"""How kernels are compiled for the CPU, and an exponential that becomes vector instructions; imports numba."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from numba.extending import intrinsic, overload

P = ParamSpec("P")
R = TypeVar("R")

# Infinities stay what they are, sums may be taken in another order: always the same one on a machine.
_SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call with numba, without the GIL; kept on disk where there is a place for it."""
    try:
        kernel: Callable[P, R] = numba.njit(cache=True, **_SETTINGS)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        kernel = numba.njit(**_SETTINGS)(function)
    return kernel


def exp_minus_half(x: Any) -> Any:
    """exp(-x / 2) for x ≥ 0, to a few ulp; at most 2^-126 where float32 underflows. For compiled code only."""
    raise TypeError("exp_minus_half is for compiled code")


def _type_power_of_two(typing_context: Any, n: Any) -> Any:
    """2^n of a float32 with a whole value in [-126, 127], by its exponent bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = numba.types.int32
        whole = builder.fptosi(arguments[0], context.get_value_type(integer))
        exponent = builder.add(whole, context.get_constant(integer, 127))
        bits = builder.shl(exponent, context.get_constant(integer, 23))
        return builder.bitcast(bits, arguments[0].type)

    return n(n), code


_power_of_two: Any = intrinsic(_type_power_of_two)

_LOG2 = np.float32(-0.5 / math.log(2))
_LEAST, _HALF, _C0 = np.float32(-126), np.float32(0.5), np.float32(1)
# 2^f on [-½, ½] interpolated at Chebyshev points, the constant term rounded to 1.
_, _C1, _C2, _C3, _C4, _C5, _C6 = (
    np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef.astype(np.float32)
)


@overload(exp_minus_half)
def _exp_minus_half(x: Any) -> Callable[[Any], Any]:
    def single(x: Any) -> Any:
        y = x * _LOG2
        y = max(_LEAST, y)
        n = np.floor(y + _HALF)
        f = y - n
        series = ((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1
        return (series * f + _C0) * _power_of_two(n)

    def double(x: Any) -> Any:
        return math.exp(-0.5 * x)

    return single if x == numba.types.float32 else double
