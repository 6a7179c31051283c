import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import randomise

import jlora
import jlora.checkpoint as jc
import jlora.models
import jlora.peft
import jlora.train as jt
from jlora._processes import on_host

D, H = 7, 12
TX = optax.adam(0.05)


def plain_params(dtype=jnp.float32):
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 0.4, shape), dtype)
    return {
        "query": {"kernel": normal(D, H), "bias": jnp.zeros(H, dtype)},
        "c_attn": {"kernel": normal(H, 3 * D)},
        "layers": {"value": {"kernel": normal(2, D, H)}},
    }


def lora_params(dtype=jnp.float32, **kwargs):
    """A fused kernel, a stacked one, a plain one, a trained bias, dropout."""
    stacked = jlora.Target(rank=3, in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    targets = {"layers/value": stacked, "query": jlora.Target()}
    settings = {"rank": 2, "targets": targets, "train": ["bias"], "dropout": 0.2}
    tree = jlora.lorafy(plain_params(dtype), **{**settings, **kwargs})
    return randomise(tree, jax.random.key(4))


def make_state(key=11, tx=TX, **kwargs):
    return jt.TrainState.create(lora_params(**kwargs), tx, jax.random.key(key))


def loss_fn(p, batch, key):
    x = batch["x"]
    h = jnp.tanh(x @ p["query"]["kernel"] + p["query"]["bias"])
    h = jnp.tanh(h @ p["c_attn"]["kernel"])[:, :D]
    for layer in range(2):
        h = h + h @ p["layers"]["value"]["kernel"][layer] @ jnp.ones((H, D)) / H
    return jnp.mean((h - batch["y"]) ** 2) + 0.01 * jax.random.uniform(key)


def make_batch(position):
    rng = np.random.default_rng(position)
    return {k: jnp.asarray(rng.normal(size=(5, D)), jnp.float32) for k in ("x", "y")}


def train(state, first, last):
    """Steps first..last; the data position is the number of batches drawn."""
    step = jt.make_train_step(loss_fn, TX, accumulate=1, clip_norm=1.0)
    losses = []
    for position in range(first, last):
        state, metrics = step(state, make_batch(position))
        losses.append(np.asarray(metrics["loss"]).tobytes().hex())
    return state, losses


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def bits(tree):
    named = jax.tree_util.tree_leaves_with_path(tree)

    def one(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return {
        jax.tree_util.keystr(p): (str(x.dtype), x.shape, one(x).tobytes())
        for p, x in named
    }


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert bits(one) == bits(two)


def refused(match, fn, *args, **kwargs):
    with pytest.raises(jlora.CheckpointError, match=match) as caught:
        fn(*args, **kwargs)
    return str(caught.value)


def size(path):
    return sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())


# -- adapters --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"targets": ["query", "c_attn"], "alpha": 5.0, "rslora": True, "train": ()}],
    ids=["stacked", "fused"],
)
def test_an_adapter_round_trips_bit_for_bit(tmp_path, dtype, kwargs):
    params = lora_params(dtype, **kwargs)
    jc.save_adapter(tmp_path / "adapter", params, metadata={"epochs": 3})
    same(jc.load_adapter(tmp_path / "adapter", plain_params(dtype)), params)
    assert jc.load_metadata(tmp_path / "adapter") == {"epochs": 3}


def test_several_adapters_on_one_fused_kernel(tmp_path):
    params = jlora.lorafy(
        {"c_attn": {"kernel": jnp.ones((H, 3 * D))}}, 2, ["query", "value"]
    )
    params = randomise(params, jax.random.key(2))
    jc.save_adapter(tmp_path / "a", params)
    same(jc.load_adapter(tmp_path / "a", jlora.merge(jlora.lorafy(
        {"c_attn": {"kernel": jnp.ones((H, 3 * D))}}, 2, ["query"]))), params)  # fmt: skip


def test_only_the_adapter_is_written(tmp_path):
    params = jlora.lorafy({"query": {"kernel": jnp.ones((501, 499))}}, 2, ["query"])
    jc.save_adapter(tmp_path / "adapter", params)
    assert size(tmp_path / "adapter") < 0.1 * 4 * 501 * 499


def test_a_dropout_key_is_not_saved(tmp_path):
    params = lora_params()
    jc.save_adapter(tmp_path / "a", jlora.with_dropout(params, jax.random.key(1)))
    same(jc.load_adapter(tmp_path / "a", plain_params()), params)


def test_another_base_is_refused_with_both_fingerprints(tmp_path):
    jc.save_adapter(tmp_path / "a", lora_params())
    other = plain_params()
    other["c_attn"]["kernel"] = other["c_attn"]["kernel"].at[3, 2].add(1e-6)
    message = refused(
        "was saved on another base", jc.load_adapter, tmp_path / "a", other
    )
    there = jc.fingerprint(lora_params()).digest
    here = jc.fingerprint(other, trained=["query/bias"]).digest
    assert f"there: {there}" in message
    assert f"here:  {here}" in message
    assert "'c_attn/kernel' float32 (12, 21) has other values" in message
    assert "'query/kernel'" not in message
    other["c_attn"]["kernel"] = jnp.zeros((H, D))
    other["new"] = other.pop("layers")
    message = refused("another base", jc.load_adapter, tmp_path / "a", other)
    assert "'c_attn/kernel' was float32 (12, 21), is float32 (12, 7)" in message
    assert "'layers/value/kernel' is missing" in message
    assert "'new/value/kernel' is new" in message


def test_another_dtype_passes_if_only_shapes_are_checked(tmp_path):
    jc.save_adapter(tmp_path / "a", lora_params())
    base = plain_params(jnp.bfloat16)
    refused("float32 .* is bfloat16", jc.load_adapter, tmp_path / "a", base)
    params = jc.load_adapter(tmp_path / "a", base, check="shapes")
    assert params["query"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="check='no'"):
        jc.load_adapter(tmp_path / "a", base, check="no")


def test_the_trained_bias_may_differ_in_the_base(tmp_path):
    params = lora_params()
    jc.save_adapter(tmp_path / "a", params)
    base = plain_params()
    base["query"]["bias"] += 1
    same(jc.load_adapter(tmp_path / "a", base), params)


def test_an_abstract_base_gets_real_adapters(tmp_path):
    jc.save_adapter(tmp_path / "a", lora_params())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), plain_params()
    )
    params = jc.load_adapter(tmp_path / "a", shapes)
    assert isinstance(params["query"]["kernel"].base, jax.ShapeDtypeStruct)
    got, want = jlora.split(params)[0], jlora.split(lora_params())[0]
    assert bits(got) == bits(want)


def test_adapters_of_sharded_kernels_are_sharded_along(tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    jc.save_adapter(tmp_path / "a", lora_params())
    base = jax.device_put(plain_params(), NamedSharding(mesh, P()))
    over_out = NamedSharding(mesh, P(None, "x"))
    base["query"]["kernel"] = jax.device_put(base["query"]["kernel"], over_out)
    params = jc.load_adapter(tmp_path / "a", base)
    adapter = params["query"]["kernel"].adapters[""]
    assert adapter.b.sharding == NamedSharding(mesh, P(None, "x"))
    assert adapter.a.sharding.is_fully_replicated
    assert params["query"]["bias"].value.sharding.mesh == mesh
    want, got = jlora.split(lora_params())[0], jlora.split(params)[0]
    assert bits(got) == bits(want)


def test_plain_and_lorafied_trees_are_not_mixed_up(tmp_path):
    with pytest.raises(jlora.StructureError, match="nothing in this tree is trained"):
        jc.save_adapter(tmp_path / "a", plain_params())
    jc.save_adapter(tmp_path / "a", lora_params())
    refused("takes the plain base", jc.load_adapter, tmp_path / "a", lora_params())


def test_fingerprint_depends_on_values_dtypes_paths_and_nothing_else():
    base = plain_params()
    digest = jc.fingerprint(base).digest
    assert digest == jc.fingerprint(jax.tree.map(np.asarray, base)).digest
    assert digest == "720ee134ffc4e011b75a6a83a1463ac2"
    adapted = jlora.lorafy(base, 2, ["query"])
    assert digest == jc.fingerprint(adapted).digest
    others = [plain_params(jnp.bfloat16), {**base, "more": jnp.zeros(1)}]
    others.append(jax.tree.map(lambda x: x[::-1], base))
    others.append({**base, "layers": {"value": {"kernel": jnp.zeros((2, H, D))}}})
    assert len({digest, *(jc.fingerprint(x).digest for x in others)}) == 5


@pytest.mark.parametrize("axes", [("x", "y"), ("y", None), (None, ("x", "y")), ()])
def test_fingerprint_is_that_of_any_sharding(axes):
    """Large arrays are read in blocks: whole ones of each shard."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    rng = np.random.default_rng(2)
    tree = {
        "blocks": rng.normal(size=(128, 1024)).astype(np.float32),
        "cut": rng.normal(size=(2 * 163, 4 * 197)).astype(np.float32),
        "small": rng.normal(size=(4, 4)).astype(np.float32),
    }
    sharding = NamedSharding(mesh, P(*axes))
    placed = jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
    assert jc.fingerprint(placed).leaves == jc.fingerprint(tree).leaves
    changed = {**tree, "blocks": tree["blocks"].copy()}
    changed["blocks"][127, 1023] *= 1.01
    lines = jc.fingerprint(placed).differences(jc.fingerprint(changed))
    assert lines == ["'blocks' float32 (128, 1024) has other values"]


def test_fingerprinting_keeps_no_copy_of_a_sharded_array():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    x = jax.device_put(jnp.ones((128, 1024)), NamedSharding(mesh, P("x")))
    jc.fingerprint({"x": x, "cut": x.reshape(1024, 128)})
    on_host(x)
    assert x._npy_value is None


def test_checkpoints_of_the_first_version_are_read(tmp_path, monkeypatch):
    """They hashed arrays whole, whatever their size."""
    base = {"w": jax.random.normal(jax.random.key(1), (128, 1024))}
    tree = randomise(jlora.lorafy(base, 40, ["w"]), jax.random.key(2))
    with monkeypatch.context() as m:
        m.setattr("jlora.checkpoint._storage.VERSION", 1)
        m.setattr("jlora.checkpoint._digests._LEAST", 2**40)
        jc.save_adapter(tmp_path / "old", tree)
    refused("other values", jc.load_adapter, tmp_path / "old", {"w": base["w"] + 1})
    same(jc.load_adapter(tmp_path / "old", base), tree)
    jc.save_adapter(tmp_path / "new", tree)
    same(jc.load_adapter(tmp_path / "new", base), tree)


# -- trees with leaves that are no arrays ----------------------------------------------


def test_trees_with_functions_for_leaves(tmp_path):
    """Equinox keeps a layer's activation as a leaf."""
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0))
    tree = randomise(jlora.lorafy(mlp, 2, ["layers"]), jax.random.key(1))
    jc.save_adapter(tmp_path / "a", tree)
    restored = jc.load_adapter(tmp_path / "a", mlp)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    arrays = lambda t: bits(eqx.filter(t, eqx.is_array))
    assert arrays(restored) == arrays(tree)
    assert restored.activation is mlp.activation
    other = eqx.tree_at(lambda m: m.layers[0].bias, mlp, jnp.ones(5))
    refused("'layers/0/bias'", jc.load_adapter, tmp_path / "a", other)
    jc.save_merged(tmp_path / "m", tree)
    merged = jc.load_merged(tmp_path / "m", mlp)
    assert arrays(merged) == arrays(jlora.merge(tree))
    x = jnp.ones((4, 3))
    np.testing.assert_array_equal(jax.vmap(merged)(x), jax.vmap(jlora.merge(tree))(x))
    state = jt.TrainState.create(tree, TX, jax.random.key(2))
    jc.save_state(tmp_path / "s", state, include_base=True)
    again, _ = jc.restore_state(tmp_path / "s", state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert again.frozen.activation is mlp.activation


# -- places and damage -----------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["gs://bucket/run", "s3://b/x", "hdfs://node/x", "abfss://c@a/x", "file:///x",
     Path("gs://bucket/run"), Path("s3://b")],
)  # fmt: skip
def test_addresses_of_buckets_are_no_folders(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree, state = lora_params(), make_state()
    for call in (
        lambda: jc.save_adapter(path, tree),
        lambda: jc.save_merged(path, tree),
        lambda: jc.save_state(path, state),
        lambda: jc.Checkpoints(path),
        lambda: jc.load_adapter(path, plain_params()),
        lambda: jc.load_merged(path),
        lambda: jc.load_metadata(path),
        lambda: jc.restore_state(path, state),
        lambda: jlora.peft.save(path, tree),
        lambda: jlora.peft.load(path, plain_params()),
        lambda: jlora.peft.load_all(path, plain_params()),
        lambda: jlora.peft.read_config(path),
        lambda: jlora.models.load(path),
        lambda: jlora.models.save(None, {}, path),
    ):
        refused("is not a local path", call)
    assert not any(tmp_path.iterdir())


def test_bad_arguments_are_checkpoint_errors(tmp_path):
    tree, state = lora_params(), make_state()
    jc.save_adapter(tmp_path / "a", tree)
    (tmp_path / "file").touch()
    run = jc.Checkpoints(tmp_path / "run")
    shapes = jax.eval_shape(lambda: tree)
    one, new = plain_params(), tmp_path / "new"
    for match, call in [
        (
            "expected 'values'",
            lambda: jc.load_adapter(tmp_path / "a", one, check="all"),
        ),
        ("best_mode='least'", lambda: jc.Checkpoints(new, best_mode="least")),
        ("keep_last='3'", lambda: jc.Checkpoints(new, keep_last="3")),
        ("cannot be made", lambda: jc.Checkpoints(tmp_path / "file")),
        ("cannot be made", lambda: jc.Checkpoints(tmp_path / "file" / "run")),
        ("'loss' is 'low'", lambda: run.save(state, metrics={"loss": "low"})),
        ("metadata= is a list", lambda: jc.save_adapter(new, tree, metadata=[1])),
        ("metadata= is a list", lambda: jc.save_merged(new, tree, metadata=[1])),
        ("data_position= is a int", lambda: jc.save_state(new, state, data_position=3)),
        ("query/a' .* no values", lambda: jc.save_adapter(new, shapes)),
        ("no values", lambda: jax.jit(lambda x: jc.save_adapter(new, x))(tree)),
        ("no values", lambda: jc.save_merged(new, shapes)),
        ("no values", lambda: jc.save_state(new, jax.eval_shape(lambda: state))),
        ("is no training state", lambda: jc.save_state(new, tree)),
        ("is no training state", lambda: jc.restore_state(tmp_path / "a", tree)),
        ("None is no path", lambda: jc.save_adapter(None, tree)),
        ("'' is no path", lambda: jc.save_adapter("", tree)),
        ("adapter=3 is not", lambda: jlora.peft.load(new, one, adapter=3)),
    ]:
        refused(match, call)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "run"]


def test_metadata_of_merged_parameters(tmp_path):
    jc.save_merged(tmp_path / "m", lora_params(), metadata={"epochs": 3})
    assert jc.load_metadata(tmp_path / "m") == {"epochs": 3}
    jc.save_state(tmp_path / "s", make_state())
    refused("has no metadata", jc.load_metadata, tmp_path / "s")


def test_adapters_of_an_abstract_base_are_saved(tmp_path):
    tree = lora_params()
    jc.save_adapter(tmp_path / "a", tree)
    shapes = jax.eval_shape(plain_params)
    abstract = jc.load_adapter(tmp_path / "a", shapes)
    jc.save_adapter(tmp_path / "b", abstract)
    same(jc.load_adapter(tmp_path / "b", plain_params()), tree)


def test_nothing_is_replaced_unasked(tmp_path):
    first, second = lora_params(), lora_params(alpha=7.0)
    jc.save_adapter(tmp_path / "a", first)
    refused("holds a checkpoint already", jc.save_adapter, tmp_path / "a", second)
    same(jc.load_adapter(tmp_path / "a", plain_params()), first)
    jc.save_adapter(tmp_path / "a", second, overwrite=True)
    same(jc.load_adapter(tmp_path / "a", plain_params()), second)
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (True, False):
        refused("is not a checkpoint of jlora; it is left alone",
                jc.save_adapter, tmp_path, lora_params(), overwrite=overwrite)  # fmt: skip
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    refused("is not a checkpoint of jlora", jc.load_adapter, tmp_path, plain_params())


@pytest.mark.parametrize("fails", [1, 2])
def test_an_interrupted_write_keeps_the_previous(tmp_path, monkeypatch, fails):
    first, second = lora_params(), lora_params(alpha=7.0)
    place = tmp_path / "a"
    jc.save_adapter(place, first)
    rename, calls = os.rename, []

    def failing(source, target, **kwargs):
        if str(source).startswith((str(place), str(tmp_path / ".a.new"))):
            calls.append((source, target))
            if len(calls) == fails:
                raise OSError("the power went off")
        return rename(source, target, **kwargs)

    monkeypatch.setattr("jlora.checkpoint._storage.os.rename", failing)
    with monkeypatch.context() as m:
        # A process that is killed cleans nothing up.
        m.setattr("jlora.checkpoint._storage.shutil.rmtree", lambda *a, **k: None)
        refused("power went off", jc.save_adapter, place, second, overwrite=True)
    monkeypatch.undo()
    same(jc.load_adapter(place, plain_params()), first)
    refused("holds a checkpoint already", jc.save_adapter, place, second)
    jc.save_adapter(place, second, overwrite=True)
    same(jc.load_adapter(place, plain_params()), second)


def data_files(path):
    files = [f for f in Path(path, "arrays").rglob("*") if f.is_file()]
    return sorted(f for f in files if f.stat().st_size)


# Reads that Orbax began and gave up are reported when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_found_wherever_it_is(tmp_path):
    params = lora_params()
    jc.save_adapter(tmp_path / "good", params)
    count = len(data_files(tmp_path / "good"))
    outcomes = []
    for number in range(count):
        for damage in ("cut", "gone", "flip"):
            place = tmp_path / "bad"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(tmp_path / "good", place)
            file = data_files(place)[number]
            data = bytearray(file.read_bytes())
            if damage == "gone":
                file.unlink()
            else:
                data[len(data) // 2] ^= 0xFF
                cut = len(data) // 2 if damage == "cut" else len(data)
                file.write_bytes(bytes(data[:cut]))
            try:
                got = jc.load_adapter(place, plain_params())
            except jlora.CheckpointError as error:
                outcomes.append("cannot be read" in str(error))
            else:
                same(got, params)  # a file that nothing depends on
    assert len(outcomes) >= 6
    assert all(outcomes)


def test_a_damaged_description_is_found(tmp_path):
    jc.save_adapter(tmp_path / "a", lora_params(), metadata={"epochs": 3})
    file = tmp_path / "a" / "config" / "metadata"
    text = file.read_text()
    for changed in (text.replace('"epochs": 3', '"epochs": 4'), text[:100], "null"):
        assert changed != text
        file.write_text(changed)
        refused("cannot be read", jc.load_adapter, tmp_path / "a", plain_params())
    file.write_text(text)
    jc.load_adapter(tmp_path / "a", plain_params())
    shutil.rmtree(tmp_path / "a" / "arrays")
    refused("cannot be read", jc.load_adapter, tmp_path / "a", plain_params())


def test_newer_formats_and_other_kinds_are_named(tmp_path, monkeypatch):
    jc.save_adapter(tmp_path / "a", lora_params())
    refused(
        "Load it with jlora.checkpoint.load_adapter", jc.load_merged, tmp_path / "a"
    )
    refused("Beside it are: a", jc.load_adapter, tmp_path / "b", plain_params())
    refused("no folder", jc.load_adapter, tmp_path / "c" / "b", plain_params())
    monkeypatch.setattr("jlora.checkpoint._storage.VERSION", 0)
    refused("Upgrade jlora", jc.load_adapter, tmp_path / "a", plain_params())


def test_what_is_not_json_is_refused(tmp_path):
    bad = {"loss": jnp.zeros(())}
    refused("saved as JSON", jc.save_adapter, tmp_path / "a", lora_params(),
            metadata=bad)  # fmt: skip
    assert not (tmp_path / "a").exists()


# -- training states -------------------------------------------------------------------


def test_a_state_round_trips_with_its_keys_and_data_position(tmp_path):
    tx = optax.chain(optax.adam(0.1), optax.add_noise(0.1, 0.5, jax.random.key(5)))
    state = make_state(tx=tx)
    state = at_step(state, 17)
    position = {"epoch": 2, "offset": 17, "files": ["a", "b"], "seen": 0.5}
    jc.save_state(tmp_path / "s", state, data_position=position)
    fresh = make_state(key=99, tx=tx)
    restored, got = jc.restore_state(tmp_path / "s", fresh)
    same(restored, state)
    assert got == position
    assert restored.frozen is fresh.frozen  # the base itself was not written


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_kinds_of_keys(tmp_path, impl):
    state = jt.TrainState.create(lora_params(), TX, jax.random.key(3, impl=impl))
    jc.save_state(tmp_path / "s", state)
    restored, _ = jc.restore_state(tmp_path / "s", state)
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
    same(restored, state)


def test_the_base_goes_along_if_asked(tmp_path):
    state = make_state()
    jc.save_state(tmp_path / "s", state, include_base=True)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    abstract = jt.TrainState.create(jax.tree.map(shape, lora_params()), TX)
    same(jc.restore_state(tmp_path / "s", abstract)[0], state)
    jc.save_state(tmp_path / "t", state)
    refused("include_base=True", jc.restore_state, tmp_path / "t", abstract)


def test_a_state_of_another_kind_is_refused(tmp_path):
    jc.save_state(tmp_path / "s", make_state())
    restore = lambda state: refused("s", jc.restore_state, tmp_path / "s", state)
    assert "only in the checkpoint" in restore(make_state(tx=optax.sgd(0.1)))
    assert "scale was 1.0, is 2.5" in restore(make_state(alpha=5.0))
    assert "dropout was 0.2, is 0.0" in restore(make_state(dropout=0.0))
    assert "rank was 2, is 5" in restore(make_state(rank=5))
    assert "has no adapter here" in restore(make_state(targets=["query"]))
    base = jax.tree.map(lambda x: x + 1, plain_params())
    other = jt.TrainState.create(jlora.lorafy(base, 2, ["query"]), TX)
    assert "was saved on another base" in restore(other)


def test_a_later_state_of_the_run_replaces_an_earlier_one(tmp_path):
    state = make_state()
    jc.save_state(tmp_path / "s", at_step(state, 3))
    jc.save_state(tmp_path / "s", at_step(state, 5))
    assert jc.restore_state(tmp_path / "s", state)[0].step == 5
    for other in (at_step(state, 4), at_step(make_state(key=12), 9)):
        refused("holds a checkpoint already", jc.save_state, tmp_path / "s", other)
    jc.save_state(tmp_path / "s", at_step(state, 4), overwrite=True)
    assert jc.restore_state(tmp_path / "s", state)[0].step == 4


RESUME = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest, test_checkpoint as t
import jlora.checkpoint as jc
import jlora.models
import jlora.peft
state, position = jc.restore_state({path!r}, t.make_state(key=99))
state, losses = t.train(state, position["drawn"], 20)
jc.save_state({out!r}, state, data_position={{"losses": losses}})
"""


def test_a_resumed_run_goes_on_bit_for_bit_in_a_new_process(tmp_path):
    start = make_state()
    half, first = train(start, 0, 10)
    jc.save_state(tmp_path / "half", half, data_position={"drawn": 10})
    paths = {"path": str(tmp_path / "half"), "out": str(tmp_path / "resumed")}
    script = RESUME.format(tests=str(Path(__file__).parent), **paths)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    whole, losses = train(make_state(), 0, 20)
    assert first == losses[:10]
    resumed, position = jc.restore_state(tmp_path / "resumed", make_state())
    assert position["losses"] == losses[10:]
    same(resumed, whole)
    assert int(resumed.step) == 20


def test_restoring_does_not_recompile(tmp_path):
    step = jt.make_train_step(loss_fn, TX)
    state, _ = step(make_state(), make_batch(0))
    jc.save_state(tmp_path / "s", state)
    state, _ = step(jc.restore_state(tmp_path / "s", make_state())[0], make_batch(1))
    assert step.cache_size() == 1


# -- a folder of states ----------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
    state = make_state()
    with jc.Checkpoints(tmp_path / "run", keep_last=2, keep_best=1) as checkpoints:
        assert checkpoints.latest_step() is None
        refused("there are none at all", checkpoints.restore, state)
        for step, loss in enumerate([3, 1, 2, float("nan"), 4], start=1):
            checkpoints.save(at_step(state, step), data_position={"drawn": step},
                             metrics={"loss": jnp.float32(loss)})  # fmt: skip
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2
        refused("'loss', which is not among", checkpoints.save, at_step(state, 6),
                metrics={"accuracy": 1})  # fmt: skip
    with jc.Checkpoints(tmp_path / "run", keep_last=2, keep_best=1) as checkpoints:
        restored, position = checkpoints.restore(make_state(key=5))
        same(restored, at_step(state, 5))
        assert position == {"drawn": 5}
        assert checkpoints.restore(state, step=2)[1] == {"drawn": 2}
        refused(r"there are \[2, 4, 5\]", checkpoints.restore, state, step=3)
        checkpoints.save(at_step(restored, 6), metrics={"loss": 0.5})
        assert checkpoints.steps() == [5, 6]
        assert checkpoints.best_step() == 6


def test_more_can_be_better(tmp_path):
    state = make_state()
    options = {"keep_last": 1, "keep_best": 1, "best_mode": "max"}
    with jc.Checkpoints(tmp_path, best_metric="bleu", **options) as checkpoints:
        for step, bleu in enumerate([3, 9, 2], start=1):
            checkpoints.save(at_step(state, step), metrics={"bleu": bleu})
        assert checkpoints.steps() == [2, 3]
    with pytest.raises(ValueError, match="keep_last=0"):
        jc.Checkpoints(tmp_path, keep_last=0)


def test_a_folder_holds_one_run(tmp_path):
    state, other = make_state(), make_state(key=12)
    with jc.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(at_step(state, 3))
        checkpoints.save(at_step(state, 5))
        checkpoints.save(at_step(state, 5))  # nothing to do
        refused("this run up to step 5", checkpoints.save, at_step(state, 4))
        refused("holds another run", checkpoints.save, at_step(other, 9))
        refused("holds another run", checkpoints.save, at_step(other, 5))
        assert checkpoints.steps() == [3, 5]
    with jc.Checkpoints(tmp_path / "run", overwrite=True) as checkpoints:
        checkpoints.save(at_step(other, 1))
        assert checkpoints.steps() == [1]
        refused("holds another run", checkpoints.save, at_step(state, 9))  # only once
    assert os.listdir(tmp_path) == ["run"]


def test_replacing_a_run_that_fails_puts_it_back(tmp_path, monkeypatch):
    state, other = make_state(), make_state(key=12)
    with jc.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(at_step(state, 3))
    with jc.Checkpoints(tmp_path / "run", overwrite=True) as checkpoints:

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(type(checkpoints._manager), "save", fail)
        refused("OSError: disk full", checkpoints.save, at_step(other, 1))
        monkeypatch.undo()
        assert checkpoints.steps() == [3]
        same(checkpoints.restore(state)[0], at_step(state, 3))
    # Killed after the old run was moved aside, before the new one's first state.
    os.rename(tmp_path / "run", tmp_path / ".run.previous")
    (tmp_path / "run" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    with jc.Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == [3]


def test_an_unfinished_step_is_no_checkpoint_and_a_damaged_one_is_named(tmp_path):
    state = make_state()
    with jc.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 1))
        checkpoints.save(at_step(state, 2))
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    for file in data_files(tmp_path / "2"):
        file.write_bytes(file.read_bytes()[:10])
    with jc.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        message = refused("cannot be read", checkpoints.restore, state, step=2)
        assert "Other steps here: [1]" in message
        same(checkpoints.restore(state, step=1)[0], at_step(state, 1))
        lost = (
            r"(?s)/2' cannot be read.*state of step 1 is restored instead; 1 step has"
        )
        with pytest.warns(jlora.JloraWarning, match=lost):
            same(checkpoints.restore(state)[0], at_step(state, 1))
        checkpoints.save(at_step(state, 2))  # in the place of the damaged one
        assert checkpoints.steps() == [1, 2]
        same(checkpoints.restore(state)[0], at_step(state, 2))
    assert (tmp_path / "2.damaged").is_dir()


def test_the_base_is_read_once_a_run(tmp_path, monkeypatch):
    from jlora.checkpoint import _manager

    calls = []
    count = lambda tree: calls.append(1) or jc.fingerprint(tree)
    monkeypatch.setattr(_manager, "fingerprint", count)
    step = jt.make_train_step(loss_fn, TX)
    state = make_state()
    with jc.Checkpoints(tmp_path) as checkpoints:
        for i in range(3):
            state, _ = step(state, make_batch(i))
            checkpoints.save(state)
    assert len(calls) == 1


# -- merged ----------------------------------------------------------------------------


def test_merged_parameters_are_plain_ones(tmp_path):
    import orbax.checkpoint as ocp

    params = lora_params(jnp.bfloat16)
    report = jc.save_merged(tmp_path / "m", params)
    want = jlora.merge(params)
    assert [m.path for m in report][1:] == ["layers/value/kernel", "query/kernel"]
    same(jc.load_merged(tmp_path / "m"), want)
    same(jc.load_merged(tmp_path / "m", like=plain_params(jnp.bfloat16)), want)
    with ocp.StandardCheckpointer() as checkpointer:
        same(checkpointer.restore(tmp_path / "m" / "arrays"), want)
    refused("holds a checkpoint already", jc.save_merged, tmp_path / "m", params)
    message = refused("does not fit", jc.load_merged, tmp_path / "m", plain_params())
    assert "'c_attn/kernel' is bfloat16 (12, 21) there and float32" in message


def test_merged_parameters_go_where_like_is(tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    jc.save_merged(tmp_path / "m", lora_params())
    place = NamedSharding(mesh, P())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), plain_params()
    )
    got = jc.load_merged(tmp_path / "m", like)
    assert all(x.sharding == place for x in jax.tree.leaves(got))
    assert bits(got) == bits(jlora.merge(lora_params()))


def test_odd_leaves_of_a_merged_tree(tmp_path):
    params = lora_params()
    params["odd"] = {"empty": jnp.zeros((0, 3)), "key": jax.random.key(3), "n": 4}
    jc.save_merged(tmp_path / "m", params)
    like = jlora.merge(params)
    got = jc.load_merged(tmp_path / "m", like)
    assert got["odd"]["empty"].shape == (0, 3)
    assert got["odd"]["n"] == 4
    np.testing.assert_array_equal(
        jax.random.key_data(got["odd"]["key"]), jax.random.key_data(like["odd"]["key"])
    )


def test_nothing_is_written_of_a_merge_that_fails(tmp_path):
    params = lora_params()
    params["query"]["kernel"] = jax.tree.map(
        lambda x: x * jnp.nan, params["query"]["kernel"]
    )
    with pytest.raises(jlora.NonFiniteError):
        jc.save_merged(tmp_path / "m", params)
    assert not (tmp_path / "m").exists()
    assert json.dumps(os.listdir(tmp_path)) == "[]"
