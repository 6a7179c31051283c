"""Stacking keeps what it finds: dicts of any type, keys, containers, other leaves."""

import collections
import collections.abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from test_stack import L, M, N, adapted, assert_equal, layers
from tools import randomise

import jlora
from jlora import ShapeError, StructureError


@jax.tree_util.register_pytree_with_keys_class
class Named(collections.abc.Mapping):
    """A mapping of the user's own, registered with JAX."""

    def __init__(self, items):
        self.items_ = dict(items)

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)

    def tree_flatten_with_keys(self):
        keys = tuple(self.items_)
        return [(jax.tree_util.DictKey(k), self.items_[k]) for k in keys], keys

    @classmethod
    def tree_unflatten(cls, keys, children):
        return cls(zip(keys, children, strict=True))


def convert(tree, make):
    """The tree with every dict made anew, the outermost last."""
    if not isinstance(tree, dict):
        return tree
    return make({key: convert(x, make) for key, x in tree.items()})


CONTAINERS = {
    "dict": dict,
    "ordered": collections.OrderedDict,
    "default": lambda items: collections.defaultdict(list, items),
    "frozen": FrozenDict,
    "own": Named,
    "state": nnx.State,
}


def in_container(kind, tree):
    if kind == "state":  # which holds plain dicts inside
        return nnx.State(tree)
    return convert(tree, CONTAINERS[kind])


@pytest.mark.parametrize("lorafied", [False, True])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_dicts_keep_their_types(kind, lorafied):
    plain = adapted(train=["norm"]) if lorafied else layers()
    keys = str if kind == "state" else None
    tree = in_container(kind, plain)
    stacked = jlora.stack_layers(tree, keys=keys)
    wanted = in_container(kind, jlora.stack_layers(plain))
    if kind in ("ordered", "own"):  # where the order of keys counts
        assert_equal(by_path(stacked), by_path(wanted))
    else:
        assert_equal(stacked, wanted)
    assert type(stacked) is type(tree)
    inner = stacked["enc"]["layers"]
    assert type(inner["attn"]["query"]) is type(tree["enc"]["layers"])
    assert type(inner["0"]["attn"]) is type(tree["enc"]["layers"])
    back = jlora.unstack_layers(stacked, ["layers"], keys=keys)
    if kind in ("ordered", "own"):
        assert_equal(by_path(back), by_path(tree))
        assert type(back["enc"]["layers"]["0"]) is type(tree)
    else:
        assert_equal(back, tree)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=jlora.is_node)
    return {jax.tree_util.keystr(path): x for path, x in leaves}


@pytest.mark.parametrize("kind", ["dict", "frozen", "own", "state"])
def test_integers_for_keys(kind):
    tree = layers()
    numbered = tree["enc"]["layers"]
    del numbered["0"]["attn"]["table"]
    tree["enc"]["layers"] = {int(key): x for key, x in numbered.items()}
    tree = in_container(kind, adapted(tree, targets=["query"]))
    if kind != "state":
        with pytest.raises(StructureError, match=r"enc/layers are keys of .* keys=int"):
            jlora.stack_layers(tree)
    keys = None if kind == "state" else int
    stacked = jlora.stack_layers(tree, keys=keys)
    node = stacked["enc"]["layers"]["attn"]["query"]["kernel"]
    assert (node.path, node.shape) == ("enc/layers/attn/query/kernel", (L, N, M))
    back = jlora.unstack_layers(stacked, ["layers"], keys=keys)
    assert_equal(back, tree)
    assert list(back["enc"]["layers"]) == list(range(L))
    with pytest.raises(jlora.OptionError, match="expected str, int or None"):
        jlora.stack_layers(tree, keys=float)


def test_integers_beside_names_are_refused_where_jax_cannot_sort_them():
    tree = {"layers": {i: {"kernel": jnp.ones(2)} for i in range(2)}}
    tree["layers"][0]["own"] = jnp.ones(3)
    with pytest.raises(StructureError, match="layers is a dict, and none can be made"):
        jlora.stack_layers(tree, keys=int)


class Layer(nnx.Module):
    """One layer, with a dropout of its own."""

    def __init__(self, rngs):
        self.query = nnx.Linear(N, N, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(jnp.tanh(self.query(x)))


class Net(nnx.Module):
    """A list of layers, whose state has integers for keys."""

    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(L)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_nnx_model_of_layers():
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    tree = randomise(jlora.lorafy(state, 2, ["query"]), jax.random.key(1))
    stacked = jlora.stack_layers(tree)
    node = jax.tree.leaves(stacked["layers"]["query"]["kernel"], is_leaf=jlora.is_node)[
        0
    ]
    (t,) = node.adapters.values()
    assert (t.a.shape, t.batch_axes, node.path) == (
        (L, N, 2),
        (0,),
        "layers/query/kernel",
    )
    back = jlora.unstack_layers(stacked, ["layers"])
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    x = jnp.ones((2, N))
    f = jlora.lora(lambda s, x: nnx.merge(graph, s)(x))
    np.testing.assert_array_equal(f(back, x), f(tree, x))


def test_other_containers_and_leaves_inside_of_layers():
    def layer(i):
        return {
            "linear": eqx.nn.Linear(N, M, key=jax.random.key(i)),
            "pair": [nnx.Param(jnp.full(2, float(i))), ({"b": jnp.ones(1)}, None)],
            "act": jnp.tanh,
            "name": "same",
            "empty": {},
        }

    tree = [{"params": {"layers": {str(i): layer(i) for i in range(L)}}}, 3, "x"]
    tree = randomise(jlora.lorafy(tree, 2, ["linear"]), jax.random.key(0))
    stacked = jlora.stack_layers(tree)
    inner = stacked[0]["params"]["layers"]
    assert isinstance(inner["linear"], eqx.nn.Linear)
    node = inner["linear"].weight
    assert (node.path, node.shape) == ("0/params/layers/linear/weight", (L, M, N))
    assert jax.tree.leaves(inner["pair"])[0].shape == (L, 2)
    assert (inner["act"], inner["name"], inner["empty"]) == (jnp.tanh, "same", {})
    assert stacked[1:] == [3, "x"]
    back = jlora.unstack_layers(stacked, ["layers"])
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert jnp.array_equal(x, y) if isinstance(x, jax.Array) else x is y
    node = back[0]["params"]["layers"]["2"]["linear"].weight
    assert node.path == "0/params/layers/2/linear/weight"


def test_masks_and_labels_are_stacked_as_their_trees_are():
    tree = adapted()
    for f in (jlora.labels, jlora.trainable_mask):
        got = jlora.stack_layers(f(tree))
        assert jax.tree.leaves(got) == jax.tree.leaves(f(jlora.stack_layers(tree)))


def _with_leaf(*leaves):
    return {str(i): {"k": jnp.ones(2), "own": x} for i, x in enumerate(leaves)}


def _with_rows():
    params = {"0": {"k": jnp.ones((2, 3)), "e": jnp.ones((3, 4))}}
    return jlora.lorafy(params, 1, ["k"], trainable_tokens={"e": [1]})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: _with_leaf("a", "b"), StructureError, r"(?s)\*/own differs.*'a': layers \[0\]"),
        (lambda: _with_leaf(jnp.tanh, jnp.sin), StructureError, "own differs"),
        (lambda: _with_leaf(1, 1.0), StructureError, r"1\.0: layers \[1\]"),
        (lambda: _with_leaf(jnp.ones(2), 1.0), ShapeError, r"1\.0: layers \[1\]"),
        (lambda: _with_leaf({"a": 1}, FrozenDict(a=1)), StructureError, r"\*/own has another"),
        (lambda: _with_leaf([1], (1,)), StructureError, r"\*/own has another structure"),
        (lambda: _with_leaf(None, jnp.ones(1)), StructureError, "another structure"),
        (lambda: {"0": jnp.ones(2), "1": jnp.ones(2)}, StructureError, "are no dicts"),
        (lambda: {"0": {"0": jnp.ones(2)}}, StructureError, "numbered directly under"),
        (lambda: {"0": FrozenDict(a=jnp.ones(2))}, StructureError, "of different types"),
        (_with_rows, StructureError, r"\*/e is a table with trained rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        jlora.stack_layers(make())


def test_a_table_with_trained_rows_is_not_unstacked():
    tree = {"layers": {"k": jnp.ones((2, 3, 4)), "e": jnp.ones((3, 4))}}
    axes = {"k": jlora.Target(in_axes=(1,), batch_axes=(0,))}
    tree = jlora.lorafy(tree, 1, axes, trainable_tokens={"e": [1]})
    with pytest.raises(StructureError, match="e is a table with trained rows"):
        jlora.unstack_layers(tree, ["layers"])


def test_layers_own_leaves_fit_the_layers_there_are():
    tree = {"layers": {"k": jnp.ones((2, 3)), "2": {"own": jnp.ones(1)}}}
    with pytest.raises(ShapeError, match="has 2 layers, and leaves of a layer '2'"):
        jlora.unstack_layers(tree, ["layers"])
    tree = {"layers": {"k": jnp.ones((2, 3)), "1": {"k": jnp.ones(1)}}}
    with pytest.raises(StructureError, match="layers/1/k is there twice"):
        jlora.unstack_layers(tree, ["layers"])
