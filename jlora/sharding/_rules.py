"""Rules from a leaf's path to where it lies: one matcher for all layouts."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._errors import OptionError, ShapeError, StructureError
from jlora._kernel.specs import names_of
from jlora._paths import name_of
from jlora._text import listed
from jlora.sharding._logical import LAYOUTS, LOGICAL, TABLE
from jlora.sharding._mesh import AXES, describe

Rule = tuple[str, PartitionSpec]
Uneven = Literal["error", "replicate"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where the leaves of a tree of parameters lie; `rules` makes them.

    Attributes:
      name: the layout's, for reports.
      own: rules of the caller; they come first.
      table: the layout's rules.
      uneven: what an axis is that the mesh does not divide: an `"error"`, or whole.
      rank: over which axes of the mesh the rank of adapters is cut.
    """

    name: str
    own: tuple[Rule, ...]
    table: tuple[Rule, ...]
    uneven: Uneven = "error"
    rank: tuple[str, ...] = ()

    def spec(self, path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """The partition spec of a leaf, one entry an axis.

        Args:
          path: the leaf's, parts joined by `/`.
          shape: the leaf's.
          mesh: its axes that a rule does not name, and axes of a rule that it does not
            have, cut nothing.

        Raises:
          StructureError: no rule matches a leaf of two axes or more.
          ShapeError: the rule has more axes than the leaf, or the mesh does not divide
            one of them.
        """
        if len(shape) < 2:
            return PartitionSpec(*(None for _ in shape))
        rule = self.match(path)
        if rule is None:
            raise no_rule({path: shape}, self)
        return self._fitted(path, shape, rule, mesh)

    def match(self, path: str) -> Rule | None:
        """The first rule whose regular expression is found in the path."""
        for rule in (*self.own, *self.table):
            if _compiled(rule[0]).search(path):
                return rule
        return None

    def on(self, mesh: Mesh) -> Callable[[str, Sequence[int]], NamedSharding]:
        """A function of a leaf's path and shape, as `jlora.models.load` takes it."""

        def place(path: str, shape: Sequence[int]) -> NamedSharding:
            return NamedSharding(mesh, self.spec(path, shape, mesh))

        return place

    def shardings(self, tree: Any, mesh: Mesh) -> Any:
        """The shardings of a tree's leaves, in its structure.

        Args:
          tree: of arrays or shapes: plain, lorafied or quantised parameters, a half of
            a split tree, or a training state. Adapters lie as their kernels do, and the
            rank is whole unless the rules say more; what else a state holds is on every
            device. Leaves that are no arrays are None.
          mesh: the mesh.

        Raises:
          StructureError: no rule matches some leaf of two axes or more.
          ShapeError: as of `spec`.

        Warns:
          JloraWarning: a rule of your own that matches nothing.
        """
        from jlora.sharding._trees import shardings_of

        return shardings_of(self, tree, mesh)

    def rank_part(self, path: str, size: int, mesh: Mesh) -> Any:
        """The entry of a partition spec for the rank of adapters on a kernel.

        Raises:
          ShapeError: the mesh does not divide it.
        """
        part = _on(mesh, self.rank)
        ways = ways_of(mesh, part)
        if size % ways == 0:
            return part
        if self.uneven == "replicate":
            return None
        over = " and ".join(f"{name}={mesh.shape[name]}" for name in names_of(part))
        raise ShapeError(
            f"{path}: a rank of {size} is to be cut over {over}, which does not divide "
            f"it.\nTake a rank that is a multiple of {ways}, rules without rank=, or "
            "leave such axes whole, uneven='replicate'."
        )

    def _fitted(
        self, path: str, shape: Sequence[int], rule: Rule, mesh: Mesh
    ) -> PartitionSpec:
        pattern, given = rule[0], tuple(rule[1])
        if len(given) > len(shape):
            raise ShapeError(
                f"{path} {list(shape)}: the rule {pattern!r} has {len(given)} axes, "
                f"{rule[1]}, and the leaf has {len(shape)}.\nGive this path a rule of "
                "its own, before that one."
            )
        parts = [None] * (len(shape) - len(given)) + [_on(mesh, part) for part in given]
        for axis, (size, part) in enumerate(zip(shape, parts, strict=True)):
            ways = ways_of(mesh, part)
            if size % ways == 0:
                continue
            if self.uneven == "error":
                raise uneven_axis(path, shape, axis, part, mesh)
            parts[axis] = None
        return PartitionSpec(*parts)


def rules(
    layout: str | Mapping[str, Any] | Iterable[Rule] | Rules = "fsdp+tensor",
    *,
    own: Iterable[Rule] = (),
    uneven: Uneven = "error",
    rank: str | Sequence[str] | None = None,
) -> Rules:
    """Rules for the parameters of every model here, or rules of your own.

    Args:
      layout: the name of one:

        - `"fsdp"` cuts each kernel along the residual stream over `fsdp`: devices
          hold a part, and gather a kernel when they need it (ZeRO-3);
        - `"tensor"` cuts heads, hidden units and the vocabulary over `tensor`: devices
          compute a part, and sum activations (Megatron);
        - `"fsdp+tensor"` does both;
        - `"replicated"` cuts nothing.

        Axes that the mesh lacks are left out, so `"fsdp+tensor"` serves every mesh.
        Or a mapping from what axes are (`embed`, `heads`, `qkv`, `mlp`, `gate_up`,
        `vocab`, `expert`) to the mesh's axes. Or pairs `(regular expression,
        PartitionSpec)` alone: the first that is found in a leaf's path counts.
      own: such pairs that come before the layout's. A spec of fewer axes than the leaf
        has is that of its last ones, so one rule serves layers that are scanned,
        `[L, i, o]`, and those that are not.
      uneven: what to do with an axis that the mesh does not divide: an `"error"`, or
        `"replicate"`, not to cut it.
      rank: an axis of the mesh, or several, over which to cut the rank of adapters,
        which is whole otherwise: for ranks in the hundreds. Where a factor's other axis
        lies over the same axis of the mesh, as B's outputs do under `tensor`, the rank
        of that factor stays whole.

    Returns:
      The rules; see `Rules.on`, `Rules.shardings` and `place`.

    Raises:
      OptionError: there is no such layout, no such axis, a pattern that is no regular
        expression, or one mesh axis twice in a rule.

    Source: ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054; Shoeybi et al. 2019,
    arXiv:1909.08053.

    >>> mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
    >>> tuple(rules().spec("layers/3/mlp/up_proj/kernel", (64, 256), mesh))
    ('fsdp', 'tensor')
    """
    if uneven not in ("error", "replicate"):
        raise OptionError(f"uneven={uneven!r}: take 'error' or 'replicate'.")
    first = _checked(own)
    over = (rank,) if isinstance(rank, str) else tuple(rank or ())
    if not all(isinstance(name, str) for name in over) or len({*over}) < len(over):
        raise OptionError(
            f"rank={rank!r}: expected the name of an axis of the mesh, or several."
        )
    made = _rules_of(layout, first, uneven)
    return dataclasses.replace(made, rank=over) if over else made


def _rules_of(layout: Any, first: tuple[Rule, ...], uneven: Uneven) -> Rules:
    if isinstance(layout, Rules):
        both = (*first, *layout.own)
        return dataclasses.replace(layout, own=both, uneven=uneven)
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            near = difflib.get_close_matches(layout, LAYOUTS, 1)
            hint = (
                f"Did you mean {near[0]!r}?" if near else "Or pass rules of your own."
            )
            raise OptionError(
                f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}."
                f"\n{hint}"
            )
        return Rules(layout, first, _table(LAYOUTS[layout]), uneven)
    if isinstance(layout, Mapping):
        if unknown := [name for name in layout if name not in LOGICAL]:
            raise OptionError(
                f"a layout of {unknown[0]!r}: there is no such axis of parameters; "
                f"there are {', '.join(LOGICAL)}."
            )
        return Rules("own", first, _checked(_table(layout)), uneven)
    return Rules("own", (*first, *_checked(layout)), (), uneven)


def _table(axes: Mapping[str, Any]) -> tuple[Rule, ...]:
    def spec(names: Iterable[str | None]) -> PartitionSpec:
        return PartitionSpec(*(axes.get(n) if n is not None else None for n in names))

    return tuple((pattern, spec(names)) for pattern, names in TABLE)


def _checked(given: Iterable[Any]) -> tuple[Rule, ...]:
    made = []
    for rule in given:
        is_pair = isinstance(rule, Sequence) and not isinstance(rule, str)
        if not is_pair or len(rule) != 2 or not isinstance(rule[1], PartitionSpec):
            raise OptionError(
                f"{rule!r} is no rule.\nA rule is a pair of a regular expression and a "
                "jax.sharding.PartitionSpec: ('q_proj/kernel$', PartitionSpec('fsdp', "
                "'tensor'))."
            )
        pattern, spec = rule
        _compiled(pattern)
        named = [name for part in spec for name in names_of(part)]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise OptionError(
                f"the rule {pattern!r}, {spec}, cuts two axes over {twice!r}.\nOne "
                "axis of the mesh cuts one axis of a leaf."
            )
        made.append((pattern, spec))
    return tuple(made)


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise OptionError(
            f"the rule {pattern!r} is no regular expression: {error}."
        ) from None


def _on(mesh: Mesh, part: Any) -> Any:
    """An entry of a spec without the axes that the mesh lacks."""
    names = names_of(part)
    if unknown := [n for n in names if n not in mesh.axis_names and n not in AXES]:
        raise OptionError(
            f"a rule cuts over {unknown[0]!r}, and the mesh has the axes "
            f"{', '.join(map(str, mesh.axis_names))}.\nRename one of them."
        )
    kept = tuple(name for name in names if name in mesh.axis_names)
    return kept if len(kept) > 1 else kept[0] if kept else None


def ways_of(mesh: Mesh, part: Any) -> int:
    """Into how many parts an entry of a spec cuts an axis."""
    return math.prod(mesh.shape[name] for name in names_of(part))


def uneven_axis(
    path: str, shape: Sequence[int], axis: int, part: Any, mesh: Mesh, why: str = ""
) -> ShapeError:
    """The error of an axis that the mesh does not divide."""
    over = " and ".join(f"{name}={mesh.shape[name]}" for name in names_of(part))
    return ShapeError(
        f"{path} {list(shape)}: axis {axis} of {shape[axis]} is to be cut over {over}, "
        f"which does not divide it{why}.\nTake a mesh that does (this one is "
        f"{describe(mesh)}), a rule of your own for this path, own=[...], or leave "
        "such axes whole, uneven='replicate'."
    )


def no_rule(unmatched: Mapping[str, Sequence[int]], rules: Rules) -> StructureError:
    """The error of leaves that no rule matches."""
    lines = [f"{path} {list(shape)}" for path, shape in unmatched.items()]
    example = re.escape(name_of(next(iter(unmatched)))) + "$"
    return StructureError(
        f"no rule of the layout {rules.name!r} matches:\n  {listed(lines)}\nSay where "
        f"they lie, own=[({example!r}, PartitionSpec('fsdp', 'tensor'))] say; "
        "PartitionSpec() is on every device."
    )
