"""A set of adapters is no tree of parameters, and every function that takes one says so."""

import importlib
import inspect

import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora import checkpoint, init, models, optim, peft, sweep, train

PARAMS = {"q": {"kernel": jnp.ones((6, 5))}, "o": {"kernel": jnp.ones((5, 7))}}
TREE = jlora.lorafy(PARAMS, 2, ["q"])
SET = jlora.add(PARAMS, "german", TREE)
X = jnp.ones((2, 6))
GPT2 = models.GPT2(
    models.GPT2Config(vocab_size=11, n_positions=7, n_embd=6, n_layer=1, n_head=2)
)


def fn(p, x):
    return x @ p["q"]["kernel"]


def loss(p, batch, key=None):
    return fn(p, batch).sum()


# By name: each is given the set where it takes parameters.
TAKING_TREES = {
    "jlora": {
        "activated": lambda s, d: jlora.activated(s, [1]),
        "add": lambda s, d: jlora.add(PARAMS, "a", s),
        "bank": lambda s, d: jlora.bank([TREE, s]),
        "combine": lambda s, d: jlora.combine(s, s),
        "dequantize": lambda s, d: jlora.dequantize(s),
        "labels": lambda s, d: jlora.labels(s),
        "lora": lambda s, d: jlora.lora(fn)(s, X),
        "lorafy": lambda s, d: jlora.lorafy(s, 2, ["o"]),
        "merge": lambda s, d: jlora.merge(s),
        "mixed": lambda s, d: jlora.mixed(fn)(jlora.with_ids(s, [0, 0]), X),
        "pick": lambda s, d: jlora.pick(s, 0),
        "quantize": lambda s, d: jlora.quantize(s, "int8"),
        "replicate_layers": lambda s, d: jlora.replicate_layers(s, [(0, 1)], ["q"]),
        "split": lambda s, d: jlora.split(s),
        "stack_layers": lambda s, d: jlora.stack_layers(s),
        "summary": lambda s, d: jlora.summary(s),
        "survey": lambda s, d: jlora.survey(fn, s, X),
        "trainable_mask": lambda s, d: jlora.trainable_mask(s),
        "unmerge": lambda s, d: jlora.unmerge(s, jlora.merge(TREE, undo=True)[1]),
        "unstack_layers": lambda s, d: jlora.unstack_layers(s, ["q"]),
        "update": lambda s, d: jlora.update(SET, "german", s),
        "with_dropout": lambda s, d: jlora.with_dropout(s, None),
        "without_adapters": lambda s, d: jlora.without_adapters(s),
    },
    "jlora.checkpoint": {
        "fingerprint": lambda s, d: checkpoint.fingerprint(s),
        "load_adapter": lambda s, d: checkpoint.load_adapter(saved(d), s),
        "save_adapter": lambda s, d: checkpoint.save_adapter(d / "a", s),
        "save_merged": lambda s, d: checkpoint.save_merged(d / "a", s),
    },
    "jlora.init": {
        "corda": lambda s, d: init.corda(fn, s, [X]),
        "eva": lambda s, d: init.eva(fn, s, [X]),
        "loftq": lambda s, d: init.loftq(s),
        "lora_ga": lambda s, d: init.lora_ga(loss, s, [X]),
        "unshift": lambda s, d: init.unshift(s, TREE, PARAMS),
    },
    "jlora.models": {
        "generate": lambda s, d: models.generate(
            GPT2, s, jnp.ones((1, 2), int), transform=jlora.lora
        ),
        "resize_vocabulary": lambda s, d: models.resize_vocabulary(GPT2, s, 20),
        "save": lambda s, d: models.save(GPT2, s, d / "m"),
        "untie": lambda s, d: models.untie(GPT2, s),
    },
    "jlora.optim": {
        "decay_mask": lambda s, d: optim.decay_mask(s),
        "lora_fa": lambda s, d: optim.lora_fa(optax.sgd(1.0), s),
        "orthogonality": lambda s, d: optim.orthogonality(s),
        "prune": lambda s, d: optim.prune(s),
    },
    "jlora.peft": {
        "load": lambda s, d: peft.load(saved_for_peft(d), s),
        "load_all": lambda s, d: peft.load_all(saved_for_peft(d), s),
        "save": lambda s, d: peft.save(d / "p", s),
    },
    "jlora.sweep": {
        "run": lambda s, d: sweep.run(
            loss, s, sweep.grid(rank=[1, 2]), [X], steps=1, targets=["q"]
        ),
    },
    "jlora.train": {
        "fit": lambda s, d: fitted(s, d),
    },
}  # fmt: skip
OWN_WORDS = {
    "add": "is given as a set",
    "combine": "both halves hold",
    "jlora.models save": "are not those of this GPT2",
    "jlora.models resize_vocabulary": "are not those of this GPT2",
    "jlora.models untie": "are not those of this GPT2",
    "unmerge": "not of one tree",
    "update": "is given as a set",
}
# They hand parameters on to the functions that they are given, or take none with nodes.
OTHERS = {"generate_with", "unreplicate"}
CASES = [(room, name) for room, calls in TAKING_TREES.items() for name in calls]


def fitted(params, folder):
    with train.RunFolder.claim(folder / "run", {}) as run:
        train.fit(loss, params, optax.sgd(1.0), [X], run, steps=1)


def saved(folder):
    checkpoint.save_adapter(folder / "a", TREE)
    return folder / "a"


def saved_for_peft(folder):
    peft.save(folder / "p", TREE)
    return folder / "p"


@pytest.mark.parametrize(("room", "name"), CASES)
def test_a_set_for_parameters_is_refused(room, name, tmp_path):
    told = OWN_WORDS.get(name) or OWN_WORDS.get(f"{room} {name}", "is a set")
    with pytest.raises(jlora.LoraError, match=told):
        TAKING_TREES[room][name](SET, tmp_path)
    assert not (tmp_path / "m").exists()


def test_every_function_of_parameters_is_tried():
    takes = {"tree", "trees", "params", "base_params"}
    for room, calls in TAKING_TREES.items():
        module = importlib.import_module(room)
        found = {
            name
            for name in dir(module)
            if inspect.isfunction(f := getattr(module, name))
            and takes & set(inspect.signature(f).parameters)
        }
        assert found - OTHERS <= calls.keys(), room


def test_what_the_error_says_to_write_works():
    with pytest.raises(jlora.StructureError) as told:
        jlora.merge({"model": SET})
    text = str(told.value)
    assert "AdapterSet(german (rank 2, active); a base of 2 leaves) is a set" in text
    assert "adapters.params" in text
    assert "adapters['german']" in text
    for tree in (SET.params, SET["german"]):
        assert not any(map(jlora.is_node, jlora.merge(tree)["q"].values()))


def test_a_state_and_an_optimiser_refuse_a_set():
    with pytest.raises(jlora.StructureError, match="is a set"):
        train.TrainState.create(SET, optax.sgd(1.0))
    tx = optim.adalora(optax.sgd(1.0), target_rank=1, total_steps=5)
    with pytest.raises(jlora.StructureError, match="is a set"):
        tx.init(SET)
