"""Hugging Face folders: what loads, what is refused and why, what is written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models_t5 import PUBLISHED

from jlora import models
from jlora._errors import CheckpointError, StructureError

GOLDEN = Path(__file__).parent / "golden" / "t5"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A copy of the untied golden checkpoint."""
    return Path(shutil.copytree(GOLDEN / "v11", tmp_path / "v11"))


@pytest.fixture
def tied(tmp_path):
    return Path(shutil.copytree(GOLDEN / "v10", tmp_path / "v10"))


def change_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder):
    """Write the checkpoint anew in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_tensors_land_transposed_where_linear(folder):
    params = models.load(folder)[1]
    tensors = load_file(folder / "model.safetensors")
    q = "encoder.block.1.layer.0.SelfAttention.q.weight"
    got = params["encoder"]["block"]["1"]["layer"]["0"]["SelfAttention"]["q"]["kernel"]
    np.testing.assert_array_equal(got, tensors[q].T)
    np.testing.assert_array_equal(
        params["shared"]["embedding"], tensors["shared.weight"]
    )
    assert len(jax.tree.leaves(params)) == len(tensors)


def test_shards_are_the_whole(folder):
    whole = models.load(folder)[1]
    shard(folder)
    assert_same(models.load(folder)[1], whole)


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtypes(folder, dtype):
    half = lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()})
    change_tensors(folder, half)
    model, params = models.load(folder, dtype)
    want = jnp.dtype(dtype or jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {want}
    assert (model.dtype, model.param_dtype) == (want, want)
    mixed, _ = models.load(folder, dtype, compute_dtype=jnp.bfloat16)
    assert mixed.dtype == jnp.bfloat16


def test_float16_parameters_compute_in_float32(folder):
    model, params = models.load(folder, jnp.float16)
    assert model.dtype == jnp.float32
    assert jax.tree.leaves(params)[0].dtype == jnp.float16


def test_known_aliases_are_verified(tied):
    def add(tensors):
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            tensors[f"{name}.weight"] = tensors["shared.weight"].copy()
        unused = "layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[f"decoder.block.0.{unused}"] = np.ones((32, 3), np.float32)

    plain = models.load(tied)[1]
    change_tensors(tied, add)
    assert_same(models.load(tied)[1], plain)
    change_tensors(tied, lambda t: t["encoder.embed_tokens.weight"].fill(0.5))
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens\.weight must eq"):
        models.load(tied)


def test_a_head_of_its_own_under_a_tied_config(folder):
    # As transformers 5 writes every untied T5.
    change_config(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
    model, params = models.load(folder)
    assert model.config.tie_word_embeddings is False
    assert model.config.scale_decoder_outputs is False
    assert "lm_head" in params
    # As nobody writes it on purpose: tied or not, it cannot be told.
    change_config(folder, scale_decoder_outputs="gone")
    with pytest.raises(CheckpointError, match="ties the head"):
        models.load(folder)


def drop(name):
    return lambda folder: change_tensors(folder, lambda t: t.pop(name))


def add(name):
    return lambda folder: change_tensors(
        folder, lambda t: t.update({name: np.ones(2, np.float32)})
    )


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def scribble(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 20 + file.read_bytes()[20:])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def integers(folder):
    name = "shared.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].astype(np.int8)}))


def wrong_shape(folder):
    change_config(folder, d_ff=25)


def missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def climbing_index(folder):
    shard(folder)
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "model-00002-of-00002.safetensors", outside)
    swap = lambda m: m.update(
        {k: "../outside.safetensors" for k, v in m.items() if "00002-of" in v}
    )
    change_index(folder, swap)


def false_index(folder):
    shard(folder)
    change_index(folder, lambda m: m.pop("shared.weight"))


def cut_index(folder):
    shard(folder)
    (folder / INDEX).write_text('{"weight_map": {"a"')


def empty_index(folder):
    shard(folder)
    (folder / INDEX).write_text("{}")


def no_config(folder):
    (folder / "config.json").unlink()


def other_model(folder):
    change_config(folder, model_type="t6")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("shared.weight"), ["1 tensors are missing", "shared.weight"]),
        (add("decoder.extra.weight"), ["no place", "decoder.extra.weight"]),
        (cut, ["model.safetensors", "bytes", "cut off"]),
        (scribble, ["model.safetensors", "cut off or damaged"]),
        (empty, ["model.safetensors", "(0 bytes)"]),
        (pickle, ["pytorch_model.bin", "safe_serialization"]),
        (no_weights, ["holds neither"]),
        (integers, ["shared.weight", "I8"]),
        (wrong_shape, ["DenseReluDense.wi_0.weight is [24, 16]", "[25, 16]"]),
        (missing_shard, ["1 of 2 shards", "model-00002-of-00002.safetensors"]),
        (climbing_index, ["../outside.safetensors", "no file name"]),
        (false_index, ["disagree", "shared.weight"]),
        (cut_index, [INDEX, "cannot be read"]),
        (empty_index, [INDEX, "no weight_map"]),
        (no_config, ["config.json does not exist"]),
        (other_model, ["'t6'", "Known are ", "t5"]),
    ],
)
def test_damage_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        models.load(folder)
    for word in words:
        assert word in str(caught.value)


def test_paths_that_are_none(tmp_path):
    for wrong in (tmp_path / "nothing", "./nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match="is no folder"):
            models.load(wrong)


def test_a_name_on_the_hub(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def found(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    models.load("someone/some-t5")
    assert asked["name"] == "someone/some-t5"
    assert {"config.json", "*.safetensors", "tokenizer.json"} <= set(asked["patterns"])
    assert not any("bin" in pattern for pattern in asked["patterns"])

    def unreachable(name, allow_patterns):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"someone/some-t5.*no route to host"):
        models.load("someone/some-t5")


@pytest.mark.parametrize("most", [None, 20_000])
@pytest.mark.parametrize("form", ["v10", "v11"])
def test_saved_is_loaded(form, most, tmp_path):
    source = GOLDEN / form
    model, params = models.load(source)
    target = tmp_path / "deep" / "out"
    models.save(model, params, target, max_shard_bytes=most)
    again, others = models.load(target)
    assert again == model
    assert again.config.extra == model.config.extra | {"dtype": "float32"}
    assert_same(params, others)
    shards = sorted(target.glob("*.safetensors"))
    assert (
        len(shards) > 1 if most else [s.name for s in shards] == ["model.safetensors"]
    )
    if most:
        assert all(s.stat().st_size < most + 4000 for s in shards)
        index = json.loads((target / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(
            leaf.nbytes for leaf in jax.tree.leaves(params)
        )
    else:
        written, wanted = load_file(shards[0]), load_file(source / shards[0].name)
        assert written.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(written[name], wanted[name])
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["out"]


def test_saved_in_bfloat16(folder, tmp_path):
    model, params = models.load(folder, jnp.bfloat16)
    models.save(model, params, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    again, others = models.load(tmp_path / "out")
    assert again.dtype == jnp.bfloat16
    assert_same(params, others)


def test_overwriting_only_where_asked(folder, tmp_path):
    model, params = models.load(folder)
    target = tmp_path / "out"
    models.save(model, params, target, max_shard_bytes=20_000)
    (target / "notes.txt").write_text("mine")
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        models.save(model, params, target)
    other = jax.tree.map(lambda x: x + 1, params)
    models.save(model, other, target, overwrite=True)
    assert_same(models.load(target)[1], other)
    assert sorted(f.name for f in target.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
    ]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "v11"]


def test_a_failed_save_leaves_what_was_there(folder, tmp_path, monkeypatch):
    model, params = models.load(folder)
    target = tmp_path / "out"
    models.save(model, params, target)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("jlora._files.TensorFile.append", full)
    with pytest.raises(CheckpointError, match="No space"):
        models.save(model, params, target, overwrite=True)
    assert_same(models.load(target)[1], params)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "v11"]


def test_tokenizer_files_are_copied(folder, tmp_path):
    model, params = models.load(folder)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        models.save(model, params, tmp_path / "out", tokenizer_from=folder)
    assert not (tmp_path / "out").exists()
    (folder / "tokenizer.json").write_text('{"a": 1}')
    models.save(model, params, tmp_path / "out", tokenizer_from=folder)
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "out/generation_config.json").exists()


def test_only_the_models_own_parameters_are_saved(folder, tmp_path):
    model, params = models.load(folder)
    for wrong in (
        {k: v for k, v in params.items() if k != "lm_head"},
        {**params, "lm_head": {"kernel": {"base": params["lm_head"]["kernel"]}}},
        {**params, "lm_head": {"kernel": params["lm_head"]["kernel"].T}},
    ):
        with pytest.raises(StructureError, match=r"lm_head/kernel.*\n.*merge"):
            models.save(model, wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_symbolic_link_keeps_pointing(folder, tmp_path):
    model, params = models.load(folder)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    models.save(model, params, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(models.load(tmp_path / "link")[1], params)


def flan_t5_small(rng):
    """Yield the names and tensors of FLAN-T5-small, as published, at random."""
    d, inner, ff, V = 512, 384, 1024, 32128
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    yield "shared.weight", draw(V, d)
    yield "lm_head.weight", draw(V, d)
    for stack, kinds in (
        ("encoder", ["SelfAttention"]),
        ("decoder", ["SelfAttention", "EncDecAttention"]),
    ):
        yield f"{stack}.final_layer_norm.weight", draw(d)
        for block in range(8):
            layers = f"{stack}.block.{block}.layer"
            for i, kind in enumerate(kinds):
                yield f"{layers}.{i}.layer_norm.weight", draw(d)
                for name in "qkv":
                    yield f"{layers}.{i}.{kind}.{name}.weight", draw(inner, d)
                yield f"{layers}.{i}.{kind}.o.weight", draw(d, inner)
            if block == 0:
                table = "SelfAttention.relative_attention_bias.weight"
                yield f"{layers}.0.{table}", draw(32, 6)
            feed = f"{layers}.{len(kinds)}"
            yield f"{feed}.layer_norm.weight", draw(d)
            for name in ("wi_0", "wi_1"):
                yield f"{feed}.DenseReluDense.{name}.weight", draw(ff, d)
            yield f"{feed}.DenseReluDense.wo.weight", draw(d, ff)


def test_flan_t5_small_whole_and_in_shards(tmp_path):
    tensors = dict(flan_t5_small(np.random.default_rng(0)))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    model, params = models.load(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 76_961_152
    assert model.config.extra["n_positions"] == 512
    head = params["lm_head"]["kernel"]
    np.testing.assert_array_equal(head, tensors["lm_head.weight"].T)
    ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    logits = jax.eval_shape(model.apply, {"params": params}, ids, ids, ids)
    assert logits.shape == (8, 64, 32128)
    del params, head
    shard(tmp_path)
    # A third of the memory, and the conversion is tried on the way.
    again, params = models.load(tmp_path, jnp.bfloat16)
    assert again.config == model.config
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == 2 * 76_961_152


@pytest.mark.oracle
@pytest.mark.parametrize("form", ["v10", "v11"])
def test_pytorch_reads_what_is_written(form, tmp_path):
    pytest.importorskip("torch")
    from golden import make_t5
    from transformers import T5ForConditionalGeneration

    model, params = models.load(GOLDEN / form)
    params = jax.tree.map(lambda x: x * 1.01, params)
    models.save(model, params, tmp_path / "out", max_shard_bytes=20_000)
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    batch = make_t5.inputs(3)
    got = jax.jit(model.apply)({"params": params}, *batch.values())
    np.testing.assert_allclose(got, make_t5.logits(theirs, batch), atol=2e-5)
