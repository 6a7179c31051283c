"""PEFT's variants exchanged live: convolutions, experts, DoRA, biases, tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_live import (
    config_of,
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

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle
V, D, E = 13, 6, 3
IDS = np.array([[1, 5, 2, 12, 4], [0, 3, 3, 7, 9]])


class Experts(torch.nn.Module):
    """Of every expert half the tokens: [E, out, in], as in transformers 5."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(E, 10, D))
        self.down_proj = torch.nn.Parameter(torch.empty(E, D, 5))

    def forward(self, x):
        gate, up = torch.einsum("btd,eod->ebto", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebto,edo->btd", torch.tanh(gate) * up, self.down_proj)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(V, D)
        self.q = torch.nn.Linear(D, D)
        self.v = torch.nn.Linear(D, D, bias=False)
        self.c_attn = transformers.pytorch_utils.Conv1D(2 * D, D)
        self.image = torch.nn.Conv2d(2, 7, (3, 2), stride=(1, 2), padding=(1, 0))
        self.time = torch.nn.Conv1d(D, D, 3, padding=1)
        self.experts = Experts()
        self.head = torch.nn.Linear(3 * 7, V)

    def forward(self, ids):
        x = self.emb(ids)
        x = x + torch.tanh(self.q(x)) * self.v(x)
        a, b = self.c_attn(x).split(D, -1)
        x = x + torch.tanh(a) * b + self.time(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.experts(x)
        x = self.image(torch.stack([x, torch.sin(x)], 1))  # [B, 7, T, 3]
        return self.head(torch.tanh(x).permute(0, 2, 1, 3).flatten(2))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def conv(x, w, padding, strides, dims):
    y = lax.conv_general_dilated(x, w["kernel"], strides, padding, dimension_numbers=dims)
    return y + w["bias"]


def apply(p, ids):
    x = p["emb"]["embedding"][ids]
    x = x + jnp.tanh(x @ p["q"]["kernel"] + p["q"]["bias"]) * (x @ p["v"]["kernel"])
    a, b = jnp.split(x @ p["c_attn"]["kernel"] + p["c_attn"]["bias"], 2, -1)
    y = conv(x, p["time"], [(1, 1)], (1,), ("NTC", "TIO", "NTC"))
    x = x + jnp.tanh(a) * b + y
    up = jnp.einsum("btd,edo->ebto", x, p["experts"]["gate_up_proj"])
    gate, up = jnp.split(up, 2, -1)
    x = x + jnp.einsum("ebto,eod->btd", jnp.tanh(gate) * up, p["experts"]["down_proj"])
    x = jnp.stack([x, jnp.sin(x)], -1)  # [B, T, d, 2]
    x = conv(x, p["image"], [(1, 1), (0, 0)], (1, 2), ("NHWC", "HWIO", "NHWC"))
    x = jnp.tanh(x).swapaxes(2, 3).reshape(*ids.shape, -1)
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).numpy()


def test_the_two_nets_are_one():
    np.testing.assert_allclose(
        apply(tree_of(net()), IDS), torch_logits(net()), rtol=1e-5, atol=1e-5
    )


EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
LAYERS = ["q", "v", "c_attn", "image", "time", "head"]
PEFT_CASES = {
    "conv": dict(target_modules=["image", "time"], r=3, lora_alpha=5),
    "conv, rslora, patterns": dict(
        target_modules=["image", "time", "q"], rank_pattern={"image": 5}, use_rslora=True
    ),
    "conv to save": dict(target_modules=["q"], modules_to_save=["image", "time"]),
    "conv, bias": dict(target_modules=["image"], bias="lora_only"),
    "experts": dict(target_modules=[], target_parameters=EXPERTS, r=2, lora_alpha=3),
    "experts, other order": dict(
        target_modules=["q"], target_parameters=EXPERTS[::-1], r=2,
        rank_pattern={"experts.gate_up_proj": 4}, alpha_pattern={"down_proj": 1},
    ),
    "one of the experts": dict(target_modules=[], target_parameters=EXPERTS[:1]),
    "another of the experts": dict(target_modules=[], target_parameters=EXPERTS[1:]),
    "a layer's weight": dict(target_modules=["v"], target_parameters=["q.weight"]),
    "dora": dict(target_modules=["q", "v", "head"], use_dora=True, r=2, lora_alpha=5),
    "dora everywhere": dict(target_modules=[*LAYERS, "emb"], use_dora=True, r=2),
    "dora, rslora, patterns": dict(
        target_modules=["q", "v", "c_attn"], use_dora=True, use_rslora=True,
        rank_pattern={"q": 3}, alpha_pattern={"v": 2}, bias="lora_only",
    ),
    "lora_bias": dict(target_modules=["q", "c_attn", "image", "time"], lora_bias=True),
    "tokens": dict(target_modules=["q"], trainable_token_indices={"emb": [3, 0, 12]}),
    "tokens alone": dict(target_modules=[], trainable_token_indices={"emb": [5]},
                         target_parameters=EXPERTS),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
def test_pefts_adapter_here_and_back(case, tmp_path, record_property):
    theirs = peft_model(net(), **PEFT_CASES[case])
    want = torch_logits(theirs)
    assert np.max(np.abs(want - torch_logits(net()))) > 0.05
    peft_save(theirs, tmp_path / "theirs")
    base = tree_of(net())
    tree = jlora.peft.load(tmp_path / "theirs", base)
    note(record_property, "in", jlora.lora(apply)(tree, IDS), want)
    note(record_property, "merged", apply(jlora.merge(tree), IDS), want)

    config = jlora.peft.read_config(tmp_path / "theirs")
    jlora.peft.save(tmp_path / "ours", tree, config=config)
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    same_tensors(jlora.peft.load(tmp_path / "ours", base), tree)
    again = torch_logits(peft_load(net(), tmp_path / "ours"))
    note(record_property, "out", again, want)

    if "weight" in case:
        return  # a tree does not tell that PEFT adapted the parameter
    flat = config.get("fan_in_fan_out")
    jlora.peft.save(tmp_path / "derived", tree, fan_in_fan_out=flat)
    same_tensors(jlora.peft.load(tmp_path / "derived", base), tree)
    again = torch_logits(peft_load(net(), tmp_path / "derived"))
    note(record_property, "derived", again, want)


T = jlora.Target
CONVS = {"image": T(rank=3, in_axes=(0, 1, 2)), "time": T(rank=2, in_axes=(0, 1), alpha=5)}
STACKS = {
    "gate_up_proj": T(rank=2, alpha=3, in_axes=(1,), batch_axes=(0,)),
    "down_proj": T(rank=4, alpha=1, in_axes=(1,), batch_axes=(0,)),
}
OUR_CASES = {
    "conv": dict(targets=CONVS),
    "conv, full": dict(targets=["q"], rank=2, train=["image", "time"]),
    "experts": dict(targets=STACKS),
    "experts and layers": dict(targets={**STACKS, "q": T(rank=3), **CONVS}),
    "dora": dict(targets=["q", "v"], rank=2, alpha=3, dora=True),
    "dora everywhere": dict(
        targets={**CONVS, **dict.fromkeys(["q", "v", "c_attn", "head", "emb"], T(rank=2))},
        dora=True),
    "lora_bias": dict(targets={**CONVS, "q": T(rank=2, alpha=3)}, lora_bias=True),
    "tokens": dict(targets=["q"], rank=2, trainable_tokens={"emb": [7, 2]}),
    "tokens and dora": dict(targets=["q"], rank=2, dora=True,
                            trainable_tokens={"emb/embedding": [7, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("case", OUR_CASES)
def test_our_adapter_in_peft(case, tmp_path, record_property):
    base = tree_of(net())
    tree = randomise(jlora.lorafy(base, **OUR_CASES[case]), jax.random.key(3))
    want = np.asarray(jlora.lora(apply)(tree, IDS))
    jlora.peft.save(tmp_path / "a", tree)
    got = torch_logits(peft_load(net(), tmp_path / "a"))
    note(record_property, "out", got, want)
    back = jlora.peft.load(tmp_path / "a", base)
    note(record_property, "in", jlora.lora(apply)(back, IDS), want)
    same_tensors(back, tree)
    jlora.peft.save(tmp_path / "b", back)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (
            tmp_path / "b" / name
        ).read_bytes()
