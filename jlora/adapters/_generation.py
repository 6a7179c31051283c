"""Generation with an adapter for each prompt, whatever beams go on from it.

    params = jlora.with_ids(bank, ids)
    tokens = jlora.models.generate(model, params, prompts, transform=jlora.mixed_steps)

The two functions that stand for a model, `encode` and `decode`, each see one prompt
with its beams. Of the cache, `"beams"` has the rows of all prompts, as the search wants
them; of the rest, what differs from prompt to prompt is kept by prompt, and what does
not, the number of the step say, once.

The invocation of an activated adapter (aLoRA) is looked for in the prompt. From there
on the adapter acts, on all new tokens too; a prompt without one the base answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Jaxpr
from jlora._errors import ShapeError, StructureError
from jlora._kernel.axes import Array
from jlora._transform.lora import transformed
from jlora.adapters._activated import activated_ids
from jlora.adapters._bank import invocations
from jlora.adapters._mixed import (
    Mixture,
    by_example,
    check_by_token,
    checked,
    choose,
    together,
)
from jlora.adapters._mixed import without_nodes as results

ACTING = "acting"  # in the cache: who makes each prompt's new tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByPrompt:
    """An array of a cache that differs from prompt to prompt, `[B, ...]`."""

    value: Array


def mixed_steps(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a model's function for generation use an adapter for each prompt.

    It is the `transform` of `jlora.models.generate`, whose `params` is then a `Mixture`
    of one number for each prompt. Beams and samples have that of their prompt. Tokens
    are those that `transform=jlora.lora` gives with each prompt's own adapter.

    Activated adapters act from the last occurrence of their invocation in the prompt
    on, on what is generated too. That is for models without an encoder.

    Args:
      fn: `encode(params, input_ids, attention_mask, *, length, beams)` or
        `decode(params, tokens, cache)`, as `jlora.models.generate` has them.

    Raises:
      StructureError: parameters that are no mixture, when called; or activated adapters
        on a model with an encoder.
      ShapeError: not one number for each prompt.
    """
    left = getattr(fn, "keywords", {}).get("left", False)  # as decoders read prompts

    def run(mixture: Mixture, first: Array, second: Any, **kwargs: Any) -> Any:
        bank, ids = checked(mixture)
        if ids.ndim != 1:
            raise ShapeError(
                f"ids {ids.shape}: generation takes one number for each prompt, [B]."
            )
        activated = any(invocations(bank))
        is_cache = isinstance(second, Mapping) and "beams" in second
        by_token = activated and not is_cache
        if by_token:
            check_by_token(bank)
            _check_left(left)
        lorafied = transformed(fn, "error", True, [1, 1] if by_token else [])

        def one(number: Array, which: Array, *args: Any) -> Any:
            return results(lorafied(choose(bank, which, number), *args, **kwargs))

        if not activated:
            return (_decode if is_cache else _encode)(one, ids, first, second)
        if is_cache:
            cache = {name: x for name, x in second.items() if name != ACTING}
            acting = second[ACTING].value
            logits, cache = _decode(one, acting, first, cache)
        else:
            real = jnp.where(jnp.asarray(second).astype(bool), first, -1)  # no padding
            which = activated_ids(bank, ids, real)
            logits, cache = _encode(one, which, first, second)
            acting = which[:, -1]
        return logits, {**cache, ACTING: ByPrompt(acting)}

    return run


def _check_left(left: bool) -> None:
    if not left:
        raise StructureError(
            "some of the bank's adapters act from their invocation tokens on (aLoRA). "
            "That is defined for models without an encoder, and generation with "
            "functions of your own cannot follow the tokens.\nTake a decoder of "
            "jlora.models and its jlora.models.generate."
        )


def _encode(one: Callable[..., Any], ids: Array, inputs: Array, mask: Any) -> Any:
    """First tokens `[B*K]` and the cache, of prompts `[B, S]`; ids too, or `[B]`."""
    size = ids.shape[0]
    args = [jnp.arange(size), ids, *by_example((inputs, mask), size)]
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), args)
    jaxpr, shapes = jax.make_jaxpr(one, return_shape=True)(*example)
    differs = jax.tree.unflatten(jax.tree.structure(shapes), _dependent(jaxpr))

    def form(_: Any, cache: Any) -> Any:
        every = jax.tree.map(lambda _: True, cache["beams"])
        return True, {**cache, "beams": every}

    axes = jax.tree.map(lambda flag: 0 if flag else None, form(*differs))
    run = _compat.function_of(jaxpr, jax.tree.structure(shapes))
    tokens, cache = jax.vmap(run, out_axes=axes)(*jax.tree.leaves(args))
    return together(tokens), _joined(cache, differs[1])


def _decode(one: Callable[..., Any], ids: Array, tokens: Array, cache: Any) -> Any:
    """Logits `[B*K, V]` and the cache, of tokens `[B*K]`."""
    rest = {name: x for name, x in cache.items() if name != "beams"}
    differs = jax.tree.map(_is_by_prompt, rest, is_leaf=_is_by_prompt)
    values = jax.tree.map(_value, rest, is_leaf=_is_by_prompt)
    axes = jax.tree.map(lambda flag: 0 if flag else None, differs)
    tokens, beams = by_example((tokens, cache["beams"]), ids.size)

    def step(number: Array, which: Array, tokens: Array, beams: Any, rest: Any) -> Any:
        return one(number, which, tokens, {**rest, "beams": beams})

    run = jax.vmap(step, in_axes=(0, 0, 0, 0, axes), out_axes=(0, {**axes, "beams": 0}))
    logits, cache = run(jnp.arange(ids.size), ids, tokens, beams, values)
    return together(logits), _joined(cache, differs)


def _joined(cache: Any, differs: Any) -> Any:
    """The cache as the search has it: beams of all prompts, the rest marked."""
    names = [name for name in cache if name != "beams"]

    def mark(flag: bool, x: Array) -> Any:
        return ByPrompt(x) if flag else x

    rest = {name: jax.tree.map(mark, differs[name], cache[name]) for name in names}
    return {**rest, "beams": jax.tree.map(together, cache["beams"])}


def _is_by_prompt(x: Any) -> bool:
    return isinstance(x, ByPrompt)


def _value(x: Any) -> Any:
    return x.value if _is_by_prompt(x) else x


def _dependent(jaxpr: Jaxpr) -> list[bool]:
    """Which results may depend on an input; what a program closes over is none."""
    bare, _ = _compat.open_jaxpr(jaxpr)
    moving = {*bare.invars}

    def moves(atom: Any) -> bool:
        return not isinstance(atom, _compat.Literal) and atom in moving

    for eqn in bare.eqns:
        if any(map(moves, eqn.invars)):
            moving.update(eqn.outvars)
    return [moves(atom) for atom in bare.outvars]
