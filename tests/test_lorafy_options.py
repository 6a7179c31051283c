"""The arguments of `lorafy`: what is taken, what is refused, and in whose words."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import DtypeError, OptionError, ShapeError, TargetError

PARAMS = {
    "attn": {
        "query": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)},
        "value": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)},
    },
    "embed": {"embedding": jnp.ones((11, 7))},
}


def lorafy(**options):
    return jlora.lorafy(PARAMS, **{"rank": 2, "targets": ["query"], **options})


def adapter(tree):
    return tree["attn"]["query"]["kernel"].adapters[""]


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": np.int64(2)},
        {"rank": np.uint8(2)},
        {"rank": jnp.int32(2)},
        {"rank": jnp.asarray(2)},
        {"rank": np.array(2)},
        {"alpha": 2},
        {"alpha": np.float32(2)},
        {"alpha": jnp.asarray(2.0)},
        {"dropout": 0},
        {"dropout": np.float64(0)},
        {"dtype": "float32"},
        {"dtype": np.float32},
        {"dtype": np.dtype("float32")},
        {"key": jax.random.key(0)},
        {"key": np.asarray(jax.random.PRNGKey(0))},
        {"train": None, "exclude": None, "trainable_tokens": None},
        {"train": set(), "exclude": ()},
        {"targets": {"query"}},
        {"targets": ("query",)},
        {"targets": iter(["query"])},
        {"targets": {"query": jlora.Target(rank=np.int32(2), alpha=jnp.float32(2))}},
        {"rslora": np.bool_(False), "bias": np.str_("none")},
        {"survey": jlora.survey(lambda p, x: x @ p["attn"]["query"]["kernel"], PARAMS,
                                jnp.ones((1, 7)))},
    ],
)  # fmt: skip
def test_what_means_the_same_gives_the_same(options):
    same(lorafy(**options), lorafy())


def test_settings_are_static_and_hash():
    tree = lorafy(dropout=np.float32(0.5))
    assert hash(jax.tree.structure(tree)) == hash(
        jax.tree.structure(lorafy(dropout=0.5))
    )
    assert type(adapter(tree).dropout) is float


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"rank": True}, ShapeError, "rank=True: expected a whole number"),
        ({"rank": "8"}, ShapeError, "rank='8'"),
        ({"rank": None}, ShapeError, "rank=None"),
        ({"rank": 2.5}, ShapeError, "rank=2.5"),
        ({"rank": np.float32(2)}, ShapeError, "rank=np.float32"),
        ({"rank": [2]}, ShapeError, r"rank=\[2\]"),
        ({"alpha": float("nan")}, OptionError, "alpha=nan: expected a finite number"),
        ({"alpha": float("inf")}, OptionError, "alpha=inf"),
        ({"alpha": -1}, OptionError, "alpha=-1"),
        ({"alpha": 0}, OptionError, "alpha=0"),
        ({"alpha": "16"}, OptionError, "alpha='16'"),
        ({"alpha": True}, OptionError, "alpha=True"),
        ({"alpha": [1.0, 2.0]}, OptionError, "alpha="),
        ({"dropout": -0.1}, OptionError, "dropout=-0.1: expected a probability"),
        ({"dropout": float("nan")}, OptionError, "dropout=nan"),
        ({"dropout": None}, OptionError, "dropout=None"),
        ({"dropout": "0.1"}, OptionError, "dropout='0.1'"),
        ({"dtype": jnp.int32}, DtypeError, "int32"),
        ({"dtype": None}, DtypeError, "dtype=None"),
        ({"dtype": "float33"}, DtypeError, "float33"),
        ({"dtype": jnp.complex64}, DtypeError, "floating-point"),
        ({"dtype": jnp.float64}, DtypeError, "jax_enable_x64"),
        ({"key": 0}, OptionError, r"key=0: expected one PRNG key, jax.random.key"),
        ({"key": jax.random.split(jax.random.key(0))}, OptionError, r"\[2\]"),
        ({"key": jnp.zeros(2)}, OptionError, r"float32\[2\]"),
        ({"targets": None}, TargetError, "targets=None"),
        ({"targets": []}, TargetError, r"targets=\[\] names no kernel"),
        ({"targets": ""}, TargetError, "names no kernel"),
        ({"targets": {}}, TargetError, "names no kernel"),
        ({"targets": 3}, TargetError, "targets=3: expected a list"),
        ({"targets": [3]}, TargetError, "3 is no entry"),
        ({"targets": [""]}, TargetError, "'' is no entry"),
        ({"targets": ["query", None]}, TargetError, "None is no entry"),
        ({"targets": {"query": 4}}, TargetError, r"expected its settings, jlora.Target"),
        ({"targets": {"query": {"rank": 4}}}, TargetError, "jlora.Target"),
        ({"train": "embed"}, TargetError, r"pass a list, \['embed'\]"),
        ({"train": [0]}, TargetError, "train: 0 is no entry"),
        ({"exclude": "embed"}, TargetError, r"pass a list, \['embed'\]"),
        ({"bias": None}, OptionError, "bias=None: expected 'none', 'lora_only' or 'all'"),
        ({"bias": True}, OptionError, "bias=True"),
        ({"rslora": 1}, OptionError, "rslora=1: expected True or False"),
        ({"dora": "yes"}, OptionError, "dora='yes'"),
        ({"lora_bias": None}, OptionError, "lora_bias=None"),
        ({"dora": True, "lora_bias": True}, OptionError, "the two together"),
        ({"init": None}, OptionError, "init=None: expected one of"),
        ({"init": 3}, OptionError, "init=3"),
        ({"init": lambda *_: (jnp.ones(2), jnp.ones(2))}, ShapeError, "attn/query/kernel"),
        ({"survey": lambda p: p}, OptionError, "expected what jlora.survey"),
        ({"trainable_tokens": [1, 2]}, OptionError, "trainable_tokens="),
        ({"trainable_tokens": {"embed": 3}}, OptionError, "the rows of each table"),
        ({"trainable_tokens": {"embed": ["a"]}}, OptionError, "the rows of each table"),
        ({"trainable_tokens": {"embed": [11]}}, ShapeError, "rows 0 to 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_its_own_words(options, error, says):
    with pytest.raises(error, match=says):
        lorafy(**options)
    assert issubclass(error, jlora.LoraError)


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("r", "rank"), ("lora_alpha", "alpha"), ("target_modules", "targets"),
        ("lora_dropout", "dropout"), ("modules_to_save", "train"),
        ("exclude_modules", "exclude"), ("use_dora", "dora"), ("use_rslora", "rslora"),
        ("init_lora_weights", "init"), ("trainable_token_indices", "trainable_tokens"),
        ("rank_pattern", "targets={pattern: jlora.Target(rank=...)}"),
    ],
)  # fmt: skip
def test_pefts_words_are_told_ours(word, ours):
    with pytest.raises(OptionError) as error:
        jlora.lorafy(PARAMS, **{word: 8})
    assert f"{word} is {ours} here" in str(error.value)


def test_other_unknown_words_are_told_the_nearest():
    with pytest.raises(OptionError, match="targts: did you mean targets") as error:
        jlora.lorafy(PARAMS, targts=["query"], xyz=1)
    assert isinstance(error.value, TypeError)  # as Python's own would be
    assert "  xyz\n" in str(error.value)
    with pytest.raises(OptionError, match=r"lora_alpha is alpha here"):
        jlora.Target(lora_alpha=4)
    with pytest.raises(TypeError):
        jlora.Target(4)


def test_a_target_is_a_value():
    target = jlora.Target(rank=np.int64(4), alpha=2, in_axes=[0])
    assert target == jlora.Target(rank=4, alpha=2.0, in_axes=(0,))
    assert type(target.rank) is int
    assert copy.deepcopy(target) == target
    assert pickle.loads(pickle.dumps(target)) == target


def test_alpha_may_be_traced():
    scale = jax.jit(lambda alpha: adapter(lorafy(alpha=alpha)).scale)(3.0)
    assert float(scale) == 1.5


def test_a_users_initialiser():
    init = lambda key, a, b, fan_in, dtype: (
        jnp.full(a, fan_in, dtype),
        jnp.ones(b, dtype),
    )
    t = adapter(lorafy(init=init, dtype=jnp.bfloat16))
    assert t.a.dtype == t.b.dtype == jnp.bfloat16
    assert float(t.a[0, 0]) == 7


@pytest.mark.parametrize("key", [0, jax.random.split(jax.random.key(0)), jnp.ones(2)])
def test_dropouts_key_is_checked_too(key):
    tree = lorafy(dropout=0.5)
    with pytest.raises(OptionError, match="expected one PRNG key"):
        jlora.with_dropout(tree, key)
    typed, raw = (
        jlora.with_dropout(tree, k) for k in (jax.random.key(3), jax.random.PRNGKey(3))
    )
    keys = [jax.random.key_data(adapter(tree).key) for tree in (typed, raw)]
    np.testing.assert_array_equal(*keys)
