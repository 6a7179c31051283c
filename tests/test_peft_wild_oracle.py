"""The same folders made by PEFT itself: added tokens, tied heads, raw state dicts."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_peft_wild import CONFIG, IDS, WEIGHTS, close, logits

import jlora
import jlora.peft
from jlora import models

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::jlora.JloraWarning"),
]
V = 20


@pytest.fixture
def base(tmp_path):
    """A small Llama of PyTorch's, by whether its head is tied; saved once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tied):
        torch.manual_seed(3)
        config = LlamaConfig(vocab_size=V, hidden_size=12, intermediate_size=10,
            num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1,
            max_position_embeddings=16, tie_word_embeddings=tied,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "base")
        return model

    return make


def adapted(model, **settings):
    """PEFT's adapter with a random B."""
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config).eval()


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize(
    ("tied", "targets"),
    [(False, ["q_proj"]), (True, ["q_proj"]), (False, ["q_proj", "embed_tokens"])],
)
def test_added_tokens(tied, targets, base, tmp_path):
    model = base(tied)
    model.resize_token_embeddings(V + 2)
    model = adapted(model, target_modules=targets)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ours, params = models.load(tmp_path / "base")
    with pytest.raises(jlora.CheckpointError, match="resize_vocabulary"):
        jlora.peft.load(tmp_path / "adapter", params)
    ours, params = models.resize_vocabulary(ours, params, V + 2)
    tree = jlora.peft.load(tmp_path / "adapter", params, model=ours)
    # Beside an adapted embedding PEFT does not save the head, nor its new rows.
    kept = V if "embed_tokens" in targets else V + 2
    close(logits(ours, tree)[..., :kept], theirs(model)[..., :kept])


def test_a_tied_head(base, tmp_path):
    model = adapted(base(True), target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    ours, params = models.load(tmp_path / "base")
    with pytest.raises(jlora.CheckpointError, match="untie"):
        jlora.peft.load(tmp_path / "adapter", params, model=ours)
    apart, params = models.untie(ours, params)
    tree = jlora.peft.load(tmp_path / "adapter", params, model=apart)
    close(logits(apart, tree), theirs(model))


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_a_raw_state_dict(variant, base, tmp_path):
    from safetensors.torch import save_file

    model = adapted(base(False), target_modules=["q_proj", "lm_head"],
                    modules_to_save=["norm"], **variant)  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    raw = {k: v.detach().clone() for k, v in model.state_dict().items()}
    save_file(raw, tmp_path / "adapter" / WEIGHTS)
    assert (tmp_path / "adapter" / CONFIG).exists()
    ours, params = models.load(tmp_path / "base")
    tree = jlora.peft.load(tmp_path / "adapter", params, model=ours)
    close(logits(ours, tree), theirs(model))


def test_a_base_in_bfloat16(base, tmp_path):
    model = base(False).to(torch.bfloat16)
    model = adapted(model, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    _, params = models.load(tmp_path / "base")  # in float32
    tree = jlora.peft.load(tmp_path / "adapter", params)
    assert tree["lm_head"]["kernel"].base is params["lm_head"]["kernel"]
    assert params["lm_head"]["kernel"].dtype == jnp.float32
    assert np.asarray(tree["lm_head"]["kernel"].adapters[""].b).any()
