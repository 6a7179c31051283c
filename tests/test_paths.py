"""Leaf paths: names that look like a box's attribute, and names that are there twice."""

import collections
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax.tree_util import DictKey, GetAttrKey, SequenceKey
from tools import randomise

import jlora
from jlora import StructureError, checkpoint, train
from jlora._paths import leaf_paths, leaves_by_path, map_with_path, path_str


class Fields(eqx.Module):
    """A module whose fields have the names of a box's attribute."""

    query: Any
    value: Any
    raw_value: Any = None


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def arrays():
    return draw(0, 5, 7), draw(1, 5, 7)


CONTAINERS = {
    "dict": lambda q, v: {"query": q, "value": v},
    "raw": lambda q, v: {"query": q, "raw_value": v},
    "frozen": lambda q, v: freeze({"query": q, "value": v}),
    "fields": Fields,
    "both fields": lambda q, v: Fields(q, v, draw(2, 5, 7)),
    "boxes": lambda q, v: {"query": nnx.Param(q), "value": nnx.Param(v)},
    "boxed fields": lambda q, v: Fields(nnx.Param(q), nnx.Param(v)),
    "partitioned": lambda q, v: {
        "query": nn.Partitioned(q, (None, "x")),
        "value": nn.Partitioned(v, (None, "x")),
    },
    "state": lambda q, v: nnx.State({"query": nnx.Param(q), "value": nnx.Param(v)}),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_a_name_value_is_a_name(make):
    params = {"attn": make(*arrays())}
    paths = leaf_paths(params)
    second = "raw_value" if make is CONTAINERS["raw"] else "value"
    assert paths[:2] == ["attn/query", f"attn/{second}"]
    tree = jlora.lorafy(params, 2, ["query", second])
    tree = randomise(tree, jax.random.key(3))
    assert [r.path for r in jlora.summary(tree).rows] == paths[:2]
    assert jax.tree.leaves(jlora.labels(tree)).count("a") == 2
    back = jlora.combine(*jlora.split(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    merged, undo = jlora.merge(tree, undo=True)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(merged)[:2], jax.tree.leaves(params), strict=False):
        assert jnp.any(x != y)
    assert jlora.unmerge(merged, undo) is tree
    # What is trained as it is, too.
    whole = jlora.lorafy(params, 2, ["query"], train=[second])
    assert [r.rank for r in jlora.summary(whole).rows] == [2, None]
    assert jax.tree.structure(jlora.merge(whole)) == jax.tree.structure(params)


def test_the_survey_and_files_know_a_name_value(tmp_path):
    params = {"attn": {"query": draw(0, 5, 7), "value": draw(1, 5, 7)}}
    f = lambda p, x: (x @ p["attn"]["query"]) * (x @ p["attn"]["value"])
    x = draw(2, 3, 5)
    survey = jlora.survey(f, params, x)
    assert list(survey.leaves) == ["attn/query", "attn/value"]
    tree = jlora.lorafy(params, 2, "all-linear", survey=survey)
    tree = randomise(tree, jax.random.key(1))
    got = jlora.lora(f)(tree, x)
    np.testing.assert_allclose(got, f(jlora.merge(tree), x), rtol=2e-5, atol=2e-5)
    checkpoint.save_adapter(tmp_path / "a", tree)
    again = checkpoint.load_adapter(tmp_path / "a", params)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_dead_adapters_of_fields_named_value_are_told_apart():
    model = Fields(draw(0, 5, 7), draw(1, 5, 7), draw(2, 5, 7))
    tree = jlora.lorafy({"attn": model}, 2, ["value", "raw_value"])
    state = train.TrainState.create(tree, optax.sgd(0.1), jax.random.key(0))
    loss = lambda p, x, _: jnp.mean((x @ p["attn"].raw_value) ** 2)
    dead = train.check_gradients(loss, state, draw(3, 2, 5))
    assert dead == ("attn/value",)


def test_a_bare_array_and_a_bare_box_have_no_name():
    assert leaf_paths(jnp.ones(3)) == [""]
    assert leaf_paths(nnx.Param(jnp.ones(3))) == [""]
    inner = nn.Partitioned(jnp.ones(3), ("x",))
    assert leaf_paths({"a": nnx.Param({"b": inner, "c": 1})}) == ["a/b", "a/c"]
    node = jlora.Full(jnp.ones(3))
    assert leaf_paths(node, jlora.is_node) == [""]
    assert leaf_paths({"a": nnx.Param(node)}, jlora.is_node) == ["a"]


def test_the_order_is_that_of_the_leaves():
    tree = {"b": (1, [2, None]), "a": nnx.Param(3), "c": {"z": 4, "y": 5}}
    assert leaf_paths(tree) == ["a", "b/0", "b/1/0", "c/y", "c/z"]
    assert leaves_by_path(tree) == {"a": 3, "b/0": 1, "b/1/0": 2, "c/y": 5, "c/z": 4}
    assert jax.tree.leaves(map_with_path(lambda path, x: (path[0], x), tree)) == [
        "a", 3, "b", 1, "b", 2, "c", 5, "c", 4,
    ]  # fmt: skip


def test_a_key_path_alone():
    path = (DictKey("query"), DictKey("kernel"), GetAttrKey("value"))
    assert path_str(path) == "query/kernel"
    assert path_str((DictKey("query"), DictKey("value"))) == "query/value"
    assert path_str((DictKey("query"), DictKey("raw_value"))) == "query/raw_value"
    assert (
        path_str((DictKey("h"), SequenceKey(0), GetAttrKey("weight"))) == "h/0/weight"
    )
    assert path_str((DictKey("value"),)) == "value"


# -- one path, two leaves --------------------------------------------------------------

TWICE = {
    "slash": lambda x: {"a/b": x, "a": {"b": x}},
    "numbers": lambda x: collections.OrderedDict([(0, {"b": x}), ("0", {"b": x})]),
    "sequence": lambda x: {"a": [x], "a/0": x},
}


@pytest.mark.parametrize("make", TWICE.values(), ids=TWICE)
def test_two_leaves_with_one_path_are_refused(make, tmp_path):
    params = {"query": draw(0, 5, 7), **make(draw(1, 5, 7))}
    if "0" in params:
        params = collections.OrderedDict(params)
    says = "leaves of this tree have the path"
    with pytest.raises(StructureError, match=says) as error:
        jlora.lorafy(params, 2, ["query"])
    assert str(error.value).count("['") + str(error.value).count("[0]") >= 3
    with pytest.raises(StructureError, match=says):
        jlora.survey(lambda p: p["query"], params)
    part = jlora.lorafy({"query": params["query"]}, 2, ["query"])
    tree = type(params)({**params, **part})
    with pytest.raises(StructureError, match=says):
        jlora.merge(tree)
    with pytest.raises(StructureError, match=says):
        checkpoint.save_adapter(tmp_path / "a", tree)
    # The partition asks for no names, and a batch may have any.
    back = jlora.combine(*jlora.split(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert len(jlora.summary(tree).rows) == 1
    f = jlora.lora(lambda p, batch: sum(jax.tree.leaves(batch)) @ p["query"])
    assert f(part, make(jnp.ones((2, 5)))).shape == (2, 7)
