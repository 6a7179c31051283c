"""The console: what it prints, what it writes, and how it refuses."""

import importlib.metadata
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from tools import randomise

import jlora
import jlora.peft
import jlora.train
from jlora import _files, checkpoint, models
from jlora.checkpoint import _storage
from jlora.cli import _inspect
from jlora.cli import _main as cli

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
T5, ROBERTA = GOLDEN / "peft" / "t5_qv", GOLDEN / "peft" / "roberta_cls"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def seen(done):
    """The reports that `inspect --json` prints."""
    return lambda folder: json.loads(done("inspect", folder, "--json"))


@pytest.fixture
def t5_adapter(tmp_path):
    """The checkpoint of a T5's adapter that jlora made, and its tree."""
    _, params = models.load(T5 / "base")
    targets = {"query": jlora.Target(rank=2), "wo": jlora.Target(rank=3, alpha=1.5)}
    tree = jlora.lorafy(params, targets=targets, train=["final_layer_norm"])
    tree = randomise(tree, jax.random.key(1))
    checkpoint.save_adapter(tmp_path / "ours", tree)
    return tmp_path / "ours", tree


def peft_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    prefix = "base_model.model."
    save_file({prefix + key: x for key, x in tensors.items()}, folder / WEIGHTS)


def config_of(folder):
    """The configuration with lists as sets: PEFT's have no order."""
    config = json.loads((folder / CONFIG).read_text())
    return {k: set(v) if isinstance(v, list) else v for k, v in config.items()}


def files(folder):
    """Everything below a folder, with its content."""
    found = sorted(folder.rglob("*"))
    return {p.relative_to(folder): p.read_bytes() for p in found if p.is_file()}


# -- inspect ---------------------------------------------------------------------------


def test_a_peft_adapter_by_its_header(seen, done):
    (report,) = seen(ROBERTA / "adapter")
    tensors = load_file(ROBERTA / "adapter" / WEIGHTS)
    assert report["kind"] == "peft_adapter"
    assert report["loadable"] is True
    assert report["task"] == "SEQ_CLS"
    assert report["bytes"] == sum(x.nbytes for x in tensors.values())
    assert report["parameters"] == sum(x.size for x in tensors.values())
    assert report["config"] == json.loads((ROBERTA / "adapter" / CONFIG).read_text())
    rows = {row["module"]: row for row in report["modules"]}
    assert len(rows) == 4
    query = rows["roberta.encoder.layer.0.attention.self.query"]
    assert (query["rank"], query["alpha"], query["scale"]) == (2, 8, 4.0)
    assert query["tensors"] == {"A": [2, 16], "B": [16, 2]}
    head = rows["classifier.dense"]
    assert (head["rank"], head["features"]) == (None, ["saved whole"])

    text = done("inspect", ROBERTA / "adapter")
    assert re.search(r"self\.query +1 +2 +8 +4 +A \(2, 16\), B \(16, 2\) +F32", text)
    assert re.search(r"settings .*modules_to_save classifier, score, r 2,", text)


def test_ranks_and_scales_by_pattern_and_repeated_layers_in_a_line(
    seen, done, tmp_path
):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": True,
              "target_modules": ["q", "v"], "rank_pattern": {"v": 4},
              "alpha_pattern": {"v": 7}}  # fmt: skip
    pair = lambda r: (np.ones((r, 5), np.float32), np.ones((3, r), np.float32))
    tensors = {
        f"layers.{i}.{name}.lora_{factor}.weight": value
        for i in range(3)
        for name, rank in (("q", 2), ("v", 4))
        for factor, value in zip("AB", pair(rank), strict=True)
    }
    peft_folder(tmp_path, config, tensors)
    rows = seen(tmp_path)[0]["modules"]
    assert [r["rank"] for r in rows if r["module"].endswith("v")] == [4, 4, 4]
    assert {r["scale"] for r in rows} == {7 / 2, float(np.float32(3 / 2**0.5))}
    text = done("inspect", tmp_path)
    assert re.search(r"layers\.\*\.v +3 +4 +7 +3\.5 .*\b384\n?", text)


def test_features_of_a_peft_adapter(seen, tmp_path):
    x = np.ones((2, 3), np.float32)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"], "corda": 1}
    peft_folder(tmp_path, config, {
        "q.lora_A.weight": x, "q.lora_B.weight": x.T, "q.lora_B.bias": x[0],
        "q.lora_magnitude_vector": x[0], "q.base_layer.bias": x[0],
        "emb.lora_embedding_A": x, "emb.lora_embedding_B": x.T,
        "emb.token_adapter.trainable_tokens_delta": x,
        "experts.base_layer.lora_A.weight": x, "norm.weight": x[0],
    })  # fmt: skip
    (report,) = seen(tmp_path)
    found = {row["module"]: set(row["features"]) for row in report["modules"]}
    assert found == {
        "q": {"DoRA", "bias of B", "saved with its base"},
        "emb": {"embedding", "trained tokens"},
        "experts.base_layer": set(),
        "norm": {"saved whole"},
    }
    assert report["loadable"] is False
    assert "corda is 1" in report["not_loadable"]


def test_keys_of_a_raw_state_dict(seen, tmp_path):
    x = np.ones((2, 3), np.float32)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}
    tensors = {"q.lora_A.default.weight": x, "q.lora_B.default.weight": x.T}
    peft_folder(tmp_path, config, tensors)
    (report,) = seen(tmp_path)
    assert (report["modules_adapted"], report["loadable"]) == (1, True)
    assert report["modules"][0]["tensors"] == {"A": [2, 3], "B": [3, 2]}


def test_another_kind_of_adapter_is_shown_though_not_loadable(seen, done, tmp_path):
    config = {"peft_type": "LOHA", "r": "many"}
    peft_folder(tmp_path, config, {"q.hada_w1_a": np.ones((2, 3), np.float32)})
    (report,) = seen(tmp_path)
    assert (report["type"], report["loadable"]) == ("LOHA", False)
    assert report["modules"][0]["tensors"] == {"hada_w1_a": [2, 3]}
    assert "not loadable" in done("inspect", tmp_path)


def test_several_adapters_in_subfolders(seen, tmp_path):
    shutil.copytree(T5 / "adapter", tmp_path / "a")
    shutil.copytree(ROBERTA / "adapter", tmp_path / "b")
    assert [r["path"] for r in seen(tmp_path)] == [str(tmp_path / x) for x in "ab"]
    shutil.copytree(T5 / "adapter", tmp_path, dirs_exist_ok=True)
    assert len(seen(tmp_path)) == 3


def test_a_pickle_is_named_and_not_read(seen, tmp_path):
    shutil.copytree(T5 / "adapter", tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    (report,) = seen(tmp_path)
    assert "pickle" in report["not_read"]
    assert (report["loadable"], report["modules"]) == (False, [])


def test_an_adapter_checkpoint(seen, done, t5_adapter):
    folder, tree = t5_adapter
    (report,) = seen(folder)
    assert report["kind"] == "adapter"
    assert report["base_fingerprint"] == checkpoint.fingerprint(tree).digest
    trained = jlora.summary(tree)
    rows = {row["kernel"]: row for row in report["kernels"]}
    assert set(rows) == {row.path for row in trained.rows}
    for row in trained.rows:
        assert rows[row.path]["rank"] == row.rank
        if row.rank:
            assert rows[row.path]["scale"] == row.scale
    norm = rows["encoder/final_layer_norm/weight"]
    assert norm["features"] == ["fully trained"]
    text = done("inspect", folder)
    assert re.search(r"wo/kernel +1 +3 +0\.5 +a \(24, 3\), b \(3, 16\)", text)


def test_training_states_and_the_folder_that_keeps_them(seen, done, tmp_path):
    params = {"q": {"kernel": jnp.ones((5, 3))}, "b": {"bias": jnp.ones(3)}}
    tree = jlora.lorafy(params, 2, ["q"], alpha=3, train=["b"])
    state = jlora.train.TrainState.create(tree, optax.adamw(1e-3))
    position = {"epoch": 1, "offset": 7}
    checkpoint.save_state(tmp_path / "one", state, data_position=position)
    (report,) = seen(tmp_path / "one")
    assert (report["kind"], report["step"]) == ("state", 0)
    assert report["data_position"] == position
    assert report["holds_the_base"] is False
    # a, b and the bias, float32; AdamW keeps two of each and a count.
    trained = 4 * (5 * 2 + 2 * 3 + 3)
    assert report["bytes_trainable"] == trained
    assert report["bytes_optimiser"] >= 2 * trained
    rows = {row["kernel"]: row for row in report["kernels"]}
    assert (rows["q/kernel"]["rank"], rows["q/kernel"]["scale"]) == (2, 1.5)
    assert rows["b/bias"]["features"] == ["fully trained"]

    step = jlora.train.make_train_step(
        lambda p, x, key: jnp.sum(x @ p["q"]["kernel"] + p["b"]["bias"]),
        optax.adamw(1e-3),
    )
    with checkpoint.Checkpoints(tmp_path / "run", keep_last=20) as kept:
        for _ in range(2):
            kept.save(state)
            state, _ = step(state, jnp.ones((1, 5)))
    assert [r["step"] for r in seen(tmp_path / "run")] == [0, 1]
    assert "epoch 1, offset 7" in done("inspect", tmp_path / "one")


def test_merged_parameters(seen, tmp_path):
    tree = jlora.lorafy({"q": {"kernel": jnp.ones((5, 3), jnp.bfloat16)}}, 2, ["q"])
    checkpoint.save_merged(tmp_path / "m", tree, metadata={"by": "me"})
    (report,) = seen(tmp_path / "m")
    assert (report["kind"], report["metadata"]) == ("merged", {"by": "me"})
    row = {"tensor": "q/kernel", "shape": [5, 3], "dtype": "bfloat16", "bytes": 30}
    assert report["tensors"] == [row]


def test_a_model(seen, tmp_path):
    folder = GOLDEN / "t5" / "v11"
    (report,) = seen(folder)
    tensors = load_file(folder / "model.safetensors")
    assert (report["kind"], report["family"]) == ("model", "t5")
    assert report["loadable"] is True
    assert report["sizes"]["d_model"] == 16
    assert report["parameters"] == sum(x.size for x in tensors.values())
    assert report["bytes"] == sum(x.nbytes for x in tensors.values())
    assert {row["tensor"]: tuple(row["shape"]) for row in report["tensors"]} == {
        name: x.shape for name, x in tensors.items()
    }
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    save_file({"w": np.ones((2, 3), np.float16)}, tmp_path / "model.safetensors")
    (report,) = seen(tmp_path)
    assert (report["loadable"], report["dtypes"]) == (False, {"F16": 6})
    assert "whisper" in report["not_loadable"]


def test_a_model_in_shards(seen, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    shards = {f"model-{i}.safetensors": f"h.{i}.weight" for i in range(3)}
    for file, name in shards.items():
        save_file({name: np.ones((2, 3), np.float32)}, tmp_path / file)
    index = {"weight_map": {name: file for file, name in shards.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (report,) = seen(tmp_path)
    assert report["files"] == sorted(shards)
    assert report["bytes"] == 3 * 24


def test_only_headers_are_read(seen, tmp_path):
    """Half a terabyte of holes: nothing could read it in this test's time."""
    size = 2**39
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    assert seen(tmp_path)[0]["bytes"] == size


# -- convert ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [T5, ROBERTA], ids=["t5", "roberta"])
def test_a_peft_adapter_goes_round_unchanged(case, done, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    out = done("convert", case / "adapter", there, "--base", case / "base")
    assert out == f"{there}: adapter checkpoint, on {case / 'base'}\n"
    # The base is known from the first conversion.
    assert done("convert", there, back).startswith(f"{back}: PEFT adapter, on ")
    assert config_of(back) == config_of(case / "adapter")
    assert (back / WEIGHTS).read_bytes() == (case / "adapter" / WEIGHTS).read_bytes()


def test_our_checkpoint_goes_round_unchanged(done, t5_adapter, tmp_path):
    ours, tree = t5_adapter
    there, back = tmp_path / "there", tmp_path / "back"
    base = ["--base", T5 / "base"]
    task = ["--task-type", "SEQ_2_SEQ_LM", "--base-name", "some/t5"]
    done("convert", ours, there, *base, *task)
    config = config_of(there)
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert config["base_model_name_or_path"] == "some/t5"
    done("convert", there, back, *base)
    _, params = models.load(T5 / "base")
    again = checkpoint.load_adapter(back, params)
    for x, y in zip(*map(jax.tree.leaves, (again, tree)), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
    ("case", "kind", "norm", "table"),
    [
        (T5, "dora", "layer_norm", "shared"),
        (ROBERTA, "lora_bias", "LayerNorm", "word_embeddings"),
    ],
)
def test_every_feature_goes_round_and_is_shown(
    case, kind, norm, table, done, seen, tmp_path
):
    _, params = models.load(case / "base")
    tree = jlora.lorafy(
        params, 2, ["query"], alpha=3, rslora=True, dropout=0.25, **{kind: True},
        train=[norm], trainable_tokens={table: [3, 5]},
    )  # fmt: skip
    tree = randomise(tree, jax.random.key(2))
    checkpoint.save_adapter(tmp_path / "a", tree)
    base = ["--base", case / "base"]
    done("convert", tmp_path / "a", tmp_path / "peft", *base)
    done("convert", tmp_path / "peft", tmp_path / "b", *base)
    done("convert", tmp_path / "b", tmp_path / "again", *base)
    reports = [seen(tmp_path / name)[0] for name in ("a", "b")]
    assert reports[0]["kernels"] == reports[1]["kernels"]
    rows = {tuple(row["features"]) for row in reports[0]["kernels"]}
    feature = {"dora": "DoRA", "lora_bias": "bias of B"}[kind]
    adapted = (feature, "rsLoRA", "dropout 0.25")
    assert rows == {adapted, ("fully trained",), ("trained tokens",)}
    (report,) = seen(tmp_path / "peft")
    assert report["loadable"] is True
    rows = {tuple(row["features"]) for row in report["modules"]}
    assert rows == {(feature,), ("saved whole",), ("trained tokens",)}
    weights = [tmp_path / name / WEIGHTS for name in ("peft", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert config_of(tmp_path / "peft") == config_of(tmp_path / "again")
    trees = [checkpoint.load_adapter(tmp_path / name, params) for name in ("a", "b")]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("direction", ["to peft", "to a checkpoint"])
def test_a_model_that_knows_its_names_is_asked(
    direction, run, t5_adapter, tmp_path, monkeypatch
):
    names = lambda self: {"nowhere": "anything"}
    monkeypatch.setattr(models.T5, "torch_names", names, raising=False)
    source = t5_adapter[0] if direction == "to peft" else T5 / "adapter"
    status, _, err = run("convert", source, tmp_path / "out", "--base", T5 / "base")
    assert status == 1
    assert "'nowhere' is no leaf or module" in err


def test_the_base_that_pefts_configuration_names(done, tmp_path):
    shutil.copytree(T5 / "adapter", tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    config["base_model_name_or_path"] = str(T5 / "base")
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    done("convert", tmp_path / "a", tmp_path / "b")
    assert checkpoint.load_metadata(tmp_path / "b")["peft"] == config


def test_named_adapters_in_subfolders(done, run, tmp_path):
    shutil.copytree(T5 / "adapter", tmp_path / "all" / "first")
    there = tmp_path / "there"
    base = ["--base", T5 / "base"]
    status, _, err = run("convert", tmp_path / "all", there, *base)
    assert (status, there.exists()) == (1, False)
    assert "first.\nPass --adapter" in err
    done("convert", tmp_path / "all", there, *base, "--adapter", "first")
    done("convert", there, tmp_path / "all", "--adapter", "again")
    weights = (tmp_path / "all" / name / WEIGHTS for name in ("first", "again"))
    assert len({file.read_bytes() for file in weights}) == 1


@pytest.mark.filterwarnings("default::jlora.JloraWarning")
def test_a_head_that_the_base_lacks(run, tmp_path):
    base = GOLDEN / "encoders" / "roberta_base"
    with pytest.warns(jlora.JloraWarning, match="newly initialised"):
        _, params = models.load(base, head="classification", num_labels=3)
    tree = jlora.lorafy(params, 2, ["query"], train=["classifier"])
    jlora.peft.save(tmp_path / "a", tree, task_type="SEQ_CLS")
    head = ["--head", "classification", "--num-labels", "3"]
    argv = ["convert", tmp_path / "a", tmp_path / "b", "--base", base]
    status, _, err = run(*argv, *head)
    assert status == 0
    assert err.startswith("jlora: warning: ")
    assert ".py" not in err
    status, _, err = run("convert", tmp_path / "a", tmp_path / "c", "--base", base)
    assert status == 1
    assert "are not in this tree" in err


def test_a_base_in_another_dtype(done, run, t5_adapter, tmp_path):
    ours, _ = t5_adapter
    model, params = models.load(T5 / "base", dtype=jnp.bfloat16)
    models.save(model, params, tmp_path / "base")
    argv = ["convert", ours, tmp_path / "out", "--base", tmp_path / "base"]
    status, _, err = run(*argv)
    assert status == 1
    assert "saved on another base" in err
    done(*argv, "--check", "shapes")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    factors = [x for key, x in tensors.items() if ".lora_" in key]
    assert {x.dtype for x in factors} == {np.dtype(np.float32)}


def test_what_is_there_is_replaced_only_when_asked(run, done, t5_adapter, tmp_path):
    ours, _ = t5_adapter
    base = ["--base", T5 / "base"]
    for source, target in ((ours, "peft"), (T5 / "adapter", "checkpoint")):
        target = tmp_path / target
        done("convert", source, target, *base)
        before = files(target)
        status, _, err = run("convert", source, target, *base)
        assert status == 1
        assert "exists already.\nPass another TARGET, or --overwrite" in err
        assert files(target) == before
        done("convert", source, target, *base, "--overwrite")
    # A folder that holds something else is not an adapter to be replaced.
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    for source in (ours, T5 / "adapter"):
        assert run("convert", source, other, *base)[0] == 1
        assert files(other) == {Path("thesis.tex"): b"years"}
    status, _, err = run("convert", T5 / "adapter", other, *base, "--overwrite")
    assert status == 1
    assert "is left alone" in err
    assert files(other) == {Path("thesis.tex"): b"years"}


def test_source_and_target_in_each_other(run, t5_adapter, tmp_path):
    ours, _ = t5_adapter
    before = files(tmp_path)
    base = ["--base", T5 / "base", "--overwrite"]
    for target in (ours, ours / "inside", tmp_path, ours / ".." / "ours"):
        status, _, err = run("convert", ours, target, *base)
        assert status == 1
        assert "lie in each other" in err
    assert files(tmp_path) == before


@pytest.mark.parametrize("direction", ["to peft", "to a checkpoint"])
@pytest.mark.parametrize("occupied", [False, True])
def test_a_failure_leaves_what_was_there(
    direction, occupied, run, done, t5_adapter, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    to_peft = direction == "to peft"
    source = t5_adapter[0] if to_peft else T5 / "adapter"
    argv = ["convert", source, tmp_path / "out", "--base", T5 / "base", "--overwrite"]
    if occupied:
        done(*argv)
    before = files(tmp_path)
    if to_peft:
        monkeypatch.setattr(_files, "write_tensors", fail)
    else:
        monkeypatch.setattr(_storage.ocp.Checkpointer, "save", fail)
    status, out, err = run(*argv)
    assert (status, out) == (1, "")
    assert "no space left on device" in err
    assert files(tmp_path) == before
    assert (tmp_path / "out").exists() == occupied


# -- refusals --------------------------------------------------------------------------


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def damaged_arrays(folder):
    """Other bytes of the same number, deep inside Orbax's files."""
    for file in (folder / "arrays").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)


DAMAGES = {
    "peft weights": ("peft", lambda f: cut(f / WEIGHTS), "cut off or damaged"),
    "peft config": ("peft", lambda f: cut(f / CONFIG), "cannot be read as JSON"),
    "peft config, a list": (
        "peft", lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object"),
    "peft config, binary": (
        "peft", lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "as JSON"),
    "peft rank": (
        "peft",
        lambda f: (f / CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": "2", "target_modules": ["q"]})),
        "r is '2', of the wrong type"),
    "peft pattern": (
        "peft",
        lambda f: (f / CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q"],
                        "rank_pattern": {"(": 2}})),
        "is not a regular expression"),
    "peft pattern, flagged": (
        "peft",
        lambda f: (f / CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q"],
                        "alpha_pattern": {"(?i)q": 2}})),
        "is not a regular expression"),
    "no peft weights": ("peft", lambda f: (f / WEIGHTS).unlink(), "does not exist|no ad"),
    "arrays": ("checkpoint", damaged_arrays, "cannot be read"),
    "no arrays": ("checkpoint", lambda f: shutil.rmtree(f / "arrays"), "cannot be read"),
    "description": (
        "checkpoint",
        lambda f: (f / "config" / "metadata").write_text('{"kind": "adapter"}'),
        "fails its checksum"),
    "no description": (
        "checkpoint", lambda f: (f / "config" / "metadata").unlink(), "cannot be read"),
    "model's weights": (
        "model", lambda f: cut(f / "model.safetensors"), "cut off or damaged"),
    "no model's weights": (
        "model", lambda f: (f / "model.safetensors").unlink(), "holds neither"),
    "model's config, cut": (
        "model", lambda f: cut(f / "config.json"), "cannot be read as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage, run, t5_adapter, tmp_path):
    kind, harm, message = DAMAGES[damage]
    sources = {
        "peft": T5 / "adapter",
        "checkpoint": t5_adapter[0],
        "model": T5 / "base",
    }
    folder = shutil.copytree(sources[kind], tmp_path / "folder")
    harm(folder)
    commands = [["inspect", folder], ["inspect", folder, "--json"]]
    source, base = (
        (folder, T5 / "base") if kind != "model" else (T5 / "adapter", folder)
    )
    commands.append(["convert", source, tmp_path / "out", "--base", base])
    before = files(tmp_path)
    for argv in commands:
        status, out, err = run(*argv)
        assert (status, out) == (1, ""), argv
        assert re.search(message, err), err
        assert err.startswith("jlora: ")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", [1]), ("feed_forward_proj", True), ("initializer_factor", {})],
)
def test_a_models_config_of_wrong_types(key, value, run, done, tmp_path):
    base = shutil.copytree(T5 / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: value}))
    done("inspect", base)
    out = tmp_path / "out"
    status, _, err = run("convert", T5 / "adapter", out, "--base", base)
    assert (status, out.exists()) == (1, False)
    assert "config.json" in err


def test_the_wrong_base(run, t5_adapter, tmp_path):
    model, params = models.load(T5 / "base")
    other = jax.tree.map(lambda x: x + 1, params)
    models.save(model, other, tmp_path / "other")
    out = tmp_path / "out"
    for source, base, message in [
        (t5_adapter[0], tmp_path / "other", "saved on another base"),
        (t5_adapter[0], ROBERTA / "base", "saved on another base"),
        (T5 / "adapter", ROBERTA / "base", "are not in this tree"),
        (
            T5 / "adapter",
            GOLDEN / "t5" / "v11",
            "SelfAttention.q is targeted, but has no",
        ),
        (T5 / "adapter", tmp_path / "nowhere", "is no folder"),
        (T5 / "adapter", T5 / "adapter", "config.json"),
        (T5 / "adapter", None, "does not say what it was trained on"),
        (t5_adapter[0], None, "does not say what it was trained on"),
    ]:
        argv = [] if base is None else ["--base", base]
        status, _, err = run("convert", source, out, *argv)
        assert (status, out.exists()) == (1, False)
        assert re.search(message, err), err


def test_what_is_no_adapter(run, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copytree(T5 / "adapter", tmp_path / "runs" / "deep" / "a")
    for folder, message in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "holds no PEFT adapter"),
        (tmp_path / "runs", "folders inside it: deep"),
        ("gs://bucket/run", "is not a local path"),
    ]:
        for argv in (["inspect", folder], ["convert", folder, tmp_path / "out"]):
            if argv == ["inspect", tmp_path / "runs"]:
                continue  # shows what is inside
            status, out, err = run(*argv)
            misused = 2 if folder == "gs://bucket/run" else 1
            assert (status, out) == (misused, "")
            assert message in err
    assert not list(Path.cwd().glob("gs:*"))
    status, _, err = run("convert", T5 / "base", tmp_path / "out")
    assert status == 1
    assert "is a model" in err


def test_a_run_is_what_is_in_it(done, tmp_path):
    """The folder that a training run leaves: an adapter, states, a merged model."""
    tree = jlora.lorafy({"q": {"kernel": jnp.ones((5, 3))}}, 2, ["q"])
    state = jlora.train.TrainState.create(tree, optax.sgd(1e-3))
    checkpoint.save_adapter(tmp_path / "adapter", tree)
    with checkpoint.Checkpoints(tmp_path / "state") as checkpoints:
        checkpoints.save(state)
    shutil.copytree(T5 / "base", tmp_path / "merged")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "settings.json").write_text("{}")
    reports = json.loads(done("inspect", tmp_path, "--json"))
    assert [(r["kind"], Path(r["path"]).relative_to(tmp_path)) for r in reports] == [
        ("adapter", Path("adapter")),
        ("model", Path("merged")),
        ("state", Path("state/0")),
    ]
    text = done("inspect", tmp_path)
    for part in ("adapter checkpoint", "Hugging Face model", "training state"):
        assert part in text


def test_a_state_is_no_adapter(run, tmp_path):
    tree = jlora.lorafy({"q": {"kernel": jnp.ones((5, 3))}}, 2, ["q"])
    state = jlora.train.TrainState.create(tree, optax.sgd(1e-3))
    checkpoint.save_state(tmp_path / "s", state)
    status, _, err = run("convert", tmp_path / "s", tmp_path / "out", "--base", "x")
    assert status == 1
    assert "kind 'state', not 'adapter'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["insect"], 'unknown command "insect". Did you mean "inspect"?'),
        (["inspect"], "FOLDER is missing"),
        (["inspect", ".", "--jsn"], "unknown option: --jsn. Did you mean --json?"),
        (["inspect", ".", "again"], "nothing takes the word 'again'"),
        (["convert", "only-one"], "TARGET is missing"),
        (
            ["convert", "a", "b", "--num-labels", "three"],
            "--num-labels: 'three' is not a whole number at least 1",
        ),
        (
            ["convert", "a", "b", "--num-labels", "0"],
            "is not a whole number at least 1",
        ),
        (
            ["convert", "a", "b", "--check", "bytes"],
            'invalid value "bytes" for --check',
        ),
        (["convert", str(T5 / "adapter"), "b", "--task-type", "X"], "--task-type: for"),
    ],
)
def test_misuse_is_explained(argv, message, run):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert message in err
    assert "--help" in err
    assert len(err.splitlines()) == 2


def test_missing_libraries_are_named(run, monkeypatch):
    for name in ("_headers", "_peft"):
        monkeypatch.delitem(sys.modules, f"jlora.cli._inspect.{name}", raising=False)
        monkeypatch.delattr(_inspect, name, raising=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    status, _, err = run("inspect", T5 / "adapter")
    assert status == 1
    assert 'pip install "jlora[hf]"' in err


# -- the command line ------------------------------------------------------------------


def test_help_and_version(done):
    assert done() == done("--help")
    assert "exit status:" in done()
    assert done("--version") == f"jlora {jlora.__version__}\n"
    text = done("--help")
    for command in cli.COMMANDS:
        assert f"{command.name} " in text
        assert command.summary in " ".join(text.split())
        assert command.examples in done(command.name, "--help")


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: c.name)
def test_the_examples_are_command_lines(command):
    for line in command.examples.replace("\\\n", " ").splitlines():
        words = shlex.split(re.split("[|>]", line)[0])
        assert words[:2] == ["jlora", command.name]
        assert isinstance(command.read(words[2:]), command.module.Options)


def test_the_pages_command_lines_are_read():
    text = (ROOT / "docs" / "guides" / "console.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    known = {command.name: command for command in cli.COMMANDS}
    seen = set()
    for line in lines:
        if not (found := re.search(r"(?:^|\| )jlora (.*)", line)):
            continue
        name, *words = shlex.split(re.split("[|>]", found[1])[0], comments=True)
        if "--help" not in words:
            assert isinstance(known[name].read(words), known[name].module.Options), line
        seen.add(name)
    assert seen == known.keys()


def test_the_installed_script_is_this_console():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (script,) = project["scripts"].items()
    point = importlib.metadata.EntryPoint(*script, "console_scripts")
    assert (point.name, point.load()) == ("jlora", cli.main)


def test_as_a_process():
    argv = [sys.executable, "-m", "jlora", "inspect"]
    ok = subprocess.run([*argv, T5 / "adapter"], capture_output=True, text=True)
    assert (ok.returncode, ok.stderr) == (0, "")
    assert "modules adapted  6" in ok.stdout
    wrong = subprocess.run([*argv, "nowhere"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("jlora: 'nowhere' does not exist")


def test_a_reader_that_leaves_early(tmp_path):
    """With more to say than a pipe holds."""
    (tmp_path / "config.json").write_text("{}")
    tensors = {f"t{i}": np.ones(1, np.float32) for i in range(2000)}
    save_file(tensors, tmp_path / "model.safetensors")
    line = f"{sys.executable} -m jlora inspect {tmp_path} --json | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "")


@pytest.mark.parametrize("process", [0, 1])
def test_one_of_several_processes_says_that_a_run_stopped(process, monkeypatch, capsys):
    from jlora.cli._common import end_by
    from jlora.train import Interrupted

    monkeypatch.setattr(jax, "process_index", lambda: process)
    with pytest.raises(SystemExit) as stop:
        end_by(Interrupted("step 3 of 9", signal.SIGTERM))
    assert stop.value.code == 0
    said = capsys.readouterr().err
    assert ("stopped by SIGTERM" in said) == (process == 0)
    assert process == 0 or not said
