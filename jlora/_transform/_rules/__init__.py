"""What each primitive does with a low-rank operand: one table, one entry a primitive.

A rule is called as `rule(run, eqn, args)` when at least one operand is `LowRank`, and
returns the list of results, or `NotImplemented` to decline. Results may be low-rank
again (a transposed kernel) or dense (a product). Only the replay loop decides what
happens to what no rule takes.
"""

from jlora._transform._rules import (
    calls,
    control,
    conv,
    custom,
    elementwise,
    experts,
    gather,
    join,
    layout,
    matmul,
    products,
    scatter,
    sharding,
    slices,
    sums,
)
from jlora._transform._rules._table import RULES, TAKES_BANK, Run

__all__ = [
    "RULES",
    "TAKES_BANK",
    "Run",
    "calls",
    "control",
    "conv",
    "custom",
    "elementwise",
    "experts",
    "gather",
    "join",
    "layout",
    "matmul",
    "products",
    "scatter",
    "sharding",
    "slices",
    "sums",
]
