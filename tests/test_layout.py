"""A state's leaves in stacks between steps: what comes of them, and what users see."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import assert_close, equations, randomise

import jlora
import jlora.train as jt
from jlora import checkpoint
from jlora.optim import decay_mask, lora_fa, lora_plus, riemannian
from jlora.train import _layout
from jlora.train._joined import Joined, Lane

D, R, LAYERS = 5, 2, 4
pytestmark = pytest.mark.loose_promotion  # optax's own dtypes


def lora_params():
    """Square kernels, so that A and B of DoRA's and plain ones are of few shapes."""
    rng = np.random.default_rng(0)
    kernel = lambda: jnp.asarray(rng.normal(0, 0.4, (D, D)), jnp.float32)
    layer = lambda: {"q": kernel(), "bias": jnp.ones(D)}
    params = {f"layer{i}": layer() for i in range(LAYERS)} | {"head": kernel()}
    tree = jlora.lorafy(params, R, ["q"], train=["bias", "head"])
    return randomise(tree, jax.random.key(1))


def loss_fn(params, batch, key):
    x = batch["x"]
    for i in range(LAYERS):
        layer = params[f"layer{i}"]
        x = jnp.tanh(x @ layer["q"] + layer["bias"])
    return jnp.mean((x @ params["head"] - batch["y"]) ** 2)


def batch_of(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=(4, D)).astype(np.float32) for n in "xy"}


def trained(tx, params=None, n=3, **options):
    """A state and metrics after n steps, and the step."""
    params = lora_params() if params is None else params
    state, step = (
        jt.TrainState.create(params, tx),
        jt.make_train_step(loss_fn, tx, **options),
    )
    for i in range(n):
        state, metrics = step(state, batch_of(i))
    assert step.cache_size() == 1
    return state, metrics, step


def assert_same(one, two, rtol=0.0, atol=0.0):
    """Equal states, keys too."""
    assert_close(*map(numbers_of, (one, two)), rtol=rtol, atol=atol)


def numbers_of(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def stacks_of(state):
    return state.lying.form.layout.stacks


@pytest.fixture
def by_leaf(monkeypatch):
    """No stacks."""
    return lambda: monkeypatch.setattr(_layout, "FEWEST", 10**9)


def layers_01(tree):
    """True for what belongs to two of the layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: path[0].key in ("layer0", "layer1"), tree
    )


OPTIMISERS = {
    "adamw": lambda: optax.adamw(0.1, mask=decay_mask),
    "schedule": lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 5)),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "lora+": lambda: optax.chain(optax.sgd(0.1, momentum=0.9), lora_plus(4.0)),
    "labels": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.2), "rest": optax.set_to_zero()},
        lambda t: jax.tree.map(
            lambda n: n if n in ("a", "b") else "rest", jlora.labels(t)
        ),
    ),
    "some layers": lambda: optax.chain(
        optax.masked(optax.adam(0.1), layers_01), optax.scale(0.5)
    ),
    "lora-fa": lambda: lora_fa(optax.adamw(0.1), lora_params()),
    "riemannian": lambda: optax.chain(riemannian(), optax.adam(0.1)),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "muon": lambda: optax.contrib.muon(0.1),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 3), optax.sgd(0.1)),
    "multi": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "ema": lambda: optax.chain(optax.adam(0.1), optax.ema(0.9)),
}


# They mix leaves, or treat each by a number of its own.
LEAF_BY_LEAF = ("multi", "noise", "some layers")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_gives_what_it_gives_leaf_by_leaf(name, by_leaf):
    tx = OPTIMISERS[name]()
    state, metrics, _ = trained(tx)
    assert bool(stacks_of(state)) is (name not in LEAF_BY_LEAF)
    by_leaf()
    want, numbers, _ = trained(tx)
    assert not stacks_of(want)
    assert_same(state, want, rtol=2e-5, atol=1e-6)
    assert_close(metrics, numbers, rtol=1e-5)
    moved = jax.tree.map(lambda x, y: jnp.any(x != y), state.params, lora_params())
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.1, "skip_nonfinite": True},
        {"accumulate": 2},
        {"compute_dtype": jnp.bfloat16, "donate": False},
        {"hooks": lambda info: {"size": optax.tree.norm(info.updates)}},
    ],
)
def test_options_of_the_step(options, by_leaf):
    tx = optax.adamw(0.1)
    state, metrics, _ = trained(tx, **options)
    assert stacks_of(state)
    by_leaf()
    want, numbers, _ = trained(tx, **options)
    assert_same(state, want, rtol=2e-5, atol=1e-6)
    assert_close(metrics, numbers, rtol=1e-5)


def test_adamw_is_the_same_to_the_bit_but_for_the_norm(by_leaf):
    state, _, _ = trained(optax.adamw(0.1))
    by_leaf()
    want, _, _ = trained(optax.adamw(0.1))
    assert_same(state, want)


def test_the_optimiser_runs_once_for_leaves_that_are_alike():
    tx, params = optax.adamw(0.1, mask=decay_mask), lora_params()
    state, _, step = trained(tx, params, n=1)
    # A, B and biases, and their two moments. The head has no like.
    assert len(stacks_of(state)) == 3 * 3
    roots = [
        eqn.outvars[0].aval.shape
        for eqn in equations(step.trace(state, batch_of(0)).jaxpr)
        if eqn.primitive.name == "sqrt" and eqn.outvars[0].aval.ndim
    ]
    assert sorted(roots) == sorted([(4, D, R), (4, R, D), (4, D), (D, D)])


def test_who_is_masked_lies_apart_from_who_is_not(monkeypatch):
    monkeypatch.setattr(_layout, "FEWEST", 2)
    state, _, _ = trained(OPTIMISERS["some layers"](), n=1)
    groups = state.lying.form.layout.groups
    assert sorted((len(rows), len(rows[0])) for rows in groups) == 3 * [(2, 1)] + 3 * [
        (2, 3)  # with its moments
    ]
    # All have the same state; two are told apart by what is done to them.
    tx = optax.chain(optax.trace(0.9), optax.masked(optax.scale(-0.1), layers_01))
    groups = trained(tx, n=1)[0].lying.form.layout.groups
    assert [(len(rows), len(rows[0])) for rows in groups] == 6 * [(2, 2)]


# -- what users see --------------------------------------------------------------------


def test_a_state_is_the_tree_that_it_was():
    tx = optax.adamw(0.1)
    first = jt.TrainState.create(lora_params(), tx)
    state, _, step = trained(tx)
    assert jax.tree.structure(state) == jax.tree.structure(first)
    assert state.params["layer0"]["q"].adapters[""].a.shape == (D, R)
    assert state.params is state.params  # made once
    again, _ = step(jax.tree.map(jnp.copy, state), batch_of(3))
    thrice, _ = step(pickle.loads(pickle.dumps(state)), batch_of(3))
    state, _ = step(state, batch_of(3))
    assert step.cache_size() == 1
    assert_same(again, state)
    assert_same(thrice, state)
    with pytest.raises(AttributeError, match="no attribute 'parameters'"):
        _ = state.parameters


def test_what_was_given_to_a_step_is_gone_stacked_or_not():
    tx = optax.adamw(0.1)
    first = jt.TrainState.create(lora_params(), tx)
    step = jt.make_train_step(loss_fn, tx)
    second, _ = step(first, batch_of(0))
    moving = (first.step, first.trainable, first.opt_state)
    assert all(x.is_deleted() for x in jax.tree.leaves(moving))
    step(second, batch_of(0))
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        _ = second.params


def test_steps_of_other_optimisers_take_each_others_states(by_leaf):
    # Alike but for the rate, and with a group of its own for B.
    one, two = optax.sgd(0.1), optax.chain(optax.sgd(0.2), lora_plus(3.0))

    def run():
        steps = [jt.make_train_step(loss_fn, tx) for tx in (one, two)]
        state = jt.TrainState.create(lora_params(), one)
        for i in range(4):
            if i == 1:
                empty = two.init(state.trainable)
                state = jt.TrainState(
                    state.step, state.trainable, state.frozen, empty, state.key
                )
            state, _ = steps[min(i, 1)](state, batch_of(i))
        return state

    state = run()
    by_leaf()
    assert_close(state.params, run().params, rtol=1e-5)


def test_evaluation_takes_a_state_in_stacks():
    state, _, _ = trained(optax.adamw(0.1))
    step = jt.make_eval_step(lambda p, batch: {"loss": loss_fn(p, batch, None)})
    for tree in (state, state.params, state):
        got = step(tree, batch_of(7))["loss"]
        np.testing.assert_allclose(
            got, jlora.lora(loss_fn)(state.params, batch_of(7), None), rtol=1e-6
        )


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_from_a_checkpoint_of_either_form(tmp_path, first, by_leaf):
    tx = optax.adamw(0.1)
    whole, _, _ = trained(tx, n=4)
    if first:
        by_leaf()
    state, _, step = trained(tx, n=2)
    assert bool(stacks_of(state)) is not first
    checkpoint.save_state(tmp_path / "state", state)
    pytest.MonkeyPatch().setattr(_layout, "FEWEST", 4)
    fresh = jt.TrainState.create(lora_params(), tx)
    state, _ = checkpoint.restore_state(tmp_path / "state", fresh)
    step = jt.make_train_step(loss_fn, tx)
    for i in (2, 3):
        state, _ = step(state, batch_of(i))
    assert stacks_of(state)
    assert_same(state, whole)


# -- where leaves stay leaves ----------------------------------------------------------


def test_leaves_on_several_devices_stay_leaves():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    tx = optax.adamw(0.1)
    state = jt.TrainState.create(lora_params(), tx, mesh=mesh)
    step = jt.make_train_step(loss_fn, tx, mesh=mesh)
    for i in range(3):
        state, _ = step(state, batch_of(i))
    assert not stacks_of(state)
    assert step.cache_size() == 1
    leaf = state.params["layer0"]["q"].adapters[""].a
    assert leaf.sharding == NamedSharding(mesh, P())
    want, _, _ = trained(tx)
    assert_close(state.trainable, want.trainable, rtol=1e-4, atol=1e-6)


def test_large_leaves_stay_leaves(monkeypatch):
    monkeypatch.setattr(_layout, "LARGEST", D)
    state, _, _ = trained(optax.adamw(0.1), n=1)
    assert {x.shape for x in state.lying.buffers if x.shape[:1] == (4,)} == {(4, D)}


def test_a_step_inside_of_another_program():
    tx = optax.sgd(0.1)
    step = jt.make_train_step(loss_fn, tx, donate=False)
    state = jt.TrainState.create(lora_params(), tx)
    got, _ = jax.jit(step)(state, batch_of(0))
    want, _ = step(state, batch_of(0))
    assert_same(got, want, rtol=1e-5, atol=1e-7)


def test_ids_are_checked_in_a_table_that_lies_in_a_stack():
    tables = {f"table{i}": jnp.ones((7, 3)) for i in range(4)}
    tree = jlora.lorafy(
        tables | {"w": jnp.ones((3, 3))},
        1,
        ["w"],
        train=[f"table{i}" for i in range(4)],
    )

    def loss(params, batch, key):
        return jnp.mean(jnp.take(params["table2"], batch["ids"], axis=0) @ params["w"])

    state = jt.TrainState.create(tree, optax.sgd(0.1))
    step = jt.make_train_step(loss, optax.sgd(0.1))
    state, _ = step(state, {"ids": np.array([0, 6])})
    assert stacks_of(state)
    with pytest.raises(
        jlora.JloraError if hasattr(jlora, "JloraError") else Exception, match="7"
    ):
        step(state, {"ids": np.array([0, 7])})


# -- a program on stacks ---------------------------------------------------------------


def test_what_lanes_have_alike_is_computed_once():
    def f(a, b, c, s):
        # Alike in all lanes, then mixed, then of the first lane alone.
        alike = [jnp.where(x > s, jnp.exp(x) * s, 0) for x in (a, b, c)]
        total = sum(jnp.sum(x) for x in alike)
        return [alike[0] + 1, alike[1] / total, alike[2] / total, *alike]

    xs = [jnp.arange(6.0).reshape(2, 3) + i for i in range(3)]
    lanes = [Lane(0, 0, i, 3) for i in range(3)]
    program = jax.make_jaxpr(f)(*xs, 2.0)
    joined = Joined(program, [*lanes, None])
    one, two, three = joined.alike([0, 1, 2])
    assert len({one, two, three}) == 3
    assert len(set(joined.alike([3, 4, 5]))) == 1
    assert len(set(joined.alike([4, 3, 5]))) == 3  # not in their own lanes

    def run(stack, s):
        plain, (stacked,) = joined.run([None] * 3 + [s], [stack], [(3, 4, 5)])
        return plain[:3], stacked

    plain, stacked = jax.jit(run)(jnp.stack(xs), 2.0)
    want = f(*xs, 2.0)
    assert_close(plain, want[:3], rtol=1e-6)
    assert_close(stacked, jnp.stack(want[3:]), rtol=1e-6)
    names = [
        e.primitive.name for e in equations(jax.make_jaxpr(run)(jnp.stack(xs), 2.0))
    ]
    assert names.count("exp") == 1
