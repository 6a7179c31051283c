"""Leaves from files: from several tensors, into any dtype and sharding, held once."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import save_file

from jlora import _files, _processes, models
from jlora._errors import ShapeError, StructureError
from jlora.models._hf import reading as _leaves
from jlora.models._hf import save as _hf_save
from jlora.models._hf.sources import (
    Joined,
    Stacked,
    Tensor,
    names,
    places,
)
from jlora.models._hf.tensors import TensorFolder

GOLDEN = Path(__file__).parent / "golden"
L, E, N, F = 2, 3, 5, 14  # layers, experts, inputs, outputs of both halves

# An MoE's gate and up projections, a layer's expert a tensor each.
EXPERTS = Stacked(
    tuple(
        Stacked(
            tuple(
                Joined(
                    (
                        Tensor(f"{layer}.{expert}.w1", transposed=True),
                        Tensor(f"{layer}.{expert}.w3", transposed=True),
                    ),
                    axis=-1,
                )
                for expert in range(E)
            )
        )
        for layer in range(L)
    )
)


@pytest.fixture
def experts(tmp_path):
    """A folder of the single tensors, and the leaf that they make up."""
    rng = np.random.default_rng(0)
    halves = rng.normal(size=(2, L, E, F // 2, N)).astype(np.float32)
    tensors = {
        f"{layer}.{expert}.{name}": np.ascontiguousarray(halves[i, layer, expert])
        for i, name in enumerate(("w1", "w3"))
        for layer in range(L)
        for expert in range(E)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    leaf = np.concatenate(halves, axis=-2).swapaxes(-1, -2)  # [L, E, N, F]
    return TensorFolder(tmp_path), tensors, leaf


@pytest.mark.parametrize(
    "spec",
    [None, (), ("x",), (None, None, None, "x"), ("x", None, None, "y")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_leaf_of_many_tensors(experts, spec, dtype):
    tensors, _, want = experts
    sharding = None
    if spec is not None:
        mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("x", "y"))
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
    got = _leaves.read(tensors, EXPERTS, want.shape, dtype, sharding)
    assert got.dtype == dtype
    if sharding is not None:
        assert got.sharding == sharding
    np.testing.assert_array_equal(np.asarray(got), want.astype(dtype))


def test_a_joint_along_a_leading_axis(experts):
    tensors, held, _ = experts
    rows = Joined((Tensor("0.0.w1"), Tensor("1.2.w3")), axis=0)
    got = _leaves.read(tensors, rows, (F, N), np.float32, None)
    np.testing.assert_array_equal(got, np.concatenate([held["0.0.w1"], held["1.2.w3"]]))


def test_a_device_reads_its_own_part(experts, monkeypatch):
    """Of two devices that share the layers out, each opens its layer's tensors."""
    tensors, _, want = experts
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    opened = []
    view = tensors.view
    monkeypatch.setattr(tensors, "view", lambda n: opened.append(n) or view(n))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    _leaves.read(tensors, EXPERTS, want.shape, np.float32, sharding)
    assert sorted(opened) == sorted(names(EXPERTS))


def test_a_leaf_falls_back_into_its_tensors(experts):
    _, tensors, leaf = experts
    parts = {
        place.tensor.name: _hf_save._layout(place, jnp.asarray(leaf))
        for place in places(EXPERTS, leaf.shape)
    }
    assert parts.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(parts[name], value)
    shapes = {place.shape for place in places(EXPERTS, leaf.shape)}
    assert shapes == {(F // 2, N)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_large_tensors_are_copied_in_parts(tmp_path, transposed, dtype):
    value = np.random.default_rng(0).normal(size=(2003, 1999)).astype(np.float32)
    save_file({"w": value}, tmp_path / "model.safetensors")
    want = (value.T if transposed else value).astype(dtype)
    assert want.nbytes > _leaves._LARGE
    source = Tensor("w", transposed)
    got = _leaves.read(TensorFolder(tmp_path), source, want.shape, dtype, None)
    np.testing.assert_array_equal(got, want)


def test_unaligned_tensors_are_read(tmp_path):
    """The format does not ask for headers that end on a multiple of four bytes."""
    header = b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    data = np.arange(3, dtype="<f4")
    size = len(header).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(size + header + data.tobytes())
    assert (8 + len(header)) % 4
    np.testing.assert_array_equal(TensorFolder(tmp_path).view("w"), data)


# -- load ------------------------------------------------------------------------------

FOLDER = GOLDEN / "decoders" / "llama"
MESH = Mesh(np.array(jax.devices()[:2]), "x")
COLUMNS = NamedSharding(MESH, PartitionSpec(None, "x"))
WHOLE = NamedSharding(MESH, PartitionSpec())


def by_path(path, shape):
    return COLUMNS if path.endswith("mlp/down_proj/kernel") else WHOLE


def as_tree(params):
    paths = jax.tree_util.tree_leaves_with_path(params)
    shardings = [
        by_path(jax.tree_util.keystr(p, simple=True, separator="/"), x.shape)
        for p, x in paths
    ]
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


@pytest.mark.parametrize("form", ["function", "tree"])
def test_every_leaf_in_its_sharding(form):
    plain = models.load(FOLDER, jnp.bfloat16)[1]
    wanted = as_tree(plain)
    got = models.load(
        FOLDER, jnp.bfloat16, sharding=by_path if form == "function" else wanted
    )[1]
    assert jax.tree.map(lambda x: x.sharding, got) == wanted
    jax.tree.map(np.testing.assert_array_equal, got, plain)


def test_one_sharding_for_all_and_the_beginning_of_a_tree():
    device = SingleDeviceSharding(jax.devices()[3])
    params = models.load(FOLDER, sharding=device)[1]
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {device}
    params = models.load(FOLDER, sharding=dict.fromkeys(params, WHOLE))[1]
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {WHOLE}


def test_new_heads_lie_where_they_shall():
    with pytest.warns(match="newly initialised"):
        params = models.load(
            GOLDEN / "encoders" / "bert_base",
            head="classification",
            num_labels=3,
            sharding=WHOLE,
        )[1]
    assert params["classifier"]["kernel"].sharding == WHOLE


@pytest.mark.parametrize(
    ("sharding", "error", "words"),
    [
        (lambda path, shape: PartitionSpec("x"), StructureError, "NamedSharding"),
        ({"model": WHOLE, "other": WHOLE}, StructureError, "not that of the param"),
        (
            NamedSharding(Mesh(np.array(jax.devices()[:3]), "x"), PartitionSpec("x")),
            ShapeError,
            r"lm_head/kernel .* cannot be sharded as",
        ),
    ],
    ids=["spec", "tree", "uneven"],
)
def test_shardings_that_cannot_be(sharding, error, words):
    with pytest.raises(error, match=words):
        models.load(FOLDER, sharding=sharding)


def test_donated_parameters_are_not_the_files():
    """XLA takes the loader's memory as it is; a step that donates must not mind."""
    params = models.load(FOLDER)[1]
    step = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
    want = jax.tree.map(lambda x: 4 * np.asarray(x), params)
    jax.tree.map(np.testing.assert_array_equal, step(step(params)), want)


PEAK = """
import json, pathlib, sys
import jax, numpy as np
from jlora import models

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key + ":"))

models.load(sys.argv[1])  # what is made once for all
pathlib.Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
before = status("VmRSS")
params = models.load(sys.argv[2], jax.numpy.bfloat16)[1]
leaves = jax.tree.leaves(params)
print(json.dumps([status("VmHWM") - before, sum(x.nbytes for x in leaves)]))
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux measures it"
)
def test_the_host_holds_one_tensor_besides(tmp_path):
    config = models.LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2048,
        num_hidden_layers=8, num_attention_heads=8,
    )  # fmt: skip
    model = models.Llama(config)
    ids = jnp.zeros((1, 1), jnp.int32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    models.save(model, params, tmp_path / "large")  # 376 MiB of float32
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(FOLDER), str(tmp_path / "large")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, own = json.loads(done.stdout)
    # One tensor of the file, mapped, and the leaf that it becomes, which is `own`'s.
    assert peak < own + largest + 2**24


SAVED = """
import json, pathlib, sys
import jax, numpy as np
from jlora import models, sharding

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key + ":"))

config = models.LlamaConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=2048, num_hidden_layers=8,
    num_attention_heads=8,
)
model = models.Llama(config, scan_layers=True)
ids = jax.ShapeDtypeStruct((1, 1), np.int32)
shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
rules = sharding.rules(sys.argv[2])
mesh = sharding.make_mesh("fsdp=2,tensor=2")
where = rules.shardings(shapes, mesh)
rng = np.random.default_rng(0)

def leaf(x, where):
    return jax.make_array_from_callback(
        x.shape, where, lambda index: np.full(x.shape, rng.random(), x.dtype)[index]
    )

models.save(*models.load(sys.argv[3]), sys.argv[1], overwrite=True)  # made once for all
params = jax.block_until_ready(jax.tree.map(leaf, shapes, where))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
before = status("VmRSS")
models.save(model, params, sys.argv[1], overwrite=True)
peak = status("VmHWM") - before
own = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps([peak, own, 8192 * 1024 * 4]))
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux measures it"
)
@pytest.mark.parametrize("layout", ["replicated", "fsdp+tensor"])
def test_saving_holds_one_tensor_of_the_file(layout, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SAVED, tmp_path / "x", layout, FOLDER],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, own, largest = json.loads(done.stdout)
    assert own > 370 * 2**20
    # The tensor as it is gathered, and as the file has it: the other way round.
    assert peak < 2 * largest + 2**24 < own / 4


@pytest.mark.parametrize("spec", [(), ("x",), (None, "y"), ("y", "x"), (("x", "y"),)])
def test_any_part_of_an_array_is_read_from_its_shards(spec):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    want = np.arange(8 * 12).reshape(8, 12)
    x = jax.device_put(want, NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_array_equal(_processes.on_host(x), want)
    for box in [(slice(3, 4), slice(0, 12)), (slice(1, 7), slice(5, 11))]:
        np.testing.assert_array_equal(_processes.on_host(x, box), want[box])
        np.testing.assert_array_equal(_processes._part(x, box), want[box])


def test_a_file_written_tensor_by_tensor_is_that_of_safetensors(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "b.10": rng.normal(size=(3, 5)).astype(np.float32),
        "b.2": rng.normal(size=(5, 3)).astype(np.float32).T,
        "ä": rng.normal(size=(7,)).astype(jnp.bfloat16),
        "half": rng.normal(size=(2, 3)).astype(np.float16),
        "double": rng.normal(size=()),
        "empty": np.zeros((0, 4), np.float32),
    }
    specs = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    written = _files.TensorFile(specs)
    written.begin(tmp_path / "ours")
    for name in written.order:
        written.append(tmp_path / "ours", tensors[name])
    dense = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    dense["double"] = tensors["double"]
    save_file(dense, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
