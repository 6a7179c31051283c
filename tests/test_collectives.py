"""What devices send each other: read from programs, and what it ought to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tools import randomise

import jlora
from jlora import models, sharding
from jlora._errors import OptionError
from jlora.sharding._collectives import _axes, _bytes, _operations
from jlora.train import TrainState, cross_entropy, make_eval_step, make_train_step
from jlora.train._codes import kept_parts

FOUR = jax.devices()[:4]
MESH = sharding.make_mesh("data=2,tensor=2", devices=FOUR)


def test_kinds_axes_and_bytes_of_a_small_program():
    x = jax.device_put(jnp.ones((8, 6)), NamedSharding(MESH, P("data", "tensor")))
    w = jax.device_put(jnp.ones((6, 4)), NamedSharding(MESH, P("tensor", None)))

    def f(x, w):
        def body(x, _):
            y = jnp.tanh(x @ w) @ w.T  # sums over tensor
            return jax.lax.with_sharding_constraint(y, x_place), None

        return jax.lax.scan(body, x, None, length=5)[0].sum()

    x_place = x.sharding
    found = sharding.collectives(jax.jit(f).lower(x, w).compile())
    [sums] = found.of("all-reduce", "tensor").of(axis="tensor")[:1]
    assert (sums.axes, sums.count, sums.times) == (("tensor",), 1, 5)
    assert sums.bytes == 5 * 4 * 4 * 4  # [8/2, 4] float32, in each of five rounds
    assert sums.largest == 64
    others = [row for row in found if row is not sums]  # of the last sum, scalars
    assert {(row.kind, row.largest) for row in others} == {("all-reduce", 4)}
    assert "all-reduce" in str(found)
    assert found.bytes == sums.bytes + sum(row.bytes for row in others)


LINES = {
    "%a = f32[4,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,2]<=[4], "
    "dimensions={1}": ("all-gather", ("tensor",), 128),
    "%a = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%x), "
    "replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}": ("all-gather", ("data",), 128),
    "ROOT %r = bf16[2,8]{1,0} reduce-scatter(%x), replica_groups={{0,1},{2,3}}, "
    "dimensions={0}": ("reduce-scatter", ("tensor",), 64),
    "%p = (s8[16]{0}, s8[16]{0}, u32[], u32[]) collective-permute-start(%x), "
    "source_target_pairs={{0,2},{2,0}}": ("collective-permute", ("data",), 16),
    "%s = (f32[3]{0}, f8e4m3fn[4]{0}) all-reduce(%x, %y), replica_groups={{0,1,2,3}}, "
    "to_apply=%add": ("all-reduce", ("data", "tensor"), 16),
    "%s = pred[] all-reduce(%x), replica_groups={}, to_apply=%add": (
        "all-reduce", ("data", "tensor"), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines_of_xla(line):
    text = f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  {line}\n}}\n"
    [(kind, found, times)] = _operations(text)
    assert times == 1
    assert (kind, _axes(found, MESH), _bytes(kind, found)) == LINES[line]


def test_what_is_no_compiled_program():
    with pytest.raises(OptionError, match=r"compile\(\)"):
        sharding.collectives(jax.jit(jnp.sum).lower(jnp.ones(3)))


# -- a training step -------------------------------------------------------------------

LAYERS, WIDTH, HIDDEN, WORDS = 5, 16, 32, 24


SIZES = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": HIDDEN}
SIZES |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}


def lowered(mesh, config=None, targets=("query", "value")):
    config = config or models.LlamaConfig(**SIZES)
    model = models.Llama(config, scan_layers=True)
    ids = np.arange(56).reshape(8, 7) % WORDS
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    tree = randomise(jlora.lorafy(params, 2, [*targets]), jax.random.key(1))

    def loss_fn(params, batch, key):
        logits = model.apply({"params": params}, batch["ids"])
        return cross_entropy(logits[:, :-1], batch["ids"][:, 1:])

    tx = optax.adam(1e-2)
    state = TrainState.create(sharding.place(tree, mesh), tx)
    step = make_train_step(loss_fn, tx, mesh=mesh)
    program = step.lower(state, {"ids": ids.astype(np.int32)}).compile()
    adapters = sum(x.nbytes for x in jax.tree.leaves(state.trainable))
    return sharding.collectives(program), adapters


def test_data_parallel_devices_sum_the_adapters_gradients_alone():
    found, adapters = lowered(sharding.make_mesh("data=4", devices=FOUR))
    assert [row.kind for row in found] == ["all-reduce"]
    assert adapters <= found.bytes <= adapters + 16  # the loss and its count


def test_fsdp_gathers_a_kernel_at_a_time_and_sums_no_activations():
    found, adapters = lowered(sharding.make_mesh("fsdp=4", devices=FOUR))
    assert adapters <= found.of("all-reduce").bytes <= adapters + 16
    gathered = found.of("all-gather")
    # One layer's kernel, and never the stack of five.
    assert gathered.largest <= 4 * WIDTH * HIDDEN
    assert sum(row.times for row in gathered) >= 2 * 7 * LAYERS
    assert {row.kind for row in found} <= {"all-reduce", "all-gather", "all-to-all"}


def test_a_mixtures_tokens_stay_on_their_devices():
    config = models.MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=8)
    mesh = sharding.make_mesh("data=4", devices=FOUR)
    found, adapters = lowered(mesh, config, ["experts/gate_up_proj", "down_proj"])
    sums = found.of("all-reduce")
    assert adapters <= sums.bytes <= adapters + 16
    states = 8 * 7 * WIDTH * 4
    assert max(row.largest for row in found if row.kind != "all-reduce") < states / 2


def test_tensor_parallel_devices_sum_activations_and_gather_no_kernel():
    mesh = sharding.make_mesh("data=2,tensor=2", devices=FOUR)
    found, adapters = lowered(mesh)
    states = 4 * 7 * WIDTH * 4  # of a device's half of the batch
    sums = found.of("all-reduce", "tensor")
    assert sum(row.times for row in sums) >= 4 * LAYERS  # two a layer, each way
    assert found.of("all-gather").largest < 4 * WIDTH * HIDDEN / 2
    over_data = [row for row in found if "data" in row.axes]
    assert sum(row.bytes for row in over_data) <= adapters + 3 * states


# -- quantised kernels -----------------------------------------------------------------


STACKED = jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,))


def layers(params, batch, key=None):
    """The loss of a net of scanned layers, each of two kernels."""

    def layer(x, own):
        return jnp.tanh(x @ own["up"]["kernel"]) @ own["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, batch["x"], params)
    return jnp.mean((x - 1) ** 2)


@pytest.mark.parametrize("form", ["int8", "nf4", "fp8"])
def test_devices_gather_codes_and_no_dense_kernels(form):
    mesh = sharding.make_mesh("data=2,fsdp=2", devices=FOUR)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
    base = {"up": {"kernel": draw(3, 128, 320)}, "down": {"kernel": draw(3, 320, 128)}}
    both = {"up": STACKED, "down": STACKED}
    codes = jlora.quantize(base, form, targets=both)
    tree = randomise(jlora.lorafy(codes, 2, {"up": STACKED}), jax.random.key(1))
    rules = sharding.rules([("up/", P("fsdp", None)), ("down/", P(None, "fsdp"))])
    batch, tx, told = {"x": draw(8, 128)}, optax.sgd(0.1), []
    for own in (None, mesh):
        state = TrainState.create(
            tree if own is None else sharding.place(tree, own, rules), tx
        )
        step = make_train_step(layers, tx, mesh=own, donate=False)
        read = make_eval_step(lambda *args: {"loss": layers(*args)}, mesh=own)
        new, metrics = step(state, batch)
        losses = [float(x["loss"]) for x in (metrics, read(new, batch))]
        told.append([*losses, np.asarray(jax.tree.leaves(new.trainable)[0])])
    for whole, cut in zip(*told, strict=True):
        np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-6)

    gathered = sharding.collectives(step.lower(state, batch).compile())
    gathered = gathered.of("all-gather", "fsdp")
    # Bytes of a kernel's codes. A CPU's XLA sends fp8 as float16.
    size = int(128 * 320 * {"int8": 1, "nf4": 0.5, "fp8": 2}[form])
    assert gathered.largest == size
    # Both kernels of each layer, forwards and backwards, and their statistics: of the
    # down projection one scale a row of 320, or a byte of 64 numbers.
    assert 4 * 3 * size <= gathered.bytes < 1.1 * 4 * 3 * size


def test_codes_are_gathered_whatever_else_cuts_them():
    """Kernels' other axes stay cut, and stacks of experts too."""
    mesh = sharding.make_mesh("fsdp=2,tensor=2", devices=FOUR)
    base = {"up": {"kernel": np.ones((3, 128, 64), np.float32)}}
    codes = jlora.quantize(base, "nf4", targets={"up": STACKED})
    rules = [("kernel$", P("fsdp", "tensor"))]
    placed = sharding.place(codes, mesh, rules)
    [(on, parts)] = kept_parts(placed, mesh)
    assert (on, parts) == (mesh.abstract_mesh, ("tensor", None))
    assert kept_parts(codes, mesh) is None  # on no mesh
    assert kept_parts(sharding.place(codes, mesh, [("", P())]), mesh) is None
