"""Quantised bases in everything around: variants, files, stacks, meshes, loading."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft
import jlora.train
from jlora import checkpoint, models
from jlora._kernel import codebooks
from tests.small_models import inputs, make
from tests.test_quantised import kernel
from tests.tools import assert_close, randomise, scalar


def layer(i):
    return {
        "c_attn": {"kernel": kernel((64, 96), i), "bias": kernel((96,), i)},
        "out": {"kernel": kernel((32, 64), i + 5)},
    }


BASE = {
    "embed": {"embedding": kernel((11, 64))},
    "layers": {str(i): layer(i) for i in range(2)},
}
IDS = jnp.asarray([[1, 2, 3]])


def forward(p, ids):
    x = p["embed"]["embedding"][ids]
    for block in p["layers"].values():
        fused = x @ block["c_attn"]["kernel"] + block["c_attn"]["bias"]
        q, k, v = jnp.split(fused, 3, -1)
        x = x + jnp.tanh(q * k + v) @ block["out"]["kernel"]
    return x @ p["embed"]["embedding"].T / 32


@pytest.fixture(scope="module")
def base():
    return jlora.quantize(BASE, "nf4", targets="all-kernels", block=32)


@pytest.fixture(scope="module")
def tree(base):
    return randomise(jlora.lorafy(base, 2, ["query", "out"]), jax.random.key(0))


VARIANTS = {
    "slices, rslora, biases": dict(
        targets=["query", "value"], rslora=True, lora_bias=True, bias="lora_only"
    ),
    "a dora table": dict(targets=["embedding", "out"], dora=True),
    "tokens": dict(targets=["out"], trainable_tokens={"embedding": [1, 3]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_as_on_the_dequantised_base(base, variant):
    tree = randomise(jlora.lorafy(base, 2, **VARIANTS[variant]), jax.random.key(1))
    dense = jlora.dequantize(tree)
    f = jlora.lora(forward)

    @jax.jit
    def both(tree, dense):
        out = []
        for each in (tree, dense):
            half, frozen = jlora.split(each)
            run = lambda t, frozen=frozen: scalar(f(jlora.combine(t, frozen), IDS))
            out.append(jax.value_and_grad(run)(half))
        return out, f(dense, IDS)

    ((got, g), (want, w)), logits = both(tree, dense)
    np.testing.assert_allclose(got, want, rtol=1e-3)
    pairs = zip(jax.tree.leaves(g), jax.tree.leaves(w), strict=True)
    for x, y in pairs:
        assert jnp.abs(y).max() > 1e-4
        np.testing.assert_allclose(x, y, atol=1e-3 * float(jnp.abs(y).max()))
    np.testing.assert_allclose(
        forward(jlora.merge(tree), IDS), logits, rtol=1e-4, atol=1e-4
    )


def test_checkpoints_of_adapters_and_states(base, tree, tmp_path):
    checkpoint.save_adapter(tmp_path / "adapter", tree)
    size = sum(
        f.stat().st_size for f in (tmp_path / "adapter").rglob("*") if f.is_file()
    )
    assert_close(checkpoint.load_adapter(tmp_path / "adapter", base), tree)
    with pytest.raises(jlora.CheckpointError, match="another base"):
        checkpoint.load_adapter(tmp_path / "adapter", jlora.quantize(BASE, "int8"))
    assert size < 2**17
    tx = optax.adamw(1e-2)
    state = jlora.train.TrainState.create(tree, tx, jax.random.key(0))

    def loss_fn(params, batch, key):
        dtypes.add(params["layers"]["0"]["out"]["kernel"].dtype)
        return jlora.train.cross_entropy(forward(params, batch["x"]), batch["labels"])

    dtypes = set()
    step = jlora.train.make_train_step(loss_fn, tx, compute_dtype=jnp.bfloat16)
    batch = {"x": IDS, "labels": IDS}
    state, first = step(state, batch)
    for _ in range(5):
        state, last = step(state, batch)
    assert last["loss"] < first["loss"]
    assert dtypes == {jnp.dtype("bfloat16")}, "the step computes in its own dtype"
    checkpoint.save_state(tmp_path / "state", state)
    again, _ = checkpoint.restore_state(tmp_path / "state", state)
    assert_close(again.params, state.params)


def test_peft_files(base, tmp_path):
    for dora in (False, True):
        tree = jlora.lorafy(base, 2, ["query", "out"], dora=dora)
        tree = randomise(tree, jax.random.key(2))
        jlora.peft.save(tmp_path / f"{dora}", tree, fan_in_fan_out=False)
        got = jlora.peft.load(tmp_path / f"{dora}", base)
        f = jax.jit(jlora.lora(forward))
        np.testing.assert_allclose(f(got, IDS), f(tree, IDS), rtol=1e-5, atol=1e-5)


def test_stacks_and_sets_of_adapters(base, tree):
    whole = jlora.lorafy(base, 2, ["out"])
    stacked = jlora.stack_layers(whole, ["layers"])
    out, fused = (stacked["layers"][n]["kernel"] for n in ("out", "c_attn"))
    assert isinstance(out.base, jlora.Quantized)
    assert out.shape == (2, 32, 64)
    assert fused.path == "layers/c_attn/kernel"
    assert_close(jlora.unstack_layers(stacked, ["layers"]), whole)
    held = jlora.add(
        jlora.add(base, "one", tree), "two", randomise(whole, jax.random.key(3))
    )
    only = jlora.activate(held, ["one"]).params
    f = jax.jit(jlora.lora(forward))
    np.testing.assert_array_equal(f(only, IDS), f(tree, IDS))


def test_codes_are_sharded_as_the_kernel():
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    w = {"w": kernel((128, 96))}
    placed = jax.device_put(w, on("x", "y"))
    q = jlora.quantize(placed, "nf4", targets=["w"])
    assert_close(
        jax.device_get(q), jax.device_get(jlora.quantize(w, "nf4", targets=["w"]))
    )
    specs = jax.tree.map(lambda x: tuple(x.sharding.spec), q["w"])
    assert (specs.codes, specs.absmax) == (("y", "x"), ("y", "x"))
    assert jlora.dequantize(q)["w"].sharding.spec == P("x", "y")
    init = lambda key, a, b, fan_in, dtype: (
        jnp.full(a, 0.1, dtype),
        jnp.full(b, 0.2, dtype),
    )
    tree = jlora.lorafy(q, 2, ["w"], init=init)
    assert tree["w"].adapters[""].a.sharding.spec == P("x", None)
    f, x = jlora.lora(lambda p, x: x @ p["w"]), kernel((4, 128), 1)
    want = f(jax.device_get(jlora.dequantize(tree)), x)
    made = jax.jit(f).lower(tree, x).compile()
    np.testing.assert_allclose(made(tree, x), want, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in made.as_text(), "no device needs another's codes"

    def over_columns(p, x):
        spec = {"w": P(None, "y")}
        local = jax.shard_map(
            lambda p, x: x @ p["w"],
            mesh=mesh,
            in_specs=(spec, P()),
            out_specs=P(None, "y"),
        )
        return local(p, x)

    np.testing.assert_allclose(
        jax.jit(jlora.lora(over_columns))(tree, x), want, rtol=1e-5, atol=1e-5
    )
    assert jlora.merge(tree)["w"].sharding.spec == P("x", "y")
    with pytest.raises(jlora.ShapeError, match="smaller block"):
        jlora.quantize(placed, "nf4", targets=["w"], block=128)


def test_a_loop_keeps_no_dense_kernels():
    p = {f"w{i}": kernel((128, 128), i) for i in range(4)}
    q = jlora.quantize(p, "nf4", targets=list(p))

    def steps(p, x):
        body = lambda _, x: (
            jnp.tanh(jnp.tanh(jnp.tanh(x @ p["w0"]) @ p["w1"]) @ p["w2"]) @ p["w3"]
        )
        return jax.lax.fori_loop(0, 9, body, x)

    # The scheduler of other backends keeps few arrays alive; the CPU's is asked to.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    made = jax.jit(jlora.lora(steps)).lower(q, kernel((2, 128))).compile(options)
    assert made.memory_analysis().temp_size_in_bytes < 2 * p["w0"].nbytes


# -- loading ---------------------------------------------------------------------------


def folder_of(tmp_path, **form):
    model, params = make("llama", **form)
    models.save(model, params, tmp_path / "dense")
    return tmp_path / "dense", params


def test_a_checkpoint_is_quantised_leaf_by_leaf(tmp_path):
    folder, params = folder_of(tmp_path)
    how = jlora.quantizer("nf4", block=4, exclude=["down_proj"], targets=["layers"])
    model, got = models.load(folder, quantize=how)
    want = jlora.quantize(
        params, "nf4", block=4, exclude=["down_proj"], targets=["layers"]
    )
    assert_close(got, want)
    run = jax.jit(jlora.lora(lambda p, *args: model.apply({"params": p}, *args)))
    plain = jax.jit(lambda p, *args: model.apply({"params": p}, *args))
    dense = plain(jlora.dequantize(got), *inputs("llama"))
    np.testing.assert_allclose(run(got, *inputs("llama")), dense, rtol=1e-4, atol=1e-4)
    _, scanned = models.load(folder, quantize=how, scan_layers=True)
    up = scanned["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(up, jlora.Quantized)
    assert up.codes.shape == (2, 20, 8)
    for bad, error in (
        ("nf4", jlora.OptionError),
        (jlora.quantizer(), jlora.OptionError),
    ):
        with pytest.raises(error, match="quantizer"):
            models.load(folder, quantize=bad)
    with pytest.raises(jlora.OptionError, match="nf5"):
        jlora.quantizer("nf5")


AS_IT_IS = jlora.quantizer()


def as_bitsandbytes(folder, to):
    """The folder with two linear layers as bitsandbytes would write them."""
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    shape = tensors[up].shape
    codes = np.arange(np.prod(shape) // 2) % 251
    tensors[up] = codes.astype(np.uint8)[:, None]
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": shape,
        "nested_blocksize": 256,
    }
    state |= {"nested_dtype": "float32", "nested_offset": 0.5}
    blocks = np.prod(shape) // 64
    parts = {
        "absmax": np.arange(blocks, dtype=np.uint8) * 50,
        "quant_map": codebooks.four_bits("nf4"),
        "nested_absmax": np.asarray([0.25], np.float32),
        "nested_quant_map": codebooks.dynamic_map(),
        "quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(state, default=int).encode(), np.uint8
        ),
    }
    tensors |= {f"{up}.{n}": np.asarray(x) for n, x in parts.items()}
    down = "model.layers.1.mlp.down_proj.weight"
    out, ins = tensors[down].shape
    tensors[down] = (np.arange(out * ins).reshape(out, ins) % 255 - 127).astype(np.int8)
    tensors[down.replace("weight", "SCB")] = np.arange(1, out + 1, dtype=np.float32)
    tensors[down.replace("weight", "weight_format")] = np.asarray(0, np.uint8)
    to.mkdir()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
    }
    (to / "config.json").write_text(json.dumps(config))
    number = codebooks.four_bits("nf4")[
        np.stack([codes >> 4, codes & 15], -1).reshape(-1)
    ]
    scale = codebooks.dynamic_map()[parts["absmax"]] * 0.25 + 0.5
    wanted = {
        "up": (number.reshape(-1, 64) * scale[:, None]).reshape(shape).T,
        "down": (tensors[down] * np.arange(1, out + 1)[:, None] / 127).T,
    }
    return tensors, wanted


def test_codes_of_bitsandbytes_are_read_as_they_are(tmp_path):
    folder, _ = folder_of(tmp_path)
    tensors, wanted = as_bitsandbytes(folder, tmp_path / "bnb")
    _, params = models.load(tmp_path / "bnb", quantize=jlora.quantizer())
    layers = params["model"]["layers"]
    up, down = (
        layers[i]["mlp"][n]["kernel"] for i, n in (("0", "up_proj"), ("1", "down_proj"))
    )
    assert (up.layout.form, down.layout.form) == ("nf4", "int8")
    np.testing.assert_allclose(up.dense(), wanted["up"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(down.dense(), wanted["down"], rtol=1e-5)
    assert up.codes.nbytes == wanted["up"].size // 2

    def refused(
        match,
        error=jlora.CheckpointError,
        quantize=AS_IT_IS,
        config=None,
        **changed,
    ):
        held = {n: changed.get(n.rpartition(".")[2], x) for n, x in tensors.items()}
        save_file(
            {n: x for n, x in held.items() if x is not None},
            tmp_path / "bnb/model.safetensors",
        )
        if config:
            (tmp_path / "bnb/config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=match):
            models.load(tmp_path / "bnb", quantize=quantize)

    refused("Take its codes as they are", quantize=None)
    refused("would quantise it again", jlora.OptionError, jlora.quantizer("int8"))
    refused("is not that of bitsandbytes' nf4", quant_map=codebooks.four_bits("fp4"))
    refused("it has 1 of 5 absmax", absmax=np.zeros(1, np.uint8))
    refused("not 0, rows", weight_format=np.asarray(1, np.uint8))
    config = json.loads((tmp_path / "bnb/config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    refused("quantised by 'gptq'", config=config)
