"""Hugging Face's models and `jlora.models` exchange adapters, named by `model=`."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from peft_live import note, peft, peft_load, peft_model, peft_save, same_tensors, torch
from tools import randomise

import jlora
import jlora.peft
from jlora import models

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
V = 29
IDS = np.array([[5, 6, 7, 1], [9, 10, 11, 12]])
SMALL = dict(vocab_size=V, hidden_size=8, intermediate_size=11, num_hidden_layers=2)
CONFIGS = {
    "llama": transformers.LlamaConfig(
        **SMALL, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=16
    ),
    "t5": transformers.T5Config(
        vocab_size=V, d_model=8, d_ff=11, d_kv=4, num_layers=1, num_heads=2,
        tie_word_embeddings=True, decoder_start_token_id=0,
    ),
    "bert": transformers.BertConfig(**SMALL, num_attention_heads=2),
    "roberta": transformers.RobertaConfig(**SMALL, num_attention_heads=2, pad_token_id=0),
    "mixtral": transformers.MixtralConfig(
        **{**SMALL, "num_hidden_layers": 1, "intermediate_size": 12},
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        num_experts_per_tok=2,
    ),
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration", "roberta": "RobertaForMaskedLM",
    "mixtral": "MixtralForCausalLM",
}  # fmt: skip


@dataclasses.dataclass
class Case:
    model: object
    params: object
    folder: object
    make: object

    def theirs(self):
        return self.make.from_pretrained(self.folder).eval()

    def torch_logits(self, model):
        ids = torch.tensor(IDS)
        more = {"decoder_input_ids": ids} if isinstance(self.model, models.T5) else {}
        with torch.no_grad():
            return model(input_ids=ids, **more).logits.numpy()

    def apply(self, params):
        more = (None, IDS) if isinstance(self.model, models.T5) else ()
        return self.model.apply({"params": params}, IDS, *more)

    def load(self, folder):
        return jlora.peft.load(folder, self.params, model=self.model)

    def save(self, folder, tree, **settings):
        jlora.peft.save(folder, tree, model=self.model, **settings)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    name = request.param
    torch.manual_seed(0)
    make = getattr(transformers, CLASSES[name])
    theirs = make(CONFIGS[name])
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder)
    return Case(*models.load(folder), folder, make)


EMBEDDINGS = {
    "llama": "embed_tokens", "gpt2": "wte", "t5": "shared", "bert": "word_embeddings",
    "roberta": "word_embeddings",
}  # fmt: skip
LAYERS = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q"}
ALL = [(n, n) for n in EMBEDDINGS]
each_model = pytest.mark.parametrize(("case", "name"), ALL, indirect=["case"])


@each_model
def test_our_tied_adapter_in_peft(case, name, tmp_path, record_property):
    """One leaf, one adapter: merged it is the adapted model; PEFT merges it twice."""
    tree = jlora.lorafy(
        case.params, 2, [EMBEDDINGS[name], LAYERS.get(name, "query")], alpha=3
    )
    tree = randomise(tree, jax.random.key(1))
    want = np.asarray(jlora.lora(case.apply)(tree))
    case.save(tmp_path, tree)
    tied = name in ("llama", "gpt2", "bert", "roberta")
    said = jlora.peft.read_config(tmp_path)["ensure_weight_tying"]
    assert said is tied  # of T5's three embeddings PEFT would make linear layers
    theirs = peft_load(case.theirs(), tmp_path)
    note(record_property, "out", case.torch_logits(theirs), want)
    same_tensors(case.load(tmp_path), tree)
    note(record_property, "merged", case.apply(jlora.merge(tree)), want)
    whole = jlora.lorafy(
        case.params, 2, [LAYERS.get(name, "query")], train=[EMBEDDINGS[name]]
    )
    whole = randomise(whole, jax.random.key(2))
    case.save(tmp_path / "whole", whole, fan_in_fan_out=False)
    got = case.torch_logits(peft_load(case.theirs(), tmp_path / "whole"))
    note(record_property, "whole", got, np.asarray(jlora.lora(case.apply)(whole)))
    same_tensors(jlora.merge(case.load(tmp_path / "whole")), jlora.merge(whole))
    if name == "llama":
        twice = case.torch_logits(theirs.merge_and_unload())
        assert np.max(np.abs(twice - want)) > 1e-2


def with_bias(case, logits):
    """PEFT's logits with trained tokens: its tied decoder forgets BERT's bias."""
    head = {"bert": ("cls", "predictions"), "roberta": ("lm_head",)}
    bias = case.params
    for part in head.get(getattr(case.model.config, "model_type", None), ()):
        bias = bias[part]
    return logits if bias is case.params else logits + np.asarray(bias["bias"])


@each_model
def test_our_tokens_in_peft(case, name, tmp_path, record_property):
    tokens = {EMBEDDINGS[name]: [7, 2, 11]}
    layer = LAYERS.get(name, "query")
    tree = jlora.lorafy(case.params, 2, [layer], trainable_tokens=tokens)
    tree = randomise(tree, jax.random.key(1))
    want = np.asarray(jlora.lora(case.apply)(tree))
    case.save(tmp_path, tree)
    got = case.torch_logits(peft_load(case.theirs(), tmp_path))
    note(record_property, "out", with_bias(case, got), want)
    same_tensors(case.load(tmp_path), tree)


@each_model
def test_pefts_tokens_here(case, name, tmp_path, record_property):
    layer = LAYERS.get(name, "query")
    embedding = EMBEDDINGS[name]
    given = [[7, 2], {embedding: [7, 2]}]
    if name in ("llama", "gpt2"):
        given.append({embedding: [7, 2], "lm_head": [7, 2]})
    for i, rows in enumerate(given):
        model = peft_model(
            case.theirs(), target_modules=[layer], trainable_token_indices=rows
        )
        peft_save(model, tmp_path / f"{i}")
        tree = case.load(tmp_path / f"{i}")
        got = jlora.lora(case.apply)(tree)
        want = with_bias(case, case.torch_logits(model))
        note(record_property, f"in{i}", got, want)
        config = jlora.peft.read_config(tmp_path / f"{i}")
        case.save(tmp_path / f"{i}b", tree, config=config)
        files = [tmp_path / f"{i}{x}" / "adapter_model.safetensors" for x in ("", "b")]
        assert files[0].read_bytes() == files[1].read_bytes()
    if name in ("llama", "gpt2"):
        rows = {embedding: [7, 2], "lm_head": [7, 3]}
        model = peft_model(
            case.theirs(), target_modules=[layer], trainable_token_indices=rows
        )
        peft_save(model, tmp_path / "c")
        with pytest.raises(jlora.CheckpointError, match=r"trained rows of .* differ"):
            case.load(tmp_path / "c")


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_ensure_weight_tying(case, tmp_path, record_property):
    for i, settings in enumerate([
        dict(target_modules=["embed_tokens", "q_proj"]),
        dict(target_modules=r".*embed_tokens|.*[01]\.self_attn\.q_proj"),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ]):  # fmt: skip
        model = peft_model(case.theirs(), ensure_weight_tying=True, **settings)
        folder = tmp_path / f"{i}"
        peft_save(model, folder)
        tree = case.load(folder)
        want = case.torch_logits(model)
        note(record_property, f"in{i}", jlora.lora(case.apply)(tree), want)
        config = jlora.peft.read_config(folder)
        case.save(tmp_path / f"{i}b", tree, config=config)
        same_tensors(case.load(tmp_path / f"{i}b"), tree)
        theirs = peft_load(case.theirs(), tmp_path / f"{i}b")
        note(record_property, f"out{i}", case.torch_logits(theirs), want)
    dora = peft_model(case.theirs(), ensure_weight_tying=True, use_dora=True,
                      target_modules=["embed_tokens"])  # fmt: skip
    peft_save(dora, tmp_path / "dora")
    with pytest.raises(jlora.CheckpointError, match="one adapter cannot be both"):
        case.load(tmp_path / "dora")


@pytest.mark.parametrize("case", ["bert", "roberta"], indirect=True)
def test_the_bias_of_a_tied_decoder(case, tmp_path, record_property):
    model = peft_model(case.theirs(), target_modules=["query"], bias="all")
    peft_save(model, tmp_path)
    got = jlora.lora(case.apply)(case.load(tmp_path))
    note(record_property, "in", got, case.torch_logits(model))


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("trained", [["classifier"], []])
def test_heads_that_peft_saves_for_a_task(family, trained, tmp_path, record_property):
    torch.manual_seed(0)
    make = {
        "bert": transformers.BertForSequenceClassification,
        "roberta": transformers.RobertaForSequenceClassification,
    }[family]
    make(CONFIGS[family]).save_pretrained(tmp_path / "base")
    model, params = models.load(tmp_path / "base")
    tree = jlora.lorafy(params, 2, ["query"], train=trained)
    tree = randomise(tree, jax.random.key(0))
    settings = dict(model=model, task_type="SEQ_CLS")
    jlora.peft.save(tmp_path / "a", tree, **settings)
    theirs = peft_load(make.from_pretrained(tmp_path / "base"), tmp_path / "a")
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor(IDS)).logits.numpy()
    want = jlora.lora(lambda p: model.apply({"params": p}, IDS))(tree)
    note(record_property, "out", got, np.asarray(want))
    back = jlora.peft.load(tmp_path / "a", params, model=model)
    jlora.peft.save(tmp_path / "b", back, **settings)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (
            tmp_path / "b" / file
        ).read_bytes()
    del params["classifier"]
    headless = jlora.lorafy(params, 2, ["query"])
    with pytest.raises(jlora.StructureError, match="classifier or score"):
        jlora.peft.save(tmp_path / "c", headless, **settings)


# -- experts ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mixtral"], indirect=True)
@pytest.mark.parametrize(
    "parameters",
    [
        ["experts.down_proj", "mlp.experts.gate_up_proj"],
        ["down_proj"],
        ["experts.gate_up_proj"],
    ],
)
def test_mixtrals_experts_both_ways(case, parameters, tmp_path, record_property):
    """transformers 5 stores [E, out, in]; A's `in` is what the product sums over."""
    settings = dict(target_modules=["q_proj"], target_parameters=parameters, r=2)
    theirs = peft_model(case.theirs(), lora_alpha=3, **settings)
    want = case.torch_logits(theirs)
    assert np.max(np.abs(case.apply(case.params) - want)) > 0.1
    peft_save(theirs, tmp_path / "a")
    tree = case.load(tmp_path / "a")
    note(record_property, "in", jlora.lora(case.apply)(tree), want)
    case.save(tmp_path / "b", tree, task_type="CAUSAL_LM")
    again = peft_load(case.theirs(), tmp_path / "b")
    note(record_property, "out", case.torch_logits(again), want)
    files = [tmp_path / x / "adapter_model.safetensors" for x in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("case", ["mixtral"], indirect=True)
def test_our_experts_in_peft(case, tmp_path, record_property):
    stack = jlora.Target(rank=2, alpha=3, in_axes=(1,), batch_axes=(0,))
    targets = {
        "gate_up_proj": stack,
        "experts/down_proj": stack,
        "v_proj": jlora.Target(),
    }
    tree = jlora.lorafy(case.params, 3, targets)
    tree = randomise(tree, jax.random.key(1))
    case.save(tmp_path, tree)
    got = case.torch_logits(peft_load(case.theirs(), tmp_path))
    note(record_property, "out", got, np.asarray(jlora.lora(case.apply)(tree)))
    same_tensors(case.load(tmp_path), tree)


# -- several adapters ------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_several_adapters_of_a_folder(case, tmp_path, record_property):
    settings = {
        "default": dict(target_modules=["q_proj"], r=2),
        "second": dict(target_modules=["q_proj", "v_proj"], r=3, use_rslora=True),
        "third": dict(target_modules=["o_proj"], use_dora=True, bias="none"),
    }
    model = peft_model(case.theirs(), **settings["default"])
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(**settings[name]))
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.4)
    peft_save(model, tmp_path / "theirs")
    trees = jlora.peft.load_all(tmp_path / "theirs", case.params, model=case.model)
    assert list(trees) == list(settings)
    for name, tree in trees.items():
        case.save(tmp_path / "ours", tree, adapter=name)
        model.set_adapter(name)
        want = case.torch_logits(model)
        note(record_property, f"in {name}", jlora.lora(case.apply)(tree), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(case.theirs(), tmp_path / "ours").eval()
        for name in ("second", "third"):
            again.load_adapter(tmp_path / "ours" / name, adapter_name=name)
    for name, tree in trees.items():
        again.set_adapter(name)
        want = np.asarray(jlora.lora(case.apply)(tree))
        note(record_property, f"out {name}", case.torch_logits(again), want)
