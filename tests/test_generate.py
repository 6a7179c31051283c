"""Generation against PyTorch's tokens, and that it compiles once."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import models
from jlora._errors import DataError, DtypeError, ShapeError, StructureError
from jlora.models._generate.config import GenerationConfig
from jlora.models._generate.functions import functions_of
from jlora.models._generate.history import History
from jlora.models._generate.rules import apply_rules
from jlora.models._generate.warpers import warp

GOLDEN = Path(__file__).parent / "golden" / "t5"
EOS = 1
CASES = [
    (form, case)
    for form in ("v10", "v11")
    for case in json.loads((GOLDEN / form / "generated.json").read_text())
]
compilations = []


@pytest.fixture(scope="module", autouse=True)
def _count_compilations():
    def note(event, duration, **details):
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)


@pytest.fixture(scope="module")
def golden():
    loaded = {}
    for form in ("v10", "v11"):
        io = load_file(GOLDEN / form / "io.safetensors")
        inputs = io["input_ids"], io["attention_mask"]
        loaded[form] = (*models.load(GOLDEN / form), *inputs)
    return loaded


def until_end(rows):
    rows = np.asarray(rows).tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize(("form", "case"), CASES)
def test_tokens_are_pytorchs(golden, form, case):
    got = models.generate(*golden[form], **case["settings"])
    assert until_end(got) == case["tokens"]
    for row, tokens in zip(np.asarray(got), case["tokens"], strict=True):
        assert not row[len(tokens) :].any()  # padding follows


def test_golden_cases_end_early_and_late():
    lengths = [len(row) for _, case in CASES for row in case["tokens"]]
    assert len(set(lengths)) > 6


def test_same_shapes_compile_once(golden):
    model, params, ids, mask = golden["v11"]
    for beams in (1, 2):
        how = {"num_beams": beams, "max_new_tokens": 5}
        models.generate(model, params, ids, mask, **how)
        before = len(compilations)
        assert before > 0  # or the events have another name and nothing is tested
        other = jax.tree.map(lambda x: x + 0.01, params)
        jax.block_until_ready(other)
        before = len(compilations)
        models.generate(model, other, np.flip(ids, 0), np.flip(mask, 0), **how)
        assert len(compilations) == before


def retrace(fn):
    """A transform as `jlora.lora` is one: trace `fn`, then replay its jaxpr."""

    def replayed(*args):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        assert all(np.size(const) < 100 for const in closed.consts)  # no parameters
        flat = jax.extend.core.jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return replayed


@pytest.mark.parametrize("beams", [1, 2])
def test_a_transform_of_the_pure_functions(golden, beams):
    how = {"num_beams": beams, "max_new_tokens": 6}
    got = models.generate(*golden["v11"], transform=retrace, **how)
    np.testing.assert_array_equal(got, models.generate(*golden["v11"], **how))


def test_functions_of_a_model_are_the_same_objects(golden):
    model = golden["v11"][0]
    again = models.T5(model.config, model.dtype, model.param_dtype)
    assert functions_of(model) is functions_of(again)


def test_any_callables_serve():
    """A model without an encoder: each token is followed by the next number."""

    def encode(params, ids, mask, *, length, beams):
        last = jnp.take_along_axis(ids, mask.sum(1, keepdims=True) - 1, axis=1)[:, 0]
        return jnp.repeat(last, beams), {"beams": (), "shared": jnp.int32(0)}

    def decode(params, tokens, cache):
        logits = params * jax.nn.one_hot(tokens + 1, 10)
        return logits, {**cache, "shared": cache["shared"] + 1}

    ids, mask = np.array([[1, 2, 0], [4, 5, 6]]), np.array([[1, 1, 0], [1, 1, 1]])
    for beams in (1, 3):
        config = GenerationConfig(
            max_new_tokens=4, num_beams=beams, eos_token_id=8, pad_token_id=0
        )
        got = models.generate_with(encode, decode, 9.0, ids, mask, config)
        np.testing.assert_array_equal(got, [[3, 4, 5, 6], [7, 8, 0, 0]])


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_of_padding_alone_stay_empty_and_change_no_other(golden, beams):
    model, params, ids, mask = golden["v11"]
    how = {"num_beams": beams, "max_new_tokens": 5}
    want = models.generate(model, params, ids, mask, **how)
    got = models.generate(model, params, ids, mask * [[1], [0], [1], [1]], **how)
    assert not got[1].any()
    np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(want, 1, 0))


def test_no_prompts_are_no_outputs(golden):
    model, params, *_ = golden["v11"]
    for ids in (np.zeros((0, 3), np.int32), np.zeros((0, 0)), [[]][:0]):
        ids = np.asarray(ids).reshape(0, np.asarray(ids).shape[-1])
        got = models.generate(model, params, ids, max_new_tokens=4)
        assert got.shape == (0, 4)
        assert got.dtype == np.int32


def test_a_tokenizer_decodes_the_result_as_it_is():
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).parents[1] / "examples" / "assets" / "tiny-t5-de-en"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, params = models.load(folder)
    batch = tokenizer(["Hund", "die Katze"], return_tensors="np", padding=True)
    out = models.generate(
        model, params, batch["input_ids"], batch["attention_mask"], max_new_tokens=5
    )
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert texts == [tokenizer.decode(row.tolist(), True) for row in out]
    assert all(isinstance(text, str) for text in texts)


def test_inside_jit_the_result_is_traced(golden):
    model, params, ids, mask = golden["v11"]
    inner = jax.jit(lambda p, i: models.generate(model, p, i, mask, max_new_tokens=3))
    want = models.generate(model, params, ids, mask, max_new_tokens=3)
    np.testing.assert_array_equal(inner(params, jnp.asarray(ids)), want)


def test_several_end_tokens(golden):
    plain = np.asarray(models.generate(*golden["v11"], max_new_tokens=6))
    second = int(plain[0, 1])
    ends = (EOS, second)
    got = models.generate(*golden["v11"], max_new_tokens=6, eos_token_id=ends)
    for row, want in zip(np.asarray(got), plain, strict=True):
        n = next((i for i, t in enumerate(want) if t in ends), 5) + 1
        np.testing.assert_array_equal(row[:n], want[:n])
        assert not row[n:].any()


def sample(golden, seed=0, **how):
    key = jax.random.key(seed)
    how = {"do_sample": True, "max_new_tokens": 6, **how}
    return np.asarray(models.generate(*golden["v11"], key=key, **how))


def test_sampling_narrowed_to_one_token_is_greedy(golden):
    greedy = models.generate(*golden["v11"], max_new_tokens=6)
    np.testing.assert_array_equal(sample(golden, top_k=1), greedy)


def test_sampling_follows_its_key(golden):
    np.testing.assert_array_equal(sample(golden, 1), sample(golden, 1))
    assert (sample(golden, 1) != sample(golden, 2)).any()


def test_samples_have_the_models_distribution(golden):
    model, params, ids, _ = golden["v11"]
    many = np.repeat(ids[:1], 4000, axis=0)
    how = {"do_sample": True, "max_new_tokens": 1, "temperature": 2.0}
    got = models.generate(model, params, many, key=jax.random.key(0), **how)
    start = np.zeros((1, 1), int)
    logits = jax.jit(model.apply)({"params": params}, ids[:1], None, start)[0, 0]
    want = jax.nn.softmax(logits / 2)
    seen = np.bincount(np.asarray(got)[:, 0], minlength=len(want)) / len(many)
    np.testing.assert_allclose(seen, want, atol=4 * np.sqrt(0.25 / len(many)))


def test_beams_drawn_without_replacement_have_the_models_distribution(golden):
    """Of two beams after one token, the first token is drawn like a single sample."""
    model, params, ids, _ = golden["v11"]
    rows = 3000
    many = np.repeat(ids[:1], rows, axis=0)
    how = {"do_sample": True, "num_beams": 2, "max_new_tokens": 1, "temperature": 2.0}
    how |= {"num_return_sequences": 2, "eos_token_id": ()}
    got = models.generate(model, params, many, key=jax.random.key(0), **how)
    pairs = got.reshape(rows, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    start = np.zeros((1, 1), int)
    logits = jax.jit(model.apply)({"params": params}, ids[:1], None, start)[0, 0]
    # Log-probabilities are warped, of which temperature makes the same distribution;
    # four are drawn, and the better two returned.
    p = np.asarray(jax.nn.softmax(logits / 2), np.float64)
    rng = np.random.default_rng(0)
    noise = rng.gumbel(size=(rows * 10, len(p))) + np.log(p)
    best = np.sort(np.argsort(-noise, axis=1)[:, :4], axis=1)
    first = np.take_along_axis(best, np.argmax(p[best], 1)[:, None], 1)[:, 0]
    want = np.bincount(first, minlength=len(p)) / len(first)
    seen = np.bincount(pairs[:, 0], minlength=len(p)) / rows
    np.testing.assert_allclose(seen, want, atol=4 * np.sqrt(0.25 / rows))


def test_warp_keeps_the_likeliest():
    probs = jnp.array([[0.5, 0.05, 0.3, 0.15]])
    kept = lambda **how: np.isfinite(warp(jnp.log(probs), GenerationConfig(**how)))[0]
    np.testing.assert_array_equal(kept(top_k=2), [True, False, True, False])
    np.testing.assert_array_equal(kept(top_p=0.7), [True, False, True, False])
    np.testing.assert_array_equal(kept(top_p=0.9), [True, False, True, True])
    np.testing.assert_array_equal(kept(top_p=0.4), [True, False, False, False])
    np.testing.assert_array_equal(kept(top_k=9), [True] * 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": 0.0},
        {"top_k": -1},
        {"temperature": "warm"},
        {"num_beams": 2.5},
        {"do_sample": 1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"early_stopping": "always"},
        {"bad_words_ids": [[]]},
        {"suppress_tokens": [-1]},
        {"num_return_sequences": 2},
        {"num_return_sequences": 3, "num_beams": 2},
        {"sequence_bias": [3, 1.0]},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(StructureError, match=next(iter(wrong))):
        GenerationConfig(**wrong)


def test_inputs_are_checked(golden):
    model, params, ids, mask = golden["v11"]
    with pytest.raises(ShapeError, match="attention_mask"):
        models.generate(model, params, ids, mask[:, :-1])
    with pytest.raises(ShapeError, match="None"):
        models.generate(model, params, ids[0])
    with pytest.raises(DataError, match="0 to 36"):
        models.generate(model, params, ids + 30, mask)
    with pytest.raises(DtypeError, match="float"):
        models.generate(model, params, ids * 1.0, mask)
    with pytest.raises(StructureError, match="key"):
        models.generate(model, params, ids, do_sample=True)
    with pytest.raises(DataError, match=r"\(4, 0\) are empty.*\n.*bos_token_id"):
        models.generate(model, params, ids[:, :0])


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [20, 21])
@pytest.mark.parametrize("form", ["v10", "v11"])
def test_tokens_are_pytorchs_live(form, seed, tmp_path):
    pytest.importorskip("torch")
    from golden import make_t5

    theirs, batch = make_t5.random_t5(form, seed), make_t5.inputs(seed)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    ids = batch["input_ids"], batch["attention_mask"]
    for how in make_t5.settings(new_tokens=10):
        got = models.generate(model, params, *ids, **how)
        assert until_end(got) == make_t5.generated(theirs, batch, **how), how


WARPERS = [
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_k": 7, "top_p": 0.6},
    {"min_p": 0.2},
    {"min_p": 0.99, "num_beams": 2},
    {"typical_p": 0.3},
    {"typical_p": 0.05, "num_beams": 3},
    {"epsilon_cutoff": 0.03},
    {"eta_cutoff": 0.1},
    {"top_h": 0.4},
    {"top_p": 0.01, "num_beams": 2},
    {"top_k": 1, "num_beams": 2, "eos_token_id": (1, 2)},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9, "eta_cutoff": 0.01},
    {"top_k": 10, "renormalize_logits": True},
]


@pytest.mark.oracle
@pytest.mark.parametrize("how", WARPERS, ids=str)
def test_what_is_drawn_from_is_pytorchs_live(how):
    """All settings of sampling, in the order and with the margins of `generate`."""
    torch = pytest.importorskip("torch")
    import transformers

    ends = how.get("eos_token_id", (1,))
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.7,
        **{"top_k": 0, "num_beams": 1, **how, "eos_token_id": list(ends)},
    )
    settings._eos_token_tensor = torch.tensor(ends)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=8, d_model=4, num_layers=1, d_ff=4)
    )
    chain = model._get_logits_processor(settings, 1, torch.zeros(3, 2, dtype=int))
    logits = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    want = chain(torch.zeros(3, 1, dtype=int), torch.tensor(logits)).numpy()
    own = {"temperature": 0.7, "eos_token_id": ends, "do_sample": True, **how}
    tokens = jnp.zeros((3, 1), jnp.int32)
    history = History(tokens, tokens, tokens == 0, tokens, jnp.int32(0))
    got = apply_rules(jnp.asarray(logits), history, GenerationConfig(**own))
    assert np.isinf(want).any()
    np.testing.assert_allclose(got, want, rtol=1e-5)
