"""Adapters exchanged live with PyTorch and PEFT: equal logits in both directions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft_live
import pytest
from peft_live import (
    CLOSE,
    goes_round,
    logits_of,
    note,
    peft,
    peft_load,
    peft_model,
    peft_save,
    same_tensors,
    torch,
    tree_of,
)
from tools import randomise

import jlora
import jlora.peft
from jlora import models
from jlora.peft._fields import DEFAULTS, HONOURED, NEUTRAL

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle
V, D, R = 13, 12, 10


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = torch.nn.LayerNorm(D)
        self.q = torch.nn.Linear(D, D)
        self.v = torch.nn.Linear(D, D, bias=False)
        self.c_attn = transformers.pytorch_utils.Conv1D(3 * D, D)

    def forward(self, x):
        y = self.ln(x)
        a, b, c = self.c_attn(y).split(D, -1)
        return x + torch.tanh(self.q(y)) * self.v(y) + torch.tanh(a) * b + c


class Net(torch.nn.Module):
    """A little of everything: table, norms, linear layers, Conv1D, a head."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(V, D)
        self.layers = torch.nn.ModuleList([Block(), Block(), Block()])
        self.head = torch.nn.Linear(D, R)

    def forward(self, ids):
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net(seed=0):
    return peft_live.net(seed, Net)


def apply(p, ids):
    x = p["emb"]["embedding"][ids]
    for i in "012":
        w = p["layers"][i]
        y = x - x.mean(-1, keepdims=True)
        y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
        y = y * w["ln"]["scale"] + w["ln"]["bias"]
        q = y @ w["q"]["kernel"] + w["q"]["bias"]
        a, b, c = jnp.split(y @ w["c_attn"]["kernel"] + w["c_attn"]["bias"], 3, -1)
        x = x + jnp.tanh(q) * (y @ w["v"]["kernel"]) + jnp.tanh(a) * b + c
    return x @ p["head"]["kernel"] + p["head"]["bias"]


IDS = np.array([[1, 5, 2, 12], [0, 3, 3, 7]])


def torch_logits(model, ids=IDS):
    return logits_of(model, ids)


PEFT_CASES = {
    "lora": dict(target_modules=["q", "v"], r=2, lora_alpha=5),
    "rslora": dict(target_modules=["q", "v"], r=3, lora_alpha=5, use_rslora=True),
    "rank above the kernel's": dict(target_modules=["q"], r=40, lora_alpha=20),
    "patterns": dict(
        target_modules=["q", "v", "head"],
        rank_pattern={"layers.1.q": 3, "q": 4, r"^head": 1},
        alpha_pattern={r"layers\.[02]\.v": 9, "v": 2, "0.q": 1},
    ),
    "patterns, rslora": dict(
        target_modules=["q", "v"], rank_pattern={"v": 5}, use_rslora=True
    ),
    "regex": dict(target_modules=r".*\.[12]\.(q|v)"),
    "exclude": dict(target_modules=["q", "v"], exclude_modules=["0.q", "2.v"]),
    "exclude, regex": dict(target_modules=["q", "v"], exclude_modules=r".*\.1\..*"),
    "layers": dict(
        target_modules=["q"], layers_to_transform=[0, 2], layers_pattern="layers"
    ),
    "conv1d": dict(target_modules=["c_attn"], fan_in_fan_out=True),
    "conv1d and linear": dict(target_modules=["c_attn", "q"]),
    "embedding": dict(target_modules=["emb", "q"], r=3),
    "modules_to_save": dict(target_modules=["q"], modules_to_save=["head", "1.ln"]),
    "conv1d to save": dict(
        target_modules=["c_attn"], modules_to_save=["0.c_attn"], fan_in_fan_out=True
    ),
    "embedding to save": dict(target_modules=["q"], modules_to_save=["emb"]),
    "bias lora_only": dict(target_modules=["q", "v"], bias="lora_only"),
    "bias all": dict(target_modules=["q"], bias="all"),
    "bias all, modules_to_save": dict(
        target_modules=["q"], bias="all", modules_to_save=["head", "0.ln"]
    ),
    "all-linear": dict(target_modules="all-linear", r=2),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_pefts_adapter_here_and_back(case, tmp_path, record_property):
    settings = PEFT_CASES[case]
    goes_round(net, settings, apply, IDS, 0.1, tmp_path, record_property)


T = jlora.Target
OUR_CASES = {
    "lora": dict(rank=2, targets=["q", "v"], alpha=3),
    "odd alpha": dict(rank=3, targets=["q"], alpha=0.1),
    "rslora": dict(rank=3, targets=["q"], alpha=7, rslora=True),
    "ranks": dict(targets={r".*layers/1/q/kernel": T(rank=4, alpha=1),
                           "q": T(rank=2), "head": T(rank=3, alpha=9)}),
    "some layers": dict(rank=2, targets=r"layers/[02]/(q|v)/kernel"),
    "everything": dict(rank=2, targets=["q", "v", "c_attn", "emb", "head"]),
    "fused": dict(rank=2, targets=["query", "value"], alpha=3),
    "fused, of several scales": dict(
        targets={"query": T(rank=2, alpha=7), "value": T(rank=3, alpha=1)}),
    "full": dict(rank=2, targets=["q"], train=["head", "ln", "emb"]),
    "full, in part": dict(rank=2, targets=["q"], train=["head/kernel"]),
    "full conv1d": dict(rank=2, targets=["q"], train=["c_attn"]),
    "bias lora_only": dict(rank=2, targets=["q"], bias="lora_only"),
    "bias all": dict(rank=2, targets=["q"], bias="all"),
    "bias all and full": dict(rank=2, targets=["q"], bias="all", train=["head/kernel"]),
    "one bias": dict(rank=2, targets=["q"], train=["layers/1/q/bias"]),
    "no adapter's bias": dict(rank=2, targets=["q"], train=["layers/1/ln/bias"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OUR_CASES)
@pytest.mark.filterwarnings("ignore::jlora.JloraWarning")
def test_our_adapter_in_peft(case, tmp_path, record_property):
    base = tree_of(net())
    tree = jlora.lorafy(base, **OUR_CASES[case])
    tree = randomise(tree, jax.random.key(3))
    want = np.asarray(jlora.lora(apply)(tree, IDS))
    flat = "conv1d" in case
    jlora.peft.save(tmp_path / "a", tree, fan_in_fan_out=flat)
    got = torch_logits(peft_load(net(), tmp_path / "a"))
    note(record_property, "out", got, want)
    back = jlora.peft.load(tmp_path / "a", base)
    note(record_property, "in", jlora.lora(apply)(back, IDS), want)
    jlora.peft.save(tmp_path / "b", back, fan_in_fan_out=flat)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (
            tmp_path / "b" / name
        ).read_bytes()


def test_conv1d_to_save_that_only_its_shape_tells(tmp_path):
    theirs = peft_model(net(), target_modules=["q"], modules_to_save=["c_attn"])
    peft_save(theirs, tmp_path)
    tree = jlora.peft.load(tmp_path, tree_of(net()))
    got = jlora.lora(apply)(tree, IDS)
    np.testing.assert_allclose(got, torch_logits(theirs), **CLOSE)


def test_several_adapters_in_subfolders(tmp_path):
    theirs = peft_model(net(), target_modules=["q"], r=2)
    theirs.add_adapter("second", peft.LoraConfig(target_modules=["v"], r=3))
    theirs.set_adapter("second")
    for name, p in theirs.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(p, std=0.4)
    peft_save(theirs, tmp_path)
    tree = jlora.peft.load(tmp_path, tree_of(net()), adapter="second")
    got = jlora.lora(apply)(tree, IDS)
    np.testing.assert_allclose(got, torch_logits(theirs), **CLOSE)
    theirs.set_adapter("default")
    tree = jlora.peft.load(tmp_path, tree_of(net()), adapter="default")
    got = jlora.lora(apply)(tree, IDS)
    np.testing.assert_allclose(got, torch_logits(theirs), **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_factors_keep_their_bits(dtype, tmp_path):
    theirs = peft_model(net(), target_modules=["q"], r=2)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(getattr(torch, dtype))
    peft_save(theirs, tmp_path / "a")
    tree = jlora.peft.load(tmp_path / "a", tree_of(net()))
    assert str(tree["layers"]["0"]["q"]["kernel"].adapters[""].a.dtype) == dtype
    config = jlora.peft.read_config(tmp_path / "a")
    jlora.peft.save(tmp_path / "b", tree, config=config)
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# -- T5 --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def t5(request, tmp_path_factory):
    """A folder with a tiny T5, and what runs it in both frameworks."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=29, d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=request.param,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("t5")
    model = transformers.T5ForConditionalGeneration(config)
    if not request.param:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(29, 16))
    model.save_pretrained(folder)
    model, params = models.load(folder)
    ids = np.array([[5, 6, 7, 1], [9, 10, 11, 12]])

    def theirs():
        return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()

    def run(model):
        with torch.no_grad():
            ids_ = torch.tensor(ids)
            return model(input_ids=ids_, decoder_input_ids=ids_).logits.numpy()

    def ours(tree):
        f = lambda p: model.apply({"params": p}, ids, None, ids)
        return jlora.lora(f)(tree)

    return params, ours, theirs, run, request.param


def test_pefts_t5_here(t5, tmp_path, record_property):
    params, ours, theirs, run, _ = t5
    for i, settings in enumerate([
        dict(target_modules=["q", "v"]),
        dict(target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"], use_rslora=True),
        dict(target_modules=["o"], modules_to_save=["layer_norm"]),
    ]):  # fmt: skip
        model = peft_model(theirs(), task_type="SEQ_2_SEQ_LM", **settings)
        peft_save(model, tmp_path / str(i))
        tree = jlora.peft.load(tmp_path / str(i), params)
        note(record_property, f"in{i}", ours(tree), run(model))


def test_our_t5_in_peft(t5, tmp_path, record_property):
    """Tables and heads included, tied or not: one adapter here, three modules there."""
    params, ours, theirs, run, tied = t5
    head = [] if tied else ["lm_head"]
    cases = [dict(targets=["query", "value"], alpha=3), dict(targets="all-linear"),
             dict(targets=["shared", *head]),
             dict(targets=["query"], train=["shared", "final_layer_norm"])]  # fmt: skip
    for i, case in enumerate(cases):
        tree = randomise(jlora.lorafy(params, 2, **case), jax.random.key(i))
        folder = tmp_path / str(i)
        jlora.peft.save(folder, tree, task_type="SEQ_2_SEQ_LM")
        model = peft_load(theirs(), folder)
        want = np.asarray(ours(tree))
        note(record_property, f"out{i}", run(model), want)
        same_tensors(jlora.peft.load(folder, params), tree)


def test_embeddings_that_peft_adapts_apart(t5, tmp_path):
    params, _, theirs, _, tied = t5
    model = peft_model(theirs(), target_modules=["embed_tokens"])
    peft_save(model, tmp_path / "a")
    with pytest.raises(
        jlora.CheckpointError, match="differ" if not tied else "lm_head"
    ):
        jlora.peft.load(tmp_path / "a", params)
    model = peft_model(theirs(), target_modules=["shared", "q"])
    peft_save(model, tmp_path / "b")
    with pytest.raises(jlora.CheckpointError, match="never call the module `shared`"):
        jlora.peft.load(tmp_path / "b", params)


def test_the_base_that_peft_saves_along(t5, tmp_path):
    params, ours, theirs, run, tied = t5
    if tied:
        return
    model = peft_model(theirs(), target_modules=["lm_head", "q"])
    peft_save(model, tmp_path)
    assert "base_layer" in (tmp_path / "adapter_model.safetensors").read_bytes()[
        :9999
    ].decode("latin1")
    np.testing.assert_allclose(
        ours(jlora.peft.load(tmp_path, params)), run(model), **CLOSE
    )
    other = {**params, "lm_head": {"kernel": params["lm_head"]["kernel"] + 1}}
    with pytest.raises(jlora.CheckpointError, match="lm_head"):
        jlora.peft.load(tmp_path, other)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (dict(use_qalora=True, qalora_group_size=4), "use_qalora"),
        (dict(velora_config=peft.tuners.lora.VeloraConfig()), "velora_config"),
        (dict(kasa_config=peft.tuners.lora.config.KasaConfig()), "kasa_config"),
    ],
)
def test_what_cannot_be_honoured(settings, key, tmp_path):
    peft_save(peft_model(net(), target_modules=["q"], **settings), tmp_path)
    with pytest.raises(jlora.CheckpointError, match=key):
        jlora.peft.load(tmp_path, tree_of(net()))


def test_every_field_of_pefts_configuration_is_known():
    """A field of a newer PEFT is an error here until somebody has read what it does."""
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    written = set(peft.LoraConfig().to_dict())
    assert written <= set(DEFAULTS)
    refused = set(DEFAULTS) - HONOURED - NEUTRAL
    assert fields - refused - HONOURED - NEUTRAL == set()
    assert refused == {
        "arrow_config", "kasa_config",
        "megatron_config", "monteclora_config", "use_bdlora", "use_qalora",
        "velora_config",
    }  # fmt: skip
    theirs = {k: v for k, v in peft.LoraConfig().to_dict().items() if k in DEFAULTS}
    for key in ("inference_mode", "peft_type"):
        theirs[key] = DEFAULTS[key]
    assert {k: DEFAULTS[k] for k in theirs} == theirs
