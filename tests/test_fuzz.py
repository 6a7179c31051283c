"""Files that were damaged or made to harm: an error of jlora's, little memory, no hang.

Each reader gets files that are nearly right: bytes flipped, cut out, put in; JSON with
values of other types and sizes. It answers with a `LoraError` or what it read, in
bounded time and memory. `pytest -m nightly` tries thousands.
"""

import ast
import contextlib
import copy
import gzip
import json
import random
import re
import shutil
import signal
import tracemalloc
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import _files, checkpoint, data, models, peft
from jlora.data import read_conversations

MEMORY = 64 * 2**20  # bytes that Python and NumPy may hold for one small damaged file
SECONDS = 20

BASE = {"q": {"kernel": jnp.ones((4, 6))}, "v": {"kernel": jnp.ones((4, 6))}}


# -- damage ----------------------------------------------------------------------------


JUNK = [
    None, True, False, -1, 0, 1, 10**9, 10**18, -(10**40), 1e308, -0.5, float("nan"), "",
    "x" * 3000, "../../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "(", "[", [], {},
    [[]], [None], ["../x"], {"a": []}, {"": None}, [1] * 1000,
]  # fmt: skip


def damaged(content, rng):
    """Bytes with a few of them changed."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 2, 8, 100))
        kind = rng.randrange(6)
        if kind == 0:
            content[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = rng.randbytes(length)
        elif kind == 3:
            content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            del content[at:]
        else:
            token = rng.choice(
                (b'"', b"\\", b"\n", b"\r", b",", b"{", b"[", b"\0", b"9" * 30)
            )
            content[at:at] = token
    return bytes(content)


def places_in(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from places_in(inner, (*path, key))
        else:
            yield (*path, key)


def misled(value, rng):
    """JSON with a few values of another type or size."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        *path, last = rng.choice([p for p in places_in(value) if p])
        inner = value
        for key in path:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(rng.choice(JUNK))
        if not value:
            break
    return value


def damaged_json(content, rng):
    """A JSON file's content: its values changed mostly, else its bytes."""
    if rng.random() < 0.2:
        return damaged(content, rng)
    return json.dumps(misled(json.loads(content), rng)).encode()


def damaged_tensors(content, rng):
    """A safetensors file: its header's values changed mostly, else its bytes."""
    if rng.random() < 0.4:
        return damaged(content, rng)
    size = int.from_bytes(content[:8], "little")
    header = damaged_json(content[8 : 8 + size].strip(), rng)
    said = rng.choice(
        (len(header), len(header), len(header), 2**63, 2**64 - 1, 10**8, 0)
    )
    return said.to_bytes(8, "little") + header + content[8 + size :]


# -- readers ---------------------------------------------------------------------------


def cells(file):
    table = data.read_table(file)
    for name in list(table.columns)[:8]:
        for read in (table.text, table.integers, table.floats):
            with contextlib.suppress(jlora.LoraError):
                read(name)


def tensors(file):
    _files.tensor_headers(file)
    _files.read_tensors(file)


def adapter(folder):
    peft.read_config(folder)
    peft.load(folder, BASE)


def headers(folder):
    from jlora.cli._inspect import inspect

    inspect(folder)


ROWS = [{"de": "Der Wind, der", "en": 'The "wind"', "n": 3, "x": 0.5}] * 3
CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole file of each kind."""
    root = tmp_path_factory.mktemp("good")
    (root / "lines.de").write_text("Der Wind ist kalt.\nüber\n")
    (root / "table.csv").write_text('de,en\r\n"a, ""b""",c\r\nd,"e\nf"\r\n')
    (root / "table.tsv").write_text("de\ten\na\tb\nc\td\n")
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (root / "table.jsonl").write_text(text)
    (root / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (root / "table.json").write_text(json.dumps(ROWS))
    (root / "chat.jsonl").write_text((json.dumps(CHAT) + "\n") * 2)
    import pyarrow
    import pyarrow.parquet

    columns = {k: [r[k] for r in ROWS] for k in ROWS[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "table.parquet")
    tree = jlora.lorafy(BASE, 2, ["q", "v"], alpha=3)
    peft.save(root / "adapter", tree)
    config = models.LlamaConfig(vocab_size=12, hidden_size=8, intermediate_size=6,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8)  # fmt: skip
    net = models.Llama(config=config)
    import jax

    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    weights = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes["params"])
    models.save(net, weights, root / "model", max_shard_bytes=700)
    checkpoint.save_adapter(root / "checkpoint", tree)
    return root


def whole_adapter(folder):
    checkpoint.load_adapter(folder, BASE)


# name: what is read, which file is damaged, how, and what reads it.
READERS = {
    "lines": ("lines.de", "", damaged, data.read_lines),
    "csv": ("table.csv", "", damaged, cells),
    "tsv": ("table.tsv", "", damaged, cells),
    "jsonl": ("table.jsonl", "", damaged, cells),
    "json": ("table.json", "", damaged_json, cells),
    "gz": ("packed.jsonl.gz", "", damaged, cells),
    "parquet": ("table.parquet", "", damaged, cells),
    "conversations": ("chat.jsonl", "", damaged, read_conversations),
    "safetensors": ("adapter/adapter_model.safetensors", "", damaged_tensors, tensors),
    "adapter_config.json": ("adapter", "adapter_config.json", damaged_json, adapter),
    "adapter_model": ("adapter", "adapter_model.safetensors", damaged_tensors, adapter),
    "inspect": ("adapter", "adapter_config.json", damaged_json, headers),
    "config.json": ("model", "config.json", damaged_json, models.load),
    "index": ("model", "model.safetensors.index.json", damaged_json, models.load),
    "description": ("checkpoint", "config/metadata", damaged_json, whole_adapter),
}  # fmt: skip


class TooLongError(Exception):
    pass


@contextlib.contextmanager
def within(seconds):
    def late(number, frame):
        raise TooLongError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_out(name, good, place, rng):
    """One damaged file: how the reader answers."""
    what, inner, damage, read = READERS[name]
    place = place / Path(what).name
    if inner:
        shutil.copytree(good / what, place, dirs_exist_ok=True)
    else:
        shutil.copy(good / what, place)
    file = place / inner if inner else place
    content = damage(file.read_bytes(), rng)
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with warnings.catch_warnings(), within(SECONDS):
            warnings.simplefilter("ignore")
            read(place)
        answer = "read"
    except jlora.LoraError:
        answer = "refused"
    except Exception as error:
        error.add_note(f"{name}: {content[:3000]!r}")
        raise
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak} bytes for {content[:300]!r}"
    return answer


def fuzz(name, good, place, count, seed):
    rng = random.Random(seed)
    answers = [try_out(name, good, place, rng) for _ in range(count)]
    assert "refused" in answers


# What reads a model or a checkpoint takes a tenth of a second.
FEW = {"config.json": 12, "index": 8, "description": 8, "adapter_config.json": 20}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused(name, good, tmp_path):
    fuzz(name, good, tmp_path, FEW.get(name, 40), 0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_refused(name, good, tmp_path):
    fuzz(name, good, tmp_path, 50 * FEW.get(name, 40), random.randrange(2**32))


# -- nothing that runs code, or leads out ----------------------------------------------


PACKAGE = Path(jlora.__file__).parent
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
# It hands work to processes of its own, and reads no file.
OWN_PROCESSES = PACKAGE / "data" / "_workers.py"
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_nothing_reads_pickles_or_runs_what_a_file_says():
    own = OWN_PROCESSES.read_text()
    assert "pickle.load(" not in own
    assert "open(" not in own
    for file in set(PACKAGE.rglob("*.py")) - {OWN_PROCESSES}:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
                assert not names & UNSAFE, where
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in UNSAFE, where
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in RUNS_CODE, where
            assert called not in ("torch.load", "yaml.load", "np.fromfile"), where
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("allow_pickle", "False") == "False", where
            assert given.get("trust_remote_code", "False") == "False", where


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b"]
)
def test_names_that_lead_out_of_a_folder(name, good, tmp_path):
    """A shard's, an adapter's, a job's."""
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"][next(iter(said["weight_map"]))] = name
    index.write_text(json.dumps(said))
    with pytest.raises(jlora.CheckpointError, match="no file name in this folder"):
        models.load(folder)
    for call in (
        lambda: peft.load(good / "adapter", BASE, adapter=name),
        lambda: peft.save(tmp_path / "p", jlora.lorafy(BASE, 1, ["q"]), adapter=name),
    ):
        with pytest.raises(jlora.LoraError):
            call()
    with pytest.raises(jlora.LoraError):
        jlora.sweep.run(None, BASE, [jlora.sweep.Job(name=name)], folder=tmp_path / "s")
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "s"}


def test_a_link_that_leads_out_of_a_folder(good, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(good / "adapter", outside)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "theirs").symlink_to(outside)
    with pytest.raises(jlora.CheckpointError, match="leads out of its folder"):
        peft.load(tmp_path / "own", BASE, adapter="theirs")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_few_bytes_do_not_unpack_to_all_the_memory(suffix, tmp_path, monkeypatch):
    import bz2
    import lzma

    import pyarrow

    from jlora.data import _text

    monkeypatch.setattr(_text, "_LEAST", 2**20)
    pack = {
        "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
        "zst": lambda b: pyarrow.compress(b, "zstd", asbytes=True),
    }[suffix]  # fmt: skip
    file = tmp_path / f"bomb.de.{suffix}"
    file.write_bytes(pack(b"\n" * 2**25))
    tracemalloc.start()
    with pytest.raises(jlora.DataError, match="unpacks to more than 200 times"):
        data.read_lines(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    file.write_bytes(pack(b"ja\n" * 2**10))
    assert data.read_lines(file) == ["ja"] * 2**10


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "at most 10,000"),
        ("num_hidden_layers", 9_999, "says that there are 9,999 layers, and the files"),
        ("hidden_size", "8", "hidden_size is '8'; it must be a whole number"),
        ("hidden_size", 10**12, "must be a whole number"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan; it must be a number"),
        ("tie_word_embeddings", 1, "must be true or false"),
        ("rope_scaling", [8], "makes no model of the family Llama: AttributeError"),
        ("head_dim", 1, "head_dim is 1; positions turn pairs"),
    ],
)
def test_configurations_of_no_model(key, value, said, good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with within(SECONDS), pytest.raises(jlora.LoraError, match=re.escape(said)):
        models.load(folder)
