"""What is done on eight devices, for test_eight_devices.py: prints JSON.

python eight_devices.py losses llama
python eight_devices.py bytes FOLDER
python eight_devices.py checkpoints FOLDER
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from tools import randomise

import jlora
import jlora.peft
from jlora import checkpoint, models, sharding, train
from jlora._paths import leaf_paths

STEPS, WORDS, LENGTH = 3, 48, 8
SIZES = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"hidden_size": 32, "intermediate_size": 64}
MESHES = ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=2,sequence=2,tensor=2")


def llama(**form):
    return models.Llama(models.LlamaConfig(**SIZES, num_key_value_heads=2), **form)


def mixture():
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return models.Llama(models.MoeConfig(**SIZES, model_type="qwen3_moe", **own))


def t5():
    own = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return models.T5(models.T5Config(vocab_size=WORDS, **own))


def gpt2():
    own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return models.GPT2(models.GPT2Config(vocab_size=WORDS, **own))


FAMILIES = {"llama": llama, "mixture": mixture, "t5": t5, "gpt2": gpt2}
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {"ids": rng.integers(0, WORDS, (16, LENGTH)).astype(np.int32)}


def made(model):
    ids = np.zeros((2, LENGTH), np.int32)
    args = (ids, None, ids) if isinstance(model, models.T5) else (ids,)
    params = jax.jit(model.init)(jax.random.key(0), *args)["params"]
    return jax.tree.map(np.asarray, params)


def adapted(params):
    targets = ["query", "value"]
    if any("experts" in path for path in leaf_paths(params)):
        targets += ["experts/gate_up_proj", "experts/down_proj"]
    return randomise(jlora.lorafy(params, 4, targets), jax.random.key(1))


def loss_of(model):
    def loss_fn(params, batch, key):
        ids = batch["ids"]
        args = (ids, None, ids) if isinstance(model, models.T5) else (ids,)
        logits = model.apply({"params": params}, *args)
        return train.cross_entropy(logits[:, :-1], ids[:, 1:])

    return loss_fn


def run(step, state, feed=lambda batch: batch):
    losses = []
    for batch in batches():
        state, metrics = step(state, feed(batch))
        losses.append(float(np.ravel(metrics["loss"])[0]))
    return losses


def losses(family):
    """The losses of a family by layout."""
    model = FAMILIES[family]()
    tree, loss_fn = adapted(made(model)), loss_of(model)
    state = train.TrainState.create(tree, TX)
    found = {"one device": run(train.make_train_step(loss_fn, TX), state)}
    for sizes in MESHES:
        mesh = sharding.make_mesh(sizes)
        placed = train.TrainState.create(sharding.place(tree, mesh), TX)
        found[sizes] = run(train.make_train_step(loss_fn, TX, mesh=mesh), placed)
    mesh = sharding.make_mesh("data=8")
    whole = train.TrainState.create(sharding.place(tree, mesh, "replicated"), TX)
    inner = train.make_train_step(loss_fn, TX, axis_name="data")
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    feed = lambda batch: sharding.place_batch(batch, mesh)
    found["shard_map"] = run(jax.jit(mapped), whole, feed)
    step = train.make_train_step(loss_fn, TX, parallel="pmap")
    cut = lambda batch: {k: x.reshape(8, -1, *x.shape[1:]) for k, x in batch.items()}
    found["pmap"] = run(step, train.replicate(train.TrainState.create(tree, TX)), cut)
    return found


def account(tree):
    """Of a tree: the bytes of all of it, the most on a device, the largest part."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    arrays = [
        x for x in arrays if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    parts = [s.data.nbytes for x in arrays for s in x.addressable_shards]
    return {
        "all": sum(x.nbytes for x in arrays),
        "device": max(sharding.device_bytes(arrays).values()),
        "largest": max(parts),
        "largest leaf": max(x.nbytes for x in arrays),
        "alive": max(sharding.device_bytes().values()),
    }


def sizes_of_stages(folder):
    """What lies on a device after each stage of a run on `fsdp=4,tensor=2`."""
    folder, model = Path(folder), llama()
    models.save(model, made(model), folder / "base")
    mesh, found = sharding.make_mesh("fsdp=4,tensor=2"), {}
    rules = sharding.rules("fsdp+tensor")
    _, params = models.load(folder / "base", sharding=rules.on(mesh))
    found["load"] = account(params)
    tree = jlora.lorafy(params, 4, "all-linear", init="gaussian")
    found["lorafy"] = account(tree)
    state = train.TrainState.create(tree, TX)
    step = train.make_train_step(loss_of(model), TX, mesh=mesh)
    for batch in batches():
        state, _ = step(state, batch)
    found["train"] = account(state)
    analysis = step.lower(state, batch).compile().memory_analysis()
    found["step"] = {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    ids = sharding.place_batch({"ids": np.ones((8, 4), np.int32)}, mesh)["ids"]
    said = models.generate(
        model, state.params, ids, max_new_tokens=4, transform=jlora.lora
    )
    found["generate"] = account(state)
    checkpoint.save_state(folder / "state", state)
    state, _ = checkpoint.restore_state(folder / "state", state)
    found["checkpoint"] = account(state)
    merged = jlora.merge(state.params)
    found["merge"] = account(merged)
    models.save(model, merged, folder / "merged")
    again, read = models.load(folder / "merged", sharding=rules.on(mesh))
    found["export"] = account(read)
    want = np.asarray(models.generate(again, read, ids, max_new_tokens=4))
    jlora.peft.save(folder / "peft", state.params)
    found["peft"] = account(jlora.peft.load(folder / "peft", params))
    _, codes = models.load(
        folder / "base", sharding=sharding.rules("tensor", own=OWN).on(mesh),
        quantize=jlora.quantizer("int8"),
    )  # fmt: skip
    found["quantise"] = account(codes)
    found["same words"] = bool((np.asarray(said) == want).all())
    return found


OWN = [("embedding$", P("tensor", "fsdp")), ("lm_head", P("fsdp", "tensor"))]


def checkpoints(folder):
    """A state saved and restored from one mesh to the next, and a step on each."""
    folder, model = Path(folder), llama()
    tree, loss_fn = adapted(made(model)), loss_of(model)
    feed = [*batches()]
    where = [
        "data=2,fsdp=4",
        "fsdp=2,tensor=4",
        None,
        "data=8",
        "data=2,fsdp=2,tensor=2",
    ]
    found, last = [], None
    for n, sizes in enumerate(where):
        mesh = None if sizes is None else sharding.make_mesh(sizes)
        lenient = {"uneven": "replicate"}
        placed = tree if mesh is None else sharding.place(tree, mesh, **lenient)
        state = train.TrainState.create(placed, TX, jax.random.key(5))
        step = train.make_train_step(loss_fn, TX, mesh=mesh)
        if last is None:
            state, _ = step(state, feed[0])
        else:
            shardings = [x.sharding for x in jax.tree.leaves(state)]
            state, _ = checkpoint.restore_state(folder / str(n - 1), state)
            same = [x.sharding for x in jax.tree.leaves(state)]
            assert same == shardings, "a leaf is elsewhere"
            for x, y in zip(last, values(state), strict=True):
                np.testing.assert_array_equal(x, y)
        checkpoint.save_state(folder / str(n), state)
        last = values(state)
        _, metrics = step(state, feed[1])
        found.append(float(metrics["loss"]))
    return found


def values(state):
    moving = (state.step, state.trainable, state.opt_state)
    return [np.asarray(x) for x in jax.tree.leaves(moving)]


DONE = {"losses": losses, "bytes": sizes_of_stages, "checkpoints": checkpoints}

if __name__ == "__main__":
    print(json.dumps(DONE[sys.argv[1]](*sys.argv[2:])))
