"""The rules of generation against PyTorch's tokens, and what is said of settings."""

from __future__ import annotations

import dataclasses
import json
import warnings
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jlora import JloraWarning, LoraError, models
from jlora._errors import DataError, StructureError
from jlora.models import GPT2, T5, GPT2Config, T5Config

HERE = Path(__file__).parent / "golden"
FORMS = ("t5/v11", "t5/v10", "decoders/gpt2", "decoders/llama")
RECORDED = json.loads((HERE / "rules.json").read_text())


RULES = RECORDED["rules"]


@lru_cache
def golden(form):
    """A model, its parameters, and the inputs that were recorded."""
    model, params = models.load(HERE / form)
    recorded = RECORDED[form]
    ids, mask = recorded["input_ids"], recorded["attention_mask"]
    return model, params, np.array(ids, np.int32), np.array(mask, np.int32)


def until_end(rows, ends):
    out = []
    for row in np.asarray(rows).tolist():
        first = next((i for i, t in enumerate(row) if t in ends), len(row) - 1)
        out.append(row[: first + 1])
    return out


def run(form, how):
    room = {} if "max_length" in how else {"max_new_tokens": 10}
    got = models.generate(*golden(form), **room, **how)
    return until_end(got, how.get("eos_token_id", [1]))


@pytest.mark.parametrize("number", range(len(RULES)))
def test_tokens_are_pytorchs(number):
    form = FORMS[number % len(FORMS)]
    assert run(form, RULES[number]) == RECORDED[form]["tokens"][number]


def small(**fields):
    """A T5 of its own and its inputs; `fields` are of its configuration."""
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 2}
    model = T5(config=T5Config(vocab_size=23, **sizes, **fields))
    ids = np.array([[3, 4, 5, 6, 7], [7, 8, 9, 10, 11]])
    params = model.init(jax.random.key(0), ids, None, ids)["params"]
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return model, jax.tree.map(noise, params), ids


def saved(tmp_path, said, config=None):
    """The small T5 as loaded from a folder whose files say that."""
    model, params, ids = small()
    models.save(model, params, tmp_path / "model")
    if said is not None:
        text = json.dumps(said)
        (tmp_path / "model" / "generation_config.json").write_text(text)
    if config is not None:
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return (*models.load(tmp_path / "model"), ids)


def test_the_files_settings_count_and_arguments_go_before_them(tmp_path):
    said = {"decoder_start_token_id": 5, "num_beams": 2, "max_length": 8}
    said |= {"no_repeat_ngram_size": 1, "eos_token_id": [1, 9], "early_stopping": True}
    model, params, ids = saved(tmp_path, said)
    bare, _, _ = small()
    got = models.generate(model, params, ids)
    assert got.shape == (2, 7)
    want = models.generate(bare, params, ids, **said)
    np.testing.assert_array_equal(got, want)
    how = {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 5}
    got = models.generate(model, params, ids, **how)
    want = models.generate(bare, params, ids, **{**said, "max_length": None, **how})
    assert got.shape == (2, 5)
    np.testing.assert_array_equal(got, want)
    plain = models.generate(bare, params, ids, max_new_tokens=5, eos_token_id=(1, 9))
    assert (plain != want).any()  # or the start token changed nothing


def test_models_that_differ_in_their_files_settings_alone(tmp_path):
    """Configurations compare equal, and programs are kept by them."""
    starts = []
    for start in (5, 7):
        said = {"decoder_start_token_id": start}
        model, params, ids = saved(tmp_path / str(start), said)
        starts.append(models.generate(model, params, ids, max_new_tokens=4))
    assert (starts[0] != starts[1]).any()


def test_a_configuration_given_whole_takes_the_files_place(tmp_path):
    model, params, ids = saved(tmp_path, {"num_beams": 3, "eos_token_id": 4})
    config = models.GenerationConfig(max_new_tokens=3)
    got = models.generate(model, params, ids, config=config)
    want = models.generate(model, params, ids, num_beams=1, max_new_tokens=3)
    np.testing.assert_array_equal(got, want)


def test_settings_in_an_old_config_count_where_there_is_no_other_file(tmp_path):
    old = {"num_beams": 2, "no_repeat_ngram_size": 2, "max_length": 20, "top_k": 50}
    model, params, ids = saved(tmp_path / "old", None, old)
    assert model.config.generation == {"num_beams": 2, "no_repeat_ngram_size": 2}
    got = models.generate(model, params, ids, max_new_tokens=6)
    how = {"num_beams": 2, "no_repeat_ngram_size": 2, "max_new_tokens": 6}
    np.testing.assert_array_equal(got, models.generate(*small(), **how))
    model, params, ids = saved(tmp_path / "both", {"min_length": 1}, old)
    assert model.config.generation == {"min_length": 1}


def test_what_is_not_honoured_is_named(tmp_path):
    said = {"guidance_scale": 1.5, "chat_format": "chatml", "use_cache": False}
    said |= {"penalty_alpha": None, "num_beam_groups": 1, "output_scores": True}
    model, params, ids = saved(tmp_path, said)
    with pytest.warns(JloraWarning) as caught:
        models.generate(model, params, ids, max_new_tokens=2)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "guidance_scale: 1.5" in texts[0]
    assert "chat_format: 'chatml'" in texts[1]
    assert not any(word in "".join(texts) for word in ("use_cache", "num_beam_groups"))
    assert all(warning.filename == __file__ for warning in caught)


def test_sampling_that_a_file_asks_for_needs_a_key(tmp_path):
    said = {"do_sample": True, "temperature": 1.7, "top_k": 5}
    model, params, ids = saved(tmp_path, said)
    with pytest.warns(JloraWarning, match="needs a key"):
        greedy = models.generate(model, params, ids, max_new_tokens=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how = {"max_new_tokens": 6, "do_sample": False}
        np.testing.assert_array_equal(
            models.generate(model, params, ids, **how), greedy
        )
        key = jax.random.key(3)
        drawn = models.generate(model, params, ids, max_new_tokens=6, key=key)
        want = models.generate(*small(), max_new_tokens=6, key=key, **said)
    np.testing.assert_array_equal(drawn, want)
    assert (drawn != greedy).any()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"repetition_penalti": 1.3}, "'repetition_penalti'; .*'repetition_penalty'"),
        ({"max_tokens": 3}, "'max_new_tokens'"),
        ({"generation_config": {}}, "'config'"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not honoured"),
        ({"max_length": 1}, "no room.*\n.*max_new_tokens"),
        ({"num_beams": "3"}, "num_beams is '3'"),
    ],
)
def test_wrong_settings_are_refused(wrong, match):
    with pytest.raises(StructureError, match=match):
        models.generate(*small(), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bad_words_ids": [[3], [4, 23]]},
        {"sequence_bias": {(23,): 1.0}},
        {"forced_bos_token_id": 23},
        {"forced_eos_token_id": [1, 40]},
        {"decoder_start_token_id": 30},
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(DataError, match=f"{name} names token .* 0 to 22"):
        models.generate(*small(), **wrong)


def test_settings_that_ask_for_nothing_are_taken():
    neutral = {"use_cache": True, "guidance_scale": None, "num_beam_groups": 1}
    got = models.generate(*small(), max_new_tokens=3, **neutral, min_p=None)
    np.testing.assert_array_equal(got, models.generate(*small(), max_new_tokens=3))


def test_a_dict_and_pairs_are_one_bias():
    pairs = models.GenerationConfig(sequence_bias=[[[3, 4], 1.0], [[5], -2]])
    by_dict = models.GenerationConfig(sequence_bias={(3, 4): 1.0, (5,): -2.0})
    assert pairs == by_dict
    assert hash(pairs) == hash(by_dict)


GPT2_SIZES = {"vocab_size": 23, "n_embd": 12, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 2.0},
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[3, 4]],
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_64_bits(kind, how):
    """The same tokens, whatever integers and floats are by default."""
    if kind == "t5":
        model, params, ids = small()
    else:
        config = GPT2Config(**GPT2_SIZES, n_positions=16, eos_token_id=1)
        model, ids = GPT2(config=config), np.array([[3, 4, 5], [6, 7, 8]])
        params = model.init(jax.random.key(0), ids)["params"]
    key = jax.random.key(5) if "do_sample" in how else None
    with jax.enable_x64(True):
        got = models.generate(model, params, ids, max_new_tokens=4, key=key, **how)
    assert got.shape == (2, 4)
    assert got.dtype == np.int32
    if key is None:
        want = models.generate(model, params, ids, max_new_tokens=4, **how)
        np.testing.assert_array_equal(got, want)


def test_rules_with_adapters():
    """What `jlora.lora` replays is the model alone; the rules are the same."""
    import jlora

    model, params, ids = small()
    tree = jlora.lorafy(params, 2, ["q", "v"], key=jax.random.key(0))
    tree = jax.tree.map(lambda x: x + 0.1, tree)
    how = {"max_new_tokens": 6, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    got = models.generate(model, tree, ids, transform=jlora.lora, **how)
    want = models.generate(model, jlora.merge(tree), ids, **how)
    np.testing.assert_array_equal(got, want)


def test_every_error_is_ours():
    for wrong in (
        {"top_k": "a"},
        {"x": 1},
        {"suppress_tokens": 5},
        {"eos_token_id": 1.5},
    ):
        with pytest.raises(LoraError):
            models.generate(*small(), **wrong)


def test_defaults_are_those_of_the_fields():
    config = models.GenerationConfig(max_new_tokens=None, top_k=None, min_p=None)
    assert config == models.GenerationConfig()
    for field in dataclasses.fields(config):
        assert getattr(config, field.name) == field.default


@pytest.mark.oracle
@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_pytorchs_live(form):
    pytest.importorskip("torch")
    from golden import make_rules

    theirs = make_rules.load(form)
    model, params = golden(form)[:2]
    for seed, how in enumerate(RULES):
        batch = make_rules.inputs(form, seed=100 + seed)
        want = make_rules.generated(theirs, batch, how)
        room = {} if "max_length" in how else {"max_new_tokens": 10}
        got = models.generate(model, params, *batch.values(), **room, **how)
        assert until_end(got, how.get("eos_token_id", [1])) == want, how


def test_what_was_asked_for_may_be_said_where_the_prompt_does_not_count():
    model, params, ids, mask = golden("decoders/gpt2")
    how = {"no_repeat_ngram_size": 1, "max_new_tokens": 8, "eos_token_id": ()}
    all_once = models.generate(model, params, ids, mask, **how)
    how["no_repeat_ngram_prompt"] = False
    own_once = models.generate(model, params, ids, mask, **how)
    free = models.generate(
        model, params, ids, mask, **{**how, "no_repeat_ngram_size": 0}
    )
    asked = [set(row[on == 1].tolist()) for row, on in zip(ids, mask, strict=True)]
    for said, rows in ((all_once, asked), (own_once, asked)):
        assert all(len(set(row.tolist())) == 8 for row in said)
        repeats = [
            bool(old & {*row.tolist()}) for old, row in zip(rows, said, strict=True)
        ]
        assert any(repeats) == (said is own_once)
    assert any(len(set(row.tolist())) < 8 for row in free)
    first = [free[i, 0] == own_once[i, 0] for i in range(len(ids))]
    assert all(first)  # nothing was said yet that could be repeated
