"""Every variant on every kind of kernel: works, or the error that it gives.

`python tests/variant_table.py` writes docs/reference/variant_table.md, and
`test_variant_table.py` holds the page and the code together. A cell works if value and gradient are those of
the function of the merged kernel. Cells are traced one by one, for their errors, and
those of one row compiled as one program.
"""

from __future__ import annotations

if __name__ == "__main__":
    import conftest  # noqa: F401, four devices, and programs that compile quickly

import functools
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "reference" / "variant_table.md"
T = jlora.Target
_CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def _scan(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def _tied(w, x):
    return jnp.tanh(w[x]) @ w.T


X, IMAGE, IDS = (3, 8), (2, 5, 5, 4), (3,)
# A kernel's shape, its leaf's name, its target, its input's shape, its function.
KINDS = {
    "linear": ((8, 8), "up/kernel", T(), X, lambda w, x: x @ w),
    "several axes": (
        (8, 2, 8), "heads/kernel", T(in_axes=(0,), out_axes=(1, 2)), X,
        lambda w, x: jnp.einsum("bi,ihk->bhk", x, w),
    ),
    "fused slice": ((8, 24), "c_attn/kernel", T(), X, lambda w, x: x @ w),
    "stacked": (
        (2, 8, 8), "layers/kernel", T(in_axes=(1,), out_axes=(2,), batch_axes=(0,)), X,
        _scan,
    ),
    "experts": (
        (2, 8, 8), "experts/up", T(in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
        (2, 3, 8), lambda w, x: jnp.einsum("ebi,eio->ebo", x, w),
    ),
    "convolution": (
        (3, 3, 4, 8), "conv/kernel", T(in_axes=(0, 1, 2), out_axes=(3,)), IMAGE,
        lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", **_CONV),
    ),
    "grouped convolution": (
        (3, 3, 2, 8), "group/kernel", T(in_axes=(0, 1, 2), out_axes=(3,)), IMAGE,
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", feature_group_count=2, **_CONV
        ),
    ),
    "embedding": ((16, 8), "embed/embedding", T(), IDS, lambda w, x: w[x]),
    "tied": ((16, 8), "tied/embedding", T(), IDS, _tied),
}  # fmt: skip
VARIANTS = {
    "LoRA": {}, "rsLoRA": {"rslora": True, "alpha": 3.0}, "DoRA": {"dora": True},
    "dropout": {"dropout": 1e-6}, "bias": {"lora_bias": True}, "PiSSA": {"init": "pissa"},
    "VeRA": {"variant": "vera"}, "LoHa": {"variant": "loha"},
    "LoKr": {"variant": jlora.LoKr(factor=2)}, "AdaLoRA": {"variant": "adalora"},
}  # fmt: skip
QUANTISED = ("int8", "nf4")
BASES = (*QUANTISED, "sharded")
ROWS = [
    *((variant, "plain") for variant in VARIANTS),
    *(("LoRA", base) for base in BASES),
]


def cell(variant, base, kind):
    """The kernel's tree with an adapter, of random numbers."""
    shape, path, target, _, _ = KINDS[kind]
    module, name = path.split("/")
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)
    if base == "sharded":
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = P(*(None for _ in shape[:-1]), "x")
        kernel = jax.device_put(kernel, NamedSharding(mesh, spec))
    own = {module: {name: kernel}}
    if variant == "bias":
        lead = shape[: len(target.batch_axes)]
        outs = [shape[d] for d in target.out_axes or (len(shape) - 1,)]
        own[module]["bias"] = jnp.ones((*lead, *outs))
    entry = "value" if kind == "fused slice" else path
    rank = 1 if variant == "LoKr" else 2  # of such small kernels
    tree = jlora.lorafy(own, rank, {entry: target}, **VARIANTS[variant])
    flags = jax.tree.leaves(jlora.trainable_mask(tree))
    leaves, structure = jax.tree.flatten(tree)
    noisy = lambda x: np.asarray(x) + rng.normal(0, 0.3, x.shape).astype(x.dtype)
    some = [
        jax.device_put(noisy(x), x.sharding) if t else x
        for x, t in zip(leaves, flags, strict=True)
    ]
    tree = jax.tree.unflatten(structure, some)
    if base in QUANTISED:
        block = (2 if len(shape) == 4 else 8) if base == "nf4" else None
        tree = jlora.quantize(tree, base, block=block, targets=[path])
    if variant == "dropout":
        tree = jlora.with_dropout(tree, jax.random.key(7))
    return tree


def function(kind):
    """What uses the kernel, of the tree; a bias is added."""
    _, path, _, shape, f = KINDS[kind]
    module, name = path.split("/")
    rng = np.random.default_rng(1)
    x = rng.integers(0, 16, shape) if shape == IDS else rng.normal(size=shape)
    x = jnp.asarray(x, jnp.int32 if shape == IDS else jnp.float32)

    def of_tree(p):
        y = f(p[module][name], x)
        if "bias" in p[module]:
            bias = p[module]["bias"]
            per_layer = {"experts": lambda b: b[:, None], "stacked": lambda b: b.sum(0)}
            y = y + per_layer.get(kind, jnp.sum if kind == "tied" else jnp.asarray)(
                bias
            )
        return jnp.sum(jnp.sin(y)), y

    return of_tree


def error_of(e):
    """An error's first line, without the name of the cell's own kernel."""
    return f"{type(e).__name__}: {str(e).splitlines()[0]}"


def compared(cells):
    """Of each cell None or its error, and the largest differences of them.

    Args:
      cells: its variant, base and kind, by any name.
    """
    out, made = {}, {}
    for name, (variant, base, kind) in cells.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = cell(variant, base, kind)
                f = jlora.lora(function(kind), stop_frozen=False)
                jax.eval_shape(f, tree)
            made[name], out[name] = tree, None
        except jlora.LoraError as e:
            out[name] = error_of(e)
    halves = {name: jlora.split(tree) for name, tree in made.items()}

    @jax.jit
    def both(halves):
        done = {}
        for name, (half, frozen) in halves.items():
            f = function(cells[name][-1])
            low = jlora.lora(f, stop_frozen=False)
            dense = lambda p, f=f: f(jlora.merge(p))
            done[name] = [
                jax.value_and_grad(lambda t, g=g, z=frozen: g(jlora.combine(t, z)), has_aux=True)(half)
                for g in (low, dense)
            ]  # fmt: skip
        return done

    off = {"value": 0.0, "gradient": 0.0}
    for ((_, y), g), ((_, want), wanted) in both(halves).values() if halves else ():
        for name, a, b in (("value", y, want), ("gradient", g, wanted)):
            a, b = (
                np.concatenate([np.ravel(v) for v in jax.tree.leaves(t)])
                for t in (a, b)
            )
            assert np.max(np.abs(b)) > 0, "a test of nothing"
            off[name] = max(off[name], float(np.max(np.abs(a - b)) / np.max(np.abs(b))))
    return out, off


@functools.cache
def row(variant, base):
    """A variant on every kind of kernel."""
    return compared({kind: (variant, base, kind) for kind in KINDS})


@functools.cache
def column(base):
    """Every variant on a linear kernel that is quantised, or lies on a mesh."""
    return compared({variant: (variant, base, "linear") for variant in VARIANTS})


def page():
    """The page: two tables, and the errors that their cells point to."""
    notes = {}

    def words(errors):
        for error in errors:
            number = error and notes.setdefault(error, len(notes) + 1)
            yield f"[{number}]" if number else "yes"

    def table(head, lines):
        start = f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
        return "\n".join((start, *(f"| {' | '.join(cells)} |" for cells in lines)))

    kinds = table(
        ["variant", "base", *KINDS],
        ([*key, *words(row(*key)[0].values())] for key in ROWS),
    )
    bases = table(
        ["variant", *BASES],
        ([v, *words(column(base)[0][v] for base in BASES)] for v in VARIANTS),
    )
    listed = "\n".join(f"{n}. `{error}`" for error, n in notes.items())
    return f"""# What works on what

Written by `python tests/variant_table.py`; a test holds it and the code together. "yes":
value and gradient of every trained leaf are those of the function of the merged kernel,
to 2e-5 of the largest number, in one compiled program a row. A number: the error
below. "sharded" kernels are split over two devices by their last axis. Dropout is
switched on, with a rate at which nothing is dropped; a looked-up row has no inputs to
drop, as in PEFT.

{kinds}

Every variant on a linear kernel that is quantised or sharded:

{bases}

{listed}
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    for key in ROWS:
        print(key, row(*key)[1])
    for base in BASES:
        print(base, column(base)[1])
