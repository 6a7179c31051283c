"""Meshes as `jax.make_mesh` makes them by default: shardings are part of the types."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small_models import make

import jlora
from jlora import models
from jlora.models._parts.explicit import take_rows

KINDS = ("t5", "gpt2", "llama", "gemma2", "roberta")
IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 10]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    with jax.set_mesh(mesh):
        yield mesh


def put(mesh, tree, *spec):
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.device_put(jnp.asarray(x), place), tree)


def forward(kind, model):
    if kind == "t5":
        return lambda p, ids, mask: model.apply({"params": p}, ids, mask, ids, mask)
    return lambda p, ids, mask: model.apply({"params": p}, ids, mask)


@pytest.mark.parametrize(
    ("kind", "scan"), [*((kind, False) for kind in KINDS), ("llama", True)]
)
def test_a_training_step_over_a_sharded_batch(mesh, kind, scan):
    """Logits, loss, gradients and update are those of one device."""
    model, params = make(kind, scan_layers=scan)
    targets = ["query", "value"]
    if scan:
        plain = forward(kind, model)
        survey = jlora.survey(lambda p: plain(p, IDS, MASK), params)
        tree = jlora.lorafy(params, 2, targets, survey=survey)
    else:
        tree = jlora.lorafy(params, 2, targets)
    tree = jax.tree.map(lambda x: x + 0.1, tree)
    apply = jlora.lora(forward(kind, model))
    tx = optax.adam(1e-2)

    @jax.jit
    def step(tree, ids, mask):
        trainable, frozen = jlora.split(tree)

        def loss(trainable):
            logits = apply(jlora.combine(trainable, frozen), ids, mask)
            return jnp.mean(jnp.square(logits)), logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, _ = tx.update(grads, tx.init(trainable), trainable)
        return value, logits, grads, optax.apply_updates(trainable, updates)

    got = step(put(mesh, tree), *put(mesh, (IDS, MASK), "data"))
    assert got[1].sharding.spec[0] == "data"
    want = step(tree, IDS, MASK)
    sizes = [float(jnp.abs(x).max()) for x in jax.tree.leaves(want[2])]
    assert min(sizes) > 0
    for x, y in zip(jax.tree.leaves(got[:3]), jax.tree.leaves(want[:3]), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5)
    for x, y in zip(jax.tree.leaves(got[3]), jax.tree.leaves(want[3]), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)  # Adam divides by tiny numbers


def by_columns(mesh, path, x):
    """Feed-forward and attention kernels over "model", the embedding's rows too."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = [None] * x.ndim
    if x.ndim == 2 and "embed" in name:
        spec[0] = "model"
    elif x.ndim == 2 and x.shape[-1] % 2 == 0:
        spec[-1] = "model"
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize(("kind", "beams"), [("t5", 2), ("llama", 1)])
def test_generation_over_sharded_prompts_and_kernels(mesh, kind, beams):
    model, params = make(kind)
    tree = jlora.lorafy(params, 2, ["query", "value"])
    tree = jax.tree.map(lambda x: x + 0.1, tree)
    how = {"max_new_tokens": 4, "num_beams": beams, "repetition_penalty": 1.3}
    how |= {"transform": jlora.lora, "min_new_tokens": 3}
    want = models.generate(model, tree, IDS, MASK, **how)
    split = jax.tree_util.tree_map_with_path(lambda p, x: by_columns(mesh, p, x), tree)
    got = models.generate(model, split, *put(mesh, (IDS, MASK), "data"), **how)
    np.testing.assert_array_equal(got, want)


def test_rows_lie_as_their_ids_and_the_tables_columns(mesh):
    table = np.arange(24.0).reshape(6, 4)
    ids = np.array([[0, 5], [6, 2]])
    want = np.asarray(take_rows(jnp.asarray(table), jnp.asarray(ids)))
    assert np.isnan(want[1, 0]).all()  # beyond the table
    for rows, columns, last in (
        (None, None, None),
        (None, "model", "model"),
        ("model", None, None),
        (None, "data", None),  # the ids have that axis
        ("model", "data", None),
    ):
        got = jax.jit(take_rows)(
            put(mesh, table, rows, columns), put(mesh, ids, "data")
        )
        assert tuple(got.sharding.spec) == ("data", None, last)
        np.testing.assert_array_equal(got, want)
