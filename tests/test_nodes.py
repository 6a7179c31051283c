"""Nodes: refused where an array is wanted, and alike whatever their path."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools import randomise

import jlora

X = np.ones((2, 3), np.float32)
TREE = jlora.lorafy(
    {
        "q": {"kernel": jnp.ones((3, 5))},
        "norm": {"scale": jnp.ones((3, 5))},
        "embed": {"embedding": jnp.ones((3, 5))},
    },
    2,
    ["q"],
    train=["norm"],
    trainable_tokens={"embed": [1]},
)
NODES = {
    "q/kernel": TREE["q"]["kernel"],
    "norm/scale": TREE["norm"]["scale"],
    "embed/embedding": TREE["embed"]["embedding"],
}
USES = {
    "jnp @": lambda n: jnp.asarray(X) @ n,
    "np @": lambda n: X @ n,
    "np.add": lambda n: np.add(1.0, n),
    "np.asarray": np.asarray,
    "jnp.asarray": jnp.asarray,
    "jnp.sin": jnp.sin,
    "jnp.einsum": lambda n: jnp.einsum("bi,io->bo", X, n),
    "lax.add": lambda n: lax.add(n, 1.0),
    "lax.dot": lambda n: lax.dot(X, n),
    "lax.transpose": lambda n: lax.transpose(n, (1, 0)),
    "lax.concatenate": lambda n: lax.concatenate([n, n], 0),
    "astype": lambda n: n.astype(jnp.bfloat16),
    "reshape": lambda n: n.reshape(-1),
    "T": lambda n: n.T,
    "at": lambda n: n.at[0].set(1),
    "size": lambda n: n.size,
    "index": lambda n: n[0],
    "len": len,
    "iterate": list,
    "unpack": lambda n: [*n],
    "in": lambda n: 1 in n,
    "if": lambda n: 1 if n else 0,
    "float": float,
    "neg": operator.neg,
    "abs": abs,
    "rsub": lambda n: 1 - n,
    "pow": lambda n: n**2,
    "greater": lambda n: n > 0,
    "equal": lambda n: n == 1.0,
    "jnp equal": lambda n: jnp.asarray(X) == n,
    "sum": sum,
}


@pytest.mark.parametrize("path", NODES)
@pytest.mark.parametrize("use", USES)
def test_a_node_is_no_array_whatever_is_done_to_it_first(use, path):
    with pytest.raises(jlora.UnmergedError, match=path) as caught:
        USES[use](NODES[path])
    assert "jlora.lora" in str(caught.value)


@pytest.mark.parametrize("path", NODES)
def test_questions_about_a_node_are_answered(path):
    node = NODES[path]
    assert (node.shape, node.ndim, node.dtype) == ((3, 5), 2, jnp.float32)
    assert np.shape(node) == (3, 5)
    assert not hasattr(node, "T")
    assert getattr(node, "sharding", None) is None
    assert node == node
    assert node != "frozen"
    assert node is not None
    assert len({node}) == 1
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = node.nope


def layers(count=3, **options):
    """Layers of one shape, adapted; no B is zero."""
    keys = jax.random.split(jax.random.key(3), count)
    params = {f"layer_{i}": {"query": jax.random.normal(k, (7, 7))}
              for i, k in enumerate(keys)}  # fmt: skip
    tree = jlora.lorafy(params, 2, ["query"], **options)
    return randomise(tree, jax.random.key(4))


def test_trees_of_one_shape_map_together_whatever_their_root():
    bare = {
        "q": {"kernel": jnp.ones((3, 5))},
        "n": jnp.ones(5),
        "t": {"embedding": jnp.ones((4, 3))},
    }
    options = {"rank": 2, "train": ["n"], "trainable_tokens": {"t": [2]}}
    one = jlora.lorafy({"params": bare}, targets=["q"], **options)["params"]
    other = jlora.lorafy(bare, targets={"q/kernel": jlora.Target()}, **options)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))
    both = jax.tree.map(jnp.add, one, other)
    assert both["q"]["kernel"].base[0, 0] == 2
    assert one["q"]["kernel"].path == "params/q/kernel"
    assert other["q"]["kernel"].path == "q/kernel"
    # A summary names leaves as they stand in the tree that it is given.
    assert [row.path for row in jlora.summary(one).rows] == [
        row.path for row in jlora.summary(other).rows
    ]


@pytest.mark.parametrize("dora", [False, True])
def test_a_condition_chooses_between_kernels(dora):
    tree = layers(2, dora=dora)
    x = jnp.ones((3, 7))

    def f(p, x, first):
        return x @ lax.cond(first, lambda: p["layer_0"]["query"],
                            lambda: p["layer_1"]["query"])  # fmt: skip

    for first in (True, False):
        got = jax.jit(jlora.lora(f))(tree, x, first)
        want = f(jlora.merge(tree), x, first)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_condition_chooses_between_roles():
    params = {"query": jnp.eye(7), "value": 2 * jnp.eye(7)}
    tree = randomise(jlora.lorafy(params, 2), jax.random.key(4))
    f = lambda p, i, x: x @ lax.switch(i, [lambda: p["query"], lambda: p["value"]])
    x = jnp.ones((3, 7))
    got = jax.jit(jlora.lora(f))(tree, 1, x)
    np.testing.assert_allclose(got, f(jlora.merge(tree), 1, x), rtol=1e-5, atol=1e-5)
