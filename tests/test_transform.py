"""`lora(fn)`: arguments, compilation, what the program holds, meshes."""

import gc
import re
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from tools import TOL, assert_close, compilations, lowrank, products, randomise

import jlora
from jlora._transform import replay as _interpret

I, H, O, R = 23, 29, 31, 2  # primes, so that a shape says whose it is  # noqa: E741


def net(key=0, layers=2, dtype=jnp.float32):
    """A little MLP whose kernels have shapes of their own."""
    keys = iter(jax.random.split(jax.random.key(key), 2 * layers))
    make = lambda *s: jax.random.normal(next(keys), s, dtype) / 5

    params = {
        f"layer_{i}": {
            "query": {"kernel": make(I, H), "bias": jnp.zeros(H, dtype)},
            "value": {"kernel": make(H, I)},
        }
        for i in range(layers)
    }

    def apply(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["query"]["kernel"] + layer["query"]["bias"])
            x = x @ layer["value"]["kernel"]
        return x

    return apply, params, jax.random.normal(jax.random.key(9), (4, I), dtype)


def tree_of(params, **kwargs):
    return randomise(jlora.lorafy(params, rank=R, **kwargs), jax.random.key(1))


def loss_of(apply, frozen):
    return lambda t, x: jnp.mean(jlora.lora(apply)(jlora.combine(t, frozen), x) ** 2)


# -- arguments -------------------------------------------------------------------------


def test_lorafied_trees_anywhere_and_other_arguments_as_they_are():
    apply, params, x = net()
    tree = tree_of(params)

    def f(scale, both, *, mode, p2=None):
        assert mode == "sum"
        assert isinstance(scale, float)
        return {
            "y": scale * apply(both["p"], both["x"]) + apply(p2, both["x"]),
            "n": None,
        }

    got = jlora.lora(f)(2.0, {"p": tree, "x": x}, mode="sum", p2=tree)
    merged = jlora.merge(tree)
    want = f(2.0, {"p": merged, "x": x}, mode="sum", p2=merged)
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_without_adapters_it_is_the_function():
    apply, params, x = net()
    assert_close(jlora.lora(apply)(params, x), apply(params, x), rtol=0, atol=0)


def test_a_tree_can_be_returned():
    apply, params, x = net()
    tree = tree_of(params)
    got = jlora.lora(lambda p, x: p)(tree, x)
    assert_close(got, tree, rtol=0, atol=0)


def test_fully_trained_leaves_are_plain_inside():
    apply, params, x = net()
    tree = tree_of(params, train=["layer_1/query/bias"])
    got = jlora.lora(apply)(tree, x)
    assert_close(got, apply(jlora.merge(tree), x), rtol=1e-4, atol=1e-4)


def test_numpy_parameters_and_inputs():
    params = {"query": np.ones((7, 5)), "n": np.arange(3)}  # float64, int64
    tree = randomise(jlora.lorafy(params, R, ["query"]), jax.random.key(1))
    f = lambda p, ids: jnp.take(p["query"], ids, axis=0) + p["n"][ids][:, None]
    ids = np.array([2, 0])
    got = jlora.lora(f)(tree, ids)
    want = f(jax.tree.map(jnp.asarray, jlora.merge(tree)), ids)
    assert_close(got, want, **TOL[jnp.float32])


def test_effects_inside_the_function_stay(capfd):
    w = lowrank(jax.random.key(0), (7, 5))

    def f(w, x):
        jax.debug.print("x sums to {}", jnp.sum(x))
        return x @ w

    jax.block_until_ready(jax.jit(jlora.lora(f))(w, jnp.ones((3, 7))))
    jax.effects_barrier()
    assert "x sums to 21" in capfd.readouterr().out


def test_forward_mode_and_gradients_inside():
    apply, params, x = net()
    tree = tree_of(params)
    half, frozen = jlora.split(tree)
    f = lambda t: jlora.lora(apply)(jlora.combine(t, frozen), x)
    g = lambda t: apply(jlora.merge(jlora.combine(t, frozen)), x)
    got, want = (jax.jvp(h, (half,), (half,))[1] for h in (f, g))
    assert_close(got, want, rtol=1e-3, atol=1e-4)
    slope = lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(apply(p, x))))(x)
    got, want = jlora.lora(slope)(tree, x), slope(jlora.merge(tree), x)
    assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_unknown_on_missing_is_refused():
    with pytest.raises(jlora.OptionError, match="expected 'error' or"):
        jlora.lora(lambda x: x, on_missing="merge")


# -- what has no rule ------------------------------------------------------------------


def test_no_rule_names_leaf_primitive_place_and_remedy(getkey):
    w = lowrank(getkey(), (7, 5))
    with pytest.raises(jlora.UnsupportedOpError) as error:
        jlora.lora(lambda w: jnp.exp(w))(w)
    for part in ("'w' (7, 5) float32", "`exp`", "test_transform.py", "materialize"):
        assert part in str(error.value)


def test_materialize_merges_for_that_use_and_says_so_once(getkey):
    _interpret._said.clear()
    w = lowrank(getkey(), (7, 5))
    f = jlora.lora(lambda w, x: x @ w + jnp.sum(jnp.exp(w)), on_missing="materialize")
    x = jnp.ones((3, 7))
    with pytest.warns(jlora.JloraWarning, match="'w'.*`exp`"):
        got = f(w, x)
    assert_close(got, x @ w.merged() + jnp.sum(jnp.exp(w.merged())), **TOL[jnp.float32])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(w, x)


def test_dead_code_needs_no_rule(getkey):
    w = lowrank(getkey(), (7, 5))

    def f(w, x):
        jnp.exp(w)
        return x @ w

    jlora.lora(f)(w, jnp.ones((3, 7)))


@pytest.mark.parametrize(
    ("f", "primitive"),
    [
        (lambda w: w * jnp.tri(7), "mul"),
        (lambda w: jnp.where(jnp.tri(7) > 0, w, 0), "select_n"),
        (lambda w: jnp.abs(w).sum(), "abs"),
        (lambda w: (w**2) @ w, "dot_general"),
        (lambda w: w**3, "integer_pow"),
        (lambda w: w.reshape(-1), "reshape"),
        (lambda w: jnp.sum(w**2) + jnp.max(w), "reduce_max"),
    ],
)
def test_what_has_no_low_rank_form_names_the_remedy(getkey, f, primitive):
    w = lowrank(getkey(), (7, 7))
    with pytest.raises(jlora.UnsupportedOpError, match=primitive) as error:
        jlora.lora(f)(w)
    assert "materialize" in str(error.value)
    with pytest.warns(jlora.JloraWarning):
        got = jax.jit(jlora.lora(f, on_missing="materialize"))(w)
    assert_close(got, f(w.merged()), **TOL[jnp.float32])


def test_squares_that_are_returned_are_refused(getkey):
    w = lowrank(getkey(), (7, 5))
    with pytest.raises(jlora.UnsupportedOpError, match="materialize"):
        jlora.lora(lambda w: w**2)(w)


# -- gradients -------------------------------------------------------------------------


def test_the_whole_trees_gradient_is_zero_where_frozen():
    apply, params, x = net()
    tree = tree_of(params)
    grads = jax.grad(lambda p: jnp.sum(jlora.lora(apply)(p, x) ** 2))(tree)
    mask = jlora.trainable_mask(tree)
    for g, trained in zip(jax.tree.leaves(grads), jax.tree.leaves(mask), strict=True):
        assert bool(jnp.any(g != 0)) == trained


def test_stop_frozen_false_differentiates_the_base():
    apply, params, x = net()
    tree = tree_of(params)
    f = jlora.lora(apply, stop_frozen=False)
    grads = jax.grad(lambda p: jnp.sum(f(p, x) ** 2))(tree)
    base = grads["layer_0"]["query"]["kernel"].base
    want = jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(jlora.merge(tree))
    assert_close(base, want["layer_0"]["query"]["kernel"], rtol=1e-3, atol=1e-3)


def test_inputs_of_other_arguments_keep_their_gradient():
    apply, params, x = net()
    tree = tree_of(params)
    got = jax.grad(lambda x: jnp.sum(jlora.lora(apply)(tree, x) ** 2))(x)
    want = jax.grad(lambda x: jnp.sum(apply(jlora.merge(tree), x) ** 2))(x)
    assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_second_derivatives(getkey):
    apply, params, x = net(layers=1)
    half, frozen = jlora.split(tree_of(params))
    loss = loss_of(apply, frozen)
    check_grads(jax.jit(loss), (half, x), order=2, rtol=2e-2, atol=2e-2)


# -- compilation -----------------------------------------------------------------------


def test_repeated_layers_keep_the_names_of_their_modules():
    """What repeats runs as one function, but for each module by itself."""
    params = {"kernel": jnp.eye(3)}

    def f(p, x):
        for n in range(7):
            with jax.named_scope(f"layer{n}"):
                x = jnp.tanh(2 * x + 1) @ p["kernel"]
            with jax.named_scope(f"norm{n}"):
                x = x / (1 + jnp.abs(x))
        return x

    tree = jlora.lorafy(params, 1, ["kernel"])
    lowered = jax.jit(jlora.lora(f)).lower(tree, jnp.ones((2, 3)))
    text = lowered.as_text(debug_info=True)
    for n in range(7):
        for name in (f"layer{n}/tanh", f"layer{n}/add", f"norm{n}/abs", f"norm{n}/div"):
            assert f'{name}"' in text


def test_a_jitted_step_compiles_once():
    apply, params, x = net()
    tree = tree_of(params)
    other = jax.tree.map(lambda v: v + 1, tree)
    step = jax.jit(jlora.lora(apply))
    assert compilations(step, (tree, x), (other, x), (tree, x + 1)) == 1


def test_an_eager_caller_of_a_jitted_function_compiles_it_once():
    apply, params, x = net()
    tree = tree_of(params)
    inner = jax.jit(apply)
    f = jlora.lora(inner)
    f(tree, x)
    assert compilations(f, (tree, x), (tree, x + 1)) == 0


def test_a_block_called_for_every_layer_is_traced_once():
    block = jax.jit(lambda w, x: jnp.tanh(x @ w))
    params = {f"layer_{i}": {"query": jnp.eye(7) * i} for i in range(6)}

    def apply(p, x):
        for layer in p.values():
            x = block(layer["query"], x)
        return x

    tree = jlora.lorafy(params, rank=2, targets=["query"])
    counts = [
        jax.jit(f).lower(p, jnp.ones((3, 7))).as_text().count("func.func private")
        for f, p in ((jlora.lora(apply), tree), (apply, jlora.merge(tree)))
    ]
    assert counts == [1, 1]


@pytest.mark.parametrize("under_jit", [False, True])
def test_arrays_that_inner_functions_closed_over_die_with_them(under_jit):
    def run():
        closed_over = jnp.ones((37, 41))
        inner = jax.jit(lambda w, x: x @ w @ closed_over)
        f = jlora.lora(lambda p, x: inner(p["query"], x))
        f = jax.jit(f) if under_jit else f
        tree = jlora.lorafy({"query": jnp.ones((7, 37))}, 2, ["query"])
        x = jnp.ones((3, 7))
        jax.grad(lambda p: f(p, x).sum())(tree)
        f(tree, x)
        assert compilations(f, (tree, x), (tree, 2 * x)) == 0
        return weakref.ref(closed_over)

    alive = run()
    gc.collect()
    assert alive() is None


# -- what the compiled program holds ---------------------------------------------------


def hlo_arrays(f, *args):
    """The shapes of all arrays of the optimised HLO, parameters left out."""
    text = jax.jit(f).lower(*args).compile().as_text()
    found = []
    for line in text.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = \(?([a-z0-9]+)\[([\d,]*)\]", line)
        if match and " parameter(" not in line and " get-tuple-element(" not in line:
            found.append(tuple(int(n) for n in match[2].split(",") if n))
    return found


@pytest.mark.parametrize("way", ["split", "masked"])
def test_the_step_holds_no_array_of_a_kernels_shape(way):
    apply, params, x = net()
    tree = tree_of(params)
    half, frozen = jlora.split(tree)
    tx = optax.adamw(1e-3)

    def split_step(half, frozen, state, x):
        grads = jax.grad(loss_of(apply, frozen))(half, x)
        updates, state = tx.update(grads, state, half)
        return optax.apply_updates(half, updates), state

    masked = optax.masked(tx, jlora.trainable_mask(tree))

    def masked_step(tree, state, x):
        loss = lambda p: jnp.mean(jlora.lora(apply)(p, x) ** 2)
        grads = jax.grad(loss)(tree)
        updates, state = masked.update(grads, state, tree)
        new = optax.apply_updates(tree, updates)
        return jlora.split(new)[0], state

    if way == "split":
        shapes = hlo_arrays(split_step, half, frozen, tx.init(half), x)
    else:
        shapes = hlo_arrays(masked_step, tree, masked.init(tree), x)
    assert (4, H) in shapes, "the parser sees nothing"
    assert (I, R) in shapes
    kernels = {(I, H), (H, I)}
    assert not kernels & set(shapes)


def test_no_backward_below_the_first_adapted_layer():
    apply, params, x = net(layers=3)
    tree = tree_of(params, targets=["layer_2/query"])
    half, frozen = jlora.split(tree)
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(apply, frozen)))(half, x)
    dots = products(jaxpr)
    # 6 kernels and the adapter's 2; then back through 1 kernel, to x·A, to A and to B.
    assert len(dots) == 6 + 2 + 4


# -- devices ---------------------------------------------------------------------------


def mesh(explicit=False):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


def sharded_net(explicit=False):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "query": {"kernel": jax.random.normal(keys[0], (8, 12)) / 5},
        "out": {"kernel": jax.random.normal(keys[1], (12, 8)) / 5},
    }
    m = mesh(explicit)
    specs = {"query": {"kernel": P(None, "model")}, "out": {"kernel": P("model", None)}}
    place = lambda v, s: jax.device_put(v, NamedSharding(m, s))
    placed = jax.tree.map(place, params, specs)
    x = jax.random.normal(keys[2], (4, 8))
    x = place(x, P("data", None))

    def apply(p, x):
        h = jnp.tanh(x @ p["query"]["kernel"])
        if explicit:
            return jnp.einsum(
                "bh,ho->bo", h, p["out"]["kernel"], out_sharding=P("data", None)
            )
        return h @ p["out"]["kernel"]

    return m, apply, params, placed, x


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_jit(explicit):
    m, apply, params, placed, x = sharded_net(explicit)
    targets = ["query", "out"]
    tree = jlora.lorafy(placed, rank=R, targets=targets)
    q, o = (tree[n]["kernel"].adapters[""] for n in targets)
    assert q.a.sharding.spec == P(None, None)
    assert q.b.sharding.spec == P(None, "model")
    assert o.a.sharding.spec == P("model", None)
    plain = randomise(jlora.lorafy(params, rank=R, targets=targets), jax.random.key(1))
    assert_close(q.a, jlora.lorafy(params, rank=R, targets=targets)["query"]
                 ["kernel"].adapters[""].a, rtol=1e-6, atol=1e-6)  # fmt: skip
    tree = jax.tree.map(lambda v, s: jax.device_put(v, s.sharding), plain, tree)
    half, frozen = jlora.split(tree)
    with jax.set_mesh(m):
        out = jax.jit(jlora.lora(apply))(tree, x)
        grads = jax.jit(jax.grad(loss_of(apply, frozen)))(half, x)
    host = np.asarray(x)
    _, plain_apply, *_ = sharded_net()
    assert_close(np.asarray(out), np.asarray(plain_apply(jlora.merge(plain), host)),
                 rtol=1e-4, atol=1e-4)  # fmt: skip
    half0, frozen0 = jlora.split(plain)
    want = jax.grad(loss_of(plain_apply, frozen0))(half0, host)
    assert_close(jax.device_get(grads), jax.device_get(want), rtol=1e-4, atol=1e-5)


def test_abstract_trees_carry_shardings():
    m = mesh()
    sharding = NamedSharding(m, P("model", "data"))
    tree = jlora.lorafy(
        {"query": jax.ShapeDtypeStruct((8, 12), jnp.bfloat16, sharding=sharding)},
        rank=R, targets=["query"],
    )  # fmt: skip
    t = tree["query"].adapters[""]
    assert (t.a.shape, t.a.dtype, t.a.sharding.spec) == (
        (8, R),
        jnp.float32,
        P("model", None),
    )
    assert t.b.sharding.spec == P(None, "data")


def test_sharding_constraints_reach_the_factors():
    m, apply, params, placed, x = sharded_net()
    tree = randomise(jlora.lorafy(params, rank=R, targets=["query"]), jax.random.key(1))
    spec = NamedSharding(m, P("data", "model"))

    def f(p, x):
        return x @ lax.with_sharding_constraint(p["query"]["kernel"], spec)

    got = jax.jit(jlora.lora(f))(tree, np.asarray(x))
    assert_close(np.asarray(got), np.asarray(x @ jlora.merge(tree)["query"]["kernel"]),
                 rtol=1e-4, atol=1e-4)  # fmt: skip
    jaxpr = str(jax.make_jaxpr(jlora.lora(f))(tree, np.asarray(x)))
    assert "P('data', None)" in jaxpr
    assert "P(None, 'model')" in jaxpr


@pytest.mark.parametrize("split", ["out", "in", "none"])
def test_shard_map_inside(split):
    m, *_ = sharded_net()
    tree = {"query": jnp.ones((8, 12))}
    tree = randomise(jlora.lorafy(tree, rank=R, targets=["query"]), jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (4, 8))
    w_spec = {"out": P(None, "model"), "in": P("model", None), "none": P()}[split]
    x_spec = P("data", "model" if split == "in" else None)

    def local(w, x):
        y = x @ w
        return lax.psum(y, "model") if split == "in" else y

    def f(p, x):
        out = P("data", "model" if split == "out" else None)
        g = jax.shard_map(local, mesh=m, in_specs=(w_spec, x_spec), out_specs=out)
        return g(p["query"], x)

    got = jax.jit(jlora.lora(f))(tree, x)
    assert_close(np.asarray(got), np.asarray(x @ jlora.merge(tree)["query"]),
                 rtol=1e-4, atol=1e-4)  # fmt: skip
    half, frozen = jlora.split(tree)
    grads = jax.jit(jax.grad(loss_of(f, frozen)))(half, x)
    want = jax.grad(loss_of(lambda p, x: x @ p["query"], frozen))(half, x)
    assert_close(jax.device_get(grads), jax.device_get(want), rtol=1e-4, atol=1e-5)


def test_shard_map_inside_gathers_an_fsdp_kernel():
    m, *_ = sharded_net()
    tree = {"query": jnp.ones((8, 12))}
    tree = randomise(jlora.lorafy(tree, rank=R, targets=["query"]), jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (4, 8))

    def local(w, x):
        return x @ lax.all_gather(w, "data", axis=0, tiled=True)

    def f(p, x):
        specs = (P("data", None), P("data", None))
        g = jax.shard_map(local, mesh=m, in_specs=specs, out_specs=P("data", None))
        return g(p["query"], x)

    got = jax.jit(jlora.lora(f))(tree, x)
    assert_close(np.asarray(got), np.asarray(x @ jlora.merge(tree)["query"]),
                 rtol=1e-4, atol=1e-4)  # fmt: skip


def test_shard_map_outside():
    m, apply, params, _, x = sharded_net()
    tree = randomise(
        jlora.lorafy(params, rank=R, targets=["query", "out"]), jax.random.key(1)
    )
    f = jax.shard_map(
        jlora.lora(apply), mesh=m, in_specs=(P(), P("data")), out_specs=P("data")
    )
    got = jax.jit(f)(tree, np.asarray(x))
    want = apply(jlora.merge(tree), np.asarray(x))
    assert_close(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-4)


def test_pmap_outside_and_inside():
    apply, params, x = net()
    tree = tree_of(params)
    xs = jnp.stack([x, 2 * x])
    want = jnp.stack([apply(jlora.merge(tree), v) for v in xs])
    outside = jax.pmap(jlora.lora(apply), in_axes=(None, 0))(tree, xs)
    assert_close(np.asarray(outside), np.asarray(want), rtol=1e-4, atol=1e-4)
    inside = jlora.lora(lambda p, xs: jax.pmap(lambda x: apply(p, x))(xs))
    assert_close(np.asarray(inside(tree, xs)), np.asarray(want), rtol=1e-4, atol=1e-4)


def test_pmapped_training_averages_gradients():
    apply, params, x = net()
    half, frozen = jlora.split(tree_of(params))
    xs = jnp.stack([x, 2 * x])
    loss = loss_of(apply, frozen)

    def step(half, x):
        return lax.pmean(jax.grad(loss)(half, x), "devices")

    grads = jax.pmap(step, "devices", in_axes=(None, 0))(half, xs)
    want = jax.tree.map(lambda *g: sum(g) / 2, *[jax.grad(loss)(half, v) for v in xs])
    first = jax.tree.map(lambda g: np.asarray(g[0]), grads)
    assert_close(first, jax.device_get(want), rtol=1e-3, atol=1e-4)
