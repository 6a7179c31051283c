"""PEFT folders without PyTorch: golden files, round trips, and what is refused."""

import json
import pathlib
import struct
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tools import randomise

import jlora
import jlora.peft
from jlora import models
from jlora.peft._config import pattern_for, rank_of, short_names, targets
from jlora.peft._names import Table

GOLDEN = pathlib.Path(__file__).parent / "golden" / "peft"
T5 = GOLDEN / "t5_qv"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def same_files(a, b):
    assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()
    ours, theirs = (json.loads((x / CONFIG).read_text()) for x in (a, b))
    as_sets = [
        {k: set(v) if isinstance(v, list) else v for k, v in c.items()}
        for c in (ours, theirs)
    ]
    assert as_sets[0] == as_sets[1]


# -- golden ----------------------------------------------------------------------------


def test_t5_gives_pefts_logits_and_its_files(tmp_path):
    model, params = models.load(T5 / "base")
    tree = jlora.peft.load(T5 / "adapter", params)
    io = load_file(T5 / "io.safetensors")

    def apply(p):
        return model.apply(
            {"params": p}, io["input_ids"], None, io["decoder_input_ids"]
        )

    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jlora.lora(apply)(tree), io["adapter_logits"], **close)
    np.testing.assert_allclose(apply(jlora.merge(tree)), io["merged_logits"], **close)
    jlora.peft.save(
        tmp_path / "a", tree, task_type="SEQ_2_SEQ_LM",
        config={"init_lora_weights": False},
    )  # fmt: skip
    same_files(tmp_path / "a", T5 / "adapter")
    config = jlora.peft.read_config(T5 / "adapter")
    jlora.peft.save(tmp_path / "b", tree, config=config)
    same_files(tmp_path / "b", T5 / "adapter")
    again = jlora.peft.load(tmp_path / "b", params)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def gpt2_tree():
    shapes = {"c_attn": (16, 48), "c_proj": (16, 16)}
    block = {
        k: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for k, s in shapes.items()
    }
    return {
        "transformer": {
            "wte": {"embedding": jnp.zeros((40, 16))},
            "h": {"0": {"attn": block}},
        }
    }


def test_gpt2s_conv1d_keeps_its_factors_as_they_are(tmp_path):
    folder = GOLDEN / "gpt2_cattn" / "adapter"
    tree = jlora.peft.load(folder, gpt2_tree())
    node = tree["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"]
    stored = load_file(folder / WEIGHTS)
    key = f"{PREFIX}transformer.h.0.attn.c_attn.lora_"
    want = 16 / 2 * (stored[key + "B.weight"] @ stored[key + "A.weight"]).T
    np.testing.assert_allclose(node.delta(), want, rtol=1e-5, atol=1e-6)
    jlora.peft.save(
        tmp_path / "a", tree, task_type="CAUSAL_LM", fan_in_fan_out=True,
        config={"init_lora_weights": False},
    )  # fmt: skip
    same_files(tmp_path / "a", folder)


# -- our own ---------------------------------------------------------------------------


def small():
    rng = np.random.default_rng(0)
    r = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer = lambda: {"q": {"kernel": r(6, 6), "bias": r(6)}, "v": {"kernel": r(6, 4)},
                     "ln": {"scale": r(6), "bias": r(6)}}  # fmt: skip
    return {"emb": {"embedding": r(11, 6)}, "layers": {str(i): layer() for i in range(3)},
            "head": {"kernel": r(6, 3), "bias": r(3)}}  # fmt: skip


def adapted(**settings):
    settings = {"rank": 2, "targets": ["q", "v"], "alpha": 3} | settings
    return randomise(jlora.lorafy(small(), **settings), jax.random.key(1))


def saved(tmp_path, tree=None, name="a", **settings):
    jlora.peft.save(tmp_path / name, adapted() if tree is None else tree, **settings)
    return tmp_path / name


def equal(x, y):
    x, y = (jax.tree_util.tree_leaves_with_path(t) for t in (x, y))
    for (p, a), (q, b) in zip(x, y, strict=True):
        assert p == q
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), p


T = jlora.Target


@pytest.mark.filterwarnings("ignore::jlora.JloraWarning")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), dict(r=2, lora_alpha=3, target_modules=["q", "v"], bias="none")),
        (dict(rslora=True), dict(use_rslora=True, lora_alpha=3)),
        (dict(alpha=0.1), dict(lora_alpha=0.1)),
        (dict(dropout=0.25), dict(lora_dropout=0.25)),
        (dict(targets=["layers.1.q"]), dict(target_modules=["1.q"])),
        (dict(targets={"layers.1.q": T(rank=4, alpha=6), "q": T(), "v": T()}),
         dict(rank_pattern={r"1\.q": 4}, alpha_pattern={r"1\.q": 6})),
        (dict(train=["head"]), dict(modules_to_save=["head"])),
        (dict(bias="lora_only"), dict(bias="lora_only", modules_to_save=None)),
        (dict(bias="all"), dict(bias="all", modules_to_save=None)),
        (dict(targets=["emb", "q"]), dict(target_modules=["emb", "q"])),
    ],
)  # fmt: skip
def test_round_trip(settings, expected, tmp_path):
    tree = adapted(**settings)
    folder = saved(tmp_path, tree)
    config = json.loads((folder / CONFIG).read_text())
    assert {k: config[k] for k in expected} == expected
    back = jlora.peft.load(folder, small())
    equal(back, tree)
    same_files(saved(tmp_path, back, "b"), folder)


def test_attention_kernels_of_three_axes(tmp_path):
    base = {"query": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))},
            "out": {"kernel": jnp.ones((2, 3, 6))}}  # fmt: skip
    tree = jlora.lorafy(base, 2, ["query", "out"], bias="lora_only")
    tree = randomise(tree, jax.random.key(0))
    folder = saved(tmp_path, tree)
    stored = load_file(folder / WEIGHTS)
    assert stored[f"{PREFIX}query.lora_B.weight"].shape == (6, 2)
    assert stored[f"{PREFIX}query.base_layer.bias"].shape == (6,)
    delta = (
        stored[f"{PREFIX}query.lora_B.weight"] @ stored[f"{PREFIX}query.lora_A.weight"]
    )
    want = tree["query"]["kernel"].delta().reshape(6, 6).T
    np.testing.assert_allclose(delta, want, rtol=1e-5, atol=1e-6)
    equal(jlora.peft.load(folder, base), tree)


def test_slices_of_a_fused_kernel_become_one(tmp_path):
    base = {"c_attn": {"kernel": jnp.ones((6, 12))}}
    targets = {"query": T(rank=2, alpha=1), "value": T(rank=3, alpha=5)}
    tree = randomise(jlora.lorafy(base, targets=targets), jax.random.key(0))
    back = jlora.peft.load(saved(tmp_path, tree), base)["c_attn"]["kernel"]
    assert back.adapters[""].rank == 5
    np.testing.assert_allclose(
        back.delta(), tree["c_attn"]["kernel"].delta(), rtol=1e-6, atol=1e-6
    )
    assert not np.any(back.delta()[:, 4:8])  # the keys' slice stays as it is


def test_names_of_another_tree(tmp_path):
    tree = jlora.lorafy({"enc": {"q": {"kernel": jnp.ones((4, 5))}}}, 2, ["q"])
    names = {"enc/q": "model.layers.0.self_attn.q_proj"}
    folder = saved(tmp_path, tree, names=names)
    assert f"{PREFIX}{names['enc/q']}.lora_A.weight" in load_file(folder / WEIGHTS)
    base = jlora.merge(tree)
    equal(jlora.peft.load(folder, base, names=names), tree)
    equal(jlora.peft.load(folder, base, names=lambda m: names[m]), tree)
    with pytest.raises(jlora.TargetError, match="no leaf or module"):
        jlora.peft.load(folder, base, names={"enc/k": "x"})
    two = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(jlora.TargetError, match=r"both be 'x.weight'"):
        jlora.peft.load(folder, two, names=lambda m: "x")


def test_a_tied_table_is_one_adapter(tmp_path):
    names = {"emb": ("embed", "lm_head.T")}
    tree = adapted(targets=["emb"])
    folder = saved(tmp_path, tree, names=names)
    stored = load_file(folder / WEIGHTS)
    a, b = (stored[f"{PREFIX}embed.lora_embedding_{x}"] for x in "AB")
    np.testing.assert_array_equal(stored[f"{PREFIX}lm_head.lora_A.weight"], b.T)
    np.testing.assert_array_equal(stored[f"{PREFIX}lm_head.lora_B.weight"], a.T)
    equal(jlora.peft.load(folder, small(), names=names), tree)
    stored[f"{PREFIX}lm_head.lora_A.weight"] += 1
    save_file(stored, folder / WEIGHTS)
    with pytest.raises(jlora.CheckpointError, match="embed and lm_head differ"):
        jlora.peft.load(folder, small(), names=names)


def test_sharded_and_abstract_bases(tmp_path):
    folder = saved(tmp_path, adapted(train=["head"]))
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    put = lambda x: jax.device_put(
        x,
        NamedSharding(
            mesh,
            PartitionSpec(
                *[None] * (x.ndim - 1), "x" if x.shape[-1] % 2 == 0 else None
            ),
        ),
    )
    tree = jlora.peft.load(folder, jax.tree.map(put, small()))
    equal(tree, jlora.peft.load(folder, small()))
    adapter = tree["layers"]["0"]["q"]["kernel"].adapters[""]
    assert adapter.b.sharding.spec == PartitionSpec(None, "x")
    assert adapter.a.sharding.mesh == mesh
    assert tree["head"]["kernel"].value.sharding.mesh == mesh
    again = saved(tmp_path, tree, "b")
    same_files(again, folder)
    abstract = jlora.peft.load(folder, jax.eval_shape(lambda: small()))
    node = abstract["layers"]["0"]["q"]["kernel"]
    assert isinstance(node.base, jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(node.adapters[""].a, adapter.a)
    shapes = jlora.lorafy(jax.eval_shape(lambda: small()), 2, ["q"])
    with pytest.raises(jlora.StructureError, match="no values"):
        jlora.peft.save(tmp_path / "c", shapes)


# -- what the configuration means ------------------------------------------------------


def test_pefts_matching():
    assert targets({"target_modules": ["q"]}, "a.q")
    assert not targets({"target_modules": ["q"]}, "a.seq")
    assert targets({"target_modules": r".*\.q"}, "a.q")
    assert not targets({"target_modules": r"\.q"}, "a.q")
    assert not targets({"target_modules": ["q"], "modules_to_save": ["a"]}, "a.q")
    layer = {"target_modules": ["q"], "layers_to_transform": 1}
    found = [
        targets(layer, m) for m in ("m.h.1.q", "m.h.0.q", "h.1.q", "m.h.1.e.0.q", "q")
    ]
    assert found == [True, False, False, True, True]  # a whole name counts in any layer
    pattern = {"q": 4, "1.q": 5, "^b": 6}
    assert [rank_of({"r": 1, "rank_pattern": pattern}, m) for m in
            ("a.1.q", "seq", "b", "a.b")] == [4, 1, 6, 1]  # fmt: skip


def test_short_names_and_patterns():
    assert short_names(["a.0.q", "a.1.q"], ["a.0.k"]) == ["q"]
    assert short_names(["a.1.q"], ["a.0.q"]) == ["1.q"]
    assert short_names(["q"], ["a.q"]) is None
    default, pattern = pattern_for({"q": 1, "a.q": 2, "b.q": 2, "c.q": 2})
    assert (default, pattern) == (2, {"^q": 1})
    found = {
        m: rank_of({"r": default, "rank_pattern": pattern}, m) for m in ("q", "a.q")
    }
    assert found == {"q": 1, "a.q": 2}


def test_a_target_that_only_an_expression_names(tmp_path):
    base = {"q": {"kernel": jnp.ones((3, 3))}, "a": {"q": {"kernel": jnp.ones((3, 3))}}}
    tree = jlora.lorafy(base, 2, "q/kernel")
    folder = saved(tmp_path, tree)
    assert jlora.peft.read_config(folder)["target_modules"] == "q"
    equal(jlora.peft.load(folder, base), tree)


def test_tables_of_hugging_faces_layouts():
    shapes = {
        "shared/embedding": (5, 2),
        "encoder/q/kernel": (2, 2),
        "decoder/q/kernel": (2, 2),
    }
    tied = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    users = lambda s: [p.module for p in Table(s).of_leaf[next(iter(s))]]
    assert users(shapes) == tied
    assert users({**shapes, "lm_head/kernel": (2, 5)}) == tied[:3]
    gpt2 = {"transformer/wte/embedding": (5, 2)}
    assert users(gpt2) == ["transformer.wte", "lm_head"]
    assert users({**gpt2, "score/kernel": (2, 2)}) == ["transformer.wte"]


# -- bad input -------------------------------------------------------------------------


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def change_tensors(folder, f):
    tensors = load_file(folder / WEIGHTS)
    f(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("lora_bias", True),
        ("target_parameters", ["head.weight"]),
        ("target_parameters", "head.weight"),
        ("trainable_token_indices", [1]),
        ("trainable_token_indices", {"emb": [1]}),
        ("trainable_token_indices", {"emb": ["1"]}),
        ("trainable_token_indices", {"emb": 1}),
        ("alora_invocation_tokens", ["a"]),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("ensure_weight_tying", "yes"),
        ("kasa_config", {}),
        ("use_bdlora", {}),
        ("arrow_config", {"top_k": 2}),
        ("init_lora_weights", "pissa_niter_4"),
        ("a_key_of_the_future", 1),
        ("bias", "some"),
        ("r", "8"),
        ("r", True),
        ("target_modules", "(q"),
        ("target_modules", [1]),
        ("modules_to_save", ["(q"]),
        ("rank_pattern", {"q": "2"}),
        ("rank_pattern", [1]),
    ],
)
def test_a_configuration_that_cannot_be_honoured(key, value, tmp_path):
    folder = saved(tmp_path)
    change_config(folder, **{key: value})
    with pytest.raises(
        jlora.CheckpointError, match=rf"{key}|\(q|head.weight is targeted"
    ):
        jlora.peft.load(folder, small())


def test_unknown_keys_that_say_nothing_are_fine(tmp_path):
    folder = saved(tmp_path)
    change_config(folder, tomorrow=None, later=False, some={}, init_lora_weights="eva")
    jlora.peft.load(folder, small())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target_modules=["q"]), "v has an adapter, but is not targeted"),
        (
            dict(target_modules=["q", "v", "head"]),
            "head is targeted, but has no adapter",
        ),
        (dict(r=3), "has rank 2, but is to have 3"),
        (dict(rank_pattern={"1.q": 4}), "layers.1.q has rank 2, but is to have 4"),
        (dict(layers_to_transform=[0]), "layers.1.q has an adapter"),
        (dict(exclude_modules=["0.q"]), "layers.0.q has an adapter"),
        (dict(modules_to_save=["head"]), "head.bias"),
        (dict(bias="lora_only"), "layers.0.q.bias"),
    ],
)
def test_tensors_and_configuration_disagree(changes, message, tmp_path):
    folder = saved(tmp_path)
    change_config(folder, **changes)
    with pytest.raises(jlora.CheckpointError, match=message):
        jlora.peft.load(folder, small())


Q = f"{PREFIX}layers.0.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "lora_B without lora_A"),
        (lambda t: [t.pop(f"{Q}.lora_{x}.weight") for x in "AB"], "has no adapter"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 6), "f4")}), "disagree on r"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((2, 7), "f4")}), "another base"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((2, 6, 1, 1), "f4")}), "convol"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.ones((2, 6), "i4")}), "dtype I32"),
        (lambda t: t.update({f"{Q}x.lora_A.weight": np.ones((2, 6), "f4")}), "not in this"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(6, "f4")}), "use_dora"),
        (lambda t: t.update({f"{Q}.lora_B.bias": np.ones(6, "f4")}), "lora_bias"),
        (lambda t: t.update({f"{PREFIX}nothing.weight": np.ones(6, "f4")}), "match nothing"),
        (lambda t: t.update({f"{PREFIX}head.bias": np.ones(3, "f4")}), "head.bias"),
        (lambda t: t.update({"head.bias": np.ones(3, "f4")}), "does not begin with"),
        (lambda t: t.clear(), "has no adapter"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change, message, tmp_path):
    folder = saved(tmp_path)
    change_tensors(folder, change)
    with pytest.raises(jlora.CheckpointError, match=message):
        jlora.peft.load(folder, small())


def test_another_base_is_told_by_its_shapes(tmp_path):
    folder = saved(tmp_path)
    other = jax.tree.map(lambda x: jnp.ones([2 * n for n in x.shape]), small())
    with pytest.raises(
        jlora.CheckpointError, match=r"6 adapters do not fit(.|\n)*layers.2.v"
    ):
        jlora.peft.load(folder, other)
    with pytest.raises(jlora.CheckpointError, match="plain base"):
        jlora.peft.load(folder, adapted())


def damaged(file, how):
    data = file.read_bytes()
    if how == "oversized":
        data = struct.pack("<Q", 1 << 40) + data[8:]
    file.write_bytes(data[: {"cut": len(data) - 9, "header": 5}.get(how, len(data))])


@pytest.mark.parametrize("how", ["cut", "header", "oversized"])
def test_damaged_tensors(how, tmp_path):
    folder = saved(tmp_path)
    damaged(folder / WEIGHTS, how)
    with pytest.raises(jlora.CheckpointError, match="cut off or damaged"):
        jlora.peft.load(folder, small())


def test_files_that_are_missing(tmp_path):
    with pytest.raises(jlora.CheckpointError, match="no PEFT adapter"):
        jlora.peft.load(tmp_path / "x", small())
    folder = saved(tmp_path, adapter="first")
    assert (folder / "first" / CONFIG).exists()
    jlora.peft.load(folder, small(), adapter="first")
    with pytest.raises(jlora.CheckpointError, match="adapter='first'"):
        jlora.peft.load(folder, small())
    (folder / "first" / WEIGHTS).rename(folder / "first" / "adapter_model.bin")
    with pytest.raises(jlora.CheckpointError, match="pickle"):
        jlora.peft.load(folder, small(), adapter="first")
    (folder / "first" / CONFIG).write_text("{")
    with pytest.raises(jlora.CheckpointError, match="JSON"):
        jlora.peft.load(folder, small(), adapter="first")


@pytest.mark.parametrize("name", ["../a", "..", "", "/etc", "b/c", "b\\c", "link"])
def test_a_path_that_climbs_out(name, tmp_path):
    saved(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    with pytest.raises(jlora.CheckpointError, match=r"not the name|leads out"):
        jlora.peft.load(tmp_path / "b", small(), adapter=name)
    with pytest.raises(jlora.CheckpointError, match=r"not the name|leads out"):
        jlora.peft.save(tmp_path / "b", adapted(), adapter=name, overwrite=True)


def test_an_adapter_is_replaced_on_request_only(tmp_path):
    folder = saved(tmp_path)
    (folder / "README.md").write_text("keep")
    before = (folder / WEIGHTS).read_bytes()
    other = adapted(rank=3)
    with pytest.raises(jlora.CheckpointError, match="overwrite=True"):
        saved(tmp_path, other)
    assert (folder / WEIGHTS).read_bytes() == before
    saved(tmp_path, other, overwrite=True)
    equal(jlora.peft.load(folder, small()), other)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    (tmp_path / "file").write_text("")
    with pytest.raises(jlora.CheckpointError, match="is a file"):
        saved(tmp_path, name="file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["write_tensors", "os.fsync"])
def test_a_full_disk_leaves_what_was_there(what, overwrite, tmp_path, monkeypatch):
    if overwrite:
        before = (saved(tmp_path) / WEIGHTS).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"jlora._files.{what}", full)
    with pytest.raises(jlora.CheckpointError, match="No space left"):
        saved(tmp_path, adapted(rank=3), overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "a" / WEIGHTS).read_bytes() == before


def test_a_failed_replacement_is_undone(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    before = (folder / WEIGHTS).read_bytes()
    rename = pathlib.Path.rename

    def fail(self, target):
        if self.name == CONFIG and pathlib.Path(target).parent == folder:
            raise OSError("gone")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(jlora.CheckpointError, match="gone"):
        saved(tmp_path, adapted(rank=3), overwrite=True)
    assert (folder / WEIGHTS).read_bytes() == before
    equal(jlora.peft.load(folder, small()), adapted())


def test_trees_that_the_format_cannot_hold(tmp_path):
    stack = {"w": {"kernel": jnp.ones((3, 4, 5))}}
    spec = {"w/kernel": T(in_axes=(1,), batch_axes=(0,))}
    odd = {"w": {"kernel": jnp.ones((2, 3, 4, 5, 3, 2))}}
    odd_spec = {"w/kernel": T(in_axes=(0, 1, 2, 3, 4))}
    flipped = {"w/kernel": T(in_axes=(2,))}
    kernel = {"w": {"kernel": jnp.ones((3, 4))}}
    two = {"q": T(dropout=0.1), "v": T(dropout=0.2)}
    for tree, message in [
        (small(), "nothing in this tree is trained"),
        (jlora.lorafy(stack, 2, spec), "Unstack it first"),
        (jlora.lorafy(odd, 2, odd_spec), "none that jlora.peft can name"),
        (adapted(targets=two), "lora_dropout"),
    ]:
        with pytest.raises(jlora.StructureError, match=message):
            saved(tmp_path, tree)
    for tree in (
        jlora.lorafy(stack, 2, flipped),
        jlora.lorafy(kernel, 2, {"w": T(in_axes=(1,))}),
    ):
        with pytest.raises(jlora.ShapeError, match="in PyTorch this"):
            saved(tmp_path, tree)
    with pytest.raises(jlora.StructureError, match="does not say what this tree is"):
        saved(tmp_path, config={"r": 5})
    with pytest.raises(jlora.StructureError, match=r"scale 1.5, but is to have 4"):
        saved(tmp_path, config={"lora_alpha": 8})
    with pytest.raises(jlora.StructureError, match="modules_to_save"):
        saved(tmp_path, adapted(train=["head"]), config={"modules_to_save": None})
    assert not list(tmp_path.iterdir())
    saved(tmp_path, adapted(targets=two), config={"lora_dropout": 0.2})


# -- servers ---------------------------------------------------------------------------


def a_decoder():
    config = models.LlamaConfig(
        vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = models.Llama(config)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    return model, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def remark_on(folder, model, tree, task_type="CAUSAL_LM"):
    """What saving an adapter warns of; nothing is None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jlora.peft.save(folder, tree, model=model, task_type=task_type, overwrite=True)
    assert len(caught) < 2
    return str(caught[0].message) if caught else None


def test_what_servers_do_not_read_is_said_once(tmp_path):
    model, params = a_decoder()
    plain = jlora.lorafy(params, 2, ["query", "value"], alpha=8)
    assert remark_on(tmp_path, model, plain) is None
    own = {
        "query": jlora.Target(rank=2, alpha=4),
        "value": jlora.Target(rank=4, alpha=8),
    }
    assert remark_on(tmp_path, model, jlora.lorafy(params, targets=own)) is None
    own["value"] = jlora.Target(rank=4, alpha=2)
    unlike = jlora.lorafy(params, targets=own)
    said = remark_on(tmp_path, model, unlike)
    config = jlora.peft.read_config(tmp_path)
    others = (
        "v_proj by 0.5" if config["lora_alpha"] / config["r"] == 2 else "q_proj by 2"
    )
    for layer in range(3):
        assert f"model.layers.{layer}.self_attn.{others}" in said
    assert "TGI leaves" not in said
    assert "with one rank and alpha; or serve the merged model" in said
    assert remark_on(tmp_path, model, unlike, "FEATURE_EXTRACTION") is None
    lacking = jlora.lorafy(params, 2, r".*layers/[02]/.*(q_proj|v_proj)/kernel")
    said = remark_on(tmp_path, model, lacking)
    assert "model.layers.1.self_attn.q_proj\n  model.layers.1.self_attn.v_proj" in said
    assert "alpha/r" not in said
