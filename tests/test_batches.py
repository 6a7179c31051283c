"""Tokens, length buckets, batches, and an order that resumes."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jlora import DataError
from jlora.data import (
    IGNORED,
    Batches,
    load_tokenizer,
    prompted,
    shapes_for,
    tokenise,
)

ASSETS = Path(__file__).parents[1] / "examples" / "assets"


def columns(sources, targets):
    return {"input_ids": sources, "labels": targets}


def encoded(n=200, seed=0):
    """Examples of random lengths; each holds its own number, and ends in 1."""
    rng = np.random.default_rng(seed)
    sides = [rng.integers(2, most, n) for most in (40, 30)]
    rows = [
        [np.r_[np.full(k - 1, 10 + i), 1].astype(np.int32) for i, k in enumerate(side)]
        for side in sides
    ]
    return columns(*rows)


def test_every_example_once_an_epoch_in_few_shapes():
    examples = encoded()
    shapes = shapes_for([examples], 4)
    batches = Batches(examples, shapes, 16, pad=0, seed=0)
    plan = batches.plan()
    assert len(plan) == len(batches) == 13
    rows = np.concatenate([batch.rows for batch in plan])
    assert sorted(rows) == list(range(200))
    seen = {batches.arrays(batch)["input_ids"].shape for batch in plan}
    assert seen <= {(16, shape[0]) for shape in shapes}
    assert len(shapes) <= 4


def test_shapes_grow_and_hold_everything():
    shapes = shapes_for([encoded()], 5)
    assert shapes == sorted(shapes)
    assert shapes[-1] >= (39, 29)
    assert all(length % 4 == 0 for shape in shapes for length in shape)


def padded_tokens(examples, shapes):
    bucket = Batches(examples, shapes, 16, 0).bucket
    return sum(sum(shapes[i]) for i in bucket)


def lengths_of(pairs):
    sides = zip(*pairs, strict=True)
    return columns(*([np.ones(n, np.int32) for n in side] for side in sides))


@pytest.mark.parametrize("buckets", [1, 2, 3])
def test_no_other_shapes_pad_less(buckets):
    rng = np.random.default_rng(1)
    source = rng.integers(2, 22, 60)
    examples = lengths_of(
        zip(source, source // 2 + rng.integers(1, 9, 60), strict=True)
    )
    found = shapes_for([examples], buckets)
    last = found[-1]
    sides = [range(4, most + 1, 4) for most in last]
    every = [*itertools.product(*sides)]
    chains = (
        [*chain, last]
        for chain in itertools.combinations(every, buckets - 1)
        if all(one[1] <= two[1] for one, two in itertools.pairwise(chain))
    )
    fewest = min(padded_tokens(examples, chain) for chain in chains)
    assert padded_tokens(examples, found) == fewest


def test_shapes_follow_the_lengths():
    # Most are short, and a few long ones are long on one side alone.
    examples = lengths_of([(4, 4)] * 90 + [(8, 4)] * 9 + [(8, 40)])
    assert shapes_for([examples], 3) == [(4, 4), (8, 4), (8, 40)]
    assert shapes_for([examples], 9) == [(4, 4), (8, 4), (8, 40)]
    assert shapes_for([examples], 1) == [(8, 40)]


def test_shapes_of_many_lengths():
    # 1,500 lengths a side: too many to try each pair.
    rng = np.random.default_rng(0)
    source = np.minimum(rng.lognormal(4.5, 1.0, 4000).astype(int) + 1, 6000)
    examples = lengths_of(zip(source, source, strict=True))
    shapes = shapes_for([examples], 8)
    assert len(shapes) == 8
    assert shapes[-1][0] == -(-source.max() // 4) * 4
    assert padded_tokens(examples, shapes) < 1.35 * 2 * source.sum()


def test_arrays_mask_padding_and_filled_up_rows():
    examples = encoded(3)
    batches = Batches(examples, shapes_for([examples], 1), 5, pad=0)
    (batch,) = batches.plan()
    arrays = batches.arrays(batch)
    for i, row in enumerate(batch.rows):
        source, target = (examples[n][row] for n in ("input_ids", "labels"))
        n = len(source)
        assert arrays["attention_mask"][i].sum() == n
        np.testing.assert_array_equal(arrays["input_ids"][i, :n], source)
        assert (arrays["input_ids"][i, n:] == 0).all()
        np.testing.assert_array_equal(arrays["labels"][i, : len(target)], target)
        assert (arrays["labels"][i, len(target) :] == IGNORED).all()
    assert (arrays["labels"][3:] == IGNORED).all()
    assert arrays["attention_mask"].sum(axis=1).all(), "a row attends to nothing"


def test_epochs_differ_and_repeat():
    examples = encoded()
    batches = Batches(examples, shapes_for([examples], 4), 16, pad=0, seed=3)
    order = lambda epoch: [tuple(b.rows) for b in batches.plan(epoch)]
    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize("start", [0, 5, 13, 20])
def test_stream_goes_on_where_it_stopped(start):
    examples = encoded()
    make = lambda: Batches(examples, shapes_for([examples], 4), 16, pad=0, seed=3)
    whole, rest = make().stream(), make().stream(start)
    for _ in range(start):
        next(whole)
    for _ in range(20):
        one, two = next(whole), next(rest)
        for name, array in one.items():
            np.testing.assert_array_equal(array, two[name])


def test_without_a_seed_nothing_is_shuffled():
    examples = encoded()
    plan = Batches(examples, shapes_for([examples], 1), 16, pad=0).plan()
    assert list(np.concatenate([b.rows for b in plan])) == list(range(200))


def test_columns_of_numbers_and_of_one_length():
    examples = encoded(5)
    ids = examples["input_ids"]
    both = {"input_ids": ids, "labels": ids}
    shapes = shapes_for([both, both], 3)
    assert all(one == two for one, two in shapes)
    assert [(n,) for n, _ in shapes] == shapes_for([{"input_ids": ids}], 3)
    classes = {"input_ids": ids, "labels": np.array([0, 1, 2, 1, 0])}
    batches = Batches(classes, [(40,)], 3, pad=7)
    first, last = batches
    assert first["labels"].tolist() == [0, 1, 2]
    assert last["labels"].tolist() == [1, 0, IGNORED]
    assert classes["labels"].tolist() == [0, 1, 2, 1, 0]
    assert first["input_ids"].shape == (3, 40)
    assert first["input_ids"][0, -1] == 7


def test_three_columns_have_their_own_lengths():
    rng = np.random.default_rng(2)
    sides = [rng.integers(1, most, 300) for most in (90, 60, 40)]
    examples = {
        name: [np.ones(n, np.int32) for n in side]
        for name, side in zip(("input_ids", "other", "labels"), sides, strict=True)
    }
    shapes = shapes_for([examples], 4)
    assert len(shapes) == 4
    batches = Batches(examples, shapes, 16, pad=0)
    for batch in batches:
        assert batch["other"].shape[1] in {shape[1] for shape in shapes}


@pytest.mark.parametrize(
    "examples", [columns([], []), columns([np.ones(1, np.int32)], []), {}]
)
def test_batches_of_nothing_are_refused(examples):
    with pytest.raises(DataError, match="at least one example"):
        Batches(examples, [(4, 4)], 2, pad=0)


def test_results_come_in_the_order_of_the_examples():
    examples = encoded(50)
    batches = Batches(examples, shapes_for([examples], 3), 16, pad=0, seed=1)
    found = batches.collect(lambda batch: batch["input_ids"][:, 0].tolist())
    first = [int(row[0]) for row in examples["input_ids"]]
    assert found == first


# ------------------------------------------------------------------------------ tokens


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tiny-t5-de-en")


@pytest.fixture
def without_end(tmp_path):
    """A tokenizer that adds nothing to a text, as a self-trained one may be."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (ASSETS / "tiny-t5-de-en").glob("tokenizer*"):
        shutil.copy(file, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(folder)


TEXTS = ["The boat is red.", "The harbour is old and the wind is cold."]


def test_an_end_token_is_there_whoever_adds_it(tokenizer, without_end):
    want = tokenise(tokenizer, TEXTS, 32)
    assert [row[-1] for row in want.rows] == [1, 1]
    got = tokenise(without_end, TEXTS, 32)
    for one, two in zip(want.rows, got.rows, strict=True):
        np.testing.assert_array_equal(one, two)
    assert 1 not in tokenise(without_end, TEXTS, 32, end=False).rows[0]
    for one in (tokenizer, without_end):
        cut = tokenise(one, TEXTS, 6)
        assert cut.cut == 1
        assert len(cut.rows[1]) == 6
        assert cut.rows[1][-1] == 1
        np.testing.assert_array_equal(cut.rows[1][:5], want.rows[1][:5])


def test_without_any_end_token_it_is_an_error(without_end):
    without_end.eos_token = None
    with pytest.raises(DataError, match="has no end token"):
        tokenise(without_end, TEXTS, 32)


def test_the_end_token_is_the_one_that_the_model_stops_by(tokenizer):
    assert tokenise(tokenizer, TEXTS, 32, end=1).rows[0][-1] == 1
    with pytest.raises(
        DataError, match=r"ends texts with the token 1 \('</s>'\).*at 2"
    ):
        tokenise(tokenizer, TEXTS, 32, end=2)


def test_a_language_after_the_end_stays(tokenizer):
    class Multilingual:
        eos_token_id = 1

        def __call__(self, texts, truncation, max_length=99, verbose=True):
            rows = [[len(word) for word in text.split()] for text in texts]
            return {"input_ids": [[*row[: max_length - 2], 1, 77] for row in rows]}

    got = tokenise(Multilingual(), ["eins zwei", "a b c d"], 5, prefix="translate: ")
    assert [row.tolist() for row in got.rows] == [[10, 4, 4, 1, 77], [10, 1, 1, 1, 77]]
    assert got.cut == 1


def test_what_tokenising_costs_is_said(tokenizer):
    clean = tokenise(tokenizer, TEXTS, 32, prefix="translate English to German: ")
    assert clean.remarks("train") == []
    assert clean.cut == clean.unknown == clean.changed == 0
    lossy = tokenise(tokenizer, [*TEXTS, "Снег ☃"], 32)
    assert lossy.unknown == 1
    assert lossy.changed == 1
    said = " ".join(lossy.remarks("train"))
    assert "1 of 3 texts hold characters that the tokenizer does not know" in said
    blank = tokenise(tokenizer, ["", *TEXTS], 32)
    assert blank.blank == 1
    assert "1 of 3 texts have no tokens" in blank.remarks("train")[0]
    cut = tokenise(tokenizer, TEXTS, 3)
    assert "train: 2 of 2 texts are longer than 3 tokens" in cut.remarks("train")[0]


def test_tokens_beyond_the_vocabulary_are_named(tokenizer):
    import copy

    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<formal>"])
    size = len(tokenizer)
    assert tokenise(more, TEXTS, 32, vocabulary=size).rows
    with pytest.raises(DataError, match=f"token {size} ..<formal>'. is beyond.*{size}"):
        tokenise(more, ["<formal> The boat."], 32, vocabulary=size)


def test_two_texts_at_once_have_types():
    class Pairs:
        def __call__(self, one, two, truncation, max_length=99, verbose=True):
            rows, kinds = [], []
            for a, b in zip(one, two, strict=True):
                row = [len(w) for w in a.split()] + [len(w) for w in b.split()]
                rows.append(row[:max_length])
                kind = [0] * len(a.split()) + [1] * len(b.split())
                kinds.append(kind[:max_length])
            return {"input_ids": rows, "token_type_ids": kinds}

    got = tokenise(Pairs(), ["a b"] * 2, 3, pairs=["cc", "cc d e"], end=False)
    assert [row.tolist() for row in got.rows] == [[1, 1, 2], [1, 1, 2]]
    assert [row.tolist() for row in got.types] == [[0, 0, 1], [0, 0, 1]]
    assert got.cut == 1


def test_prompts_are_not_learnt():
    prompts = [np.array([5, 6], np.int32)]
    got = prompted(prompts, [np.array([7, 1], np.int32)])
    assert got["input_ids"][0].tolist() == [5, 6, 7, 1]
    assert got["labels"][0].tolist() == [IGNORED, IGNORED, 7, 1]
    assert prompts[0].tolist() == [5, 6]


def test_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="has no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_pieces_of_an_unknown_kind(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(DataError, match="nothing says of which kind") as said:
        load_tokenizer(tmp_path)
    assert 'tokenizer_config.json beside it: {"tokenizer_class"' in str(said.value)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == [2]
