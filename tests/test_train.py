import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import assert_close, equations, products, randomise

import jlora
import jlora.train as jt

V, D, H, B = 13, 7, 11, 8


def plain_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(5), 3)
    normal = lambda k, *shape: (jax.random.normal(k, shape) * 0.3).astype(dtype)
    return {
        "query": {"kernel": normal(keys[0], D, H), "bias": jnp.zeros(H, dtype)},
        "value": {"kernel": normal(keys[1], H, D)},
        "head": {"kernel": normal(keys[2], D, V)},
    }


def lora_params(dtype=jnp.float32, **kwargs):
    tree = jlora.lorafy(plain_params(dtype), 2, ["query", "value"], **kwargs)
    return randomise(tree, jax.random.key(9))


def model(p, x):
    h = x @ p["query"]["kernel"]
    h = jnp.tanh(h + jnp.broadcast_to(p["query"]["bias"], h.shape))
    return (h @ p["value"]["kernel"]) @ p["head"]["kernel"]


def loss_fn(p, batch, key):
    logits = model(p, batch["x"])
    right = jnp.where(jnp.argmax(logits, -1) == batch["y"], batch["mask"], 0)
    pair = jt.cross_entropy(logits, batch["y"], batch["mask"])
    return pair, {"accuracy": (jnp.sum(right), jnp.sum(batch["mask"]))}


def make_batch(seed=0, items=B, length=5):
    rng = np.random.default_rng(seed)
    lengths = np.arange(items) % length  # the first of them is all padding
    return {
        "x": jnp.asarray(rng.normal(size=(items, length, D)), jnp.float32),
        "y": jnp.asarray(rng.integers(0, V, (items, length))),
        "mask": jnp.asarray(np.arange(length) < lengths[:, None], jnp.float32),
    }


def run(step, state, n=3, batch=None):
    for i in range(n):
        state, metrics = step(state, make_batch(i) if batch is None else batch)
    return state, metrics


def sgd_run(*, tx=None, params=None, n=3, **kwargs):
    tx = tx or optax.sgd(0.5)
    state = jt.TrainState.create(lora_params() if params is None else params, tx)
    step = jt.make_train_step(loss_fn, tx, **kwargs)
    state, metrics = run(step, state, n)
    assert step.cache_size() == 1
    return state, metrics


def same_bits(one, two):
    one, two = jax.tree.leaves(one), jax.tree.leaves(two)
    assert len(one) == len(two)
    for x, y in zip(one, two, strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# -- the step --------------------------------------------------------------------------


def test_step_equals_a_step_by_hand():
    params = lora_params()
    batch = make_batch()
    half, frozen = jlora.split(params)

    def by_hand(half):
        dense = jlora.merge(jlora.combine(half, frozen))
        total, count = loss_fn(dense, batch, None)[0]
        return total / count

    loss, grads = jax.jit(jax.value_and_grad(by_hand))(half)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, half, grads)
    state = jt.TrainState.create(params, optax.sgd(0.5))
    state, metrics = jt.make_train_step(loss_fn, optax.sgd(0.5))(state, batch)
    assert_close(state.trainable, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), 1e-5)
    assert metrics["weight"] == jnp.sum(batch["mask"])
    assert not metrics["nonfinite"]
    assert int(state.step) == 1


@pytest.mark.loose_promotion  # optax's own dtypes
def test_nothing_of_the_kernels_shape_is_optimised_or_differentiated():
    tx = optax.adam(0.1)
    state = jt.TrainState.create(lora_params(), tx)
    shapes = {x.shape for x in jax.tree.leaves((state.trainable, state.opt_state))}
    assert shapes == {(D, 2), (2, H), (H, 2), (2, D), ()}
    step = jt.make_train_step(loss_fn, tx)
    jaxpr = jax.make_jaxpr(step)(state, make_batch())
    formed = [
        v.aval.shape
        for eqn in equations(jaxpr)
        if eqn.primitive.name not in ("stop_gradient", "jit", "pjit")
        for v in eqn.outvars
    ]
    assert (D, H) not in formed
    assert (H, D) not in formed


@pytest.mark.loose_promotion  # optax's own dtypes
def test_the_base_and_the_users_arrays_survive_donation():
    params = lora_params()
    state = jt.TrainState.create(params, optax.adam(0.1))
    step = jt.make_train_step(loss_fn, optax.adam(0.1))
    new, _ = step(state, make_batch())
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    moving = (state.trainable, state.opt_state)
    assert all(x.is_deleted() for x in jax.tree.leaves(moving))
    pairs = zip(jax.tree.leaves(state.frozen), jax.tree.leaves(new.frozen), strict=True)
    assert all(x is y for x, y in pairs)  # neither copied nor donated
    assert new.key is state.key


def test_without_donation_the_old_state_can_be_used_again():
    state = jt.TrainState.create(lora_params(), optax.sgd(0.5))
    step = jt.make_train_step(loss_fn, optax.sgd(0.5), donate=False)
    same_bits(step(state, make_batch())[0], step(state, make_batch())[0])


@pytest.mark.parametrize("tx", [optax.contrib.schedule_free_sgd(0.1), optax.lion(0.1)])
def test_optimisers_that_keep_the_parameters_can_be_donated(tx):
    sgd_run(tx=tx, n=2)


def test_numpy_base_is_put_on_the_device_once():
    params = jlora.lorafy(jax.tree.map(np.asarray, plain_params()), 2, ["query"])
    state = jt.TrainState.create(params, optax.sgd(0.1))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@pytest.mark.loose_promotion  # optax's own dtypes
def test_a_batch_on_a_device_or_on_the_host_compiles_once():
    state = jt.TrainState.create(lora_params(), optax.adam(0.1))
    step = jt.make_train_step(loss_fn, optax.adam(0.1))
    run(step, state, batch=jax.tree.map(np.asarray, make_batch()))
    assert step.cache_size() == 1


@pytest.mark.loose_promotion  # optax's own dtypes
def test_a_base_that_was_put_on_a_device_compiles_once():
    """The adapters, which were put nowhere, go there too."""
    device = jax.devices()[1]
    tree = jlora.lorafy(jax.device_put(plain_params(), device), 2, ["query", "value"])
    step, tx = jt.make_train_step(loss_fn, optax.adam(0.1)), optax.adam(0.1)
    state, metrics = run(step, jt.TrainState.create(tree, tx, jax.random.key(0)))
    assert step.cache_size() == 1
    assert metrics["loss"].devices() == {device}
    assert all(x.devices() == {device} for x in jax.tree.leaves(state))


def test_abstract_state_has_the_real_ones_shapes():
    tx = optax.adam(0.1)
    params = lora_params()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    abstract, real = (jt.TrainState.create(p, tx) for p in (shapes, params))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    pairs = zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True)
    assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)


def test_nothing_trained_is_an_error():
    with pytest.raises(jlora.StructureError, match="nothing in this tree is trained"):
        jt.TrainState.create(plain_params(), optax.sgd(0.1))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"accumulate": 0}, "accumulate=0"), ({"accumulate": 2.0}, "accumulate=2.0"),
     ({"accumulate": True}, "accumulate=True"), ({"clip_norm": -1.0}, "clip_norm=-1.0"),
     ({"clip_norm": float("nan")}, "clip_norm=nan"), ({"clip_norm": "1"}, "clip_norm='1'"),
     ({"parallel": "threads"}, "parallel='threads'"),
     ({"compute_dtype": "bf16"}, "compute_dtype='bf16'"),
     ({"compute_dtype": jnp.int8}, "compute_dtype=.*floating"),
     ({"on_missing": "merge"}, "on_missing='merge'"),
     ({"hooks": [1]}, "hooks=1: expected functions"), ({"loss_fn": 0.5}, "loss_fn is float"),
     ({"tx": optax.constant_schedule(1.0)}, "tx is function")],
)  # fmt: skip
def test_options_out_of_range(options, words):
    with pytest.raises(jlora.OptionError, match=words):
        jt.make_train_step(**{"loss_fn": loss_fn, "tx": optax.sgd(0.1), **options})
    also = {"compute_dtype", "parallel", "on_missing"} & set(options)
    for name in also:
        with pytest.raises(jlora.OptionError, match=words):
            jt.make_eval_step(lambda p, b: {}, **{name: options[name]})


def test_whole_numbers_of_any_kind_are_whole_numbers():
    want, _ = sgd_run(accumulate=4, n=1)
    got, _ = sgd_run(accumulate=np.int64(4), clip_norm=np.float32(1e9), n=1)
    assert_close(got.trainable, want.trainable, rtol=1e-6, atol=1e-7)


# -- accumulation and weights ----------------------------------------------------------


@pytest.mark.parametrize("accumulate", [4, 8])
def test_accumulation_equals_the_big_batch_with_uneven_padding(accumulate):
    whole, one = sgd_run(clip_norm=0.1)
    parts, two = sgd_run(clip_norm=0.1, accumulate=accumulate)
    assert_close(parts.trainable, whole.trainable, rtol=1e-5, atol=1e-6)
    assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_a_mean_with_its_weight_equals_a_total_with_its_count():
    def mean_loss(p, batch, key):
        (total, count), metrics = loss_fn(p, batch, key)
        mean = total / jnp.maximum(count, 1)
        return mean, {**metrics, "weight": count, "length": jnp.float32(5)}

    tx = optax.sgd(0.5)
    whole, _ = sgd_run()
    state = jt.TrainState.create(lora_params(), tx)
    state, metrics = run(jt.make_train_step(mean_loss, tx, accumulate=8), state)
    assert_close(state.trainable, whole.trainable, rtol=1e-5, atol=1e-6)
    assert metrics["length"] == 5


def test_a_plain_mean_is_averaged_over_microbatches():
    def mean_loss(p, batch, key):
        return jnp.mean(model(p, batch["x"]) ** 2)

    tx = optax.sgd(0.5)
    states = [
        run(jt.make_train_step(mean_loss, tx, accumulate=n),
            jt.TrainState.create(lora_params(), tx))[0]
        for n in (1, 4)
    ]  # fmt: skip
    assert_close(states[1].trainable, states[0].trainable, rtol=1e-5, atol=1e-6)


def test_a_batch_of_padding_alone_changes_nothing():
    batch = make_batch()
    batch["mask"] = jnp.zeros_like(batch["mask"])
    state = jt.TrainState.create(lora_params(), optax.sgd(0.5))
    new, metrics = jt.make_train_step(loss_fn, optax.sgd(0.5), donate=False)(
        state, batch
    )
    same_bits(new.trainable, state.trainable)
    assert metrics["loss"] == 0
    assert metrics["weight"] == 0


def test_scalars_of_a_batch_are_shared_and_uneven_batches_refused():
    tx = optax.sgd(0.5)
    state = jt.TrainState.create(lora_params(), tx)
    step = jt.make_train_step(loss_fn, tx, accumulate=4)
    state, _ = step(state, {**make_batch(), "temperature": jnp.float32(1)})
    with pytest.raises(jlora.ShapeError, match=r"does not divide.*'mask' is \(6, 5\)"):
        step(state, make_batch(items=6))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x: jnp.stack([x, x]), r"'loss' is \(2,\)"),
        (lambda x: ((x, x), {"weight": x}), "leave the other out"),
        (lambda x: (x, {"grad_norm": x}), "'grad_norm', which the step"),
        (lambda x: (x, {"acc": "high"}), "'acc' is str"),
    ],
)
def test_what_a_loss_function_may_not_return(result, words):
    tx = optax.sgd(0.5)
    loss = lambda p, b, k: result(jnp.sum(model(p, b["x"])))
    state = jt.TrainState.create(lora_params(), tx)
    with pytest.raises(jlora.StructureError, match=words):
        jt.make_train_step(loss, tx)(state, make_batch())


# -- clipping, finite numbers, dtypes, dropout, hooks ----------------------------------


def test_clipping_is_optax_clipping_of_the_trainable_leaves():
    clipped, metrics = sgd_run(clip_norm=0.05)
    chained, _ = sgd_run(tx=optax.chain(optax.clip_by_global_norm(0.05),
                                        optax.sgd(0.5)))  # fmt: skip
    assert metrics["grad_norm"] > 0.05
    assert_close(clipped.trainable, chained.trainable, rtol=1e-6, atol=1e-7)


@pytest.mark.loose_promotion  # optax's own dtypes
@pytest.mark.parametrize("skip", [True, False])
def test_nonfinite_is_said_and_skipped_if_asked(skip):
    tx = optax.adam(0.1)
    state = jt.TrainState.create(lora_params(), tx)
    step = jt.make_train_step(loss_fn, tx, skip_nonfinite=skip, donate=False)
    batch = make_batch()
    bad = {**batch, "x": batch["x"].at[-1, 0, 0].set(jnp.nan)}
    new, metrics = step(state, bad)
    assert metrics["nonfinite"]
    assert int(new.step) == 1
    if skip:
        same_bits((new.trainable, new.opt_state), (state.trainable, state.opt_state))
    else:
        assert any(jnp.isnan(x).any() for x in jax.tree.leaves(new.trainable))


@pytest.mark.loose_promotion  # optax's own dtypes
def test_mixed_precision_computes_in_bfloat16_and_updates_in_float32():
    seen = []

    def loss(p, batch, key):
        seen.append({x.dtype for x in jax.tree.leaves(p)} | {batch["x"].dtype})
        logits = model(p, batch["x"])
        seen.append({logits.dtype})
        return jt.cross_entropy(logits, batch["y"], batch["mask"])

    tx = optax.adam(0.1)
    params = lora_params(train=["bias"])
    state = jt.TrainState.create(params, tx)
    step = jt.make_train_step(loss, tx, compute_dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(step)(state, make_batch())
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in seen)
    dots = products(jaxpr)
    assert {v.aval.dtype for e in dots for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    state, _ = run(step, state)
    floats = jax.tree.leaves((state.trainable, state.opt_state[0].mu, state.frozen))
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    exact, _ = run(jt.make_train_step(loss, tx), jt.TrainState.create(params, tx))
    near = run(step, jt.TrainState.create(params, optax.adam(0.1)))[0]
    same_bits(near.trainable, state.trainable)
    assert_close(state.trainable, exact.trainable, rtol=0.1, atol=0.25)


@pytest.mark.loose_promotion  # bfloat16 kernels, a float32 batch
def test_integers_of_a_batch_and_an_uncast_batch_keep_their_dtype():
    seen = {}

    def loss(p, batch, key):
        seen.update({k: v.dtype for k, v in batch.items()})
        return jnp.sum(model(p, batch["x"]).astype(jnp.float32))

    tx = optax.sgd(0.1)
    for cast, want in ((True, jnp.bfloat16), (False, jnp.float32)):
        step = jt.make_train_step(loss, tx, compute_dtype=jnp.bfloat16, cast_batch=cast)
        step.lower(jt.TrainState.create(lora_params(), tx), make_batch())
        assert seen["x"] == want
        assert seen["y"] == jnp.int32


def test_dropout_differs_by_step_and_run_and_is_off_in_evaluation():
    tx = optax.set_to_zero()
    params = lora_params(dropout=0.4)
    losses = {}
    for seed in (0, 1):
        state = jt.TrainState.create(params, tx, jax.random.key(seed))
        step = jt.make_train_step(loss_fn, tx)
        losses[seed] = []
        for _ in range(2):
            state, metrics = step(state, make_batch())
            losses[seed].append(float(metrics["loss"]))
    assert len({*losses[0], *losses[1]}) == 4
    evaluation = jt.make_eval_step(lambda p, b: {"loss": loss_fn(p, b, None)[0]})
    total, count = loss_fn(jlora.merge(params), make_batch(), None)[0]
    got = evaluation(state, make_batch())["loss"]
    np.testing.assert_allclose(got, total / count, rtol=1e-5)


def test_the_loss_functions_key_differs_by_step_and_microbatch():
    def loss(p, batch, key):
        noise = jax.random.uniform(key)
        return 0 * jnp.sum(model(p, batch["x"])) + noise, {"square": noise**2}

    tx = optax.sgd(0.1)
    state = jt.TrainState.create(lora_params(), tx)
    step = jt.make_train_step(loss, tx, accumulate=2)
    state, first = step(state, make_batch())
    state, second = step(state, make_batch())
    assert first["loss"] != second["loss"]
    assert first["square"] - first["loss"] ** 2 > 1e-9  # two different numbers


def test_hooks_see_the_step_and_may_not_shadow():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    hook = lambda info: {
        "learning_rate": schedule(info.step),
        "update": optax.tree.norm(info.updates),
    }
    _, metrics = sgd_run(tx=optax.sgd(schedule), hooks=hook)
    assert metrics["learning_rate"] == 0.5
    assert metrics["update"] > 0
    with pytest.raises(jlora.StructureError, match=r"\['loss'\]"):
        sgd_run(hooks=[lambda info: {"loss": 0}])


@pytest.mark.loose_promotion  # optax's own dtypes
def test_the_optimiser_is_told_the_loss():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    sgd_run(tx=tx)


def test_an_optimiser_that_changes_its_states_structure_is_named():
    tx = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g, (1,)))
    state = jt.TrainState.create(lora_params(), tx)
    with pytest.raises(jlora.StructureError, match="another structure than it was"):
        jt.make_train_step(loss_fn, tx)(state, make_batch())


def test_groups_of_leaves_by_label():
    params = lora_params()
    labels = jlora.split(jlora.labels(params))[0]
    tx = optax.multi_transform({"a": optax.set_to_zero(), "b": optax.sgd(0.5)}, labels)
    state, _ = sgd_run(tx=tx, params=params)
    same_bits(state.params["query"]["kernel"].adapters[""].a,
              params["query"]["kernel"].adapters[""].a)  # fmt: skip


# -- masked, on the whole tree ---------------------------------------------------------


@pytest.mark.loose_promotion  # optax's own dtypes
def test_masked_training_of_the_whole_tree_equals_training_by_split():
    params = lora_params()
    tx = optax.masked(optax.adam(0.1), jlora.trainable_mask(params))

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            (total, count), _ = jlora.lora(loss_fn)(params, batch, None)
            return total / count

        grads = jax.grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    whole, opt_state = params, tx.init(params)
    for i in range(3):
        whole, opt_state = step(whole, opt_state, make_batch(i))
    half, _ = sgd_run(tx=optax.adam(0.1), params=params)
    assert_close(jlora.split(whole)[0], half.trainable, rtol=1e-5, atol=1e-6)
    same_bits(jlora.split(whole)[1], jlora.split(params)[1])


# -- several devices -------------------------------------------------------------------


@pytest.fixture
def mesh():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    return Mesh(np.array(jax.devices()[:4]), ("data",))


@pytest.mark.parametrize(
    ("spec", "accumulate"), [(P(), 1), (P(), 2), (P(None, "data"), 1)]
)
def test_sharded_jit_equals_one_device(mesh, accumulate, spec):
    want, _ = sgd_run(clip_norm=0.1)
    params = lora_params()
    kernel = params["query"]["kernel"]
    params = jax.device_put(params, NamedSharding(mesh, P()))
    if spec != P():
        wide = jlora.lorafy(
            {"up": {"kernel": jax.device_put(jnp.ones((D, 12)),
                                             NamedSharding(mesh, spec))}},
            2, ["up"],
        )  # fmt: skip
        params = {**params, "unused": wide}
    tx = optax.sgd(0.5)
    state = jt.TrainState.create(params, tx)
    step = jt.make_train_step(loss_fn, tx, clip_norm=0.1, accumulate=accumulate)
    along = NamedSharding(mesh, P("data"))
    before = [x.sharding for x in jax.tree.leaves(state.trainable)]
    for i in range(3):
        state, _ = step(state, jax.device_put(make_batch(i), along))
    assert step.cache_size() == 1
    assert [x.sharding for x in jax.tree.leaves(state.trainable)] == before
    got = state.params["query"]["kernel"]
    assert got.shape == kernel.shape
    assert_close(got, want.params["query"]["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("check_vma", "accumulate"), [(True, 1), (True, 2), (False, 2)]
)
def test_shard_map_equals_one_device(mesh, check_vma, accumulate):
    want, one = sgd_run(clip_norm=0.1)
    tx = optax.sgd(0.5)
    params = jax.device_put(lora_params(), NamedSharding(mesh, P()))
    step = jt.make_train_step(
        loss_fn, tx, clip_norm=0.1, accumulate=accumulate, axis_name="data"
    )
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(),
                      check_vma=check_vma)
    )  # fmt: skip
    state, metrics = run(mapped, jt.TrainState.create(params, tx))
    assert_close(state.trainable, want.trainable, rtol=1e-5, atol=1e-6)
    assert_close(metrics, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [True, False])
def test_pmap_equals_one_device(mesh, own):
    want, one = sgd_run(clip_norm=0.1)
    tx = optax.sgd(0.5)
    state = jt.replicate(jt.TrainState.create(lora_params(), tx))
    if own:
        step = jt.make_train_step(loss_fn, tx, clip_norm=0.1, parallel="pmap")
    else:
        inner = jt.make_train_step(loss_fn, tx, clip_norm=0.1, axis_name="d")
        step = jax.pmap(inner, axis_name="d")
    for i in range(3):
        batch = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), make_batch(i))
        state, metrics = step(state, batch)
    if own:
        assert step.cache_size() == 1
    assert_close(jt.unreplicate(state).trainable, want.trainable, rtol=1e-5, atol=1e-6)
    assert_close(jt.unreplicate(metrics), one, rtol=1e-5, atol=1e-6)


# -- evaluation and checks -------------------------------------------------------------


def test_evaluation_over_uneven_batches_equals_the_whole():
    def metrics(p, batch):
        pair, more = loss_fn(p, batch, None)
        mean = pair[0] / pair[1]
        return {"loss": pair, "mean": mean, "weight": pair[1], **more}

    params = lora_params()
    batch = make_batch(items=8)
    parts = [{k: x[i:j] for k, x in batch.items()} for i, j in ((0, 2), (2, 8))]
    step = jt.make_eval_step(metrics)
    got = jt.evaluate(step, params, parts)
    (total, count), more = loss_fn(jlora.merge(params), batch, None)
    right, of = more["accuracy"]
    np.testing.assert_allclose(got["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(got["mean"], total / count, rtol=1e-5)
    np.testing.assert_allclose(got["accuracy"], right / of, rtol=1e-6)
    with pytest.raises(jlora.StructureError, match="no batches"):
        jt.evaluate(step, params, iter(()))
    with pytest.raises(jlora.StructureError, match="returns an array: expected a dict"):
        jt.make_eval_step(lambda p, b: jnp.zeros(()))(params, batch)


def test_check_gradients_names_the_dead():
    tx = optax.sgd(0.1)
    fresh = jlora.lorafy(plain_params(), 2, ["query", "value"], train=["bias"])
    state = jt.TrainState.create(fresh, tx)  # a's gradient is 0 here, all is well
    assert jt.check_gradients(loss_fn, state, make_batch()) == ()

    def without_value(p, batch, key):
        return jnp.sum(batch["x"] @ p["query"]["kernel"])

    dead = jt.check_gradients(without_value, state, make_batch())
    assert set(dead) == {"query/bias", "value/kernel"}
    outside = plain_params()
    with pytest.raises(jlora.StructureError, match="no gradient at all: none of the 3"):
        jt.check_gradients(lambda p, b, k: loss_fn(outside, b, k), state, make_batch())


# -- cross entropy ---------------------------------------------------------------------


def reference(logits, labels, mask, eps, z):
    logits = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, -1)
    onehot = jax.nn.one_hot(labels, V) * (1 - eps) + eps / V
    nll = lse - jnp.sum(onehot * logits, -1) + z * lse**2
    return jnp.sum(jnp.where(mask > 0, nll * mask, 0))


@pytest.mark.parametrize(("eps", "z"), [(0.0, 0.0), (0.1, 0.5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_and_its_gradient(getkey, eps, z, dtype):
    logits = (3 * jax.random.normal(getkey(), (3, 5, V))).astype(dtype)
    labels = jax.random.randint(getkey(), (3, 5), 0, V)
    mask = jnp.tile(jnp.array([1.0, 0, 1, 2.5, 0]), (3, 1))
    logits = logits.at[:, 1].set(jnp.inf)  # masked: what is there does not matter
    options = {"label_smoothing": eps, "z_loss": z}
    loss = lambda x: jt.cross_entropy(x, labels, mask, **options)[0]
    want, dwant = jax.value_and_grad(reference)(
        jnp.where(mask[..., None] > 0, logits, 0), labels, mask, eps, z
    )
    got, dgot = jax.jit(jax.value_and_grad(loss))(logits)
    assert got.dtype == jnp.float32
    assert dgot.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=1e-5)
    tol = 1e-5 if dtype == jnp.float32 else 2e-2
    dwant = jnp.where(mask[..., None] > 0, dwant, 0)
    assert_close(
        dgot.astype(jnp.float32), dwant.astype(jnp.float32), rtol=tol, atol=tol
    )
    assert jt.cross_entropy(logits, labels, mask)[1] == jnp.sum(mask)


def test_cross_entropy_leaves_out_negative_labels(getkey):
    logits = jax.random.normal(getkey(), (4, V))
    labels = jnp.array([3, -100, -1, 12])
    total, count = jt.cross_entropy(logits, labels)
    want = -sum(jax.nn.log_softmax(logits[i])[labels[i]] for i in (0, 3))
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert count == 2


def test_cross_entropy_keeps_no_float32_logits():
    logits = jnp.zeros((5, V), jnp.bfloat16)
    labels = jnp.zeros(5, jnp.int32)
    _, pullback = jax.vjp(lambda x: jt.cross_entropy(x, labels)[0], logits)
    kept = [x for x in jax.tree.leaves(pullback) if x.shape == logits.shape]
    assert [x.dtype for x in kept] == [jnp.bfloat16]


def test_cross_entropy_says_what_does_not_fit():
    with pytest.raises(jlora.ShapeError, match=r"logits \(2, 13\) and labels \(3,\)"):
        jt.cross_entropy(jnp.zeros((2, V)), jnp.zeros(3, jnp.int32))
    with pytest.raises(jlora.ShapeError, match=r"mask \(3,\)"):
        jt.cross_entropy(jnp.zeros((2, V)), jnp.zeros(2, jnp.int32), jnp.ones(3))


# -- imports ---------------------------------------------------------------------------


def test_the_module_lists_its_public_names():
    names = dir(jt)
    assert {"TrainState", "make_train_step", "cross_entropy"} <= set(names)
    for name in names:
        assert not name.startswith("_")
        home = getattr(jt, name).__module__
        assert home.startswith(("jlora.", "collections", "typing"))


def test_import_needs_optax_only_here():
    code = """
import sys
sys.modules["optax"] = None
sys.modules["orbax"] = None
import jlora
for name in ("train", "checkpoint"):
    try:
        __import__("jlora." + name)
    except ImportError as error:
        assert 'pip install "jlora[train]"' in str(error), error
    else:
        raise SystemExit(f"jlora.{name} imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
