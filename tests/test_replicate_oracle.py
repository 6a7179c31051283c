"""PEFT's `layer_replication`, live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_live import (
    logits_of,
    peft,
    peft_load,
    peft_save,
    torch,
    transformers,
)

import jlora
import jlora.models
import jlora.peft

pytestmark = pytest.mark.oracle
IDS = np.array([[1, 5, 2, 9], [3, 3, 7, 0]])
RANGES = [[0, 2], [1, 3]]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, ids):
        return self.inner(input_ids=ids, use_cache=False).logits


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=12, intermediate_size=10, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=11,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_an_adapter_of_repeated_layers(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], layer_replication=RANGES
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.5)
    want = logits_of(Logits(theirs), IDS)
    peft_save(theirs, tmp_path / "theirs")

    model, params = jlora.models.load(str(tmp_path / "base"))
    with pytest.raises(jlora.CheckpointError, match="replicate_layers"):
        jlora.peft.load(tmp_path / "theirs", params, model=model)
    model, deep = jlora.models.load(str(tmp_path / "base"), layer_replication=RANGES)
    jax.tree.map(
        np.testing.assert_array_equal,
        deep,
        jlora.replicate_layers(params, RANGES, ["layers"]),
    )
    tree = jlora.peft.load(tmp_path / "theirs", deep, model=model)
    got = jlora.lora(model.apply)({"params": tree}, jnp.asarray(IDS))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    said = jlora.peft.read_config(tmp_path / "theirs")
    jlora.peft.save(tmp_path / "ours", tree, model=model, config=said)
    assert jlora.peft.read_config(tmp_path / "ours") == said
    again = logits_of(Logits(peft_load(llama(), tmp_path / "ours")), IDS)
    np.testing.assert_allclose(again, want, rtol=1e-4, atol=1e-5)
