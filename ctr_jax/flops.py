"""Counts of floating-point operations, read off the program a function traces to.

A product of matrices counts two operations per multiply-add, elementwise arithmetic one per element
it makes, a reduction one per element it reads, a scatter that adds one per element of its updates.
exp, log, tanh, the logistic function, erf, erfc and their like count apart, that is, nothing here.
So does XLA's own cost analysis, but for those that it writes out: 3 operations an element of the
logistic function, 62 of erfc, so that its count of a model with exact GELU (LONGER, Transformer) is
some 10 % higher. It reads the body of a loop once, too, where this counts it as often as it runs.
No compiler is asked, so the count is that of the mathematics as written, on every device alike.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable

import jax

_ARITHMETIC = {"add", "sub", "mul", "div", "max", "min", "neg", "abs", "floor", "ceil", "round",
               "sign", "rem", "square", "integer_pow", "rsqrt", "sqrt", "add_any", "select_n",
               "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor",
               "not", "clamp", "clz", "population_count", "shift_left", "shift_right_logical",
               "shift_right_arithmetic"}  # fmt: skip
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
               "reduce_xor", "argmax", "argmin", "cumsum", "cumprod", "cumlogsumexp", "cummax",
               "cummin"}  # fmt: skip
# One per element of the updates, the operand after the indices.
_SCATTERS = {"scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"}
# Much work that no rule here counts; nothing of ours has them, and nothing may count them as none.
_UNCOUNTED = {"conv_general_dilated", "ragged_dot_general", "reduce", "reduce_window",
              "reduce_window_sum", "reduce_window_max", "reduce_window_min", "fft", "cholesky",
              "triangular_solve", "lu", "geqrf", "householder_product", "eigh", "svd"}  # fmt: skip


def count(function: Callable, *args, depth: int = 2) -> dict[str, int]:
    """Operations of `function(*args)` by component.

    Args:
      args: arrays or jax.ShapeDtypeStructs.
      depth: how many of the module names that lead to an operation make its component's name.
    Returns:
      {"outer/inner": operations}, in the order met; "" is what lies in no module.
    Raises:
      ValueError: a loop whose number of rounds is not known before it runs; a convolution or
        another operation that is not counted.
    """
    closed = jax.make_jaxpr(function)(*args)
    totals: collections.Counter = collections.Counter()
    _walk(closed.jaxpr, "", 1, totals, depth)
    return dict(totals)


def _walk(jaxpr, scope, times, totals, depth) -> None:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = _join(scope, str(equation.source_info.name_stack))
        if name == "while":
            raise ValueError(f"a loop of unknown length in {inner or 'the function'}")
        if name in _UNCOUNTED:
            raise ValueError(f"{name} in {inner or 'the function'}: not counted")
        rounds = times
        if name == "scan":
            rounds = times * params["length"]
        elif name == "pallas_call":
            rounds = times * math.prod(params["grid_mapping"].grid)
        # What a scatter does with an update and its target is a body too, of a single element.
        scatter = name in _SCATTERS
        bodies = [] if scatter else [b for value in params.values() for b in _bodies(value)]
        if name == "cond":
            branches = [collections.Counter() for _ in bodies]
            for body, branch in zip(bodies, branches, strict=True):
                _walk(body, inner, rounds, branch, depth)
            totals.update(max(branches, key=lambda b: b.total()))
        elif bodies:
            for body in bodies:
                _walk(body, inner, rounds, totals, depth)
        elif operations := _operations(equation):
            totals["/".join(inner.split("/")[:depth])] += rounds * operations


def _operations(equation) -> int:
    name = equation.primitive.name
    size = lambda variable: math.prod(variable.aval.shape)  # noqa: E731
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * size(equation.outvars[0]) * math.prod(left[i] for i in contracted)
    if name in _SCATTERS:
        return size(equation.invars[2])
    if name in _ARITHMETIC:
        return size(equation.outvars[0])
    return size(equation.invars[0]) if name in _REDUCTIONS else 0


def _bodies(value):
    """The jaxprs in an equation's parameter."""
    for item in value if isinstance(value, tuple | list) else (value,):
        body = getattr(item, "jaxpr", item)
        if hasattr(body, "eqns"):
            yield body


def _join(scope: str, stack: str) -> str:
    """Module names only: transformations ("jvp(x)"), einsum's formulas and methods ("a.history", or
    a module's call of its own) name no component."""
    parts = scope.split("/") if scope else []
    for part in stack.split("/"):
        name, *method = part.split(".")
        if name and "(" not in part and "->" not in part and not (method and [name] == parts[-1:]):
            parts.append(name)
    return "/".join(parts)
