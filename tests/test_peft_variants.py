"""PEFT's variants without PyTorch: recorded adapters, round trips, what is refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peft_nets
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tools import randomise

import jlora
import jlora.peft
from jlora import models

GOLDEN = pathlib.Path(__file__).parent / "golden" / "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
T = jlora.Target


def close(got, want):
    size = max(1.0, float(np.max(np.abs(want))))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * size)


def equal(x, y):
    x, y = (jax.tree_util.tree_leaves_with_path(t) for t in (x, y))
    for (p, a), (q, b) in zip(x, y, strict=True):
        assert p == q
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), p


def same_files(a, b):
    """Byte for byte, of the base that PEFT saves along apart; lists as sets."""
    x, y = (load_file(f / WEIGHTS) for f in (a, b))
    assert set(x) - set(y) == set()
    assert all(k.endswith("base_layer.weight") for k in set(y) - set(x))
    assert all(x[k].tobytes() == y[k].tobytes() for k in x)
    configs = [json.loads((f / CONFIG).read_text()) for f in (a, b)]
    as_sets = [
        {k: set(v) if isinstance(v, list) else v for k, v in c.items()} for c in configs
    ]
    assert as_sets[0] == as_sets[1]


# -- golden ----------------------------------------------------------------------------


def net_base():
    return peft_nets.tree_of(load_file(GOLDEN / "net" / "base.safetensors"))


def check_golden(tmp_path, case, base, apply, name=None, **settings):
    """PEFT's logits, adapted and merged; load, save, load is the same file and tree."""
    folder = GOLDEN / case / "adapter"
    io = load_file(GOLDEN / case / "io.safetensors")
    tree = jlora.peft.load(folder, base, adapter=name, **settings)
    want = io[f"{name or 'adapter'}_logits"]
    apply = jax.jit(lambda p, f=apply: f(p, io["input_ids"]))
    assert float(np.max(np.abs(apply(base) - want))) > 3e-4
    close(jax.jit(jlora.lora(apply))(tree), want)
    close(apply(jlora.merge(tree)), want)
    config = jlora.peft.read_config(folder, adapter=name)
    jlora.peft.save(tmp_path, tree, config=config, adapter=name, **settings)
    inner = name if name != "default" else None
    places = [x / inner if inner else x for x in (tmp_path, folder)]
    same_files(*places)
    equal(jlora.peft.load(tmp_path, base, adapter=name, **settings), tree)
    jlora.peft.save(
        tmp_path / "derived", tree, fan_in_fan_out=config["fan_in_fan_out"], **settings
    )
    equal(jlora.peft.load(tmp_path / "derived", base, **settings), tree)


NET = ["net_conv", "net_experts", "net_dora", "net_lora_bias", "net_tokens"]


@pytest.mark.parametrize("case", NET)
def test_a_net_gives_pefts_logits(case, tmp_path):
    check_golden(tmp_path, case, net_base(), peft_nets.apply)


@pytest.mark.parametrize("name", ["default", "second"])
def test_one_of_several_adapters(name, tmp_path):
    check_golden(tmp_path, "net_several", net_base(), peft_nets.apply, name)


MODELS = {
    "llama_dora_patterns": "llama_dora_patterns", "llama_tied": "llama_tied",
    "llama_tied_saved": "llama_tied", "llama_tied_tokens": "llama_tied",
    "roberta_cls": "roberta_cls",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:a server would not:jlora.JloraWarning")
@pytest.mark.parametrize("case", MODELS)
def test_a_model_gives_pefts_logits(case, tmp_path):
    model, params = models.load(GOLDEN / MODELS[case] / "base")
    apply = lambda p, ids: model.apply({"params": p}, ids)
    check_golden(tmp_path, case, params, apply, model=model)


def test_all_adapters_of_a_folder(tmp_path):
    base = net_base()
    trees = jlora.peft.load_all(GOLDEN / "net_several" / "adapter", base)
    assert list(trees) == ["default", "second"]
    second = trees["second"]["q"]["kernel"]
    assert second.base is base["q"]["kernel"] is trees["default"]["q"]["kernel"].base
    for name in reversed(trees):
        jlora.peft.save(tmp_path, trees[name], adapter=name)
    again = jlora.peft.load_all(tmp_path, base)
    equal(again, trees)
    (one,) = jlora.peft.load_all(tmp_path, base, adapters=["second"]).values()
    equal(one, trees["second"])
    with pytest.raises(jlora.CheckpointError, match="no PEFT adapter"):
        jlora.peft.load_all(tmp_path / "second" / "x", base)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "second")
    with pytest.raises(jlora.CheckpointError, match="leads out"):
        jlora.peft.load_all(tmp_path / "out", base)


# -- our own ---------------------------------------------------------------------------


def saved(tmp_path, tree, name="a", **settings):
    jlora.peft.save(tmp_path / name, tree, **settings)
    return tmp_path / name


def adapted(base, **settings):
    return randomise(jlora.lorafy(base, **settings), jax.random.key(1))


def test_fused_slices_with_dora_and_biases(tmp_path):
    """Outside of the slices a magnitude is the base's length, and a bias is zero."""
    rng = np.random.default_rng(0)
    r = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    base = {"c_attn": {"kernel": r(6, 12), "bias": r(12)}}
    targets = {"query": T(rank=2, alpha=1), "value": T(rank=3, alpha=5)}
    x = r(5, 6)
    apply = lambda p: x @ p["c_attn"]["kernel"] + p["c_attn"]["bias"]
    for settings in (dict(dora=True), dict(lora_bias=True)):
        tree = adapted(base, targets=targets, **settings)
        folder = saved(tmp_path, tree, *settings)
        back = jlora.peft.load(folder, base)
        assert back["c_attn"]["kernel"].adapters[""].rank == 5
        close(jlora.lora(apply)(back), jlora.lora(apply)(tree))
        assert np.max(np.abs(jlora.lora(apply)(tree) - apply(base))) > 0.1


def test_experts_of_several_scales(tmp_path):
    base = {"experts": {"down_proj": jnp.ones((3, 5, 4))}}
    spec = {"down_proj": T(rank=2, in_axes=(1,), batch_axes=(0,))}
    tree = adapted(base, targets=spec)
    node = tree["experts"]["down_proj"]
    scales = jnp.array([0.5, 2.0, 1.0])
    changed = node.map(node.base, lambda t: dataclasses.replace(t, scale=scales))
    folder = saved(tmp_path, {"experts": {"down_proj": changed}})
    stored = load_file(folder / WEIGHTS)
    assert stored[f"{PREFIX}experts.lora_A.weight"].shape == (3 * 2, 5)
    assert stored[f"{PREFIX}experts.lora_B.weight"].shape == (4, 2 * 3)
    back = jlora.peft.load(folder, base)["experts"]["down_proj"]
    np.testing.assert_allclose(back.delta(), changed.delta(), rtol=1e-6, atol=1e-6)


def test_parameters_whose_order_only_names_tell(tmp_path):
    base = {"moe": {"w1": jnp.ones((2, 3, 4)), "a2": jnp.ones((2, 4, 3))}}
    stack = dict(rank=2, in_axes=(1,), batch_axes=(0,))
    tree = adapted(base, targets={"w1": T(**stack), "a2": T(**stack)})
    with pytest.raises(jlora.TargetError, match="order in which the PyTorch"):
        saved(tmp_path, tree)
    names = {"moe/w1": "model.moe", "moe/a2": "model.moe"}
    folder = saved(tmp_path, tree, names=names)
    stored = load_file(folder / WEIGHTS)
    outer = stored[f"{PREFIX}model.moe.lora_A.weight"]
    inner = stored[f"{PREFIX}model.moe.base_layer.lora_A.weight"]
    assert (inner.shape, outer.shape) == ((4, 3), (4, 4))
    equal(jlora.peft.load(folder, base, names=names), tree)
    with pytest.raises(jlora.CheckpointError, match="do not fit"):
        jlora.peft.load(folder, base, names=dict(reversed(names.items())))


def test_equinoxs_convolutions_are_pytorchs(tmp_path):
    base = {"conv": {"weight": jnp.ones((5, 2, 3, 3)), "bias": jnp.ones((5, 1, 1))}}
    spec = {"conv/weight": T(rank=2, in_axes=(1, 2, 3), out_axes=(0,))}
    tree = adapted(base, targets=spec)
    folder = saved(tmp_path, tree)
    stored = load_file(folder / WEIGHTS)
    a, b = (stored[f"{PREFIX}conv.lora_{x}.weight"] for x in "AB")
    assert (a.shape, b.shape) == ((2, 2, 3, 3), (5, 2, 1, 1))
    want = np.einsum("or,rikl->oikl", b[..., 0, 0], a)
    close(tree["conv"]["weight"].delta(), want)
    equal(jlora.peft.load(folder, base), tree)


def test_a_tied_table_with_several_users(tmp_path):
    base = {"shared": {"embedding": jnp.ones((7, 4))}, "decoder": {"q": {"kernel": jnp.ones((4, 4))}},
            "encoder": {"q": {"kernel": jnp.ones((4, 4))}}}  # fmt: skip
    rows = adapted(base, targets=["q"], rank=2, trainable_tokens={"shared": [6, 1]})
    folder = saved(tmp_path, rows)
    stored = load_file(folder / WEIGHTS)
    key = f"{PREFIX}shared.token_adapter.trainable_tokens_delta"
    np.testing.assert_array_equal(stored[key], rows["shared"]["embedding"].rows)
    assert jlora.peft.read_config(folder)["trainable_token_indices"] == {
        "shared": [6, 1]
    }
    equal(jlora.peft.load(folder, base), rows)
    untied = {**base, "lm_head": {"kernel": jnp.ones((4, 7))}}
    rows = adapted(untied, targets=["q"], rank=2, trainable_tokens={"shared": [6, 1]})
    folder = saved(tmp_path, rows, "b")
    ends = {"encoder.embed_tokens": [6, 1], "decoder.embed_tokens": [6, 1]}
    assert jlora.peft.read_config(folder)["trainable_token_indices"] == ends
    equal(jlora.peft.load(folder, untied), rows)


def test_variants_of_sharded_kernels(tmp_path):
    base = net_base()
    convs = {"image": T(rank=3, in_axes=(0, 1, 2)), "q": T(rank=2)}
    tree = adapted(base, targets=convs, dora=True, trainable_tokens={"emb": [3, 1]})
    folder = saved(tmp_path, tree)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    spec = lambda x: PartitionSpec(
        *[None] * (x.ndim - 1), "x" if x.shape[-1] % 2 == 0 else None
    )
    put = lambda x: jax.device_put(x, NamedSharding(mesh, spec(x)))
    again = jlora.peft.load(folder, jax.tree.map(put, base))
    equal(again, tree)
    assert again["q"]["kernel"].adapters[""].magnitude.sharding.spec == PartitionSpec(
        "x"
    )
    assert again["emb"]["embedding"].rows.sharding.spec == PartitionSpec(None, "x")
    equal(jlora.peft.load(saved(tmp_path, again, "b"), base), tree)


# -- bad input -------------------------------------------------------------------------


def change_tensors(folder, f):
    tensors = load_file(folder / WEIGHTS)
    f(tensors)
    save_file(tensors, folder / WEIGHTS)


def copied(case, tmp_path, **changes):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((GOLDEN / case / "adapter" / name).read_bytes())
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
    return tmp_path


Q, IMAGE = f"{PREFIX}q", f"{PREFIX}image"
TOKENS = f"{PREFIX}emb.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("net_conv", lambda t: t.update({f"{IMAGE}.lora_A.weight": np.ones((3, 2, 2, 2), "f4")}),
         r"another base(.|\n)*image: A \[3, 2, 2, 2\].*but here A \[3, 2, 3, 2\]"),
        ("net_conv", lambda t: t.update({f"{IMAGE}.lora_A.weight": np.ones((3, 12), "f4")}),
         "is a linear layer there and a convolution here"),
        ("net_conv", lambda t: t.update({
            f"{IMAGE}.lora_A.weight": np.ones((3, 4, 3, 2), "f4"),
            f"{IMAGE}.lora_B.weight": np.ones((7, 1, 1, 1), "f4")}), "grouped"),
        ("net_dora", lambda t: t.update({f"{Q}.lora_A.weight": np.ones((), "f4")}),
         "disagree on r"),
        ("net_dora", lambda t: t.pop(f"{Q}.lora_magnitude_vector"),
         "use_dora is true, but q has no magnitude"),
        ("net_dora", lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(5, "f4")}),
         r"q: A .*magnitude \[5\], but here"),
        ("net_dora", lambda t: [t.pop(f"{Q}.lora_{x}.weight") for x in "AB"],
         "q has no lora_A"),
        ("net_lora_bias", lambda t: t.pop(f"{Q}.lora_B.bias"),
         "lora_bias is true, but q has no bias"),
        ("net_tokens", lambda t: t.pop(TOKENS), "names emb, and the trained rows"),
        ("net_tokens", lambda t: t.update({TOKENS: np.ones((3, 6), "f4")}), "trained rows"),
        ("net_tokens", lambda t: t.update(
            {TOKENS.replace("emb", "q"): np.ones((2, 6), "f4")}), "is no table"),
        ("net_experts", lambda t: t.pop(f"{PREFIX}experts.base_layer.lora_A.weight"),
         "lora_B without lora_A"),
        ("net_experts", lambda t: t.update(
            {f"{PREFIX}experts.base_layer.base_layer.lora_A.weight": np.ones((6, 6), "f4")}),
         "not in this tree"),
        ("net_experts", lambda t: [t.pop(f"{PREFIX}experts.lora_{x}.weight") for x in "AB"],
         "experts.down_proj is targeted, but has no adapter"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(case, change, message, tmp_path):
    folder = copied(case, tmp_path)
    change_tensors(folder, change)
    with pytest.raises(jlora.CheckpointError, match=message):
        jlora.peft.load(folder, net_base())


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("net_dora", dict(use_dora=False), "use_dora is false, but .* has a magnitude"),
        ("net_dora", dict(lora_bias=True), "both true"),
        (
            "net_lora_bias",
            dict(lora_bias=False),
            "lora_bias is false, but .* has a bias",
        ),
        (
            "net_experts",
            dict(target_parameters=["experts.down_proj"]),
            "not in this tree",
        ),
        ("net_experts", dict(target_parameters=None), "not in this tree"),
        ("net_experts", dict(r=4), "experts.gate_up_proj has rank 2, but is to have 4"),
        ("net_tokens", dict(trainable_token_indices={"emb": [3]}), "trained rows"),
        ("net_tokens", dict(trainable_token_indices={"emb": [3, 99]}), "rows 0 to 12"),
        ("net_tokens", dict(trainable_token_indices={"emb": [3, -1]}), "rows 0 to 12"),
        ("net_tokens", dict(trainable_token_indices={"emb": [3, 3]}), "each once"),
        ("net_tokens", dict(trainable_token_indices=None), "trained rows"),
        ("net_tokens", dict(trainable_token_indices={"q": [3, 0]}), "names q"),
    ],
)
def test_a_configuration_that_says_something_else(case, changes, message, tmp_path):
    folder = copied(case, tmp_path, **changes)
    with pytest.raises(jlora.CheckpointError, match=message):
        jlora.peft.load(folder, net_base())


def test_another_base_of_experts_and_convolutions(tmp_path):
    base = net_base()
    base["experts"] = jax.tree.map(lambda x: x[:2], base["experts"])
    with pytest.raises(jlora.CheckpointError, match=r"experts\.gate_up_proj"):
        jlora.peft.load(GOLDEN / "net_experts" / "adapter", base)
    base = net_base()
    base["q"].pop("bias")
    with pytest.raises(jlora.CheckpointError, match="its layer has none"):
        jlora.peft.load(GOLDEN / "net_lora_bias" / "adapter", base)


def test_a_tied_head_has_no_magnitude_of_its_own(tmp_path):
    model, params = models.load(GOLDEN / "llama_tied" / "base")
    tree = adapted(params, targets=["embed_tokens"], rank=2, dora=True)
    with pytest.raises(jlora.StructureError, match="lm_head is tied to it"):
        saved(tmp_path, tree, model=model)
    assert not list(tmp_path.iterdir())


def test_a_table_with_an_adapter_and_trained_rows(tmp_path):
    folder = copied("net_tokens", tmp_path, target_modules=["q", "emb"], r=2)
    factors = {"A": np.ones((2, 13), "f4"), "B": np.ones((6, 2), "f4")}
    more = {f"{PREFIX}emb.lora_embedding_{x}": v for x, v in factors.items()}
    more |= {f"{Q}.lora_A.weight": np.ones((2, 6), "f4")}
    more |= {f"{Q}.lora_B.weight": np.ones((6, 2), "f4")}
    change_tensors(folder, lambda t: t.update(more))
    with pytest.raises(jlora.CheckpointError, match="share one leaf"):
        jlora.peft.load(folder, net_base())


def test_a_head_that_is_tied_is_not_saved_apart(tmp_path):
    model, params = models.load(GOLDEN / "llama_tied" / "base")
    folder = copied("llama_tied_saved", tmp_path)
    change_tensors(folder, lambda t: t.pop(f"{PREFIX}lm_head.weight"))
    with pytest.raises(jlora.CheckpointError, match=r"lacks(.|\n)*lm_head\.weight"):
        jlora.peft.load(folder, params, model=model)


def test_trees_that_peft_cannot_hold(tmp_path):
    base = {
        "moe": {"down_proj": jnp.ones((2, 3, 4))},
        "head": {"kernel": jnp.ones((4, 7))},
    }
    stack = T(rank=2, in_axes=(1,), batch_axes=(0,))
    dora = jlora.lorafy(base, targets={"down_proj": stack}, dora=True)
    with pytest.raises(jlora.StructureError, match="does not know for experts"):
        saved(tmp_path, dora)
    shared = jlora.lorafy(base, targets={"down_proj": T(rank=2, in_axes=(0, 1))})
    with pytest.raises(jlora.StructureError, match="has a pair for each"):
        saved(tmp_path, shared)
    rows = jlora.lorafy(base, 2, ["head"])
    mixed = {
        "a": jlora.lorafy({"k": {"kernel": jnp.ones((3, 3))}}, 2, ["k"], dora=True),
        "b": rows,
    }
    with pytest.raises(
        jlora.StructureError, match=r"use_dora is true, but b\.head has no magnitude"
    ):
        saved(tmp_path, mixed)
    tokens = jlora.lorafy(base, 2, {"down_proj": stack}, trainable_tokens={"head": [1]})
    with pytest.raises(jlora.StructureError, match="rows are not those"):
        saved(tmp_path, tokens)
    drops = jlora.lorafy(base, targets={"down_proj": stack}, dropout=0.1)
    with pytest.raises(jlora.StructureError, match=r"lora_dropout is 0\.1"):
        saved(tmp_path, drops)
    with pytest.raises(jlora.StructureError, match="no adapter"):
        saved(tmp_path, {"head": {"kernel": jlora.Full(jnp.ones((4, 7)))}})
    table = {"emb": {"embedding": jnp.ones((7, 4))}}
    rowwise = jlora.lorafy(table, targets={"emb": T(rank=2, in_axes=(1,))}, dora=True)
    with pytest.raises(jlora.StructureError, match="outputs along its rows"):
        saved(tmp_path, rowwise)
    whole = jlora.lorafy(base, 2, ["head"], train=["down_proj"])
    with pytest.raises(jlora.ShapeError, match="Take it out of train"):
        saved(tmp_path, whole)
    assert not list(tmp_path.iterdir())


def test_the_layout_of_a_layer_saved_whole_is_asked_for(tmp_path):
    base = {"c_proj": {"kernel": jnp.ones((3, 3))}, "q": {"kernel": jnp.ones((3, 3))}}
    tree = jlora.lorafy(base, 2, ["q"], train=["c_proj"])
    with pytest.raises(jlora.StructureError, match="fan_in_fan_out=True or False"):
        saved(tmp_path, tree)
    saved(tmp_path, tree, fan_in_fan_out=True)


def test_scanned_layers_are_unstacked_first(tmp_path):
    model, params = models.load(GOLDEN / "llama_dora_patterns" / "base")
    folder = GOLDEN / "llama_dora_patterns" / "adapter"
    scanned = jlora.stack_layers(params)
    with pytest.raises(jlora.StructureError, match="unstack_layers"):
        jlora.peft.load(folder, scanned, model=model)
    adapters = adapted(scanned, targets=["query"], rank=2, train=["norm"])
    with pytest.raises(jlora.StructureError, match="unstack_layers"):
        saved(tmp_path, adapters, model=model)
    flat = jlora.unstack_layers(adapters, ["model/layers"])
    back = jlora.peft.load(saved(tmp_path, flat, model=model), params, model=model)
    equal(jlora.stack_layers(back), adapters)


def test_models_and_names_are_one_thing(tmp_path):
    model, params = models.load(GOLDEN / "llama_tied" / "base")
    folder = GOLDEN / "llama_tied" / "adapter"
    equal(
        jlora.peft.load(folder, params, names=model.torch_names()),
        jlora.peft.load(folder, params, model=model),
    )
    with pytest.raises(jlora.TargetError, match="not both"):
        jlora.peft.load(folder, params, model=model, names={})
    with pytest.raises(jlora.TargetError, match="no torch_names"):
        jlora.peft.load(folder, params, model=object())
