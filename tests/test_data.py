"""Reading text and tables: what is read to the letter, and what is refused."""

import bz2
import datetime
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from jlora import DataError, JloraWarning
from jlora.data import (
    Pair,
    direction,
    hold_out,
    read_dataset_pairs,
    read_lines,
    read_pairs,
    read_table,
    subset,
)

PAIRS = [Pair("Guten Tag.", "Good day."), Pair("Der Bär schläft.", "The bear sleeps.")]
DE = "".join(f"{p.source}\n" for p in PAIRS)
EN = "".join(f"{p.target}\n" for p in PAIRS)


def zstd(data):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def write(path, data):
    data = data if isinstance(data, bytes) else data.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACKED.get(path.suffix, bytes)(data))
    return path


def line_files(folder, de, en, suffix=""):
    return [
        write(folder / f"corpus.de{suffix}", de),
        write(folder / f"corpus.en{suffix}", en),
    ]


def refuses(message, files, way="de-en", **options):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_pairs(files, way, **options)


# ---------------------------------------------------------------------- parallel lines


@pytest.mark.parametrize("suffix", ["", *PACKED])
def test_line_files(tmp_path, suffix):
    assert read_pairs(line_files(tmp_path, DE, EN, suffix), "de-en") == PAIRS


@pytest.mark.parametrize(
    ("de", "en"),
    [
        ("corpus.de", "corpus.en"),
        ("train.de.txt", "train.en.txt"),
        ("europarl-v7.de-en.de", "europarl-v7.de-en.en"),
        ("en-de.de.gz", "en-de.en.gz"),
        ("de_train.txt", "en_train.txt"),
        ("train_DE", "train_EN"),
        ("news.de_DE.txt", "news.en_GB.txt"),
        ("german.txt", "english.txt"),
        ("train.source", "train.target"),
        ("train.src.txt", "train.tgt.txt"),
        ("de/train.txt", "en/train.txt"),
    ],
)
def test_names_tell_the_languages(tmp_path, de, en):
    files = [write(tmp_path / de, DE), write(tmp_path / en, EN)]
    assert read_pairs(files, "de-en") == PAIRS
    assert read_pairs(files[::-1], "de-en") == PAIRS
    if "s" not in Path(de).suffix and "src" not in de:
        assert read_pairs(files, "en-de") == [Pair(t, s) for s, t in PAIRS]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("one.txt", "two.txt"),
        ("corpus.de", "corpus.txt"),
        ("corpus.fr", "corpus.de"),
        ("corpus.de", "corpus.de.en"),
        ("corpus.de-en", "corpus.en-de"),
    ],
)
def test_names_that_do_not_tell_are_refused(tmp_path, one, two):
    files = [write(tmp_path / one, DE), write(tmp_path / two, EN)]
    refuses("do not tell which holds de and which en", files)
    refuses("do not tell", [files[0], files[0]])


def test_any_two_languages(tmp_path):
    files = [write(tmp_path / "a.cs", "Ahoj.\n"), write(tmp_path / "a.en", "Hi.\n")]
    assert read_pairs(files, "en-cs") == [Pair("Hi.", "Ahoj.")]
    assert direction("en-cs").prompt == "translate English to Czech: "
    assert direction("en_CS") == direction("en-cs")
    with pytest.raises(DataError, match="name of the language 'xx' is not known"):
        _ = direction("de-xx").prompt


@pytest.mark.parametrize("name", ["de", "de-de", "German-English", "de-en-fr", ""])
def test_what_is_no_direction(name):
    with pytest.raises(DataError, match="unknown direction"):
        direction(name)


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_byte_order_marks_and_windows_lines(tmp_path, encoding):
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    de = (mark + DE.replace("\n", "\r\n")).encode(encoding)
    assert read_pairs(line_files(tmp_path, de, EN), "de-en") == PAIRS
    table = "de\ten\r\n" + "".join(f"{s}\t{t}\r\n" for s, t in PAIRS)
    file = write(tmp_path / "corpus.tsv", (mark + table).encode(encoding))
    assert read_pairs(file, "de-en") == PAIRS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_text_with_nul_bytes_is_named_by_its_encoding(tmp_path, encoding):
    name = encoding.upper().replace("-", "").replace("UTF", "UTF-")
    files = line_files(tmp_path, DE.encode(encoding), EN)
    refuses(f"corpus.de is not UTF-8.*look like {name}.*iconv -f {name}", files)
    file = write(tmp_path / "corpus.csv", f"de,en\n{DE},x\n".encode(encoding))
    refuses(name, file)


def test_binary_files_are_named(tmp_path):
    refuses("is no text.*Parquet", line_files(tmp_path, b"PAR1\0\0abc", EN))
    refuses("is no text.*zip", line_files(tmp_path, b"PK\x03\x04\0\0", EN))
    refuses("is no text.*gzip", line_files(tmp_path, gzip.compress(DE.encode()), EN))
    refuses("is no text.*NUL", line_files(tmp_path, bytes(range(256)), EN))


@pytest.mark.parametrize(
    ("de", "en", "message"),
    [
        (DE, EN + "More.\n", r"corpus.de has 2 lines.*corpus.en has 3.*is line 3"),
        (DE, "", r"corpus.de has 2 lines.*corpus.en has 0.*is line 1"),
        ("a\n\nc\n", "a\nb\nc\n", r"corpus.de, line 2: nothing there.*'b'.*skip-empty"),
        ("a\nb\n", "a\n  \n", r"corpus.en, line 2: nothing there.*'b'"),
        ("a\n\n", "a\n\n", r"corpus.de, line 2: empty on both sides"),
        (b"a\nB\xe4r\n", "a\nbear\n", r"corpus.de, line 2: not UTF-8 \(byte 0xe4 at column 2"),
        ("", "", r"corpus.de holds no sentence pairs"),
        ("a\rb\r", "a\rb\r", "lines end in a carriage return alone"),
    ],
    ids=["unequal", "one", "source", "target", "both", "latin1", "none", "mac"],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, de, en, message):
    refuses(message, line_files(tmp_path, de, en))


def test_no_encoding_is_advised_that_may_be_wrong(tmp_path):
    files = line_files(tmp_path, "Příliš žluťoučký".encode("cp1250"), EN)
    with pytest.raises(DataError) as error:
        read_pairs(files, "de-en")
    assert "iconv -f ENCODING" in str(error.value)
    assert "latin1" not in str(error.value)


def test_other_line_ends_are_part_of_a_line(tmp_path):
    files = line_files(tmp_path, "a\u2028b\x0cc\x85d\n", "x\ry\n")
    assert read_pairs(files, "de-en") == [Pair("a\u2028b\x0cc\x85d", "x\ry")]
    assert read_lines(files[0]) == ["a\u2028b\x0cc\x85d"]


def test_skipping_empty_pairs_is_counted(tmp_path):
    files = line_files(tmp_path, "a\n\nc\n", "a\nb\nc\n")
    with pytest.warns(JloraWarning, match=r"1 of 3 pairs.*corpus.de, line 2"):
        found = read_pairs(files, "de-en", empty="skip")
    assert found == [Pair("a", "a"), Pair("c", "c")]


@pytest.mark.parametrize("suffix", PACKED)
def test_broken_archives(tmp_path, suffix):
    files = line_files(tmp_path, DE * 99, EN * 99, suffix)
    whole = files[0].read_bytes()
    for data in (b"no archive", b"", whole[: len(whole) // 2]):
        files[0].write_bytes(data)
        refuses(f"corpus.de{suffix} cannot be read", files)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"de": "a", "en": "b"}\n{"de": "c", "en": "d"}\n', "JSON lines"),
        ('[\n  {"de": "a"}\n]\n', "JSON"),
        ('<?xml version="1.0"?>\n<tmx>\n', "mark-up"),
        ('<srcset setid="newstest" srclang="any">\n', "mark-up"),
        ('<seg id="1">Hallo</seg>\n', "mark-up"),
        ("<p>Hallo</p>\n\n<p>Welt</p>\n<br/>\n", "mark-up"),
        ("Hallo\tHello\nWelt\tWorld\n", "a table with tabs"),
        ('id,"de","en"\n1,Hallo,Hello\n', "a table, with the columns"),
        ("Source;Target\nHallo;Hello\n", "a table, with the columns"),
    ],
)
def test_files_that_hold_no_lines_of_text(tmp_path, text, kind):
    refuses(f"corpus.de does not hold a sentence a line.*{kind}",
            line_files(tmp_path, text, EN))  # fmt: skip


def test_ordinary_lines_are_not_taken_for_something_else(tmp_path):
    lines = [
        "{1} ist eine Menge.",
        "[Musik]",
        "a\tb",
        "<3 Dich",
        "<de> Hallo",
        '"Zitat" ohne Ende"',
    ]
    text = "".join(line + "\n" for line in lines)
    files = line_files(tmp_path, text, text)
    assert read_pairs(files, "de-en") == [Pair(line, line) for line in lines]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["nowhere.de", "nowhere.en"], "nowhere.de: no such file"),
        (["."], "a folder, not a file"),
        (["corpus.de"], "cannot tell how to read"),
        (["corpus.de"] * 3, "cannot tell how to read"),
        (["corpus.de", "corpus.tsv"], "cannot tell how to read"),
        ([], "cannot tell how to read no file"),
    ],
)
def test_what_is_no_corpus(tmp_path, monkeypatch, files, message):
    line_files(tmp_path, DE, EN)
    write(tmp_path / "corpus.tsv", "de\ten\na\tb\n")
    monkeypatch.chdir(tmp_path)
    refuses(message, files)


# --------------------------------------------------------------------------- tables


def rows_of(pairs):
    return [dict(zip(("de", "en"), pair, strict=True)) for pair in pairs]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


COLUMNS = {"de": [p.source for p in PAIRS], "en": [p.target for p in PAIRS]}
TEXTS = {
    ".csv": "de,en\n" + "".join(f"{s},{t}\n" for s, t in PAIRS),
    ".tsv": "de\ten\n" + "".join(f"{s}\t{t}\n" for s, t in PAIRS),
    ".jsonl": json_lines(rows_of(PAIRS)),
    ".json": json.dumps(rows_of(PAIRS)),
}


@pytest.mark.parametrize("packed", ["", *PACKED])
@pytest.mark.parametrize("kind", TEXTS)
def test_tables_of_two_columns(tmp_path, kind, packed):
    file = write(tmp_path / f"corpus{kind}{packed}", TEXTS[kind])
    assert read_pairs(file, "de-en") == PAIRS
    assert read_pairs(str(file), "en-de") == [Pair(t, s) for s, t in PAIRS]


def test_parquet(tmp_path):
    assert read_pairs(parquet(tmp_path / "a.parquet", COLUMNS), "de-en") == PAIRS
    wmt = {"translation": rows_of(PAIRS)}
    assert read_pairs(parquet(tmp_path / "b.parquet", wmt), "de-en") == PAIRS


def test_tables_are_parts_of_one_corpus(tmp_path):
    files = [write(tmp_path / f"part{kind}", text) for kind, text in TEXTS.items()]
    assert read_pairs(files, "de-en") == PAIRS * 4


def test_rows_of_wmt(tmp_path):
    rows = [{"translation": row} for row in rows_of(PAIRS)]
    file = write(tmp_path / "corpus.jsonl", json_lines(rows))
    assert read_pairs(file, "de-en") == PAIRS


def test_source_and_target_are_in_the_direction_already(tmp_path):
    rows = [{"source": t, "target": s} for s, t in PAIRS]
    file = write(tmp_path / "corpus.jsonl", json_lines(rows))
    assert read_pairs(file, "en-de") == [Pair(t, s) for s, t in PAIRS]


@pytest.mark.parametrize(
    "content",
    [
        {"data": rows_of(PAIRS), "version": 1},
        COLUMNS,
        {"translation": rows_of(PAIRS)},
    ],
)
def test_forms_of_json(tmp_path, content):
    file = write(tmp_path / "corpus.json", json.dumps(content, indent=1))
    assert read_pairs(file, "de-en") == PAIRS
    file = write(tmp_path / "lines.json", json_lines(rows_of(PAIRS)))
    assert read_pairs(file, "de-en") == PAIRS


def test_tabs_know_no_quoting(tmp_path):
    pairs = [('Sie rief: "Halt!', '"Stop!'), ("a", 'b"'), ('"', '""'), ('"x"', "'y")]
    text = "de\ten\n" + "".join(f"{s}\t{t}\n" for s, t in pairs)
    assert read_pairs(write(tmp_path / "corpus.tsv", text), "de-en") == pairs


def test_commas_are_read_by_the_standard(tmp_path):
    text = (
        'id,de,en\r\n1,"Er sagte ""Halt"", und ging.","a\nb"\r\n'
        '2,NA,null\r\n3,"1,5",C:\\dir\r\n4,"C:\\""",\'x\r\n'
    )
    found = read_pairs(write(tmp_path / "corpus.csv", text), "de-en")
    assert found == [
        Pair('Er sagte "Halt", und ging.', "a\nb"),
        Pair("NA", "null"),
        Pair("1,5", "C:\\dir"),
        Pair('C:\\"', "'x"),
    ]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('"Er rief \\"Halt\\".","x"\n"a","b"', 2),
        ('a,b\n"Er rief \\"Halt\\"","x"\n"Er \\"lief\\"","y"\n', 3),
        ('a,"b\nc,d\n', 2),
        ('a,b\nEr sagte "Halt",x', 3),
        ('"a\nb",c\n"d"e,f', 4),
        ('a, "b, c"', 2),
        ('"\\"","x"\n","y\\""', 2),
        ("a,b,c", 2),
        ("a,b\n\nc,d", 3),
        ("a,b\nc", 3),
    ],
)
def test_commas_off_the_standard_are_refused(tmp_path, rows, line):
    refuses(
        f"corpus.csv, line {line}:", write(tmp_path / "corpus.csv", "de,en\n" + rows)
    )


def test_an_index_is_not_guessed(tmp_path):
    file = write(tmp_path / "corpus.csv", ",de,en\n0,a,b\n")
    assert read_pairs(file, "de-en") == [("a", "b")]
    refuses("line 2: 3 fields", write(tmp_path / "no.csv", "de,en\n0,a,b\n"))
    refuses("line 3: 3 fields", write(tmp_path / "no.tsv", "de\ten\na\tb\na\tb\tc\n"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"de": "a", "fr": "b"}, "has the columns de, fr.*It needs translation"),
        ({"de": "", "en": "b"}, "line 1, de: nothing there"),
        ({"de": "a", "en": None}, "line 1, en: nothing there"),
        ({"translation": {"de": "a", "fr": "b"}}, "translation has de, fr, not en"),
        ({"translation": {"de": "a", "en": None}}, "translation.en: nothing there"),
        ({"translation": {"de": "a", "en": 1.5}}, "translation holds a number"),
        ({"translation": "a ||| b"}, "translation holds str 'a .* b'"),
        ({"translation": ["a", "b"]}, "translation holds list"),
        ({"de": "a", "en": 1.5}, r"line 1, column en holds a number \(float\)"),
        ({"de": True, "en": "a"}, r"column de holds a truth value \(bool\)"),
        ({"de": ["a"], "en": "a"}, "column de holds a list"),
        ({"de": {"x": "a"}, "en": "a"}, "column de holds an object"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    refuses(message, write(tmp_path / "corpus.jsonl", json_lines([row])))


def test_whole_numbers_are_their_text(tmp_path):
    rows = [{"de": "zwei und zwei", "en": 4}, {"de": "Hundert", "en": 100}]
    file = write(tmp_path / "corpus.jsonl", json_lines(rows))
    want = [("zwei und zwei", "4"), ("Hundert", "100")]
    assert read_pairs(file, "de-en") == want
    columns = {"de": [want[0][0], want[1][0]], "en": [4, 100]}
    assert read_pairs(parquet(tmp_path / "a.parquet", columns), "de-en") == want


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (datetime.date(2020, 1, 2), "a date or time"),
        (datetime.datetime(2020, 1, 2), "a date or time"),
        (2.5, "a number"),
        (b"bytes", "bytes"),
    ],
)
def test_other_types_are_named(tmp_path, cell, kind):
    file = parquet(tmp_path / "a.parquet", {"de": ["a"], "en": [cell]})
    for empty in ("error", "skip"):
        refuses(f"row 1, column en holds {kind}", file, empty=empty)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", b"de,en\na,a\nB\xe4r,bear\n", "a.csv, line 3: not UTF-8"),
        ("a.csv", "de;en\na;b\n", "columns de;en. .A .csv has commas"),
        ("a.csv", "de,en,de\na,b,c\n", "the column 'de' more than once"),
        ("a.tsv", "de\ten\ten\na\tb\tc\n", "the column 'en' more than once"),
        ("a.jsonl", '{"de": "a", "en": "b", "de": "c"}', "key 'de' stands twice"),
        ("a.jsonl", '{"de": "a", "en": "b"}\n{"de": "a"', "line 2: not JSON"),
        ("a.jsonl", '{"de": "a", "en": "b"}{}', "line 1: not JSON"),
        ("a.jsonl", '["a", "b"]', "line 1: a list, not an object"),
        ("a.jsonl", '{"de": NaN, "en": "b"}', "NaN is no JSON"),
        ("a.json", '{"de": ["a"], "en": []}', "is no table"),
        ("a.json", '["a"]', "is no table"),
        ("a.json", "[{]", "line 1: not JSON"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "de,en\n", "holds no sentence pairs"),
        ("a.tsv", "", "a.tsv is empty"),
        ("a.json", "", "not JSON"),
        ("a.json", "[]", "has the columns .none."),
        ("a.jsonl", "", "has the columns .none."),
        ("a.parquet", "no table", "a.parquet cannot be read"),
        ("a.parquet", "", "a.parquet cannot be read"),
    ],
)
def test_bad_tables(tmp_path, name, text, message):
    refuses(message, write(tmp_path / name, text))


def test_parquet_with_a_column_twice(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([["a"], ["b"], ["c"]], names=["de", "en", "de"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refuses("column 'de' more than once", tmp_path / "a.parquet")


def test_columns_of_labels(tmp_path):
    text = 'gj04\t1\t\tThey said.\ngj05\t0\t*\tSaid they "\n'
    table = read_table(
        write(tmp_path / "cola.tsv", text), columns=["source", "label", "star", "text"]
    )
    assert table.text("text") == ["They said.", 'Said they "']
    np.testing.assert_array_equal(table.integers("label"), np.array([1, 0], np.int32))
    assert table.integers("label").dtype == np.int32
    assert table.floats("label").dtype == np.float32
    assert len(table) == 2
    with pytest.raises(
        DataError, match=r"cola.tsv, line 1, column source: 'gj04' is not"
    ):
        table.integers("source")
    with pytest.raises(DataError, match="has the columns source, label, star, text"):
        table.text("sentence")
    rows = [{"x": 1.5}, {"x": 2}]
    table = read_table(write(tmp_path / "a.jsonl", json_lines(rows)))
    np.testing.assert_array_equal(table.floats("x"), [1.5, 2.0])
    with pytest.raises(DataError, match=r"line 1, column x: 1.5 is not a whole number"):
        table.integers("x")


# --------------------------------------------------------------------- datasets


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches out of the home folder; never ask the hub."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("files", "config"),
    [
        (("train.parquet", "validation.parquet", "test.parquet"), None),
        (("de-en/train-0-of-1.parquet", "de-en/dev.jsonl", "de-en/test.csv"), "de-en"),
        (("data/train/a.tsv", "data/val/a.tsv", "data/test/a.tsv"), None),
    ],
)
def test_a_folder_with_a_table_for_each_split(tmp_path, files, config):
    for file, pair in zip(files, [("a", "A"), ("b", "B"), ("c", '"C')], strict=True):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet(path, {"de": [pair[0]], "en": [pair[1]]})
        elif path.suffix == ".jsonl":
            write(path, json_lines(rows_of([pair])))
        elif path.suffix == ".csv":
            write(path, 'de,en\nc,"""C"\n')
        else:
            write(path, "de\ten\n{}\t{}\n".format(*pair))
    read = lambda split: read_dataset_pairs(tmp_path, "de-en", config, split)
    assert read("train") == [("a", "A")]
    assert read("validation") == [("b", "B")]
    assert read("test") == [("c", '"C')]
    with pytest.raises(DataError, match="holds no table of the split 'nope'"):
        read("nope")


def test_parts_of_a_split_and_empty_pairs(tmp_path):
    write(tmp_path / "train-1.tsv", "de\ten\nc\tC\n\tD\n")
    write(tmp_path / "train-0.tsv", "de\ten\na\tA\n")
    with pytest.warns(JloraWarning, match="1 of 2 pairs"):
        assert read_dataset_pairs(tmp_path, "de-en") == [("a", "A"), ("c", "C")]


@pytest.mark.usefixtures("_own_cache")
def test_a_dataset_of_the_hub():
    with pytest.raises(DataError, match=r"nobody/nothing \[train\] cannot be read"):
        read_dataset_pairs("nobody/nothing", "de-en")


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path, monkeypatch):
    import datasets

    rows = [{"de": f"{i:03}", "en": "x"} for i in range(100)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(rows)
    )
    draw = lambda seed: [
        pair.source
        for pair in read_dataset_pairs("some/set", "de-en", limit=20, seed=seed)
    ]
    assert draw(0) == draw(0) == sorted(draw(0))
    assert len(set(draw(0))) == 20
    assert draw(0) != draw(1)


# ------------------------------------------------------------------------------ choosing


def test_subset_keeps_the_order():
    items = list(range(50))
    assert subset(items, None) == subset(items, 99) == items
    assert subset(items, 9, seed=1) == sorted(subset(items, 9, seed=1)) != items[:9]


def test_hold_out_shares_nothing():
    pairs = [Pair(str(i % 50), "x") for i in range(100)]
    kept, held = hold_out(pairs, 5, seed=0)
    assert len(held) == 5
    assert len(kept) == 45
    assert not set(kept) & set(held)


def test_hold_out_takes_a_tenth_at_most():
    pairs = [Pair(str(i), "x") for i in range(30)]
    assert len(hold_out(pairs, 500, seed=0)[1]) == 3
    with pytest.raises(DataError, match="9 different examples are too few"):
        hold_out(pairs[:9], 500, seed=0)
