"""Against bitsandbytes itself: codes, statistics, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional


def weights(shape, dtype="float32", seed=0):
    """A weight [out, in] as PyTorch has it, with a row of zeros and an outlier."""
    w = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
    w[1], w[2, 3] = 0, 3
    return torch.tensor(w).to(getattr(torch, dtype))


def ours(w, form, **kw):
    kernel = jnp.asarray(w.float().numpy().T, str(w.dtype).removeprefix("torch."))
    return jlora.quantize({"w": kernel}, form, targets=["w"], **kw)["w"]


def assert_same_codes(q, codes, w, block):
    """But where all of a block is zero: any code means zero, bitsandbytes' varies."""
    blocks = w.float().numpy().reshape(-1, block)
    zero = np.repeat(~blocks.any(1), block // 2)  # two codes a byte
    assert zero.any() and not zero.all()  # noqa: PT018
    got, want = np.asarray(q.codes).reshape(-1), codes.numpy().reshape(-1)
    np.testing.assert_array_equal(got[~zero], want[~zero])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(form, dtype):
    for shape, block in (((67, 192), 64), ((5, 128), 128), ((320, 256), 32)):
        w = weights(shape, dtype)
        codes, state = F.quantize_4bit(w, blocksize=block, quant_type=form)
        q = ours(w, form, block=block, double=False)
        assert_same_codes(q, codes, w, block)
        np.testing.assert_array_equal(q.absmax.reshape(-1), state.absmax.numpy())
        dense = F.dequantize_4bit(codes, state)
        np.testing.assert_array_equal(
            np.asarray(q.dense().T, np.float32), dense.float().numpy()
        )


def test_double_quantisation_is_that_of_bitsandbytes():
    for shape in ((96, 128), (67, 192), (320, 256)):  # whole blocks of 256, and not
        w = weights(shape)
        codes, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        q = ours(w, "nf4")
        assert_same_codes(q, codes, w, 64)
        # PyTorch and XLA sum up the mean, the offset, in another order.
        np.testing.assert_allclose(q.offset, state.offset.item(), rtol=3e-7)
        np.testing.assert_allclose(q.nested_absmax, state.state2.absmax, rtol=1e-6)
        off = q.absmax.reshape(-1).astype(int) - state.absmax.numpy().astype(int)
        assert np.abs(off).max() <= 1
        assert (off != 0).mean() < 0.05
        # A block of zeros: bitsandbytes' codes vary, and its scale is not quite zero.
        alike = (off == 0) & w.numpy().reshape(-1, 64).any(1)
        alike = np.repeat(alike, 64).reshape(shape)
        dense = F.dequantize_4bit(codes, state).numpy()
        np.testing.assert_allclose(
            np.asarray(q.dense()).T[alike], dense[alike], rtol=1e-5
        )


def test_int8_is_that_of_bitsandbytes():
    for shape in ((67, 192), (320, 256)):
        w = weights(shape, "float16")
        codes, absmax, _ = F.int8_vectorwise_quant(w.clone())
        q = ours(w, "int8")
        np.testing.assert_array_equal(q.codes, codes.numpy())
        np.testing.assert_array_equal(q.absmax, absmax.numpy())
        dense = F.int8_vectorwise_dequant(codes, absmax)
        np.testing.assert_allclose(q.with_dtype("float32").dense().T, dense, rtol=1e-6)


def checkpoint(folder, name, **quantised):
    """A small model's dense folder, and the one that transformers quantised."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = dict(vocab_size=97, num_hidden_layers=2, num_attention_heads=2)
    if name == "llama":
        config = hf.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_key_value_heads=2, **sizes
        )
    elif name == "gpt2":
        config = hf.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32
        )
    else:
        config = hf.T5Config(
            vocab_size=97, d_model=64, d_ff=128, d_kv=32, num_layers=2, num_heads=2
        )
    kind = hf.AutoModelForSeq2SeqLM if name == "t5" else hf.AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder / "dense")
    made = kind.from_pretrained(
        folder / "dense",
        quantization_config=hf.BitsAndBytesConfig(**quantised),
        device_map="cpu",
        dtype=torch.float32,
    )
    made.save_pretrained(folder / "codes")
    return folder / "codes", made


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
CASES = {
    "llama-nf4": ("llama", NF4),
    "llama-fp4": ("llama", dict(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "llama-int8": ("llama", dict(load_in_8bit=True)),
    "t5-nf4": ("t5", NF4),
    "gpt2-nf4": ("gpt2", NF4),
}


def dense_of(module):
    w = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        # Not F.dequantize_4bit: on CPUs it takes each row for whole blocks.
        s, code = w.quant_state, w.data.reshape(-1)
        absmax = s.absmax
        if s.nested:
            absmax = F.dequantize_blockwise(absmax, s.state2) + s.offset
        each = s.code[torch.stack([code >> 4, code & 15], -1).reshape(-1).int()]
        return (each.reshape(-1, s.blocksize) * absmax[:, None]).reshape(s.shape)
    return F.int8_vectorwise_dequant(w.data, w.SCB).float()


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_bitsandbytes_are_read_code_by_code(case, tmp_path):
    name, quantised = CASES[case]
    folder, theirs = checkpoint(tmp_path, name, **quantised)
    model, params = models.load(folder, quantize=jlora.quantizer())
    linear = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = {
        n.replace(".", "/"): m
        for n, m in theirs.named_modules()
        if isinstance(m, linear)
    }
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=jlora.is_node)
    codes = {
        jax.tree_util.keystr(p[:-1], simple=True, separator="/"): x
        for p, x in leaves
        if isinstance(x, jlora.Quantized)
    }
    assert codes.keys() == found.keys()
    for path, q in codes.items():
        got, want = np.asarray(q.dense(), np.float32).T, dense_of(found[path]).numpy()
        np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-6, atol=1e-7)
    ids = np.asarray([[3, 11, 60, 7]])
    args = (ids, np.ones_like(ids), ids) if name == "t5" else (ids,)
    apply = jax.jit(jlora.lora(lambda p, *args: model.apply({"params": p}, *args)))
    got = apply(params, *args)
    given = {"input_ids": torch.tensor(ids)}
    if name == "t5":
        given["decoder_input_ids"] = torch.tensor(ids)
    # Its own products round activations, to int8 or bfloat16; those of Linear do not.
    for path, module in found.items():
        linear = torch.nn.Linear(module.in_features, module.out_features, False)
        linear.weight.data = torch.tensor(dense_of(module).numpy()).reshape(
            linear.weight.shape
        )
        linear.bias = module.bias
        theirs.set_submodule(path.replace("/", "."), linear)
    with torch.no_grad():
        want = theirs(**given).logits.float().numpy()
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    if case == "llama-nf4":
        scanned, stacked = models.load(
            folder, quantize=jlora.quantizer(), scan_layers=True
        )
        run = jlora.lora(lambda p, ids: scanned.apply({"params": p}, ids))
        np.testing.assert_allclose(jax.jit(run)(stacked, ids), got, atol=1e-5)
