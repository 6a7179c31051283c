"""Runs spread over devices: options, batches that do not divide, ids checked as ever."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import checkpoint, models, sharding, sweep, tasks
from jlora._errors import DataError, OptionError, ShapeError
from jlora.train import TrainState, evaluate, make_eval_step, make_train_step

FOUR = jax.devices()[:4]
MESH = sharding.make_mesh("data=2,fsdp=2", devices=FOUR)
RULES = [("embedding$", jax.sharding.PartitionSpec(None, "fsdp")),
         ("kernel$", jax.sharding.PartitionSpec("fsdp", None))]  # fmt: skip


def net(params, ids):
    x = params["embed"]["embedding"][ids].mean(1)
    return jnp.tanh(x) @ params["out"]["kernel"]


def loss_fn(params, batch, key):
    out = net(params, batch["ids"])[:, 0]
    return jnp.sum((out - batch["y"]) ** 2), out.size


def made():
    rng = np.random.default_rng(0)
    base = {
        "embed": {"embedding": jnp.asarray(rng.normal(0, 1, (11, 6)), jnp.float32)},
        "out": {"kernel": jnp.asarray(rng.normal(0, 1, (6, 3)), jnp.float32)},
    }
    return jlora.lorafy(base, 2, ["out"], init="gaussian")


def batch_of(size, seed=1):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 11, (size, 5)).astype(np.int32)
    return {"ids": ids, "y": rng.normal(0, 1, size).astype(np.float32)}


def test_a_step_puts_its_batches_on_the_mesh_and_ends_as_on_one_device():
    tx = optax.sgd(0.1)
    alone = TrainState.create(made(), tx, jax.random.key(0))
    state = TrainState.create(
        sharding.place(made(), MESH, RULES), tx, jax.random.key(0)
    )
    step, plain = (make_train_step(loss_fn, tx, mesh=m) for m in (MESH, None))
    for n in range(3):
        state, metrics = step(state, batch_of(8, n))
        alone, want = plain(alone, batch_of(8, n))
        np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-5)
    assert step.cache_size() == 1
    with pytest.raises(ShapeError, match=r"ids \[6, 5\]: 6 examples .*4 equal parts"):
        step(state, batch_of(6))


@pytest.mark.parametrize("where", [None, jax.devices()[1]], ids=["nowhere", "on one"])
def test_parameters_that_were_not_placed_are_replicated(where):
    """And the step is compiled once for them."""
    tree = made() if where is None else jax.device_put(made(), where)
    state = TrainState.create(tree, optax.sgd(0.1), jax.random.key(0), mesh=MESH)
    step = make_train_step(loss_fn, optax.sgd(0.1), mesh=MESH)
    for n in range(2):
        state, _ = step(state, batch_of(8, n))
    assert step.cache_size() == 1
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


def test_ids_beyond_the_table_are_told_in_every_step():
    tx, bad = optax.sgd(0.1), batch_of(8)
    bad["ids"][2, 1] = 11
    state = TrainState.create(sharding.place(made(), MESH, RULES), tx)
    step = make_train_step(loss_fn, tx, mesh=MESH)
    state, _ = step(state, batch_of(8))
    with pytest.raises(DataError, match="11"):
        step(state, bad)


def test_a_validation_that_does_not_divide_counts_every_example_once():
    batches = [batch_of(8, 1), batch_of(8, 2), batch_of(3, 3)]

    def metric_fn(params, batch):
        total, count = loss_fn(params, batch, None)
        return {"loss": (total, count), "seen": (jnp.float32(count), 1.0)}

    want = evaluate(make_eval_step(metric_fn), made(), batches)
    tree = sharding.place(made(), MESH, RULES)
    got = evaluate(make_eval_step(metric_fn, mesh=MESH), tree, batches)
    assert got["seen"] == pytest.approx(19 / 3)
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_sweep_on_a_mesh(shared):
    base = jlora.without_adapters(made())
    jobs = sweep.grid(rank=[1, 2], learning_rate=[0.1, 0.3])
    batches = [batch_of(8, n) for n in range(3)]
    feed = batches if shared else (lambda job: batches[job.rank - 1 :])
    options = {"steps": 3, "targets": ["out"], "valid": [batch_of(3, 9)]}
    want = sweep.run(loss_fn, base, jobs, feed, **options)
    placed = sharding.place(base, MESH, RULES)
    got = sweep.run(loss_fn, placed, jobs, feed, mesh=MESH, **options)
    for one, two in zip(got, want, strict=True):
        np.testing.assert_allclose(one.losses, two.losses, rtol=1e-4)
        assert one.value == pytest.approx(two.value, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "data=2"}, "is no mesh|expected a jax.sharding.Mesh"),
        ({"mesh": MESH, "parallel": "pmap"}, "leading axis of devices"),
    ],
)
def test_meshes_that_a_step_refuses(options, words):
    with pytest.raises(OptionError, match=words):
        make_train_step(loss_fn, optax.sgd(0.1), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(tasks.AdapterOptions, tasks.TrainingOptions):
    """As a script's."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "data=3"}, "asks for 3 devices"),
        ({"mesh": "data=2,fsdp=2", "batch_size": 6}, "--batch-size 6 .* 4 equal parts"),
        ({"mesh": "data=4", "accumulate": 3, "batch_size": 24}, None),
        ({"mesh": "data=4", "accumulate": 3, "batch_size": 30}, "--batch-size 36"),
        ({"mesh": "tensor=4", "batch_size": 5}, None),
    ],
)
def test_options_of_devices(monkeypatch, options, words):
    monkeypatch.setattr(jax, "devices", lambda: FOUR)
    settings = Settings(**options)
    if words is None:
        settings.check()
        return
    with pytest.raises(OptionError, match=words):
        settings.check()


def test_a_model_is_loaded_adapted_and_answers_on_the_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: FOUR)
    monkeypatch.setattr("jlora.data.load_tokenizer", lambda source: Words())
    config = models.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = models.Llama(config)
    params = model.init(jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    models.save(model, params, tmp_path)
    settings = Settings(mesh="fsdp=2,tensor=2", precision="float32")
    loaded = settings.load(tmp_path)
    tree = settings.adapt(loaded.params, settings.key)
    assert sharding.mesh_of(tree) == settings.device_mesh
    facts = settings.device_facts(tree)
    assert "fsdp=2,tensor=2, layout fsdp+tensor" in facts["devices"]
    rows = np.array([[3, 4, 5], [6, 7, 8], [9, 3, 1]], np.int32)  # 3 on 2 ways
    batch = {"input_ids": rows, "attention_mask": np.ones_like(rows)}
    ask = tasks.Generator(model, Words(), 4)
    assert ask(tree, batch) == ask(settings.adapt(params, settings.key), batch)


class Words:
    """Tokens as numbers."""

    def batch_decode(self, tokens, **_):
        return [" ".join(map(str, row)) for row in tokens]


def test_devices_stay_known_after_many_saves(tmp_path):
    """A set of devices that JAX hands out is its own: nothing is taken from it."""
    tree = sharding.place(made(), MESH, RULES)
    state = TrainState.create(tree, optax.adam(0.1))
    x = jax.tree.leaves(state.trainable)[0]
    with checkpoint.Checkpoints(tmp_path, background=True) as kept:
        for n in range(2):
            kept.save(dataclasses.replace(state, step=jnp.int32(n)))
    assert x.devices() == {*FOUR}


# -- the same bits on any number of devices --------------------------------------------


def run_of(sizes, count, groups, layout=RULES, steps=3):
    mesh = sharding.make_mesh(sizes, devices=FOUR[:count])
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    tree = jlora.with_dropout(made(), None)
    state = TrainState.create(sharding.place(tree, mesh, layout), tx)
    step = make_train_step(loss_fn, tx, mesh=mesh, groups=groups)
    for n in range(steps):
        state, metrics = step(state, batch_of(16, n))
    return [np.asarray(x) for x in jax.tree.leaves((state.trainable, metrics))]


def test_groups_end_alike_to_the_bit_on_two_devices_and_on_four():
    whole = [("", jax.sharding.PartitionSpec())]
    want = run_of("data=2", 2, 8, whole)
    for sizes, layout in (("data=4", whole), ("data=2,fsdp=2", RULES)):
        for x, y in zip(run_of(sizes, 4, 8, layout), want, strict=True):
            np.testing.assert_array_equal(x, y)
    for x, y in zip(run_of("data=4", 4, None, whole), want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_groups_without_a_mesh_are_the_batch():
    tx = optax.sgd(0.1)
    found = []
    for groups in (None, 4):
        step = make_train_step(loss_fn, tx, groups=groups)
        state, metrics = step(TrainState.create(made(), tx), batch_of(8))
        found.append([*jax.tree.leaves(state.trainable), metrics["grad_norm"]])
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 0}, "groups=0"),
        ({"groups": 6, "mesh": MESH}, "Take a multiple, 8 say"),
        ({"groups": 4, "accumulate": 2}, "neither with accumulate"),
        ({"groups": 4, "axis_name": "data"}, "nor with axis_name"),
    ],
)
def test_groups_that_cannot_be(options, words):
    with pytest.raises(OptionError, match=words):
        make_train_step(loss_fn, optax.sgd(0.1), **options)


def test_a_batch_that_groups_do_not_divide():
    step = make_train_step(loss_fn, optax.sgd(0.1), groups=4)
    with pytest.raises(ShapeError, match="groups=4 does not divide"):
        step(TrainState.create(made(), optax.sgd(0.1)), batch_of(6))
