"""The translation example's reading, bucketing and data order."""

import gzip
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from jlora import DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _data
from _batches import IGNORED, Batches, Encoded, Shape, encode, shapes_for
from _data import Pair, Rows, source_of

DE_EN = _data.direction("de-en")
EN_DE = _data.direction("en-de")
PAIRS = [Pair("Guten Tag.", "Good day."), Pair("Der Bär schläft.", "The bear sleeps.")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches out of the home folder; never ask the hub."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(path, data):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())
    return str(path)


def line_files(folder, de, en, suffix=""):
    return [
        write(folder / f"corpus.de{suffix}", de),
        write(folder / f"corpus.en{suffix}", en),
    ]


def read(files, direction=DE_EN, skip_empty=False):
    return source_of(files).read(direction, skip_empty=skip_empty)


DE = "".join(f"{p.source}\n" for p in PAIRS)
EN = "".join(f"{p.target}\n" for p in PAIRS)


# ---------------------------------------------------------------------- parallel lines


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_line_files(tmp_path, suffix):
    assert read(line_files(tmp_path, DE, EN, suffix)) == PAIRS


def test_suffixes_tell_the_languages(tmp_path):
    files = line_files(tmp_path, DE, EN)
    assert read(files[::-1]) == PAIRS
    assert read(files, EN_DE) == [Pair(t, s) for s, t in PAIRS]


def test_without_suffixes_german_comes_first(tmp_path):
    files = [write(tmp_path / "one.txt", DE), write(tmp_path / "two.txt", EN)]
    assert read(files, EN_DE) == [Pair(t, s) for s, t in PAIRS]


def test_byte_order_mark_and_windows_lines(tmp_path):
    de = b"\xef\xbb\xbf" + DE.replace("\n", "\r\n").encode()
    assert read(line_files(tmp_path, de, EN)) == PAIRS


@pytest.mark.parametrize(
    ("de", "en", "message"),
    [
        (DE, EN + "More.\n", r"corpus.de has 2 lines.*corpus.en has 3.*is line 3"),
        ("a\n\nc\n", "a\nb\nc\n", r"corpus.de, line 2: nothing there.*'b'.*skip-empty"),
        ("a\nb\n", "a\n  \n", r"corpus.en, line 2: nothing there.*'b'"),
        ("a\n\n", "a\n\n", r"corpus.de, line 2: empty on both sides"),
        (b"a\nB\xe4r\n", "a\nbear\n", r"corpus.de, line 2: not UTF-8 \(byte 0xe4"),
        ("", "", r"corpus.de holds no sentence pairs"),
    ],
    ids=["unequal", "empty source", "empty target", "both", "latin1", "no lines"],
)
def test_bad_lines_are_named(tmp_path, de, en, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(line_files(tmp_path, de, en))


def test_skip_empty(tmp_path):
    files = line_files(tmp_path, "a\n\nc\n", "a\nb\nc\n")
    assert read(files, skip_empty=True) == [Pair("a", "a"), Pair("c", "c")]


def test_broken_archive(tmp_path):
    files = line_files(tmp_path, DE, EN, ".gz")
    Path(files[0]).write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"corpus.de.gz cannot be read: Not a gzip"):
        read(files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["nowhere.de", "nowhere.en"], "nowhere.de: no such file"),
        (["corpus.de"], "cannot tell how to read"),
        (["corpus.de"] * 3, "cannot tell how to read"),
    ],
)
def test_what_is_no_corpus(tmp_path, monkeypatch, files, message):
    line_files(tmp_path, DE, EN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        source_of(files)


def test_unknown_direction():
    with pytest.raises(DataError, match="unknown direction 'de-fr': it is de-en or"):
        _data.direction("de-fr")


def test_prompts():
    assert DE_EN.prompt == "translate German to English: "
    assert EN_DE.prompt == "translate English to German: "


# --------------------------------------------------------------------------- tables


def table(kind, folder, columns):
    """Write the columns, lists of equal length, as a table of that kind."""
    import datasets

    path = folder / f"corpus.{kind}"
    rows = datasets.Dataset.from_dict(columns)
    if kind == "parquet":
        rows.to_parquet(str(path))
    elif kind == "jsonl":
        rows.to_json(str(path), force_ascii=False)
    else:
        rows.to_csv(str(path), index=False, sep="," if kind == "csv" else "\t")
    return [str(path)]


COLUMNS = {"de": [p.source for p in PAIRS], "en": [p.target for p in PAIRS]}
WMT = {"translation": [dict(zip(("de", "en"), p, strict=True)) for p in PAIRS]}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
def test_tables_of_two_columns(tmp_path, kind):
    assert read(table(kind, tmp_path, COLUMNS)) == PAIRS


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_of_wmt(tmp_path, kind):
    assert read(table(kind, tmp_path, WMT)) == PAIRS


def test_source_and_target_are_in_the_direction_already(tmp_path):
    columns = {"source": COLUMNS["en"], "target": COLUMNS["de"]}
    files = table("jsonl", tmp_path, columns)
    assert read(files, EN_DE) == [Pair(t, s) for s, t in PAIRS]


def test_a_dataset_folder_reads_as_the_hub_does(tmp_path):
    folder = tmp_path / "wmt"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        Path(table("parquet", folder, WMT)[0]).rename(folder / f"{split}.parquet")
    for split in ("train", "validation", "test"):
        assert Rows(str(folder), split=split).read(DE_EN, skip_empty=True) == PAIRS
    with pytest.raises(DataError, match=r"\[nope\] cannot be read: .*nope"):
        Rows(str(folder), split="nope").read(DE_EN, skip_empty=True)


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path):
    many = {"de": [f"{i:03}" for i in range(100)], "en": ["x"] * 100}
    source = source_of(table("parquet", tmp_path, many))
    draw = lambda seed: [
        p.source
        for p in source._replace(limit=20, seed=seed).read(DE_EN, skip_empty=False)
    ]
    assert draw(0) == draw(0) == sorted(draw(0))
    assert len(set(draw(0))) == 20
    assert draw(0) != draw(1)


def test_words_that_pandas_takes_for_missing(tmp_path):
    columns = {"de": ["NA", "null"], "en": ["n/a", "None"]}
    assert read(table("csv", tmp_path, columns)) == [
        Pair("NA", "n/a"),
        Pair("null", "None"),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"de": ["a"], "fr": ["b"]}, "has the columns de, fr.*It needs translation"),
        ({"de": ["a", ""], "en": ["a", "b"]}, "row 1, source: nothing there"),
        ({"de": ["a", "b"], "en": ["a", None]}, "row 1, target: nothing there"),
        ({"translation": [{"de": "a", "fr": "b"}]}, "row 0, target: nothing there"),
    ],
    ids=["columns", "empty", "null", "language"],
)
def test_bad_tables(tmp_path, columns, message):
    with pytest.raises(DataError, match=f"(?s)corpus.jsonl.*{message}"):
        read(table("jsonl", tmp_path, columns))


def test_table_that_is_not_utf8(tmp_path):
    path = write(tmp_path / "corpus.csv", b"de,en\na,a\nB\xe4r,bear\n")
    with pytest.raises(DataError, match=r"corpus.csv, line 3: not UTF-8"):
        read([path])


def test_table_that_is_no_table(tmp_path):
    path = write(tmp_path / "corpus.parquet", "no table")
    with pytest.raises(DataError, match=r"corpus.parquet cannot be read"):
        read([path])


def test_dataset_that_nobody_has():
    with pytest.raises(DataError, match=r"nobody/nothing \[train\] cannot be read"):
        Rows("nobody/nothing").read(DE_EN, skip_empty=True)


# ----------------------------------------------------------------- choosing and holding


def test_hold_out_shares_no_pair():
    pairs = [Pair(str(i % 50), "x") for i in range(100)]
    kept, held = _data.hold_out(pairs, 5, seed=0)
    assert len(held) == 5
    assert len(kept) == 45
    assert not set(kept) & set(held)


def test_hold_out_takes_a_tenth_at_most():
    pairs = [Pair(str(i), "x") for i in range(30)]
    assert len(_data.hold_out(pairs, 500, seed=0)[1]) == 3
    with pytest.raises(DataError, match="9 different pairs are too few"):
        _data.hold_out(pairs[:9], 500, seed=0)


# ----------------------------------------------------------------------------- batches


def encoded(n=200, seed=0):
    """Examples of random lengths; each holds its own number, and ends in 1."""
    rng = np.random.default_rng(seed)
    sides = [rng.integers(2, most, n) for most in (40, 30)]
    rows = [
        [np.r_[np.full(k - 1, 10 + i), 1].astype(np.int32) for i, k in enumerate(side)]
        for side in sides
    ]
    return Encoded(*rows)


def test_every_example_once_an_epoch_in_few_shapes():
    examples = encoded()
    shapes = shapes_for([examples], 4)
    batches = Batches(examples, shapes, 16, pad=0, seed=0)
    plan = batches.plan()
    assert len(plan) == len(batches) == 13
    rows = np.concatenate([batch.rows for batch in plan])
    assert sorted(rows) == list(range(200))
    seen = {batches.arrays(batch)["input_ids"].shape for batch in plan}
    assert seen <= {(16, shape.source) for shape in shapes}
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
    return Encoded(*([np.ones(n, np.int32) for n in side] for side in sides))


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
    every = [Shape(*pair) for pair in itertools.product(*sides)]
    chains = (
        [*chain, last]
        for chain in itertools.combinations(every, buckets - 1)
        if all(one.target <= two.target for one, two in itertools.pairwise(chain))
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
    assert shapes[-1].source == -(-source.max() // 4) * 4
    assert padded_tokens(examples, shapes) < 1.35 * 2 * source.sum()


def test_arrays_mask_padding_and_filled_up_rows():
    examples = encoded(3)
    batches = Batches(examples, shapes_for([examples], 1), 5, pad=0)
    (batch,) = batches.plan()
    arrays = batches.arrays(batch)
    for i, row in enumerate(batch.rows):
        source, target = examples.sources[row], examples.targets[row]
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


def test_encoding_prompts_and_keeps_the_end():
    class Words:
        def __call__(self, texts, truncation, max_length):
            assert truncation
            ids = [[len(w) for w in text.split()][: max_length - 1] for text in texts]
            return {"input_ids": [[*row, 1] for row in ids]}

    got = encode(Words(), [Pair("eins zwei", "one")], "translate: ", (3, 8))
    assert [row.tolist() for row in got.sources] == [[10, 4, 1]]
    assert [row.tolist() for row in got.targets] == [[3, 1]]
