"""Several named adapters on one base: switched, swapped, padded, trained, kept in files."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tools import adapter_of, assert_close, compilations, randomise

import jlora
import jlora.peft
from jlora import checkpoint

X = jax.random.normal(jax.random.key(99), (3, 7))
IDS = np.array([4, 1, 2])


def make_params():
    keys = jax.random.split(jax.random.key(0), 5)
    normal = jax.random.normal
    return {
        "query": {"kernel": normal(keys[0], (7, 5)), "bias": normal(keys[1], (5,))},
        "value": {"kernel": normal(keys[2], (7, 11))},
        "table": {"embedding": normal(keys[3], (13, 7))},
        "head": {"kernel": normal(keys[4], (16, 3))},
    }


def apply(p, x):
    q = x @ p["query"]["kernel"] + p["query"]["bias"]
    v = (x + p["table"]["embedding"][IDS]) @ p["value"]["kernel"]
    return jnp.tanh(jnp.concatenate([q, v], -1)) @ p["head"]["kernel"]


def adapter(params, seed, rank=2, targets=("query", "value"), **how):
    return adapter_of(params, seed, rank, list(targets), **how)


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def adapters(params):
    """Plain LoRA twice, and each of the variants."""
    out = params
    for name, tree in {
        "a": adapter(params, 1),
        "b": adapter(params, 2),
        "rslora": adapter(params, 3, 3, rslora=True),
        "dora": adapter(params, 4, dora=True),
        "biased": adapter(params, 5, 3, ["query"], lora_bias=True),
        "whole": adapter(params, 6, 1, ["value"], train=["head"]),
        "rows": adapter(params, 7, 2, ["query"], trainable_tokens={"table": [4, 2]}),
    }.items():
        out = jlora.add(out, name, tree)
    return out


@pytest.fixture(scope="module")
def step():
    return jax.jit(jlora.lora(apply))


def updates(params, tree):
    """What a lorafied tree changes of each leaf, as numbers."""
    return jax.tree.map(lambda x, y: x - y, jlora.merge(tree), params)


def same_arrays(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(one is other for one, other in pairs)


# -- what is active --------------------------------------------------------------------


def test_the_first_is_active_and_others_wait(adapters, params):
    assert adapters.names == ("a", "b", "rslora", "dora", "biased", "whole", "rows")
    assert adapters.active == ("a",)
    assert "dora" in adapters
    assert "other" not in adapters
    told = repr(adapters)
    assert "a (rank 2, active)" in told
    assert "whole (rank 1, 1 whole)" in told
    assert same_arrays(adapters.params, adapters["a"])


def test_disabled_is_the_base_itself(adapters, params, step):
    off = jlora.disable(adapters)
    assert off.active == ()
    assert off.params is params
    assert same_arrays(off.params, params)
    assert step(off.params, X).tobytes() == jax.jit(apply)(params, X).tobytes()
    whole = jlora.activate(off, "whole")  # and its head is not the base's
    assert jlora.disable(whole).params["head"]["kernel"] is params["head"]["kernel"]


def test_the_base_is_held_once(adapters, params):
    trees = [adapters[name] for name in adapters.names]
    for tree in (*trees, jlora.activate(adapters, ["a", "dora"]).params):
        held = {id(x) for x in jax.tree.leaves(tree)}
        assert id(params["query"]["bias"]) in held
        assert id(params["query"]["kernel"]) in held
    own = len(jax.tree.leaves(adapters)) - len(jax.tree.leaves(params))
    assert own == sum(
        len(jax.tree.leaves(adapters.adapters[n])) for n in adapters.names
    )


def test_switching_and_swapping_compile_nothing(adapters, params, step):
    more = jlora.add(adapters, "c", adapter(params, 8))
    step(more.params, X)
    step(jlora.activate(more, ["a", "b"]).params, X)
    other = adapter(params, 9)

    def switch():
        swapped = jlora.update(more, "b", other)
        return [
            step(jlora.activate(s, names).params, X)
            for s in (more, swapped)
            for names in ("b", "c", ["a", "c"], ["c", "b"], "a")
        ]

    assert compilations(switch, ()) == 0
    outs = switch()
    assert len({x.tobytes() for x in outs}) == 7  # of ten, three without b


def test_several_add_their_updates(adapters, params):
    """Value and gradients, of all kinds that may be active together."""
    x = X

    @functools.partial(jax.jit, static_argnames="names")
    def both(s, names):
        tree = jlora.activate(s, list(names)).params
        half, frozen = jlora.split(tree)

        def low(half):
            return jnp.sum(jnp.sin(jlora.lora(apply)(jlora.combine(half, frozen), x)))

        def dense(half):
            parts = jlora.combine(half, frozen)
            return jnp.sum(jnp.sin(apply(jlora.merge(parts), x)))

        total = jax.tree.map(
            lambda b, *xs: b + sum(x - b for x in xs),
            s.base,
            *[jlora.merge(s[name]) for name in names],
        )
        want = jnp.sum(jnp.sin(apply(total, x)))
        return low(half), want, jax.grad(low)(half), jax.grad(dense)(half)

    got, want, grad, dense = both(
        adapters, ("rslora", "dora", "biased", "whole", "rows")
    )
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grad))
    assert_close(grad, dense, rtol=1e-3, atol=1e-4)


def test_names_of_terms_do_not_depend_on_names_of_adapters(adapters):
    structures = {
        jax.tree.structure(jlora.activate(adapters, names).params)
        for names in (["a", "b"], ["b", "a"])
    }
    renamed = jlora.rename(jlora.activate(adapters, ["a", "b"]), "b", "z")
    assert renamed.active == ("a", "z")
    structures.add(jax.tree.structure(renamed.params))
    assert len(structures) == 1


# -- padding ---------------------------------------------------------------------------


def test_padding_changes_the_shape_alone(params):
    tree = adapter(params, 1, 2, dora=True, rslora=True)
    padded = jlora.add(params, "a", tree, pad_to=5)["a"]
    assert padded["query"]["kernel"].adapters[""].rank == 5

    @jax.jit
    def out(tree):
        half, frozen = jlora.split(tree)
        f = lambda half: jnp.sum(jlora.lora(apply)(jlora.combine(half, frozen), X) ** 2)
        return jlora.lora(apply)(tree, X), jlora.merge(tree), jax.grad(f)(half)

    got, want = out(padded), out(tree)
    assert_close(got[:2], want[:2], rtol=1e-6, atol=1e-6)
    a, b = (got[2]["query"]["kernel"].adapters[""].__dict__[n] for n in "ab")
    own = want[2]["query"]["kernel"].adapters[""]
    np.testing.assert_allclose(a[:, :2], own.a, rtol=1e-5, atol=1e-5)
    assert not jnp.any(a[:, 2:])  # what is padded stays zero in training
    assert not jnp.any(b[2:])


def test_ranks_dropouts_and_scales_share_one_program(params):
    step = jax.jit(jlora.lora(apply))
    alike = {"pad_to": 4, "inference": True}
    s = jlora.add(params, "a", adapter(params, 1, 2, dropout=0.1), **alike)
    s = jlora.add(s, "b", adapter(params, 2, 4, rslora=True), **alike)
    step(s.params, X)
    assert compilations(lambda: step(jlora.activate(s, "b").params, X), ()) == 0
    # A smaller one takes the place of a larger one.
    small = adapter(params, 3, 1, dropout=0.2)
    swapped = jlora.update(s, "b", small)
    assert jax.tree.structure(swapped["b"]) == jax.tree.structure(s["b"])
    got = step(swapped["b"], X)
    assert_close(got, jax.jit(jlora.lora(apply))(small, X), rtol=1e-5, atol=1e-5)


def test_padding_keeps_shardings_and_shapes(params):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = NamedSharding(mesh, PartitionSpec(None, "m"))
    base = {"query": {"kernel": jax.device_put(jnp.ones((7, 4)), spec)}}
    half, frozen = jlora.split(jlora.lorafy(base, 1, ["query"]))
    tree = jlora.combine(jax.tree.map(lambda x: x + 0.5, half), frozen)
    s = jlora.add(base, "a", tree, pad_to=3)
    t = s["a"]["query"]["kernel"].adapters[""]
    assert t.b.sharding.spec == PartitionSpec(None, "m")
    shapes = jax.eval_shape(lambda: base)
    s = jlora.add(shapes, "a", jlora.lorafy(shapes, 1, ["query"]), pad_to=3)
    assert s["a"]["query"]["kernel"].adapters[""].a.shape == (7, 3)


# -- training and files ----------------------------------------------------------------


def test_one_is_trained_and_the_rest_stay(adapters, params):
    trainable, frozen = jlora.split(jlora.activate(adapters, "b").params)
    tx = optax.sgd(1e-1)

    @jax.jit
    def train(trainable):
        def loss(t):
            return jnp.sum(jlora.lora(apply)(jlora.combine(t, frozen), X) ** 2)

        updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable))
        return optax.apply_updates(trainable, updates), loss(trainable)

    first = train(trainable)[1]
    for _ in range(3):
        trainable, last = train(trainable)
    assert last < first
    trained = jlora.update(adapters, "b", jlora.combine(trainable, frozen))
    assert trained.names == adapters.names
    assert trained.active == adapters.active
    assert same_arrays(jlora.split(trained["b"])[0], trainable)
    for name in set(adapters.names) - {"b"}:
        assert trained.adapters[name] is adapters.adapters[name]
    assert trained.base is params


def test_keys_of_dropout_stay_out(params):
    tree = jlora.with_dropout(adapter(params, 1, dropout=0.5), jax.random.key(1))
    kept = jlora.add(params, "a", tree)["a"]["query"]["kernel"].adapters[""]
    assert kept.key is None
    assert kept.dropout == 0.5


def test_a_set_from_folders_and_back(adapters, params, tmp_path, step):
    names = ("a", "dora", "biased")
    for name in names:
        jlora.peft.save(tmp_path / "all", adapters[name], adapter=name)
        checkpoint.save_adapter(tmp_path / "own" / name, adapters[name])
    for read in (
        lambda name: jlora.peft.load(tmp_path / "all", params, adapter=name),
        lambda name: checkpoint.load_adapter(tmp_path / "own" / name, params),
    ):
        s = params
        for name in names:
            s = jlora.add(s, name, read(name))
        assert same_arrays(s.base, params)
        for name in names:
            assert same_arrays(s[name]["table"], params["table"])
            assert s[name]["query"]["kernel"].base is params["query"]["kernel"]
            assert_close(step(s[name], X), step(adapters[name], X), rtol=1e-6)


# -- a tree like any other -------------------------------------------------------------


def test_a_set_is_a_pytree(adapters, step):
    leaves, structure = jax.tree.flatten(adapters)
    again = jax.tree.unflatten(structure, leaves)
    assert again.names == adapters.names
    assert again.active == adapters.active
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(adapters)]
    told = [jax.tree_util.keystr(p, simple=True, separator="/") for p in paths]
    assert "base/query/kernel" in told
    assert "adapters/dora/query/kernel/magnitude" in told
    assert "adapters/whole/head/kernel/full" in told
    inside = jax.jit(lambda s: jlora.lora(apply)(s["b"], X))(adapters)
    assert_close(inside, step(adapters["b"], X), rtol=1e-5, atol=1e-5)


def test_adapters_of_an_equinox_module():
    base = eqx.nn.MLP(7, 3, 5, 1, use_final_bias=False, key=jax.random.key(0))
    s = base
    for n, name in enumerate("ab"):
        tree = randomise(jlora.lorafy(base, 2, ["layers"]), jax.random.key(n))
        s = jlora.add(s, name, tree)
    both = jlora.activate(s, ["a", "b"]).params
    assert len(both.layers[0].weight.adapters) == 2
    assert both.layers[1].bias is None
    assert both.activation is base.activation
    assert jlora.disable(s).params is base


# -- bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "", "a/b", ".", "..", "a b", "x\\y", "-x", None, 3]
)
def test_a_name_is_a_word(params, name):
    with pytest.raises(jlora.OptionError, match="cannot name an adapter"):
        jlora.add(params, name, adapter(params, 1))


def other_base(change):
    params = make_params()
    change(params)
    return adapter(params, 1, targets=["query"])


def widen(p):
    p["value"]["kernel"] = jnp.ones((7, 13))


def halve(p):
    p["query"]["kernel"] = p["query"]["kernel"].astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (widen, r"'value/kernel' is float32\[7, 11\], and float32\[7, 13\]"),
        (halve, r"'query/kernel' is float32\[7, 5\], and bfloat16\[7, 5\]"),
        (lambda p: p.pop("table"), "'table/embedding' is missing in the adapter's"),
        (lambda p: p.update(more=jnp.ones(3)), "'more' is in the adapter's alone"),
        (
            lambda p: p["query"].update(bias=p["query"]["bias"] + 1),
            r"'query/bias' float32\[5\] has other values",
        ),
    ],
)
def test_an_adapter_of_another_base(params, change, told):
    with pytest.raises(jlora.StructureError, match=told):
        jlora.add(params, "a", other_base(change))


def test_an_adapter_of_a_shifted_base_is_told_its_way(params):
    tree = jlora.lorafy(params, 2, ["query"], init="pissa")
    with pytest.raises(jlora.StructureError, match=r"jlora\.init\.unshift"):
        jlora.add(params, "a", tree)
    s = jlora.add(params, "a", jlora.init.unshift(tree, tree, params))
    assert s["a"]["query"]["kernel"].base is params["query"]["kernel"]


def test_an_equal_base_will_do(params):
    tree = adapter(make_params(), 1)
    s = jlora.add(params, "a", tree)
    assert s["a"]["query"]["kernel"].base is params["query"]["kernel"]


BAD = {
    "taken": (lambda s: jlora.add(s, "a", s["b"]), "an adapter 'a' already"),
    "unknown": (lambda s: jlora.activate(s, "dorra"), "Did you mean 'dora'"),
    "unknown item": (lambda s: s["layers"], "adapters.params"),
    "none": (lambda s: jlora.activate(s, []), "jlora.disable"),
    "remove unknown": (lambda s: jlora.remove(s, "x"), "no adapter 'x'"),
    "remove active": (lambda s: jlora.remove(s, "a"), "is active"),
    "rename to taken": (lambda s: jlora.rename(s, "a", "b"), "'b' already"),
    "rename to path": (lambda s: jlora.rename(s, "a", "../b"), "cannot name"),
    "no set": (lambda s: jlora.activate(s["a"], "a"), "takes a set of adapters"),
    "a set for a tree": (lambda s: jlora.add(s, "z", s), "given as a set"),
    "plain": (lambda s: jlora.add(s, "z", s.base), "nothing in this tree is trained"),
    "begun lorafied": (lambda s: jlora.add(s["a"], "z", s["b"]), "plain parameters"),
    "pad below": (lambda s: jlora.add(s, "z", s["rslora"], pad_to=2), "rank 3"),
    "pad to what": (lambda s: jlora.add(s, "z", s["a"], pad_to="x"), "whole number"),
    "flag": (lambda s: jlora.add(s, "z", s["a"], inference=1), "True or False"),
    "a bank": (lambda s: jlora.add(s, "z", jlora.bank([s["a"], s["b"]])), "a bank of"),
    "swap targets": (lambda s: jlora.update(s, "a", s["whole"]), "as it was"),
    "swap rank": (lambda s: jlora.update(s, "a", s["rslora"]), "cannot be padded"),
    "swap variant": (lambda s: jlora.update(s, "a", s["dora"]), "magnitude"),
    "two whole": (lambda s: both_whole(s), "'head/kernel' is a fully trained leaf"),
    "two rows": (lambda s: both_rows(s), r"same rows of 'table/embedding', \[4\]"),
    "used as params": (lambda s: jlora.lora(apply)(s, X), "adapters.params"),
}


def both_whole(s):
    s = jlora.add(s, "more", adapter(s.base, 11, 1, ["query"], train=["head"]))
    return jlora.activate(s, ["whole", "more"])


def both_rows(s):
    tree = adapter(s.base, 12, 1, ["query"], trainable_tokens={"table": [1, 4]})
    return jlora.activate(jlora.add(s, "more", tree), ["rows", "more"])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(adapters, case):
    call, told = BAD[case]
    with pytest.raises(jlora.LoraError, match=told):
        call(adapters)


def test_removing_and_rows_apart(adapters, params):
    tree = adapter(params, 12, 1, ["query"], trainable_tokens={"table": [1, 3]})
    s = jlora.activate(jlora.add(adapters, "more", tree), ["rows", "more"])
    assert s.params["table"]["embedding"].indices == (4, 2, 1, 3)
    changed = updates(params, s.params)["table"]["embedding"]
    assert sorted(np.flatnonzero(np.any(changed != 0, axis=1))) == [1, 2, 3, 4]
    s = jlora.remove(jlora.disable(s), "rows")
    assert "rows" not in s
