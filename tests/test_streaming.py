"""Streams: every row once an epoch, from any source, and on from an exact place."""

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import pathlib
import signal
import tempfile
import warnings

import numpy as np
import pytest
import stream_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import data

LINES = stream_rows.texts(40)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shards(folder, counts=(17, 2, 21), end=".txt", write=None):
    """Files of lines in a row; returns their pattern."""
    first = 0
    for i, count in enumerate(counts):
        path = folder / f"part{i}{end}"
        rows = LINES[first : first + count]
        first += count
        if write is None:
            path.write_text("\n".join(rows) + "\n")
        else:
            write(path, rows)
    return str(folder / f"*{end}")


def stream(source, **options):
    options = {"size": 4, "shapes": [(4, 4), (8, 8)], "window": 3, "seed": 5} | options
    return data.Streaming(source, stream_rows.encode, **options)


def numbers(batches):
    """The numbers of the rows that count, in the order of the batches."""
    return [
        stream_rows.number(ids)
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        if labels[0] != data.IGNORED
    ]


def equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def tables(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        # A field of two lines: records are not lines.
        writer.writerows([["note", "text"], *(['a "b",\nc', row] for row in rows)])


def tabs(path, rows):
    path.write_text("\ufeffnote\ttext\n" + "".join(f'"x\t{row}\n' for row in rows))


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": rows})
    pyarrow.parquet.write_table(table, path, row_group_size=5)


def packed(opener):
    return lambda path, rows: opener(path, "wt").write("\n".join(rows) + "\n")


def zst(path, rows):
    import pyarrow

    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(("\n".join(rows) + "\n").encode())


KINDS = {
    ".txt": None,
    ".jsonl": jsonl,
    ".csv": tables,
    ".tsv": tabs,
    ".parquet": parquet,
    ".txt.gz": packed(gzip.open),
    ".txt.bz2": packed(bz2.open),
    ".txt.xz": packed(lzma.open),
    ".txt.zst": zst,
}


@pytest.mark.parametrize("end", KINDS)
def test_every_row_once_and_on_from_any_batch(folder, end):
    source = data.stream_files(shards(folder, end=end, write=KINDS[end]))
    assert len(source.shards) == 3
    assert sorted(numbers(stream(source))) == list(range(40))
    own = stream(source)
    reading, places, whole = own.stream(), [], []
    for _ in range(30):  # three epochs
        places.append(json.loads(json.dumps(reading.position())))
        whole.append(next(reading))
    # A window spans the end of an epoch, and no row is seen twice before.
    assert sorted(numbers(whole)) == sorted([*range(40)] * 3)
    assert len(set(numbers(whole[:9]))) == 36
    assert numbers(whole[:10]) != numbers(whole[10:20])
    for step in (0, 2, 3, 4, 7, 11, 14, 22):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            on = own.stream(step, places[step])
        seen = [str(w.message) for w in said if "cannot be sought" in str(w.message)]
        began_within = any(state["place"] for state in places[step]["sources"])
        assert bool(seen) == (end.count(".") == 2 and began_within)
        equal(list(itertools.islice(on, 30 - step)), whole[step:])


def test_what_is_before_a_place_is_not_read(folder, monkeypatch):
    """A file is sought, and of what follows only the window is read."""
    from jlora.data import _line_rows

    source = data.stream_files(shards(folder, (40,)))
    own = stream(source, seed=None)
    reading = own.stream()
    list(itertools.islice(reading, 7))  # the third window of 12 rows has begun
    place, read = reading.position(), []
    plain = _line_rows._Lines.next
    monkeypatch.setattr(
        _line_rows._Lines, "next", lambda s: read.append(s.lines) or plain(s)
    )
    next(own.stream(7, place))
    assert read == list(range(24, 36))


def test_shuffled_by_shards_and_within_a_window(folder):
    source = data.stream_files(shards(folder))
    plain = numbers(stream(source, seed=None, shapes=[(8, 8)]))
    assert plain == list(range(40))
    one, same, other = (numbers(stream(source, seed=s)) for s in (1, 1, 2))
    assert one == same
    assert one != other
    assert {min(one[:12]), min(other[:12])} == {0, 19}  # other shards come first


def test_few_shapes_and_no_waste(folder):
    source = data.stream_files(shards(folder))
    batches = list(itertools.islice(stream(source).stream(), 30))
    assert {batch["input_ids"].shape for batch in batches} == {(4, 4), (4, 8)}
    assert len(numbers(batches)) == 4 * 30  # a window's batches are full


def test_packed_in_windows(folder):
    source = data.stream_files(shards(folder))
    own = stream(source, shapes=None, length=11)
    batches = list(own)
    assert {batch["input_ids"].shape for batch in batches} == {(4, 11)}
    seen = [
        stream_rows.number(ids[segments == number])
        for batch in batches
        for ids, labels, segments in zip(
            batch["input_ids"], batch["labels"], batch["segment_ids"], strict=True
        )
        for number in range(1, segments.max() + 1)
        if not (labels == data.IGNORED).all() or (segments == number).sum() == 1
    ]
    assert set(seen) == set(range(40))
    reading = own.stream()
    first = list(itertools.islice(reading, 3))
    place = reading.position()
    rest = list(itertools.islice(reading, 9))
    equal(list(itertools.islice(own.stream(3, place), 9)), rest)
    assert first[0]["input_ids"].shape == (4, 11)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("length", [None, 11])
def test_several_processes_see_each_example_once(folder, count, length):
    source = data.stream_files(shards(folder))  # 40 rows: windows of 12, the last of 4
    cut = {"shapes": None, "length": 11} if length else {}
    readers = [list(stream(source, shard=(i, count), **cut)) for i in range(count)]
    whole = list(stream(source, **cut))
    assert len({len(reader) for reader in readers}) == 1
    for parts, batch in zip(zip(*readers, strict=True), whole, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([p[name] for p in parts]), array
            )


def test_a_place_is_that_of_any_number_of_processes(folder):
    own = stream(data.stream_files(shards(folder)), shard=(1, 2))
    reading = own.stream()
    list(itertools.islice(reading, 4))
    other = stream(own.sources, shard=(3, 4)).stream(4, reading.position())
    np.testing.assert_array_equal(
        next(other)["input_ids"][0], next(reading)["input_ids"][1]
    )


def test_mixed_by_weight(folder):
    files = data.stream_files(shards(folder))
    memory = data.in_memory({"text": stream_rows.texts(7, first=100)})
    own = stream([files, memory], weights=[3, 1], shapes=[(8, 8)])
    reading = own.stream()
    seen = numbers(itertools.islice(reading, 300))
    share = np.mean([n >= 100 for n in seen])
    assert abs(share - 0.25) < 0.04
    # Each of a source is seen as often as any other, to one epoch.
    often = np.bincount([n for n in seen if n < 100], minlength=40)
    assert often.max() - often.min() <= 2
    place = json.loads(json.dumps(reading.position()))
    equal(
        list(itertools.islice(own.stream(300, place), 9)),
        list(itertools.islice(reading, 9)),
    )
    assert sorted(numbers(own)) == [*range(40), *range(100, 107)]


def test_examples_in_memory_are_shuffled_as_a_whole():
    columns = {"input_ids": [[i, i] for i in range(50)], "labels": np.arange(50)}
    own = data.Streaming(
        data.in_memory(columns), size=2, shapes=[(4,)], window=1, seed=0
    )
    labels = np.concatenate([batch["labels"] for batch in own])
    assert sorted(labels) == list(range(50))
    assert np.abs(np.diff(labels)).mean() > 5  # and not within windows of 2


def test_datasets_library(folder):
    datasets = pytest.importorskip("datasets")
    shards(folder, end=".jsonl", write=jsonl)
    files = sorted(map(str, folder.glob("*.jsonl")))
    source = data.stream_dataset("json", data_files=files, cache_dir=str(folder / "c"))
    assert len(source.shards) == 3
    own = stream(source)
    assert sorted(numbers(own)) == list(range(40))
    reading = own.stream()
    whole = [next(reading) for _ in range(5)]
    place = json.loads(json.dumps(reading.position()))
    whole = [next(reading) for _ in range(9)]
    with pytest.warns(jlora.JloraWarning, match="shard . of 3 cannot be sought"):
        on = own.stream(5, place)
    equal(list(itertools.islice(on, 9)), whole)
    given = datasets.Dataset.from_dict({"text": LINES}).to_iterable_dataset(
        num_shards=4
    )
    assert sorted(numbers(stream(data.stream_dataset(given)))) == list(range(40))


def test_workers_make_the_same_batches(folder):
    source = data.stream_files(shards(folder))
    want = list(itertools.islice(stream(source).stream(), 13))
    reading = stream(source, workers=2).stream()
    reading._read_ahead(3)  # workers are starting
    pool = reading._workers._pool
    for worker in pool._processes:  # as a scheduler does that ends all: they go on
        os.kill(worker, signal.SIGTERM)
    equal(list(itertools.islice(reading, 8)), want[:8])
    place = reading.position()
    reading.close()
    assert not pool._processes
    equal(list(itertools.islice(stream(source).stream(8, place), 5)), want[8:])


def test_workers_have_neither_devices_nor_torch(folder):
    source = data.stream_files(shards(folder))
    own = data.Streaming(
        source, stream_rows.encode_and_tell, size=4, shapes=[(4, 4)], workers=1
    )
    told = np.concatenate([batch["told"][:, :3] for batch in own])
    assert (told[:, :2] == 0).all()
    assert (told[:, 2] != 0).all()


BAD = {
    "die": (stream_rows.die, "worker process that reads data ended without a word"),
    "fail": (stream_rows.fail, "row 1 of epoch 1 of .*KeyError: 'no such column'"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_worker_that_fails(folder, what):
    encode, message = BAD[what]
    source = data.stream_files(shards(folder))
    own = data.Streaming(source, encode, size=4, shapes=[(8, 8)], workers=1)
    with pytest.raises(jlora.DataError, match=message):
        next(own.stream())


def test_a_worker_that_never_ends(folder):
    source = data.stream_files(shards(folder))
    own = data.Streaming(
        source, stream_rows.sleep, size=4, shapes=[(8, 8)], workers=1, patience=3
    )
    with pytest.raises(jlora.DataError, match="in 3 seconds"):
        next(own.stream())


def test_what_cannot_be_told_to_a_worker(folder):
    source = data.stream_files(shards(folder))
    own = data.Streaming(source, lambda rows: rows, size=4, shapes=[(8,)], workers=1)
    with pytest.raises(jlora.DataError, match="top level of a file"):
        own.stream()


def bad_source(folder, kind):
    whole = "\n".join(LINES)
    path = folder / {"json": "x.jsonl", "csv": "x.csv", "parquet": "x.parquet"}.get(
        kind, "x.txt"
    )
    if kind == "empty":
        path.write_text("\n\n")
    elif kind == "json":
        path.write_text('{"text": "1"}\n{"text": "2"\n')
    elif kind == "csv":
        path.write_text('text\n"1 2\n3\n')
    elif kind == "parquet":
        parquet(path, LINES)
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "bytes":
        path.write_bytes(b"1 2\n\xff\xfe 3\n")
    elif kind == "gz":
        path = folder / "x.txt.gz"
        path.write_bytes(gzip.compress(whole.encode())[:-30])
    elif kind == "not gz":
        path = folder / "x.txt.gz"
        path.write_text(whole)
    elif kind == "gone":
        path.write_text(whole)
    source = data.stream_files(path)
    if kind == "gone":
        path.unlink()
    return source


MESSAGES = {
    "empty": "x.txt holds no rows",
    "json": "x.jsonl, line 2: not JSON",
    "csv": "x.csv, line 2: a quotation mark",
    "parquet": "x.parquet cannot be read",
    "bytes": "x.txt, line 2: not UTF-8",
    "gz": "x.txt.gz breaks off after line",
    "not gz": "not packed as its name says",
    "gone": "x.txt cannot be read: No such file",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_shards_that_are_broken(folder, kind):
    source = bad_source(folder, kind)
    with pytest.raises(jlora.DataError, match=MESSAGES[kind]):
        list(itertools.islice(stream(source).stream(), 99))


def test_batches_before_a_broken_shard_are_made(folder):
    (folder / "a.txt").write_text("\n".join(LINES))
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"1\n" * 9999)[:-9])
    source = data.stream_files([folder / "a.txt", folder / "b.txt.gz"])
    reading = stream(source, seed=None, window=1).stream()
    assert len(list(itertools.islice(reading, 10))) == 10
    with pytest.raises(jlora.DataError, match="breaks off"):
        list(itertools.islice(reading, 9999))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 0.0]}, "a number above 0"),
        ({"weights": [1.0, -1.0]}, "a number above 0"),
        ({"weights": [1.0, float("nan")]}, "a number above 0"),
        ({"weights": [1.0]}, "of 2 sources"),
        ({"size": 0}, "size=0"),
        ({"window": 0}, "window=0"),
        ({"workers": -1}, "workers=-1"),
        ({"length": 8}, "either shapes"),
        ({"shapes": None}, "either shapes"),
        ({"shard": (2, 2)}, "index below the count"),
        ({"shard": (0, 3)}, "divides the size"),
    ],
)
def test_options_that_do_not_go(folder, options, message):
    source = data.stream_files(shards(folder))
    with pytest.raises(jlora.DataError, match=message):
        stream([source, source], **options)


def test_examples_that_are_in_no_shape(folder):
    source = data.stream_files(shards(folder))
    with pytest.raises(jlora.DataError, match="no shape holds more than 4"):
        list(stream(source, shapes=[(4, 4)]))
    with pytest.raises(jlora.DataError, match="2 columns of sequences"):
        list(stream(source, shapes=[(8,)]))


def test_nothing_left_by_encode(folder):
    source = data.stream_files(shards(folder))
    own = data.Streaming(source, stream_rows.drop, size=4, shapes=[(8, 8)])
    assert list(own) == []
    with pytest.raises(jlora.DataError, match="left out every row"):
        next(own.stream())


def test_a_place_of_another_stream(folder):
    source = data.stream_files(shards(folder))
    place = stream(source).stream().position()
    with pytest.raises(jlora.DataError, match="differs in window 3, now 4"):
        stream(source, window=4).stream(0, place)
    (folder / "part1.txt").write_text("1\n")
    with pytest.raises(jlora.DataError, match="by name and size"):
        stream(source).stream(0, place)
    with pytest.warns(jlora.JloraWarning, match="was not told where"):
        late = stream(source).stream(3)
    fresh = stream(source).stream()
    equal([next(late)], [list(itertools.islice(fresh, 4))[3]])


def test_no_such_file(folder):
    for name in ("nothing.txt", "*.jsonl"):
        with pytest.raises(jlora.DataError, match="no such file"):
            data.stream_files(name)


# --------------------------------------------------------------------------- encoders


class Letters:
    """A token a letter, and the end token 1."""

    eos_token_id, unk_token_id = 1, None

    def __call__(self, texts, truncation=False, max_length=None, **options):
        most = max_length - 1 if truncation else None
        return {"input_ids": [[*map(ord, text[:most]), 1] for text in texts]}


PAIR_ROWS = [
    {"de": "ja", "en": "yes"},
    {"translation": {"de": "nein", "en": "no"}},
    {"source": "lang", "target": "for long"},
]


def test_pairs_are_encoded():
    encode = data.EncodePairs(Letters(), "de-en", (5, 6), prefix=">")
    got = encode(PAIR_ROWS)
    text = lambda ids: "".join(map(chr, ids)).replace("\x01", ".")
    assert [text(x) for x in got["input_ids"]] == [">ja.", ">nei.", ">lan."]
    assert [text(x) for x in got["labels"]] == ["yes.", "no.", "for l."]
    rows = [*PAIR_ROWS, {"de": "", "en": "nothing"}]
    with pytest.raises(jlora.DataError, match=r"a side of the pair .*nothing"):
        encode(rows)
    skips = data.EncodePairs(Letters(), "de-en", (5, 6), empty="skip")
    assert len(skips(rows)["labels"]) == 3
    with pytest.raises(jlora.DataError, match="columns fr, en, not 'de'"):
        encode([{"fr": "oui", "en": "yes"}])
    with pytest.raises(jlora.DataError, match="'de' holds a number"):
        encode([{"de": 1.5, "en": "yes"}])


def test_texts_are_encoded_cut_or_split():
    rows = [{"body": "abcdefg"}, {"body": " "}, {"body": "hi"}]
    cut = data.EncodeTexts(Letters(), 4, "body")(rows)
    assert [len(x) for x in cut["input_ids"]] == [4, 3]
    split = data.EncodeTexts(Letters(), 4, "body", split=True)(rows)
    assert [len(x) for x in split["input_ids"]] == [4, 4, 3]
    whole = [*map(ord, "abcdefg"), 1, *map(ord, "hi"), 1]
    for name in ("input_ids", "labels"):
        assert np.concatenate(split[name]).tolist() == whole
    with pytest.raises(jlora.DataError, match="beyond the model's vocabulary"):
        data.EncodeTexts(Letters(), 4, "body", vocabulary=100)(rows)


def test_shapes_from_a_sample(folder):
    source = data.stream_files(shards(folder))
    shapes = data.sample_shapes(source, stream_rows.encode, 9, 2, rows=30)
    assert shapes == [(4, 4), (12, 12)] or shapes[-1] == (12, 12)
    assert len(list(stream(source, shapes=shapes))) == 10


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*KINDS, ".ndjson", ".tab"]), st.binary(max_size=60), st.data())
def test_whatever_a_file_holds_is_read_or_refused(end, noise, choice):
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place, f"x{end}")
        write = KINDS.get(end) or (lambda path, rows: path.write_text("\n".join(rows)))
        write(path, LINES[:9])
        whole = path.read_bytes()
        at = choice.draw(st.integers(0, len(whole)))
        cut = choice.draw(st.integers(0, len(whole) - at))
        path.write_bytes(whole[:at] + noise + whole[at + cut :])
        shard = data.stream_files(path).shards[0]
        try:
            rows = shard.rows()
            for _ in range(99):
                assert isinstance(next(rows), dict)
                shard.rows(rows.place())
        except (StopIteration, jlora.DataError):
            pass
