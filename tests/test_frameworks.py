"""Real little models of each framework, unchanged, with adapters."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from tools import TOL, assert_close, products, randomise

import jlora
import jlora.train


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=6, name="attn")(h, h)
        h = nn.DenseGeneral((3, 5), name="up")(nn.LayerNorm()(x))
        return x + nn.DenseGeneral(4, axis=(-2, -1), name="down")(nn.gelu(h)), None


class Linen(nn.Module):
    """Embedding with a tied head, scanned and rematerialised blocks, a convolution."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 4, name="embed")
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(name="blocks")(embed(ids))
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.Dense(4, dtype=jnp.bfloat16, name="half")(x).astype(jnp.float32)
        return embed.attend(x)


def linen():
    model, ids = Linen(), jnp.array([[1, 2, 3, 4, 10], [0, 5, 6, 7, 8]])
    variables = model.init(jax.random.key(0), ids)
    return model.apply, variables, ids


def linen_unrolled():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x, _ = Block(name=f"layers_{i}")(x)
            return x

    model, x = Net(), jax.random.normal(jax.random.key(1), (2, 5, 4))
    return model.apply, model.init(jax.random.key(0), x), x


def nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 4, rngs=rngs)
            self.query = nnx.Linear(4, 6, rngs=rngs)
            self.conv = nnx.Conv(6, 4, (3,), rngs=rngs)

        def __call__(self, ids):
            x = nnx.gelu(self.query(self.embed(ids)))
            return self.embed.attend(self.conv(x))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    ids = jnp.array([[1, 2, 3, 4, 10]])
    return lambda p, ids: nnx.merge(graph, p)(ids), params, ids


def equinox():
    model = eqx.nn.MLP(3, 5, 7, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    x = jax.random.normal(jax.random.key(1), (2, 3))
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x


def haiku():
    def f(ids):
        x = hk.Embed(11, 4)(ids)
        return hk.Linear(5)(hk.Conv1D(4, 3)(jax.nn.relu(hk.Linear(4)(x))))

    model, ids = hk.without_apply_rng(hk.transform(f)), jnp.array([[1, 2, 10, 4]])
    return model.apply, model.init(jax.random.key(0), ids), ids


def plain():
    def f(p, x):
        return jnp.einsum("bi,iko->bko", jnp.tanh(x @ p["first"]), p["second"])

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": jax.random.normal(keys[0], (3, 7)),
        "second": jax.random.normal(keys[1], (7, 2, 5)),
    }
    return f, params, jax.random.normal(keys[2], (4, 3))


MODELS = [linen, linen_unrolled, nnx_model, equinox, haiku, plain]


def adapted(make):
    """The function, its input, the plain tree, and one with every kernel adapted."""
    f, params, x = make()
    survey = jlora.survey(f, params, x)
    targets = {path: jlora.Target() for path in survey.leaves if survey.is_kernel(path)}
    tree = jlora.lorafy(params, rank=2, targets=targets, survey=survey)
    return f, x, params, tree


@pytest.mark.parametrize("make", MODELS)
def test_starts_as_the_base_model(make):
    f, x, params, tree = adapted(make)
    want = jax.jit(f)(params, x)
    assert_close(jax.jit(jlora.lora(f))(tree, x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_equals_the_merged_model(make):
    f, x, params, tree = adapted(make)
    tree = randomise(tree, jax.random.key(7))
    got = jax.jit(jlora.lora(f))(tree, x)
    want = jax.jit(f)(jlora.merge(tree), x)
    base = jax.jit(f)(params, x)
    tol = 4e-2 if make is linen else 1e-4  # linen has a bfloat16 layer
    size = float(jnp.max(jnp.abs(want)))
    assert_close(got, want, rtol=tol, atol=tol * size)
    assert float(jnp.max(jnp.abs(base - want))) > 20 * tol * size / 10


@pytest.mark.parametrize("make", MODELS)
def test_every_adapter_gets_a_gradient(make):
    f, x, _, tree = adapted(make)
    half, frozen = jlora.split(randomise(tree, jax.random.key(7)))
    low = jlora.lora(f)
    loss = lambda t: jnp.sum(jnp.sin(low(jlora.combine(t, frozen), x)))
    grads = jax.jit(jax.grad(loss))(half)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.any(g != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("make", MODELS)
def test_plain_apply_fails_loudly(make):
    f, x, _, tree = adapted(make)
    # Equinox itself refuses to combine trees of different structure.
    error = ValueError if make is equinox else jlora.UnmergedError
    with pytest.raises(error):
        f(tree, x)


@pytest.mark.parametrize("make", [linen, linen_unrolled, nnx_model])
def test_naming_conventions_agree_with_the_survey(make):
    f, params, x = make()
    survey = jlora.survey(f, params, x)
    if make is linen:  # stacked and convolved kernels need the survey
        with pytest.raises(jlora.ShapeError, match="survey"):
            jlora.lorafy(params, rank=2, targets=["blocks"])
        return
    names = ["attn"] if make is linen_unrolled else ["query", "embed"]
    by_name = jlora.lorafy(params, rank=2, targets=names)
    by_survey = jlora.lorafy(params, rank=2, targets=names, survey=survey)
    assert jax.tree.structure(by_name) == jax.tree.structure(by_survey)


def test_nnx_jit_takes_the_tree():
    f, params, ids = nnx_model()
    tree = jlora.lorafy(params, rank=2, targets=["query"])
    tree = randomise(tree, jax.random.key(1))
    out = nnx.jit(jlora.lora(f))(tree, ids)
    assert_close(out, f(jlora.merge(tree), ids), **TOL[jnp.float32])


def test_bfloat16_net_is_not_promoted():
    """Float32 adapters leave every product of a bfloat16 network in bfloat16."""
    f, params, x = linen_unrolled()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tree = jlora.lorafy(params, rank=2, targets=["attn", "query"])
    jaxpr = jax.make_jaxpr(jlora.lora(f))(tree, x.astype(jnp.bfloat16))
    dots = products(jaxpr)
    assert {str(v.aval.dtype) for e in dots for v in e.invars} == {"bfloat16"}


def test_linen_dropout_and_batch_statistics_pass_through():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(7, name="query")(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    model, x = Net(), jax.random.normal(jax.random.key(0), (5, 3))
    variables = model.init(jax.random.key(0), x, train=False)
    tree = jlora.lorafy(variables, rank=2, targets=["query"])
    tree = randomise(tree, jax.random.key(1))
    options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(5)}}
    call = lambda v, x: model.apply(v, x, train=True, **options)
    got, stats = jlora.lora(call)(tree, x)
    want, want_stats = call(jlora.merge(tree), x)
    assert_close((got, stats), (want, want_stats), **TOL[jnp.float32])


# -- NNX models with more than parameters ----------------------------------------------


class Noisy(nnx.Module):
    """Parameters, running statistics and random state."""

    def __init__(self, rngs):
        self.query = nnx.Linear(3, 7, rngs=rngs)
        self.norm = nnx.BatchNorm(7, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(7, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(jnp.tanh(self.norm(self.query(x)))))


def noisy():
    """The model's function of (parameters, rest, x), these, and a batch."""
    graph, state, rest = nnx.split(Noisy(nnx.Rngs(0)), nnx.Param, ...)

    def forward(state, rest, x):
        net = nnx.merge(graph, state, rest)
        return net(x), nnx.state(net, nnx.Not(nnx.Param))

    x = jax.random.normal(jax.random.key(1), (16, 3)) * 2 + 1
    return forward, state, rest, x


def test_nnx_statistics_and_random_state_come_back():
    forward, state, rest, x = noisy()
    tree = randomise(jlora.lorafy(state, 2, ["query"]), jax.random.key(2))
    got, new = jax.jit(jlora.lora(forward))(tree, rest, x)
    want, wanted = jax.jit(forward)(jlora.merge(tree), rest, x)
    assert_close(got, want, **TOL[jnp.float32])
    assert jax.tree.structure(new) == jax.tree.structure(wanted)
    stats, wanted_stats = (nnx.to_pure_dict(s)["norm"] for s in (new, wanted))
    assert_close(stats, wanted_stats, **TOL[jnp.float32])
    assert jnp.all(stats["mean"] != nnx.to_pure_dict(rest)["norm"]["mean"])
    assert nnx.to_pure_dict(new)["drop"]["rngs"]["count"] == 1
    again, _ = jlora.lora(forward)(tree, new, x)  # another mask
    assert jnp.any(again != got)


def test_nnx_trains_with_statistics_and_random_state():
    forward, state, rest, x = noisy()
    tree = jlora.lorafy(state, 2, ["query"], train=["head"])
    trainable, frozen = jlora.split(tree)
    tx = optax.adam(3e-2)
    low = jlora.lora(forward)

    def loss_fn(trainable, rest):
        y, rest = low(jlora.combine(trainable, frozen), rest, x)
        return jnp.mean((y - x[:, :2]) ** 2), rest

    @jax.jit
    def step(trainable, opt_state, rest):
        grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, rest), grads = grad(trainable, rest)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, rest, loss

    opt_state, losses = tx.init(trainable), []
    for _ in range(60):
        trainable, opt_state, rest, loss = step(trainable, opt_state, rest)
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert nnx.to_pure_dict(rest)["drop"]["rngs"]["count"] == 60
    # The statistics follow the batch as the adapted layer sees it.
    tree = jlora.combine(trainable, frozen)
    kernel = jax.tree.leaves(tree["query"]["kernel"], is_leaf=jlora.is_node)[0]
    mean = nnx.to_pure_dict(rest)["norm"]["mean"]
    far = lambda w: float(jnp.linalg.norm(mean - jnp.mean(x @ w, 0)))  # biases are zero
    assert far(kernel.merged()) < 0.3 * far(kernel.base)


def test_the_projects_step_trains_nnx_parameters_alone():
    """Statistics as they are, dropout by the step's key."""
    forward, state, rest, x = noisy()
    tree = jlora.lorafy(state, 2, ["query"])

    def loss_fn(params, batch, key):
        own = nnx.to_pure_dict(batch["rest"])
        own["drop"]["rngs"]["key"] = key
        rest = nnx.clone(batch["rest"])
        nnx.replace_by_pure_dict(rest, own)
        y, _ = forward(params, rest, batch["x"])
        return jnp.mean((y - batch["x"][:, :2]) ** 2)

    tx = optax.adam(3e-2)
    run = jlora.train.TrainState.create(tree, tx, jax.random.key(0))
    step = jlora.train.make_train_step(loss_fn, tx)
    losses = []
    for _ in range(30):
        run, metrics = step(run, {"x": x, "rest": rest})
        losses.append(float(metrics["loss"]))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
