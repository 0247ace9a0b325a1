"""How a quantity grows: least-squares fits with their errors, in words. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress


@dataclass(frozen=True)
class Line:
    """y = intercept + slope · x. Errors are standard errors of the fit."""

    slope: float
    slope_error: float
    intercept: float
    r2: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    found = linregress(x, y)
    return Line(float(found.slope), float(found.stderr), float(found.intercept), float(found.rvalue) ** 2)


def fit_power(x: Sequence[float], y: Sequence[float]) -> Line:
    """log y = log c + exponent · log x: the slope is the exponent."""
    return fit_line(list(np.log(x)), list(np.log(y)))


def linear_law(x: Sequence[float], y: Sequence[float], unit: str, per: str) -> str:
    line = fit_line(x, y)
    return (
        f"{line.intercept:.3g} {unit} + ({line.slope:.3g} ± {line.slope_error:.1g}) {unit} a {per}, R² = {line.r2:.3f}"
    )


def power_law(x: Sequence[float], y: Sequence[float], symbol: str) -> str:
    line = fit_power(x, y)
    return f"∝ {symbol}^({line.slope:.2f} ± {line.slope_error:.2f}), R² = {line.r2:.3f}"
