"""Random small programs that use kernels in every way that jlora has a rule for.

A program is a list of steps; each takes activations `[b, t, d]` to `[b, t, o]` with
kernels of its own. It is plain data, so that a program that fails can be written down:
`Program((("dense", 4, 0), ("scan", 4, 1)))`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

B, T, H, V = 2, 3, 2, 5  # batch, tokens, heads, vocabulary; few sizes compile little


def sliced(w, o, v):
    return lax.slice(w, (0, v * o), (w.shape[0], (v + 1) * o))


def fori(w, h):
    return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ w) + x, h)


def looped(w, h):
    done = lambda carry: carry[0] < 2
    return lax.while_loop(done, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, h))[1]


def scanned(w, h):
    return lax.scan(lambda x, one: (jnp.tanh(x @ one) + x, None), h, w)[0]


def branched(w, u, h):
    to = lambda kernel: lambda x: x @ kernel
    return lax.cond(jnp.sum(h) > 0, to(w), to(u), h)


def switched(w, h, v):
    return lax.switch(v, [lambda x: x @ w, lambda x: (2 * x) @ w], h)


def convolved(w, h):
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(h, w, (1,), "SAME", dimension_numbers=layout)


@jax.custom_vjp
def halved_backwards(x):
    return jnp.sin(x)


halved_backwards.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (0.5 * g * jnp.cos(x),))


def tied(table, h):
    return jax.nn.softmax(h @ table.T) @ table


def heads(h, width):
    return h.reshape(*h.shape[:2], H, width // H)


def flat(x):
    return x.reshape(*x.shape[:2], -1)


# name: shapes of the kernels for d in and o out, and what is done with them. The last
# argument is a small number that says which of several ways.
STEPS = {
    "dense": (lambda d, o: [(d, o)], lambda h, w, v: h @ w),
    "transposed": (lambda d, o: [(o, d)], lambda h, w, v: h @ w.T),
    "second": (lambda d, o: [(o, d)], lambda h, w, v: jnp.einsum("btd,od->bto", h, w)),
    "left": (
        lambda d, o: [(d, o)],
        lambda h, w, v: jnp.einsum("do,btd->obt", w, h).transpose(1, 2, 0),
    ),
    "heads": (
        lambda d, o: [(d, H, o // H)],
        lambda h, w, v: flat(jnp.einsum("btd,dhk->bthk", h, w)),
    ),
    "heads out": (
        lambda d, o: [(H, d // H, o)],
        lambda h, w, v: jnp.einsum("bthk,hko->bto", heads(h, h.shape[-1]), w),
    ),
    "reshaped": (
        lambda d, o: [(d, o)],
        lambda h, w, v: flat(jnp.einsum("btd,dhk->bthk", h, w.reshape(w.shape[0], H, -1))),
    ),
    "fused": (
        lambda d, o: [(d, 3 * o)],
        lambda h, w, v: h @ sliced(w, w.shape[1] // 3, v % 3),
    ),
    "fused, split": (
        lambda d, o: [(d, 2 * o)],
        lambda h, w, v: jnp.multiply(*jnp.split(h @ w, 2, -1)),
    ),
    "dynamic slice": (
        lambda d, o: [(d, 2 * o)],
        lambda h, w, v: h @ lax.dynamic_slice_in_dim(w, v, w.shape[1] // 2, 1),
    ),
    "rows": (
        lambda d, o: [(2 * d, o)],
        lambda h, w, v: h @ w[: h.shape[-1]] + jnp.tanh(h) @ w[h.shape[-1] :],
    ),
    "joined": (
        lambda d, o: [(d, o - 2), (d, 2)],
        lambda h, w, u, v: h @ jnp.concatenate([w, u], 1),
    ),
    "stacked": (
        lambda d, o: [(d, o), (d, o)],
        lambda h, w, u, v: jnp.einsum("btd,edo->bto", h, jnp.stack([w, u])),
    ),
    "picked": (
        lambda d, o: [(d, 2 * o)],
        lambda h, w, v: h @ w[:, v % 2 :: 2],
    ),
    "reversed": (lambda d, o: [(d, o)], lambda h, w, v: h @ w[::-1]),
    "padded": (
        lambda d, o: [(d, o - 1)],
        lambda h, w, v: h @ jnp.pad(w, ((0, 0), (0, 1))),
    ),
    "broadcast": (
        lambda d, o: [(d, o)],
        lambda h, w, v: jnp.einsum("btd,bdo->bto", h, jnp.broadcast_to(w, (B, *w.shape))),
    ),
    "scaled": (lambda d, o: [(d, o)], lambda h, w, v: h @ (w * (v - 0.5))),
    "columns scaled": (
        lambda d, o: [(d, o)],
        lambda h, w, v: h @ (w * jnp.arange(1.0, w.shape[1] + 1, dtype=w.dtype)),
    ),
    "added": (lambda d, o: [(d, o), (d, o)], lambda h, w, u, v: h @ (w - u)),
    "cast": (
        lambda d, o: [(d, o)],
        lambda h, w, v: (h.astype(jnp.float32) @ w.astype(jnp.float32)).astype(h.dtype),
    ),
    "summed": (lambda d, o: [(d, o)], lambda h, w, v: h @ w + w.sum(0)),
    "embedded": (
        lambda d, o: [(V, d), (d, o)],
        lambda h, table, w, v: (h + table[ids(h, v)]) @ w,
    ),
    "looked up": (
        lambda d, o: [(V, o)],
        lambda h, table, v: jnp.take(table, ids(h, v), axis=0) * h.mean(-1, keepdims=True),
    ),
    "tied": (lambda d, o: [(V, d), (d, o)], lambda h, table, w, v: tied(table, h) @ w),
    "scan": (
        lambda d, o: [(2, d, d), (d, o)],
        lambda h, w, u, v: scanned(w, h) @ u,
    ),
    "fori": (lambda d, o: [(d, d), (d, o)], lambda h, w, u, v: fori(w, h) @ u),
    "while": (lambda d, o: [(d, d), (d, o)], lambda h, w, u, v: looped(w, h) @ u),
    "cond": (lambda d, o: [(d, o), (d, o)], lambda h, w, u, v: branched(w, u, h)),
    "switch": (lambda d, o: [(d, o)], lambda h, w, v: switched(w, h, v % 2)),
    "conv": (lambda d, o: [(3, d, o)], lambda h, w, v: convolved(w, h)),
    "remat": (
        lambda d, o: [(d, o)],
        lambda h, w, v: jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, w),
    ),
    "custom vjp": (lambda d, o: [(d, o)], lambda h, w, v: halved_backwards(h @ w)),
    "custom jvp": (lambda d, o: [(d, o)], lambda h, w, v: jax.nn.silu(h @ w)),
    "jit": (lambda d, o: [(d, o)], lambda h, w, v: jax.jit(jnp.matmul)(h, w)),
    "vmap": (lambda d, o: [(d, o)], lambda h, w, v: jax.vmap(lambda x: x @ w)(h)),
    "experts": (lambda d, o: [(B, d, o)], lambda h, w, v: jax.vmap(jnp.matmul)(h, w)),
    "norm": (
        lambda d, o: [(d, o)],
        lambda h, w, v: (h - h.mean(-1, keepdims=True)) @ w / (1 + jnp.var(h)),
    ),
}  # fmt: skip
NO_GRADIENT = {"while"}
NO_TANGENT = {"custom vjp"}


def ids(h, v):
    return (jnp.arange(B * T).reshape(B, T) * (v + 1)) % V


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps, each a name, how wide its result is, and which of several ways."""

    steps: tuple[tuple[str, int, int], ...]
    width: int = 4

    def kernels(self, rng, dtype):
        """Kernels by step, drawn anew."""
        params, d = {}, self.width
        for n, (name, o, _) in enumerate(self.steps):
            shapes = STEPS[name][0](d, o)
            params[f"step{n}"] = {
                f"kernel{k}": jnp.asarray(rng.normal(0, 0.6, shape), dtype)
                for k, shape in enumerate(shapes)
            }
            d = o
        return params

    def __call__(self, params, x):
        for n, (name, _, v) in enumerate(self.steps):
            own = params[f"step{n}"]
            x = STEPS[name][1](x, *(own[k] for k in sorted(own)), v)
            x = x if n == len(self.steps) - 1 else jnp.tanh(x)
        return x

    @functools.cached_property
    def names(self):
        return {name for name, _, _ in self.steps}
