"""Targets, axes, settings and the errors of `lorafy`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

import jlora
from jlora._paths import generalise, path_str
from jlora._tree.matching import coverage, match_entry, match_regex

SHAPE = jax.ShapeDtypeStruct


def arrays(shapes):
    """A nested dict of shapes as zeros."""
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


def t5(layers=2):
    attention = {n: {"kernel": (7, 5)} for n in "qkv"} | {"o": {"kernel": (5, 7)}}
    block = lambda: {
        "layer": {
            "0": {"SelfAttention": dict(attention), "layer_norm": {"weight": (7,)}},
            "1": {
                "DenseReluDense": {
                    "wi_0": {"kernel": (7, 11)},
                    "wo": {"kernel": (11, 7)},
                }
            },
        }
    }
    return arrays(
        {
            "encoder": {"block": {str(i): block() for i in range(layers)}},
            "shared": {"embedding": (13, 7)},
            "lm_head": {"kernel": (7, 13)},
        }
    )


def bert():
    layer = lambda: {
        "attention": {
            "self": {
                n: {"kernel": (7, 7), "bias": (7,)} for n in ("query", "key", "value")
            },
            "output": {"dense": {"kernel": (7, 7)}},
        },
        "intermediate": {"dense": {"kernel": (7, 11)}},
        "output": {"dense": {"kernel": (11, 7)}},
    }
    return arrays({"encoder": {"layer": {"0": layer(), "1": layer()}},
                   "classifier": {"kernel": (7, 3), "bias": (3,)}})  # fmt: skip


def gpt2():
    return arrays({"h": {str(i): {
        "attn": {"c_attn": {"kernel": (7, 21), "bias": (21,)}, "c_proj": {"kernel": (7, 7)}},
        "mlp": {"c_fc": {"kernel": (7, 28)}, "c_proj": {"kernel": (28, 7)}},
    } for i in range(2)}})  # fmt: skip


def llama():
    layer = {f"{n}_proj": {"kernel": (7, 5)} for n in "qkv"} | {
        "o_proj": {"kernel": (5, 7)}
    }
    return arrays({"layers": {"0": {"self_attn": layer, "mlp": {
        "gate_proj": {"kernel": (7, 11)}, "up_proj": {"kernel": (7, 11)},
        "down_proj": {"kernel": (11, 7)}}}}})  # fmt: skip


def adapted(tree):
    """The paths of the adapted kernels, slices included."""
    out = []
    for leaf in jax.tree.leaves(tree, is_leaf=jlora.is_node):
        if isinstance(leaf, jlora.LowRank):
            out += [f"{leaf.path}{':' if n else ''}{n}" for n in leaf.adapters]
    return out


def lorafy(tree, targets, **kwargs):
    return jlora.lorafy(tree, 2, targets, **kwargs)


# -- what is hit -----------------------------------------------------------------------


@pytest.mark.parametrize("family", [t5, bert, gpt2, llama])
def test_the_one_call_works_on_every_family(family):
    tree = lorafy(family(), ["query", "value"])
    layers = 1 if family is llama else 2
    assert len(adapted(tree)) == 2 * layers
    assert {r.role for r in jlora.summary(tree).rows} == (
        {None} if family is bert else {"query", "value"}
    )


@pytest.mark.parametrize(
    ("family", "role", "count"),
    [
        (t5, "key", 2), (t5, "out", 2), (t5, "gate", 2), (t5, "down", 2),
        (bert, "out", 2), (bert, "up", 2), (gpt2, "out", 2), (gpt2, "up", 2),
        (gpt2, "down", 2), (llama, "gate", 1), (llama, "up", 1), (llama, "down", 1),
    ],
)  # fmt: skip
def test_roles(family, role, count):
    assert len(adapted(lorafy(family(), [role]))) == count


def test_slices_of_a_fused_kernel():
    tree = lorafy(gpt2(), ["query", "value"])
    w = tree["h"]["0"]["attn"]["c_attn"]["kernel"]
    assert list(w.adapters) == ["query", "value"]
    assert w.adapters["value"].starts == (0, 14)
    assert w.adapters["value"].b.shape == (2, 7)
    ones = jax.tree.map(
        lambda x, m: jnp.ones_like(x) if m else x, w, jlora.trainable_mask(w)
    )
    delta = ones.delta()
    assert not jnp.any(delta[:, 7:14])
    assert jnp.all(delta[:, :7] == 2)
    assert jnp.all(delta[:, 14:] == 2)
    x = jnp.arange(14.0).reshape(2, 7)
    got = jlora.lora(lambda w, x: x @ w)(ones, x)
    np.testing.assert_allclose(got, x @ ones.merged(), rtol=1e-5)
    both = lorafy(gpt2(), ["c_attn", "query"])  # the whole kernel covers its slices
    assert list(both["h"]["0"]["attn"]["c_attn"]["kernel"].adapters) == [""]
    with pytest.raises(jlora.ShapeError, match="3 equal parts"):
        lorafy({"c_attn": {"kernel": jnp.zeros((7, 20))}}, ["query"])


@pytest.mark.parametrize(
    ("targets", "hits"),
    [
        (["SelfAttention.q"], 2),
        (["SelfAttention/q/kernel"], 2),
        (["encoder"], 12),
        (["0.SelfAttention"], 8),
        (r".*SelfAttention/(q|v)", 4),
        (r".*SelfAttention\.(q|v)", 4),
        (r"encoder/block/1/.*/kernel", 6),
        ("all-linear", 13),
        (
            {
                "SelfAttention.q": jlora.Target(rank=1),
                r".*/wo/.*": jlora.Target(alpha=4),
            },
            4,
        ),
        (["shared", "lm_head"], 2),
    ],
)
def test_entries(targets, hits):
    assert len(adapted(lorafy(t5(), targets))) == hits


def test_exclude_takes_away():
    tree = lorafy(t5(), "all-linear", exclude=["lm_head", "block.1"])
    assert all("block/0" in p for p in adapted(tree))
    with pytest.raises(jlora.TargetError, match="is in exclude"):
        lorafy(t5(), ["lm_head"], exclude=["lm_head"])


def test_the_first_match_wins_with_its_own_settings():
    targets = {
        "block.0.layer.0.SelfAttention.q": jlora.Target(rank=1, alpha=5.0),
        "q": jlora.Target(rank=3),
    }
    tree = jlora.lorafy(t5(), 2, targets, alpha=6)
    q = [tree["encoder"]["block"][i]["layer"]["0"]["SelfAttention"]["q"]["kernel"].adapters[""]
         for i in "01"]  # fmt: skip
    assert [t.rank for t in q] == [1, 3]
    assert [float(t.scale) for t in q] == [5.0, 2.0]


def test_partial_coverage_is_reported():
    params = t5(3)
    layer = params["encoder"]["block"]["1"]["layer"]["0"]
    layer["LinearAttention"] = layer.pop("SelfAttention")
    with pytest.warns(jlora.JloraWarning, match=r"hits 2 of the 3 blocks.*block/1"):
        lorafy(params, ["SelfAttention"])
    lorafy(
        params, [r"block.0.layer.0.SelfAttention"]
    )  # an entry with a number means it


def test_coverage_counts_the_outermost_blocks():
    paths = [
        f"enc/block/{i}/layer/{j}/{n}" for i in range(2) for j, n in enumerate("ab")
    ]
    assert not coverage("a", [p for p in paths if p.endswith("a")], paths)
    (found,) = coverage("a", paths[:1], paths)
    assert found.missed == ("enc/block/1",)


def test_train_and_bias():
    tree = lorafy(bert(), ["query"], train=["classifier"])
    assert isinstance(tree["classifier"]["kernel"], jlora.Full)
    assert jlora.summary(tree).trainable == 2 * 2 * 14 + 24
    only = lorafy(bert(), ["query"], bias="lora_only")
    assert (
        sum(
            isinstance(x, jlora.Full)
            for x in jax.tree.leaves(only, is_leaf=jlora.is_node)
        )
        == 2
    )
    every = lorafy(bert(), ["query"], bias="all")
    assert (
        sum(
            isinstance(x, jlora.Full)
            for x in jax.tree.leaves(every, is_leaf=jlora.is_node)
        )
        == 7
    )
    assert set(jax.tree.leaves(jlora.labels(every))) == {"a", "b", "bias", "frozen"}


def cnn():
    """A function with convolutions, a table and a head, and its parameters."""
    params = arrays({
        "embed": {"embedding": (3, 4)},
        "conv": [{"kernel": (3, 4, 5)}, {"kernel": (3, 5, 5)}],
        "head": {"kernel": (5, 7), "bias": (7,)},
    })  # fmt: skip

    def f(p, ids):
        x = p["embed"]["embedding"][ids]
        for layer in p["conv"]:
            x = jax.lax.conv_general_dilated(
                x,
                layer["kernel"],
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
        return x @ p["head"]["kernel"] + p["head"]["bias"]

    return f, params, jnp.zeros((2, 6), jnp.int32)


def test_all_linear_says_which_convolutions_it_leaves_out():
    f, params, ids = cnn()
    survey = jlora.survey(f, params, ids)
    with pytest.warns(jlora.JloraWarning, match="leaves out 2 of conv") as warned:
        tree = lorafy(params, "all-linear", survey=survey)
    assert warned[0].filename == __file__
    assert adapted(tree) == ["head/kernel"]
    says = str(warned[0].message)
    assert "'conv/0/kernel' (3, 4, 5), 'conv/1/kernel' (3, 5, 5)" in says
    assert "'all-kernels'" in says
    assert "exclude=" in says


@pytest.mark.filterwarnings("error")
def test_convolutions_left_out_on_purpose_are_not_told():
    f, params, ids = cnn()
    survey = jlora.survey(f, params, ids)
    tree = lorafy(params, "all-linear", survey=survey, exclude=["conv"])
    assert adapted(tree) == ["head/kernel"]
    convs = ["conv/0/kernel", "conv/1/kernel"]
    tree = lorafy(params, ["conv", "all-linear"], survey=survey)
    assert adapted(tree) == [*convs, "head/kernel"]
    tree = lorafy(params, "all-kernels", survey=survey)
    assert adapted(tree) == [*convs, "embed/embedding", "head/kernel"]
    own = {"conv": jlora.Target(rank=1), "all-kernels": jlora.Target()}
    tree = lorafy(params, own, survey=survey)
    assert tree["conv"][0]["kernel"].adapters[""].rank == 1
    assert tree["embed"]["embedding"].adapters[""].rank == 2


def test_all_kernels_by_name():
    assert set(adapted(lorafy(t5(), "all-kernels"))) - set(
        adapted(lorafy(t5(), "all-linear"))
    ) == {"shared/embedding"}
    with pytest.raises(
        jlora.TargetError, match="finds no kernel in this tree of 1 arr"
    ):
        lorafy({"w": {"other": jnp.ones((3, 4))}}, "all-linear")


def test_biases_alone_may_be_trained():
    tree = jlora.lorafy(bert(), targets=[], bias="all")
    assert not adapted(tree)
    assert set(jax.tree.leaves(jlora.labels(tree))) == {"bias", "frozen"}


# -- how they start --------------------------------------------------------------------


def test_default_init_is_pefts():
    w = jlora.lorafy({"query": jnp.zeros((400, 30))}, 8, ["query"])["query"]
    t = w.adapters[""]
    assert not jnp.any(t.b)
    assert float(jnp.max(jnp.abs(t.a))) <= 1 / 20
    assert float(jnp.std(t.a)) == pytest.approx(1 / 20 / np.sqrt(3), rel=0.05)
    gauss = jlora.lorafy({"query": jnp.zeros((400, 30))}, 8, ["query"], init="gaussian")
    assert float(jnp.std(gauss["query"].adapters[""].a)) == pytest.approx(
        1 / 8, rel=0.1
    )


def test_embeddings_start_with_a_zero():
    t = lorafy(t5(), ["shared"])["shared"]["embedding"].adapters[""]
    assert not jnp.any(t.a)
    assert jnp.all(t.b != 0)


def test_a_leafs_init_depends_on_its_path_alone():
    one = lorafy(t5(), ["query"])
    two = lorafy(t5(), ["query", "value", "shared"])
    get = lambda tree, n: tree["encoder"]["block"]["1"]["layer"]["0"]["SelfAttention"][
        n
    ]["kernel"]
    a = [get(t, "q").adapters[""].a for t in (one, two)]
    np.testing.assert_array_equal(*a)
    assert jnp.any(get(two, "v").adapters[""].a != a[1])
    other = lorafy(t5(), ["query"], key=jax.random.key(5))
    assert jnp.any(get(other, "q").adapters[""].a != a[0])


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_scales(rslora, scale):
    params = {"query": jnp.zeros((7, 5))}
    tree = jlora.lorafy(params, 4, ["query"], alpha=16, rslora=rslora)
    assert float(tree["query"].adapters[""].scale) == scale
    assert float(jlora.lorafy(params, 4, ["query"])["query"].adapters[""].scale) == 1


def test_abstract_and_real_trees_agree():
    params = t5()
    shapes = jax.tree.map(lambda x: SHAPE(x.shape, x.dtype), params)
    real, abstract = lorafy(params, ["query"]), lorafy(shapes, ["query"])
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    traced = jax.eval_shape(lambda p: lorafy(p, ["query"]), params)
    assert jax.tree.structure(traced) == jax.tree.structure(real)


def test_key_paths_extend_the_kernels():
    tree = lorafy(gpt2(), ["query", "down"])
    paths = {path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)}
    assert "h/0/mlp/c_proj/kernel/a" in paths
    assert "h/0/mlp/c_proj/kernel/base" in paths
    assert "h/0/attn/c_attn/kernel/query/b" in paths


# -- bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (dict(rank=0), jlora.ShapeError, "from 1 to 5"),
        (dict(rank=-1), jlora.ShapeError, "rank=-1"),
        (dict(rank=6), jlora.ShapeError, "SelfAttention/q/kernel"),
        (dict(rank=2.0), jlora.ShapeError, "rank=2.0"),
        (dict(targets=["SelfAtention"]), jlora.TargetError, "block/0/layer/0/SelfAttention"),
        (dict(targets="q"), jlora.TargetError, r"regular expression.*\n.*targets=\['q'\]"),
        (dict(targets="query"), jlora.TargetError, r"list to match names: targets=\['query'\]"),
        (dict(targets=".*nix"), jlora.TargetError, "hits nothing in this tree"),
        (dict(targets="(q"), jlora.TargetError, "not a regular expression"),
        (dict(targets=["layer_norm"]), jlora.TargetError, "no kernel, only"),
        (dict(targets=["query", "nothing"]), jlora.TargetError, "'nothing' hits nothing"),
        (dict(train=["classifier"]), jlora.TargetError, "train: 'classifier'"),
        (dict(train="lm_head"), jlora.TargetError, r"\['lm_head'\]"),
        (dict(train=["SelfAttention"]), jlora.TargetError, "both a target and in train"),
        (dict(exclude=["nope"]), jlora.TargetError, "exclude: 'nope'"),
        (dict(bias="some"), jlora.OptionError, "lora_only"),
        (dict(bias="lora_only"), jlora.TargetError, "have none"),
        (dict(dropout=1.0), jlora.OptionError, "probability"),
        (dict(init="zeros"), jlora.OptionError, "gaussian"),
    ],
)  # fmt: skip
def test_bad_settings(call, error, says):
    with pytest.raises(error, match=says):
        jlora.lorafy(t5(), **{"rank": 2, **call})


def test_an_entry_one_letter_off_names_the_near_one():
    with pytest.raises(jlora.TargetError) as error:
        lorafy(bert(), ["querry"])
    first = str(error.value).splitlines()[2]
    assert "query" in first


def test_a_misspelt_role_names_the_role_and_what_it_hits():
    with pytest.raises(jlora.TargetError) as error:
        lorafy(t5(), ["query", "valeu"])
    text = str(error.value)
    assert "did you mean 'value'?" in text.splitlines()[0]
    assert text.splitlines()[2].endswith("SelfAttention/v/kernel")
    with pytest.raises(jlora.TargetError, match="did you mean 'lm_head'") as error:
        lorafy(t5(), ["lm_haed"])
    assert str(error.value).splitlines()[2].strip() == "lm_head/kernel"
    with pytest.raises(jlora.TargetError, match="did you mean 'DenseReluDense'"):
        lorafy(t5(), {"block.*.DenseReLuDense.w": jlora.Target()})
    with pytest.raises(jlora.TargetError) as error:
        lorafy(t5(), ["classifier"])
    assert "did you mean" not in str(error.value)


def test_integer_and_empty_leaves():
    with pytest.raises(jlora.DtypeError, match=r"'query' \(4, 4\) is int8"):
        lorafy({"query": jnp.zeros((4, 4), jnp.int8)}, ["query"])
    with pytest.raises(jlora.ShapeError, match="empty"):
        lorafy({"query": jnp.zeros((0, 4))}, ["query"])


def test_no_leaf_is_adapted_twice():
    tree = lorafy(t5(), ["query"])
    with pytest.raises(jlora.TargetError, match="has an adapter already"):
        lorafy(tree, ["query"])
    more = lorafy(tree, ["value"])  # other leaves may be added
    assert len(adapted(more)) == 4


@pytest.mark.parametrize("params", [None, {}, nn.Dense(3), {"act": jnp.tanh}, "path"])
def test_what_holds_no_arrays_is_no_tree_of_parameters(params):
    with pytest.raises(jlora.TargetError, match="holds no arrays") as error:
        lorafy(params, ["query"])
    assert type(params).__name__ in str(error.value)


def test_axes_that_names_do_not_tell():
    params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 6))}}
    with pytest.raises(
        jlora.ShapeError, match=r"(?s)survey=.*Target\(in_axes=\(0, 1, 2\)"
    ):
        lorafy(params, ["conv"])
    target = jlora.Target(in_axes=(0, 1, 2))
    w = lorafy(params, {"conv": target})["conv"]["kernel"]
    assert w.adapters[""].a.shape == (3, 3, 4, 2)
    with pytest.raises(jlora.ShapeError, match="each of the 4 axes once"):
        lorafy(params, {"conv": jlora.Target(in_axes=(0, 1), out_axes=(3,))})


def test_a_survey_of_another_tree_is_refused():
    params = {"query": jnp.zeros((7, 5))}
    survey = jlora.survey(
        lambda v, x: x @ v["params"]["query"], {"params": params}, jnp.ones((1, 7))
    )
    with pytest.raises(jlora.TargetError, match="'params/query'"):
        lorafy(params, ["query"], survey=survey)


def test_a_leaf_the_function_does_not_use_is_no_target():
    params = {"query": jnp.zeros((7, 5)), "value": jnp.zeros((7, 5))}
    survey = jlora.survey(lambda p, x: x @ p["query"], params, jnp.ones((1, 7)))
    with pytest.raises(jlora.TargetError, match="hits no kernel"):
        lorafy(params, ["value"], survey=survey)


# -- paths -----------------------------------------------------------------------------


names = st.lists(
    st.sampled_from(["a", "b", "query", "q", "layer_1", "0"]), min_size=2, max_size=5
)


@given(names, st.integers(0, 4))
def test_every_segment_and_suffix_of_a_path_matches_it(parts, start):
    path = "/".join(parts)
    assert all(match_entry(part, path) for part in parts)
    assert match_entry(".".join(parts[start % len(parts) :]), path)
    assert match_regex(path.replace("/", r"\."), path)
    assert match_entry(path + "x", path) is None
    assert generalise(generalise(path)) == generalise(path)


@pytest.mark.parametrize("layers", [(), (2,)])
def test_experts_have_an_adapter_each(layers):
    shape = (*layers, 3, 5, 7)
    params = {
        "mlp": {"experts": {"up_proj": jnp.ones(shape)}, "gate": jnp.ones((5, 3))}
    }
    for targets in (["experts"], ["experts/up_proj"], ["up_proj"]):
        tree = jlora.lorafy(params, 2, targets)
        t = tree["mlp"]["experts"]["up_proj"].adapters[""]
        assert t.a.shape == (*layers, 3, 5, 2)
        assert t.b.shape == (*layers, 3, 2, 7)
        assert not jlora.is_node(tree["mlp"]["gate"])
