"""PEFT's variants exchanged live: convolutions, experts, DoRA, biases, tokens."""

import jax
import numpy as np
import pytest
from peft_live import (
    goes_round,
    logits_of,
    net,
    note,
    peft_load,
    peft_model,
    peft_save,
    same_tensors,
    torch,
    tree_of,
)
from peft_nets import IDS, apply
from tools import randomise

import jlora
import jlora.peft

pytestmark = pytest.mark.oracle


def torch_logits(model):
    return logits_of(model, IDS)


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
    goes_round(
        net, PEFT_CASES[case], apply, IDS, 0.05, tmp_path, record_property,
        # A tree does not tell that PEFT adapted the parameter.
        derived="weight" not in case,
    )  # fmt: skip


class Stored(torch.nn.Module):
    """Experts as [E, in, out], which a module says by `is_transposed`."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        shape = (3, 4, 5) if is_transposed else (3, 5, 4)
        self.down_proj = torch.nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_read_the_same_however_they_are_stored(is_transposed, tmp_path):
    settings = dict(target_modules=[], target_parameters=["experts.down_proj"], r=2)
    theirs = peft_model(
        torch.nn.ModuleDict({"experts": Stored(is_transposed)}), **settings
    )
    peft_save(theirs, tmp_path)
    base = {"experts": {"down_proj": np.ones((3, 4, 5), np.float32)}}
    node = jlora.peft.load(tmp_path, base)["experts"]["down_proj"]
    delta = theirs.base_model.model["experts"].get_delta_weight("default")
    delta = delta.detach().numpy()
    want = delta if is_transposed else delta.swapaxes(1, 2)
    np.testing.assert_allclose(node.delta(), want, rtol=1e-5, atol=1e-6)


T = jlora.Target
CONVS = {
    "image": T(rank=3, in_axes=(0, 1, 2)),
    "time": T(rank=2, in_axes=(0, 1), alpha=5),
}
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
