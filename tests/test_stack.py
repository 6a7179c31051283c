"""Numbered layers and stacks of them: one from the other, with their adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tools import randomise

import jlora
from jlora import ShapeError, StructureError

L, N, M = 3, 5, 7


def layers(key=0, length=L):
    """A tree of numbered layers; the first has a table of its own."""
    rng = np.random.default_rng(key)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    tree = {
        str(i): {
            "attn": {"query": {"kernel": draw(N, M)}, "out": {"kernel": draw(M, N)}},
            "norm": {"scale": draw(N)},
        }
        for i in range(length)
    }
    tree["0"]["attn"]["table"] = draw(2, 2)
    return {"enc": {"layers": tree}, "head": {"kernel": draw(N, 2)}}


def adapted(tree=None, **settings):
    settings = {"rank": 2, "targets": ["query", "attn.out"], "alpha": 3.0} | settings
    tree = jlora.lorafy(layers() if tree is None else tree, **settings)
    return randomise(tree, jax.random.key(1))


def assert_equal(got, want):
    """The same structure (static parts included), shapes, dtypes and values."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if not isinstance(x, jax.ShapeDtypeStruct):
            np.testing.assert_array_equal(x, y)


def test_what_all_layers_have_is_stacked():
    tree = layers()
    got = jlora.stack_layers(tree)
    numbered = tree["enc"]["layers"]
    assert got["head"]["kernel"] is tree["head"]["kernel"]
    assert got["enc"]["layers"].keys() == {"0", "attn", "norm"}
    kernel = got["enc"]["layers"]["attn"]["query"]["kernel"]
    assert kernel.shape == (L, N, M)
    for i in range(L):
        np.testing.assert_array_equal(
            kernel[i], numbered[str(i)]["attn"]["query"]["kernel"]
        )
    own = got["enc"]["layers"]["0"]
    assert (list(own), list(own["attn"])) == (["attn"], ["table"])
    assert own["attn"]["table"] is numbered["0"]["attn"]["table"]


def test_ten_layers_keep_their_order():
    tree = layers(length=11)
    got = jlora.stack_layers(tree)["enc"]["layers"]["norm"]["scale"]
    np.testing.assert_array_equal(got[10], tree["enc"]["layers"]["10"]["norm"]["scale"])


def test_adapters_go_along():
    tree = adapted(train=["norm"])
    stacked = jlora.stack_layers(tree)
    node = stacked["enc"]["layers"]["attn"]["query"]["kernel"]
    (t,) = node.adapters.values()
    assert node.path == "enc/layers/attn/query/kernel"
    assert (t.a.shape, t.b.shape, t.scale.shape) == ((L, N, 2), (L, 2, M), (L,))
    assert (t.batch_axes, t.in_axes, t.out_axes) == ((0,), (1,), (2,))
    assert_equal(jlora.merge(stacked), jlora.stack_layers(jlora.merge(tree)))
    assert_equal(jlora.unstack_layers(stacked, ["layers"]), tree)


def test_a_stack_is_adapted_as_its_layers_are():
    """What `lorafy` makes of a stack, and what stacking makes of lorafied layers."""
    axes = jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,), alpha=3.0)
    tree = jlora.lorafy(
        jlora.stack_layers(layers()), rank=2, targets={"query": axes, "attn.out": axes}
    )
    wanted = jlora.stack_layers(adapted())
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    assert_equal(jlora.stack_layers(jlora.unstack_layers(tree, ["enc/layers"])), tree)


def test_dropouts_keys_go_along():
    tree = jlora.with_dropout(adapted(dropout=0.5), jax.random.key(2))
    stacked = jlora.stack_layers(tree)
    (t,) = stacked["enc"]["layers"]["attn"]["query"]["kernel"].adapters.values()
    assert t.key.shape == (L,)
    again = jlora.unstack_layers(stacked, ["layers"])
    keys = lambda tree: jax.tree.map(jax.random.key_data, _keys(tree))
    jax.tree.map(np.testing.assert_array_equal, keys(again), keys(tree))


def _keys(tree):
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def test_slices_of_a_fused_kernel():
    tree = layers()
    for layer in tree["enc"]["layers"].values():
        layer["attn"]["c_attn"] = {"kernel": jnp.ones((N, 3 * M))}
        del layer["attn"]["query"]
    tree = adapted(tree, targets=["query", "value"])
    stacked = jlora.stack_layers(tree)
    node = stacked["enc"]["layers"]["attn"]["c_attn"]["kernel"]
    assert node.adapters["value"].starts == (0, 0, 2 * M)
    assert_equal(jlora.merge(stacked), jlora.stack_layers(jlora.merge(tree)))
    assert_equal(jlora.unstack_layers(stacked, ["layers"]), tree)


@pytest.mark.parametrize("half", [0, 1], ids=["trainable", "frozen"])
def test_halves_and_shapes(half):
    tree = adapted()
    stacked = jlora.stack_layers(tree)
    abstract = jax.eval_shape(lambda: tree)
    assert_equal(jlora.stack_layers(abstract), jax.eval_shape(lambda: stacked))
    part = jlora.split(tree)[half]
    got = jlora.stack_layers(part)
    assert_equal(got, jlora.split(stacked)[half])
    assert_equal(jlora.unstack_layers(got, ["layers"]), part)


def test_under_jit_and_inside_of_other_containers():
    tree = adapted()
    got = jax.jit(lambda t: jlora.stack_layers(({"params": t}, 1.0))[0])(tree)
    assert_equal(got, {"params": jlora.stack_layers(tree)})


def test_shardings_go_along():
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    rows = NamedSharding(mesh, PartitionSpec("x"))
    block = {"w": {"kernel": jax.device_put(jnp.ones((4, N)), rows)}}
    tree = {"0": block, "1": block}
    stacked = jlora.stack_layers(tree)
    got = stacked["w"]["kernel"].sharding
    assert got == NamedSharding(mesh, PartitionSpec(None, "x"))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    assert jlora.stack_layers(like)["w"]["kernel"].sharding == got


def test_kernels_of_three_axes_are_not_taken_for_stacks():
    """Heads of one layer, as many as it has inputs; and square matrices of PyTorch's."""
    heads = {"query": {"kernel": jnp.ones((4, 4, 2)), "bias": jnp.ones((4, 2))}}
    tree = {"attn": heads, "norm": {"scale": jnp.ones(4)}}
    (t,) = jlora.lorafy(tree, 1, ["query"])["attn"]["query"]["kernel"].adapters.values()
    assert (t.in_axes, t.out_axes, t.batch_axes) == ((0,), (1, 2), ())
    square = {
        "query": {"weight": jnp.ones((4, 4))},
        "value": {"weight": jnp.ones((4, 4))},
    }
    (t,) = jlora.lorafy(square, rank=1)["query"]["weight"].adapters.values()
    assert (t.in_axes, t.out_axes, t.batch_axes) == ((1,), (0,), ())


def test_norms_of_a_stack_are_no_kernels():
    tree = {"norm": {"weight": jnp.ones((3, 5))}, "up": {"kernel": jnp.ones((3, 5, 7))}}
    got = jlora.lorafy({"layers": tree}, rank=2, targets="all-linear")["layers"]
    assert not jlora.is_node(got["norm"]["weight"])
    (t,) = got["up"]["kernel"].adapters.values()
    assert (t.in_axes, t.out_axes, t.batch_axes) == ((1,), (2,), (0,))
    alone = {"up": {"kernel": jnp.ones((3, 5, 7))}}
    with pytest.raises(ShapeError, match=r"batch_axes=\(0,\)"):
        jlora.lorafy(alone, targets="all-linear", rank=2)


def _other_rank():
    tree = layers()
    ranks = {r"enc/layers/1/attn/query": jlora.Target(rank=1), "query": jlora.Target()}
    return jlora.lorafy(tree, rank=2, targets={**ranks})


def _other_shape():
    tree = layers()
    tree["enc"]["layers"]["2"]["norm"]["scale"] = jnp.ones(N + 1)
    return tree


def _some_adapted():
    return jlora.lorafy(layers(), targets=["1.attn.query", "2.attn.query"], rank=2)


def _other_dropout():
    own = {r".*/0/attn/query": jlora.Target(dropout=0.5), "query": jlora.Target()}
    return jlora.lorafy(layers(), rank=2, targets=own, dropout=0.1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (_other_rank, StructureError, [r"rank 2: layers \[0, 2\]", r"rank 1: layers \[1\]"]),
        (_other_shape, ShapeError, [r"float32\[6\]: layers \[2\]", "norm/scale"]),
        (_some_adapted, StructureError, [r"plain: layers \[0\]", r"adapted: layers \[1, 2\]"]),
        (_other_dropout, StructureError, [r"0\.5.*layers \[0\]"]),
        (lambda: {"a": jnp.ones(3)}, StructureError, ["no dict"]),
    ],
    ids=["rank", "shape", "some", "dropout", "nothing"],
)  # fmt: skip
def test_layers_that_make_no_stack(make, error, words):
    for word in words:
        with pytest.raises(error, match=word):
            jlora.stack_layers(make())


def test_what_cannot_be_unstacked():
    stacked = jlora.stack_layers(layers())
    with pytest.raises(StructureError, match="no dict whose path ends so"):
        jlora.unstack_layers(stacked, ["layers", "blocks"])
    with pytest.raises(ShapeError, match="do not share a leading axis"):
        jlora.unstack_layers(stacked, ["enc"])
    with pytest.raises(StructureError, match="pass a list"):
        jlora.unstack_layers(stacked, "layers")
