"""From data to text: what a decoder reads, what its loss is of, and the splits."""

import csv
import itertools

import numpy as np
import pytest

from jlora import DataError, OptionError, data, models, tasks
from jlora.tasks import DataToTextSettings, Meaning

ROWS = [
    (
        "name[The Heron], eatType[pub], near[Café Nord]",
        "The Heron is a pub near Café Nord.",
    ),
    ("name[Blue Quay], priceRange[£20-25]", "Blue Quay costs £20-25."),
    ("name[The Heron], eatType[pub], near[Café Nord]", "Near Café Nord is The Heron."),
]


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows])
    return str(path)


def many(count, letter="x"):
    return [(f"name[{letter}{i}]", f"It is {letter}{i}.") for i in range(count)]


def settings(**given):
    return DataToTextSettings(model="somewhere", **given)


def test_a_meaning_is_read_as_loralib_writes_it():
    meaning = Meaning(
        "name[The Punter], eatType[pub], priceRange[more than £30], customer rating[high], "
        "familyFriendly[no], near[Raja, the Inn]",
        [],
    )
    assert meaning.prompt == (
        "name : The Punter | Type : pub | price : more than £30 | customer rating : high "
        "| family friendly : no | near : Raja, the Inn"
    )


def test_rows_of_one_meaning_are_its_references(tmp_path):
    found = tasks.read_meanings([write(tmp_path / "a.csv", ROWS)])
    assert [m.text for m in found] == [ROWS[0][0], ROWS[1][0]]
    assert found[0].references == [ROWS[0][1], ROWS[2][1]]
    with pytest.raises(DataError, match="line 2: 'A pub' is no meaning"):
        tasks.read_meanings([write(tmp_path / "b.csv", [("A pub", "text")])])


class Tokenizer:
    eos_token_id, unk_token_id = 0, None

    def __call__(self, texts, **how):
        return {"input_ids": [list(text.encode()) for text in texts]}

    def batch_decode(self, rows, **how):
        return [bytes(t for t in row if t).decode() for row in rows]

    decode = lambda self, row, **how: self.batch_decode([row])[0]


class Config:
    vocab_size, eos_token_id = 256, 0


def test_the_loss_is_of_the_text_and_its_end():
    columns, remarks = tasks.say_columns(Tokenizer(), [("a : b", "It is.")], Config)
    want = [*b"a : b", 0, *b" It is.", 0]
    assert columns["input_ids"][0].tolist() == want
    labels = columns["labels"][0]
    assert labels[:6].tolist() == [data.IGNORED] * 6
    assert labels[6:].tolist() == want[6:]
    assert not remarks


class Loaded:
    """As a loaded model, of which the data alone is asked for."""

    def __init__(self):
        self.tokenizer = Tokenizer()
        config = models.GPT2Config(
            vocab_size=256, n_embd=8, n_layer=1, n_head=2, n_positions=64,
            eos_token_id=0,
        )  # fmt: skip
        self.model = models.GPT2(config)


def examples_of(batches):
    """Every example's tokens and labels; a label that none predicts does not count."""
    found = set()
    for batch in batches:
        numbers = batch.get("segment_ids", batch["attention_mask"])
        for ids, labels, of in zip(
            batch["input_ids"], batch["labels"], numbers, strict=True
        ):
            for n in range(1, of.max() + 1):
                own = labels[of == n]
                if (own >= 0).any():
                    found.add((tuple(ids[of == n].tolist()), tuple(own[1:].tolist())))
    return found


def test_packed_and_streamed_examples_are_those_of_the_batches(tmp_path):
    files = {
        name: [write(tmp_path / f"{name}.csv", many(12, name[0]))]
        for name in ("train", "valid", "test")
    }
    small = {**files, "max_meaning_length": 24, "max_text_length": 24, "batch_size": 2}
    whole = tasks.DataToText(settings(**small), Loaded())
    want = examples_of(itertools.islice(whole.train.stream(0), 6))
    assert len(want) == 12
    packed = tasks.DataToText(settings(**small, pack=True), Loaded())
    assert "train: 12 texts in " in " ".join(packed.remarks)
    rows = list(itertools.islice(packed.train.stream(0), len(packed.train)))
    assert len(rows) < 6
    assert examples_of(rows) == want
    for pack in (False, True):
        own = settings(**small, pack=pack, streaming=True, steps=2)
        stream = tasks.DataToText(own, Loaded()).train.stream(0)
        assert examples_of(next(stream) for _ in range(40)) == want


def test_a_streamed_row_that_is_no_meaning():
    encode = tasks.EncodeMeanings(Tokenizer(), Config, (8, 8))
    with pytest.raises(DataError, match="row 1: 'A pub' is no meaning"):
        encode([{"mr": "A pub", "ref": "text"}])
    with pytest.raises(DataError, match="row 2 has the columns text; expected"):
        encode([{"mr": "a[b]", "ref": "c"}, {"text": "x"}])


def test_what_is_held_out_is_not_trained_on(tmp_path):
    file = write(tmp_path / "a.csv", many(60))
    splits = settings(train=[file], valid_size=4, test_size=6).read()
    sizes = {name: len(found) for name, found in splits.items()}
    assert sizes == {"train": 50, "valid": 4, "test": 6}
    texts = [m.text for found in splits.values() for m in found]
    assert len(set(texts)) == len(texts)
    again = settings(train=[file], valid_size=4, test_size=6).read()
    assert again == splits


def test_a_folder_of_the_challenge_is_known_by_its_names(tmp_path):
    for name, letter in (("devset", "v"), ("testset_w_refs", "t"), ("trainset", "s")):
        write(tmp_path / f"{name}.csv", many(12, letter))
    splits = settings(data=str(tmp_path)).read()
    assert {n: found[0].text[5] for n, found in splits.items()} == {
        "train": "s", "valid": "v", "test": "t"
    }  # fmt: skip
    (tmp_path / "trainset.csv").unlink()  # then the development set trains
    splits = settings(data=str(tmp_path), valid_size=1).read()
    assert {m.text[5] for m in splits["train"] + splits["valid"]} == {"v"}
    assert len(splits["train"]) == 11
    (tmp_path / "devset.csv").unlink()
    with pytest.raises(DataError, match=r"nothing to train on.*\n.*trainset.csv"):
        settings(data=str(tmp_path)).read()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "d", "train": ["f"]}, "--data brings its own files"),
        ({}, "--model needs data"),
        ({"model": None, "train": ["f"]}, "a model is needed"),
        ({"train": ["f"], "streaming": True}, "--train, --valid and --test"),
        ({"train": ["f"], "workers": 1}, "--workers are for --streaming"),
    ],
)
def test_options_that_do_not_go_together(given, message):
    with pytest.raises(OptionError, match=message):
        DataToTextSettings(**{"model": "m", **given}).check()


def test_good_and_bad_texts_are_shown_by_their_quality():
    task = object.__new__(tasks.DataToText)
    task.meanings = [Meaning(f"name[{x}]", [x * 9]) for x in "abcdefgh"]
    said = [m.references[0] for m in task.meanings]
    said[2:5] = ["zzzz", "dddzzzzzz", "eeeeeezzz"]
    rows = task.samples(["-"] * 8, said)
    assert [row[0] for row in rows][:3] == ["100"] * 3
    assert [row[2] for row in rows][-1] == "c" * 9
    qualities = np.array([float(row[0]) for row in rows])
    assert (np.diff(qualities) <= 0).all()
    assert len(rows) == 6
