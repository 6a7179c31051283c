"""Meshes by name, rules for every family, and trees that lie as the rules say."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import randomise

import jlora
from jlora import models, sharding
from jlora._errors import JloraWarning, OptionError, ShapeError, StructureError
from jlora._paths import leaves_by_path
from jlora.train import TrainState, make_train_step

FOUR = jax.devices()[:4]
ABSTRACT = AbstractMesh((2, 2), ("fsdp", "tensor"))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh("fsdp=2,tensor=2", devices=FOUR)


# -- meshes ----------------------------------------------------------------------------


def test_a_mesh_by_name_and_the_devices_that_are_left():
    mesh = sharding.make_mesh("data=1, fsdp=-1,tensor=2", devices=FOUR)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert mesh == sharding.make_mesh(dict(mesh.shape), devices=FOUR)
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in FOUR]
    explicit = sharding.make_mesh("slots=4", names=["slots"], devices=FOUR, explicit=1)
    assert explicit.axis_types == (jax.sharding.AxisType.Explicit,)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("data=3", "asks for 3 devices, and there are 4"),
        ("data=8", "device_count=8"),
        ("data=2", r"devices=jax.devices\(\)\[:2\]"),
        ("data=-1,fsdp=3", "a multiple of 3"),
        ("dta=4", "Did you mean 'data'"),
        ("data=2,data=2", "twice"),
        ("data=-1,fsdp=-1", "data and fsdp are both -1"),
        ("data=x", "'x' is no size"),
        ("data=0", "size 0"),
        ({"data": 2.0}, "size 2.0"),
        ("", "no axis"),
        (4, "no axis"),
    ],
)
def test_meshes_that_cannot_be(sizes, words):
    with pytest.raises(OptionError, match=words):
        sharding.make_mesh(sizes, devices=FOUR)


# -- rules -----------------------------------------------------------------------------

LLAMA = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 24, "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2}
BERT = {"vocab_size": 24, "hidden_size": 12, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 2, "intermediate_size": 20}
BERT |= {"max_position_embeddings": 16}
GPT2 = {"vocab_size": 24, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
MOE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "t5": lambda: (models.T5, models.T5Config(**T5, num_heads=2)),
    "t5 v1.1": lambda: (
        models.T5,
        models.T5Config(
            **T5, num_heads=2, tie_word_embeddings=False,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "gpt2": lambda: (models.GPT2, models.GPT2Config(**GPT2)),
    "bert": lambda: (models.BertMaskedLM, models.BertConfig(**BERT, head="masked_lm")),
    "bert head": lambda: (
        models.BertClassifier,
        models.BertConfig(**BERT, head="classification", num_labels=3),
    ),
    "roberta": lambda: (
        models.BertMaskedLM,
        models.BertConfig(**BERT, model_type="roberta", head="masked_lm"),
    ),
    "roberta head": lambda: (
        models.BertClassifier,
        models.BertConfig(
            **BERT, model_type="roberta", head="classification", num_labels=3
        ),
    ),
    "llama": lambda: (models.Llama, models.LlamaConfig(**LLAMA)),
    "qwen2 biases": lambda: (
        models.Llama, models.LlamaConfig(**LLAMA, model_type="qwen2"),
    ),
    "gemma": lambda: (
        models.Llama, models.GemmaConfig(**LLAMA, sliding_window=3),
    ),
    "mixture": lambda: (models.Llama, models.MoeConfig(**MOE, moe_intermediate_size=6)),
    "mixture, shared": lambda: (
        models.Llama,
        models.MoeConfig(
            **MOE | {"model_type": "qwen2_moe"}, moe_intermediate_size=6,
            shared_expert_intermediate_size=10,
        ),
    ),
}  # fmt: skip


def abstract(name, **form):
    kind, config = FAMILIES[name]()
    ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    args = (ids, None, ids) if kind is models.T5 else (ids,)
    init = lambda *args: kind(config=config, **form).init(jax.random.key(0), *args)
    return jax.eval_shape(init, *args)["params"]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_covered_and_cut(name, scan):
    tree = abstract(name, scan_layers=scan)
    for layout, axes in {"fsdp": {"fsdp"}, "tensor": {"tensor"}}.items():
        found = sharding.rules(layout).shardings(tree, ABSTRACT)
        cut = whole = 0
        for path, x in leaves_by_path(tree).items():
            spec = leaves_by_path(found)[path].spec
            size = int(np.prod(x.shape))
            used = {name for name in spec if name}
            assert used <= axes
            assert spec[:-2] in ((), (None,) * (x.ndim - 2)), "a stack's axis is cut"
            is_vector = path.endswith(("/bias", "/weight"))
            assert not (used and is_vector)
            cut, whole = cut + size * bool(used), whole + size * (not is_vector)
        # What is whole: T5's table of distances; of tensor also positions and heads.
        assert cut > (0.95 if layout == "fsdp" else 0.7) * whole


def test_each_side_of_a_kernel_is_cut_as_it_is_used():
    rules = sharding.rules("fsdp+tensor")
    into, out_of = ("fsdp", "tensor"), ("tensor", "fsdp")
    want = {
        "encoder/block/1/layer/0/SelfAttention/q/kernel": into,
        "decoder/block/1/layer/1/EncDecAttention/o/kernel": out_of,
        "decoder/block/1/layer/2/DenseReluDense/wi_1/kernel": into,
        "decoder/block/layer/2/DenseReluDense/wo/kernel": out_of,
        "transformer/h/0/attn/c_attn/kernel": into,
        "transformer/h/0/attn/c_proj/kernel": out_of,
        "transformer/h/0/mlp/c_proj/kernel": out_of,
        "bert/encoder/layer/0/attention/self/query/kernel": into,
        "bert/encoder/layer/0/attention/output/dense/kernel": out_of,
        "bert/encoder/layer/0/intermediate/dense/kernel": into,
        "bert/encoder/layer/0/output/dense/kernel": out_of,
        "model/layers/0/self_attn/k_proj/kernel": into,
        "model/layers/0/mlp/down_proj/kernel": out_of,
        "model/layers/0/mlp/shared_expert/gate_proj/kernel": into,
        "model/layers/0/mlp/gate/kernel": ("fsdp", None),
        "shared/embedding": out_of,
        "lm_head/kernel": into,
        "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding": (
            None, None),
    }  # fmt: skip
    assert {p: tuple(rules.spec(p, (8, 8), ABSTRACT)) for p in want} == want
    stacked = rules.spec("model/layers/mlp/up_proj/kernel", (3, 8, 8), ABSTRACT)
    assert tuple(stacked) == (None, *into)
    experts = rules.spec("layers/mlp/experts/down_proj", (3, 5, 8, 8), ABSTRACT)
    assert tuple(experts) == (None, None, *out_of)
    spread = AbstractMesh((5, 2), ("expert", "tensor"))
    experts = rules.spec("layers/mlp/experts/down_proj", (3, 5, 8, 8), spread)
    assert tuple(experts) == (None, "expert", "tensor", None)


def test_axes_that_the_mesh_lacks_cut_nothing():
    rules = sharding.rules("fsdp+tensor")
    alone = AbstractMesh((4,), ("fsdp",))
    assert tuple(rules.spec("up_proj/kernel", (8, 6), alone)) == ("fsdp", None)
    data = AbstractMesh((4,), ("data",))
    assert tuple(rules.spec("up_proj/kernel", (8, 6), data)) == (None, None)
    whole = sharding.rules("replicated").spec("up_proj/kernel", (7, 5), ABSTRACT)
    assert tuple(whole) == (None, None)


def test_own_rules_come_first_and_own_layouts_map_axes():
    rules = sharding.rules("fsdp", own=[(r"q_proj/kernel$", P("tensor", None))])
    assert tuple(rules.spec("a/q_proj/kernel", (8, 8), ABSTRACT)) == ("tensor", None)
    spec = rules.spec("self_attn/k_proj/kernel", (8, 8), ABSTRACT)
    assert tuple(spec) == ("fsdp", None)
    both = sharding.rules({"mlp": ("fsdp", "tensor")})
    assert tuple(both.spec("up_proj/kernel", (6, 8), ABSTRACT)) == (
        None, ("fsdp", "tensor"),
    )  # fmt: skip
    alone = AbstractMesh((2,), ("tensor",))
    assert tuple(both.spec("up_proj/kernel", (6, 8), alone)) == (None, "tensor")
    pairs = sharding.rules([("w", P("model")), ("", P())])
    model = AbstractMesh((2,), ("model",))
    assert tuple(pairs.spec("net/w", (5, 3, 8), model)) == (None, None, "model")
    assert tuple(pairs.spec("net/v", (5, 3), model)) == (None, None)
    assert tuple(pairs.spec("net/w", (7,), model)) == (None,)  # a vector is whole


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sharding.rules("fdsp"), "Did you mean 'fsdp'"),
        (lambda: sharding.rules("fsdp", uneven="pad"), "uneven='pad'"),
        (lambda: sharding.rules({"width": "fsdp"}), "'width'.*there are embed, expert"),
        (lambda: sharding.rules([("w", "fsdp")]), "is no rule"),
        (lambda: sharding.rules([("w(", P())]), "no regular expression"),
        (lambda: sharding.rules([("w", P("fsdp", "fsdp"))]), "two axes over 'fsdp'"),
        (
            lambda: sharding.rules([("w", P("tensr"))]).spec("w", (2, 2), ABSTRACT),
            "'tensr', and the mesh has the axes fsdp, tensor",
        ),
    ],
)
def test_rules_that_cannot_be(make, words):
    with pytest.raises(OptionError, match=words):
        make()


def test_what_no_rule_matches_is_an_error_with_the_remedy(mesh):
    tree = {"lm_head": {"kernel": jnp.ones((4, 4))}, "mine": {"w": jnp.ones((3, 5))}}
    with pytest.raises(StructureError, match=r"mine/w \[3, 5\]\n.*own=\[\('w\$'"):
        sharding.place(tree, mesh)
    rules = sharding.rules(own=[("w$", P()), ("absent$", P())])
    with pytest.warns(JloraWarning, match=r"match no leaf.*\n  absent\$"):
        placed = sharding.place(tree, mesh, rules)
    assert placed["mine"]["w"].sharding.is_fully_replicated
    too_long = sharding.rules(own=[("w$", P(None, None, "fsdp"))])
    with pytest.raises(ShapeError, match=r"has 3 axes.*the leaf has 2"):
        too_long.spec("mine/w", (3, 5), mesh)


def test_an_axis_that_does_not_divide_is_an_error_with_the_numbers(mesh):
    rules = sharding.rules("fsdp+tensor")
    with pytest.raises(
        ShapeError, match=r"wte/embedding \[13, 6\]: axis 0 of 13 .* tensor=2"
    ):
        rules.spec("wte/embedding", (13, 6), mesh)
    lenient = sharding.rules(rules, uneven="replicate")
    assert tuple(lenient.spec("wte/embedding", (13, 6), mesh)) == (None, "fsdp")


# -- trees -----------------------------------------------------------------------------

WIDE = {"query": {"kernel": (8, 6)}, "value": {"kernel": (8, 6)}}
OWN = [("query/kernel$", P("fsdp", "tensor")), ("kernel$", P("tensor", "fsdp"))]


def arrays(shapes=WIDE, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def specs(tree):
    return {p: tuple(x.sharding.spec) for p, x in leaves_by_path(tree).items()}


def test_a_plain_tree_is_placed_with_its_values(mesh):
    tree = arrays()
    placed = sharding.place(tree, mesh, OWN)
    for want, got in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(want, got)
        assert got.addressable_shards[0].data.size == got.size // 4
    shapes = jax.eval_shape(lambda: tree)
    abstract = sharding.place(shapes, mesh, OWN)
    assert specs(abstract) == specs(placed)
    found = sharding.rules(OWN).shardings(shapes, mesh)
    made = jax.jit(arrays, out_shardings=found)()
    assert specs(made) == specs(placed)


VARIANTS = {
    "lora": {},
    "dora": {"dora": True},
    "bias": {"lora_bias": True},
    "loha": {"variant": jlora.LoHa()},
    "lokr": {"variant": jlora.LoKr(factor=2), "rank": 1},
    "vera": {"variant": jlora.VeRA()},
}


@pytest.mark.parametrize("form", VARIANTS)
def test_adapters_lie_as_those_born_on_placed_kernels(mesh, form):
    own = [*OWN, ("bias$", P())]
    shapes = {k: v | {"bias": (6,)} for k, v in WIDE.items()}
    base = arrays(shapes)
    options = {"rank": 2, "targets": ["query"]} | VARIANTS[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JloraWarning)  # of the rule for biases
        rules = sharding.rules(own)
        born = jlora.lorafy(sharding.place(base, mesh, rules), **options)
        moved = sharding.place(jlora.lorafy(base, **options), mesh, rules)
    want = {
        p: tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
        for p, x in leaves_by_path(born).items()
        if isinstance(x.sharding, NamedSharding)
    }
    got = specs(moved)
    assert {p: got[p] for p in want} == want
    assert sum("/base" not in p for p in want if "query" in p) >= 2
    for p, x in leaves_by_path(born).items():
        # The columns' lengths of DoRA are sums over devices.
        np.testing.assert_allclose(x, leaves_by_path(moved)[p], rtol=1e-6)


def test_a_and_b_follow_the_kernel_and_the_rank_is_whole(mesh):
    tree = sharding.place(jlora.lorafy(arrays(), 2, ["query", "value"]), mesh, OWN)
    query, value = (tree[n]["kernel"].adapters[""] for n in ("query", "value"))
    assert tuple(query.a.sharding.spec) == ("fsdp", None)
    assert tuple(query.b.sharding.spec) == (None, "tensor")
    assert tuple(value.a.sharding.spec) == ("tensor", None)
    assert tuple(value.b.sharding.spec) == (None, "fsdp")
    half, frozen = jlora.split(tree)
    rules = sharding.rules(OWN)
    for part in (half, frozen):
        found = rules.shardings(part, mesh)
        assert jax.tree.structure(found) == jax.tree.structure(part)
        for x, s in zip(jax.tree.leaves(part), jax.tree.leaves(found), strict=True):
            assert x.sharding == s, (x.shape, x.sharding, s)


def test_an_adapter_on_a_third_of_a_fused_kernel(mesh):
    """The kernel's 18 outputs are cut into 2, the adapter's 9 are not."""
    fused = {"c_attn": {"kernel": jnp.ones((8, 18))}}
    rules = [("c_attn/kernel$", P("fsdp", "tensor"))]
    fused = sharding.place(fused, mesh, rules)
    tree = jlora.lorafy(fused, 2, ["query"])
    [adapter] = tree["c_attn"]["kernel"].adapters.values()
    assert adapter.b.shape == (2, 6)
    assert tuple(adapter.b.sharding.spec) == (None, "tensor")
    odd = {"c_attn": {"kernel": jnp.ones((8, 6))}}  # thirds of 2, halves of 3
    odd = sharding.place(odd, sharding.make_mesh("tensor=2", devices=FOUR[:2]), rules)
    tree = jlora.lorafy(odd, 2, ["query"])
    [adapter] = tree["c_attn"]["kernel"].adapters.values()
    assert adapter.b.shape == (2, 2)


def test_quantised_kernels_and_those_with_adapters(mesh):
    base = arrays({"query": {"kernel": (256, 8)}})
    rules = [("query/kernel$", P("fsdp", "tensor"))]
    whole = jlora.lorafy(jlora.quantize(base, "nf4", targets=["query"]), 2, ["query"])
    placed = sharding.place(whole, mesh, rules)
    codes = placed["query"]["kernel"].base
    assert tuple(codes.codes.sharding.spec) == ("tensor", "fsdp")
    assert tuple(codes.absmax.sharding.spec) == ("tensor", "fsdp")
    alone = sharding.place(jlora.quantize(base, "nf4", targets=["query"]), mesh, rules)
    assert specs(alone["query"]["kernel"]) == specs(codes)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_block_of_codes_is_not_cut(mesh):
    base = jlora.quantize(
        arrays({"query": {"kernel": (192, 8)}}), "nf4", targets=["query"]
    )
    rules = sharding.rules([("query/kernel$", P("fsdp", "tensor"))])
    with pytest.raises(ShapeError, match=r"whole blocks \(3 absmax\)"):
        sharding.place(base, mesh, rules)
    placed = sharding.place(base, mesh, rules, uneven="replicate")
    assert tuple(placed["query"]["kernel"].codes.sharding.spec) == ("tensor", None)


def test_trained_leaves_and_rows(mesh):
    base = arrays({"embed": {"embedding": (12, 8)}, "head": {"kernel": (8, 4)}})
    rules = [("embedding$", P("tensor", "fsdp")), ("head", P("fsdp"))]
    tree = jlora.lorafy(
        base, 2, [], train=["head"], trainable_tokens={"embedding": [1, 5]}
    )
    placed = sharding.place(tree, mesh, rules)
    assert tuple(placed["embed"]["embedding"].rows.sharding.spec) == (None, "fsdp")
    assert tuple(placed["embed"]["embedding"].base.sharding.spec) == ("tensor", "fsdp")
    assert tuple(placed["head"]["kernel"].value.sharding.spec) == (None, "fsdp")


def test_a_training_state_follows_and_its_moments_are_born_where_they_stay(mesh):
    tree = randomise(jlora.lorafy(arrays(), 2, ["query"]), jax.random.key(0))
    rules = sharding.rules(OWN)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state = TrainState.create(sharding.place(tree, mesh, rules), tx, jax.random.key(3))
    found = rules.shardings(state, mesh)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
    for x, s in pairs:
        assert x.sharding.is_equivalent_to(s, x.ndim), (x.shape, x.sharding, s)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 2]
    assert len(moments) == 4
    assert all(not x.sharding.is_fully_replicated for x in moments)
    moved = sharding.place(TrainState.create(tree, tx, jax.random.key(3)), mesh, rules)
    assert [x.sharding for x in jax.tree.leaves(moved)] == jax.tree.leaves(found)


RANKED = sharding.rules([("query/kernel$", P("fsdp", None))], rank="tensor")


def test_the_rank_is_cut_on_request(mesh):
    """And a step on the mesh is that of one device."""
    base = arrays({"query": {"kernel": (8, 6)}})
    tree = randomise(jlora.lorafy(base, 4, ["query"]), jax.random.key(0))
    tx = optax.adam(1e-2)
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)

    def loss_fn(params, batch, key):
        return jnp.mean((batch["x"] @ params["query"]["kernel"] - 1) ** 2)

    ends = []
    for own in (None, mesh):
        state = TrainState.create(tree, tx)
        state = state if own is None else sharding.place(state, own, RANKED)
        step = make_train_step(loss_fn, tx, mesh=own, donate=False)
        for _ in range(2):
            state, metrics = step(state, {"x": x})
        [t] = state.params["query"]["kernel"].adapters.values()
        ends.append([metrics["loss"], t.a, t.b])
    for one, cut in zip(*ends, strict=True):
        np.testing.assert_allclose(cut, one, rtol=1e-5)
    assert tuple(t.a.sharding.spec) == ("fsdp", "tensor")
    assert tuple(t.b.sharding.spec) == ("tensor", None)
    moments = {x.sharding.spec for x in jax.tree.leaves(state.opt_state) if x.ndim == 2}
    assert moments == {t.a.sharding.spec, t.b.sharding.spec}


def test_a_rank_that_cannot_be_cut(mesh):
    base = arrays({"query": {"kernel": (8, 6)}})
    three = jlora.lorafy(base, 3, ["query"])
    with pytest.raises(ShapeError, match="a rank of 3 is to be cut over tensor=2"):
        sharding.place(three, mesh, RANKED)
    placed = sharding.place(three, mesh, RANKED, uneven="replicate")
    [t] = placed["query"]["kernel"].adapters.values()
    assert tuple(t.a.sharding.spec) == ("fsdp", None)
    # B's outputs lie over tensor themselves.
    both = sharding.rules([("query/kernel$", P("fsdp", "tensor"))], rank=["tensor"])
    placed = sharding.place(jlora.lorafy(base, 4, ["query"]), mesh, both)
    [t] = placed["query"]["kernel"].adapters.values()
    assert tuple(t.a.sharding.spec) == ("fsdp", "tensor")
    assert tuple(t.b.sharding.spec) == (None, "tensor")
    with pytest.raises(OptionError, match="expected the name of an axis"):
        sharding.rules(rank=("tensor", "tensor"))
    with pytest.raises(OptionError, match="'tensr'"):
        sharding.place(three, mesh, sharding.rules([("", P())], rank="tensr"))


def test_leaves_that_are_no_arrays_pass(mesh):
    tree = {"act": jnp.tanh, "w": jnp.ones((4, 4))}
    placed = sharding.place(tree, mesh, [("w", P("fsdp"))])
    assert placed["act"] is jnp.tanh
    assert tuple(placed["w"].sharding.spec) == (None, "fsdp")


def test_a_checkpoint_is_read_as_the_rules_say(tmp_path, mesh):
    config = models.LlamaConfig(**LLAMA)
    model = models.Llama(config)
    params = model.init(jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    models.save(model, params, tmp_path)
    rules = sharding.rules("fsdp+tensor")
    _, got = models.load(tmp_path, sharding=rules.on(mesh))
    found = rules.shardings(params, mesh)
    for path, x in leaves_by_path(got).items():
        assert x.sharding == leaves_by_path(found)[path]
        np.testing.assert_array_equal(x, leaves_by_path(params)[path])


# -- batches ---------------------------------------------------------------------------


def test_a_batch_is_cut_over_data_and_fsdp():
    mesh = sharding.make_mesh("data=2,fsdp=1,tensor=2", devices=FOUR)
    batch = {"ids": np.arange(12).reshape(4, 3), "weight": 2.0, "label": np.arange(4)}
    placed = sharding.place_batch(batch, mesh)
    assert tuple(placed["ids"].sharding.spec) == (("data", "fsdp"), None)
    assert placed["ids"].addressable_shards[0].data.shape == (2, 3)
    assert placed["weight"].sharding.is_fully_replicated
    np.testing.assert_array_equal(placed["ids"], batch["ids"])
    again = sharding.place_batch(placed, mesh)
    assert again["ids"].sharding == placed["ids"].sharding
    long = sharding.make_mesh("data=2,sequence=2", devices=FOUR)
    tokens = sharding.place_batch(np.ones((4, 6), np.int32), long)
    assert tuple(tokens.sharding.spec) == ("data", "sequence")


def test_a_batch_that_does_not_divide():
    mesh = sharding.make_mesh("data=2,sequence=2", devices=FOUR)
    with pytest.raises(ShapeError, match=r"batch ids \[3, 4\]: 3 examples .* 2 equal"):
        sharding.place_batch({"ids": np.ones((3, 4))}, mesh)
    with pytest.raises(ShapeError, match="Pad the tokens to 8"):
        sharding.place_batch({"ids": np.ones((4, 7))}, mesh)
    ids = np.arange(21).reshape(3, 7)
    placed = sharding.place_batch(ids, mesh, uneven="replicate")
    assert placed.sharding.is_fully_replicated
    np.testing.assert_array_equal(placed, ids)
