"""Activation functions and their derivatives as vector instructions, without calls of a library.

The exponential function is 2^n times a polynomial on an interval of length log(2). The normal distribution function
needs ``erfc(z) = exp(-z^2) t g(t)`` with ``t = 2 / (2 + z)`` for z >= 0: g is smooth on (0, 1], and is replaced by its
Chebyshev interpolant, which is computed from SciPy's ``erfcx`` when it is first needed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache

from structlin.execution.compiled._emit import Emitter

__all__ = ["ACTIVATIONS", "activation"]

# Degrees of the polynomials: the least whose error is that of rounding in this type.
EXP_DEGREE = {"float": 7, "double": 13}
ERFC_DEGREE = {"float": 10, "double": 24}
SHIFT = {"float": 1.5 * 2**23, "double": 1.5 * 2**52}  # to add it rounds to whole numbers, and puts them into low bits
MANTISSA = {"float": 23, "double": 52}  # bits
RANGE = {"float": 87.0, "double": 708.0}  # of arguments of exp whose result is a normal number
# log(2) in two parts, of which the first has so few digits that its product with a whole number is exact.
LOG2_HIGH = {"float": 0.693359375, "double": 0.693147180369123816490}
TANH_GELU = math.sqrt(2 / math.pi), 0.044715  # Hendrycks and Gimpel, Gaussian Error Linear Units, 2016


@cache
def _erfc_polynomial(degree: int) -> tuple[float, ...]:
    """Return the coefficients of g in powers of ``2 t - 1``, the highest first."""
    import numpy as np
    from numpy.polynomial import chebyshev
    from scipy.special import erfcx

    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    t = (nodes + 1) / 2
    fitted = chebyshev.chebfit(nodes, erfcx(2 * (1 - t) / t) / t, degree)
    return tuple(float(c) for c in chebyshev.cheb2poly(fitted)[::-1])


class Vectors:
    """Arithmetic on vectors of the type that an emitter computes in."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter, self.code, self.kind, self.element = emitter, emitter.code, emitter.vector, emitter.element
        self.integer = f"<{emitter.lanes} x {'i32' if self.element == 'float' else 'i64'}>"

    def constant(self, number: float) -> str:
        """Return the same number in all lanes, as the bits of a double that the type holds exactly."""
        if self.element == "float":
            number = struct.unpack("f", struct.pack("f", number))[0]
        bits = struct.unpack("<Q", struct.pack("<d", number))[0]
        return f"splat ({self.element} 0x{bits:016X})"

    def _two(self, operation: str, a: str, b: str) -> str:
        return self.code.value(f"{operation} {self.kind} {a}, {b}")

    def add(self, a: str, b: str) -> str:
        return self._two("fadd", a, b)

    def subtract(self, a: str, b: str) -> str:
        return self._two("fsub", a, b)

    def multiply(self, a: str, b: str) -> str:
        return self._two("fmul", a, b)

    def divide(self, a: str, b: str) -> str:
        return self._two("fdiv", a, b)

    def fma(self, a: str, b: str, c: str) -> str:
        return self.emitter.multiply_add(a, b, c)

    def negative(self, a: str) -> str:
        return self.code.value(f"fneg {self.kind} {a}")

    def absolute(self, a: str) -> str:
        return self.code.call(self.kind, f"llvm.fabs.v{self.emitter.lanes}{self.emitter.short[self.element]}",
                              (self.kind, a))  # fmt: skip

    def select(self, above: str, a: str, b: str) -> str:
        """Return ``a`` where ``above`` is greater than zero, otherwise ``b``."""
        lanes = f"<{self.emitter.lanes} x i1>"
        mask = self.code.value(f"fcmp ogt {self.kind} {above}, zeroinitializer")
        return self.code.value(f"select {lanes} {mask}, {self.kind} {a}, {self.kind} {b}")

    def least(self, a: str, bound: float) -> str:
        """Return the smaller one of each number and a bound; a NaN stays."""
        lanes, most = f"<{self.emitter.lanes} x i1>", self.constant(bound)
        mask = self.code.value(f"fcmp ogt {self.kind} {a}, {most}")
        return self.code.value(f"select {lanes} {mask}, {self.kind} {most}, {self.kind} {a}")

    def polynomial(self, coefficients: tuple[float, ...], x: str) -> str:
        found = self.constant(coefficients[0])
        for c in coefficients[1:]:
            found = self.fma(found, x, self.constant(c))
        return found

    def exp_negative(self, a: str) -> str:
        """Return ``exp(-a)`` for a >= 0; below the least normal number about that number."""
        element, code = self.element, self.code
        x = self.negative(self.least(a, RANGE[element]))
        shifted = self.fma(x, self.constant(1 / math.log(2)), self.constant(SHIFT[element]))
        whole = self.negative(self.subtract(shifted, self.constant(SHIFT[element])))
        high = LOG2_HIGH[element]
        rest = self.fma(whole, self.constant(math.log(2) - high), self.fma(whole, self.constant(high), x))
        degree = EXP_DEGREE[element]
        found = self.polynomial(tuple(1 / math.factorial(k) for k in range(degree, -1, -1)), rest)
        bits, number = (code.value(f"bitcast {self.kind} {v} to {self.integer}") for v in (shifted, found))
        width = self.integer.split()[-1].rstrip(">")
        power = code.value(f"shl {self.integer} {bits}, splat ({width} {MANTISSA[element]})")
        total = code.value(f"add {self.integer} {number}, {power}")
        return code.value(f"bitcast {self.integer} {total} to {self.kind}")

    def sigmoid(self, x: str) -> tuple[str, str]:
        """Return ``1 / (1 + exp(-x))`` and its derivative, without overflow for any x."""
        one = self.constant(1.0)
        e = self.exp_negative(self.absolute(x))
        inverse = self.divide(one, self.add(one, e))
        small = self.multiply(e, inverse)  # of -|x|
        return self.select(x, inverse, small), self.multiply(inverse, small)

    def normal(self, x: str) -> tuple[str, str]:
        """Return the distribution function of the standard normal distribution, and its density."""
        one, two = self.constant(1.0), self.constant(2.0)
        e = self.exp_negative(self.multiply(self.multiply(x, x), self.constant(0.5)))
        t = self.divide(two, self.fma(self.absolute(x), self.constant(math.sqrt(0.5)), two))
        g = self.polynomial(_erfc_polynomial(ERFC_DEGREE[self.element]), self.fma(two, t, self.constant(-1.0)))
        tail = self.multiply(self.multiply(e, self.constant(0.5)), self.multiply(t, g))
        value = self.select(x, self.subtract(one, tail), tail)
        return value, self.multiply(e, self.constant(1 / math.sqrt(2 * math.pi)))


Both = tuple[str, str]


def _relu(v: Vectors, x: str) -> Both:
    zero = v.constant(0.0)
    # As torch does it, a NaN stays one: only what is below zero becomes zero.
    return v.select(v.negative(x), zero, x), v.select(x, v.constant(1.0), zero)


def _gelu(v: Vectors, x: str) -> Both:
    value, density = v.normal(x)
    return v.multiply(x, value), v.fma(x, density, value)


def _gelu_tanh(v: Vectors, x: str) -> Both:
    scale, cubic = TANH_GELU
    square = v.multiply(x, x)
    inner = v.multiply(x, v.fma(square, v.constant(2 * scale * cubic), v.constant(2 * scale)))
    value, slope = v.sigmoid(inner)  # (1 + tanh(a)) / 2 = sigmoid(2 a)
    by = v.fma(square, v.constant(6 * scale * cubic), v.constant(2 * scale))
    return v.multiply(x, value), v.fma(v.multiply(x, slope), by, value)


def _silu(v: Vectors, x: str) -> Both:
    value, slope = v.sigmoid(x)
    return v.multiply(x, value), v.fma(x, slope, value)


ACTIVATIONS: dict[str, Callable[[Vectors, str], Both]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "silu": _silu,
}


def activation(name: str, emitter: Emitter, x: str) -> Both:
    """Return the function of a vector and its derivative there. LLVM drops the instructions of what is not used."""
    return ACTIVATIONS[name](Vectors(emitter), x)
