"""Kernels of three axes without a survey: told by the leaves around, or refused."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tools import randomise

import jlora
from jlora._tree.conventions import attention_form

L, D, H, K = 3, 5, 2, 7


class Attention(nn.Module):
    """Flax's attention, whose kernels have three axes."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(
            H, qkv_features=H * K, use_bias=self.use_bias, name="attn"
        )(x, x)


class Layer(nn.Module):
    """Dense layers under the names of attention's."""

    use_bias: bool = True
    norm: bool = False

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x) if self.norm else x
        h = nn.Dense(K, use_bias=self.use_bias, name="query")(h)
        h = h * nn.Dense(K, use_bias=self.use_bias, name="value")(x)
        return x + nn.Dense(D, use_bias=self.use_bias, name="out")(h), None


class Scanned(nn.Module):
    """Such layers, scanned."""

    use_bias: bool = True
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=L
        )
        x, _ = layers(self.use_bias, self.norm, name="layers")(x, None)
        return nn.Dense(2, name="head")(nn.LayerNorm()(x))


def agrees_with_the_survey(model, targets):
    x = jax.random.normal(jax.random.key(0), (4, 3, D))
    params = model.init(jax.random.key(1), x)["params"]
    f = lambda p, x: model.apply({"params": p}, x)
    survey = jlora.survey(f, params, x)
    by_name = jlora.lorafy(params, 2, targets)
    by_survey = jlora.lorafy(params, 2, targets, survey=survey)
    assert jax.tree.structure(by_name) == jax.tree.structure(by_survey)
    tree = randomise(by_name, jax.random.key(2))
    got, want = jlora.lora(f)(tree, x), f(jlora.merge(tree), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_flax_attention_is_known_by_its_neighbours(use_bias):
    agrees_with_the_survey(Attention(use_bias), ["query", "key", "value", "out"])


@pytest.mark.parametrize(("use_bias", "norm"), [(True, False), (False, False), (False, True)])  # fmt: skip
def test_scanned_layers_of_attentions_names_are_stacks(use_bias, norm):
    agrees_with_the_survey(Scanned(use_bias, norm), ["query", "value", "layers/out"])


def named(**modules):
    """Leaves by path: each module's kernel and bias, by their shapes."""
    return {
        f"attn/{module}/{name}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for module, pair in modules.items()
        for name, shape in zip(("kernel", "bias"), pair, strict=False)
    }


@pytest.mark.parametrize(
    ("leaves", "form"),
    [
        (named(query=[(D, H, K)]), None),
        (named(query=[(D, H, K), (H, K)]), "heads"),
        (named(query=[(L, D, K), (L, K)]), "stack"),
        (named(query=[(D, H, K), (K,)]), None),  # neither
        (named(query=[(3, 3, K), (3, K)]), None),  # both
        (named(query=[(3, 3, K), (3, K)], out=[(3, K, D), (D,)]), "heads"),
        (named(query=[(3, 3, K), (3, K)], out=[(3, K, D), (3, D)]), "stack"),
        (named(query=[(D, H, K)], out=[(H, K, D)]), "heads"),
        (named(query=[(L, D, K)], out=[(L, K, D)]), "stack"),
        (named(query=[(D, 4, K)], value=[(D, H, 11)], out=[(4, 11, D)]), "heads"),
        (named(query=[(D, H, K), (H, K)], out=[(L, K, D), (L, D)]), None),  # a mixture
    ],
)
def test_the_only_form_that_is_possible(leaves, form):
    assert attention_form("attn/query/kernel", leaves) == form


@pytest.mark.parametrize(
    "params",
    [
        {"layers": {"query": {"kernel": jnp.ones((L, D, K))}}},
        {"layers": {"out": {"kernel": jnp.ones((L, D, K))}}},
        {"attn": {"q_proj": {"kernel": jnp.ones((D, H, K)), "bias": jnp.ones((H, K))}}},
        {"attn": {"query": jnp.ones((D, H, K))}},
        {"attn": {"query": {"weight": jnp.ones((D, H, K))}}},
    ],
)
def test_what_nothing_tells_is_refused_with_the_lines_to_write(params):
    with pytest.raises(jlora.ShapeError, match="3 axes") as error:
        jlora.lorafy(params, 2, ".*")
    text = str(error.value)
    assert "survey = jlora.survey(fn, params, *inputs)" in text
    assert "jlora.lorafy(params, ..., survey=survey)" in text
    lines = re.findall(r"targets=({.*})  # (.*)", text)
    assert [form.split()[0] for _, form in lines] == ["layers", "heads", "heads"]
    for (line, _), ins in zip(lines, [(1,), (0,), (0, 1)], strict=True):
        targets = eval(line, {"jlora": jlora})
        (node,) = (
            x
            for x in jax.tree.leaves(
                jlora.lorafy(params, 2, targets), is_leaf=jlora.is_node
            )
            if isinstance(x, jlora.LowRank)
        )
        t = node.adapters[""]
        shape = node.shape
        batch = (0,) if ins == (1,) else ()
        assert t.a.shape == (*tuple(shape[d] for d in (*batch, *ins)), 2)


def test_nnx_attention_is_known_by_its_neighbours():
    net = nnx.MultiHeadAttention(H, D, H * K, decode=False, rngs=nnx.Rngs(0))
    graph, state, rest = nnx.split(net, nnx.Param, ...)
    f = lambda s, x: nnx.merge(graph, s, rest)(x)
    x = jax.random.normal(jax.random.key(0), (2, 3, D))
    survey = jlora.survey(f, state, x)
    by_name = jlora.lorafy(state, 2, ["query", "out"])
    by_survey = jlora.lorafy(state, 2, ["query", "out"], survey=survey)
    assert jax.tree.structure(by_name) == jax.tree.structure(by_survey)


def test_axes_are_checked():
    params = {"w": jnp.ones((D, K))}
    for target in (
        jlora.Target(in_axes=(2,)),
        jlora.Target(in_axes=(0, 0)),
        jlora.Target(in_axes=(-3,)),
        jlora.Target(in_axes=(0, 1)),
    ):
        with pytest.raises(jlora.ShapeError, match="each of the 2 axes once"):
            jlora.lorafy(params, 2, {"w": target})
    one = jlora.lorafy(params, 2, {"w": jlora.Target(in_axes=0)})
    other = jlora.lorafy(params, 2, {"w": jlora.Target(in_axes=[-2], out_axes=(-1,))})
    assert jax.tree.structure(one) == jax.tree.structure(other)
    with pytest.raises(jlora.OptionError, match="in_axes='0'"):
        jlora.Target(in_axes="0")


def test_equinox_weights_are_out_in():
    tree = jlora.lorafy(eqx.nn.Linear(D, K, key=jax.random.key(0)), 2, ["weight"])
    assert tree.weight.adapters[""].a.shape == (D, 2)


def test_axes_that_the_function_contradicts_get_a_remedy_that_works():
    """Written as told, for the kernel as it is and for a stack of them."""
    params = {
        "layers": {"up": {"kernel": jnp.ones((L, D, D))}},
        "heads": {"kernel": jnp.ones((D, H, K))},
    }

    def f(p, x):
        body = lambda c, w: (c @ w, None)
        x, _ = jax.lax.scan(body, x, p["layers"]["up"]["kernel"])
        return jnp.einsum("bd,dhk->bhk", x, p["heads"]["kernel"])

    x = jnp.ones((2, D))
    wrong = {"up": jlora.Target(in_axes=(0,)), "heads": jlora.Target(in_axes=(0, 1))}
    for entry, number in (("heads", 0), ("up", 1)):
        tree = jlora.lorafy(params, 2, {entry: wrong[entry]})
        with pytest.raises(jlora.ShapeError) as error:
            jlora.lora(f)(tree, x)
        text = str(error.value)
        assert "survey = jlora.survey(fn, params, *inputs)" in text
        line = re.findall(r"^  (jlora\.Target\(.*\))$", text, re.M)[number]
        tree = jlora.lorafy(params, 2, {entry: eval(line, {"jlora": jlora})})
        tree = randomise(tree, jax.random.key(0))
        got, want = jlora.lora(f)(tree, x), f(jlora.merge(tree), x)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        survey = jlora.survey(f, params, x)
        by_survey = jlora.lorafy(params, 2, [entry], survey=survey)
        assert jax.tree.structure(by_survey) == jax.tree.structure(tree)
