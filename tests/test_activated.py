"""Activated adapters: on from their invocation tokens on, the base before."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import make
from test_mixed import filled
from tools import assert_close

import jlora
import jlora.peft

V, D, T = 24, 6, 7
CALL = (5, 6)
X = np.array(
    [
        [5, 6, 1, 5, 6, 2, 3],  # twice: the last one counts
        [1, 2, 3, 4, 7, 5, 6],  # at the very end
        [5, 1, 6, 2, 5, 3, 5],  # nowhere
        [5, 6, 2, 2, 3, 4, 8],
    ]
)
ON = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1], [0] * 7, [1] * 7], bool)


def net(linear, p, x):
    """Heads, a scan that is recomputed, a last layer; `linear(kernel, h)` its products."""

    @jax.checkpoint
    def block(h, own):
        q, k, v = jnp.split(linear(own["qkv"]["kernel"], h), 3, -1)
        q, k, v = (
            y.reshape(*y.shape[:2], 2, 3).transpose(0, 2, 1, 3) for y in (q, k, v)
        )
        scores = q @ k.swapaxes(2, 3) + jnp.where(jnp.tri(T, dtype=bool), 0, -1e9)
        y = (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(h.shape)
        return h + linear(own["out"]["kernel"], y) / jnp.std(h, -1, keepdims=True), None

    h = jax.lax.scan(block, jnp.take(p["table"], x, axis=0), p["layers"])[0]
    return jax.jit(jnp.tanh)(linear(p["last"]["kernel"], h[:, 1:]))


def plain(p, x):
    return net(lambda w, h: h @ w, p, x)


@pytest.fixture(scope="module")
def trees():
    n = lambda k, *s: 0.5 * jax.random.normal(jax.random.key(k), s)
    base = {
        "table": n(0, V, D),
        "layers": {
            "qkv": {"kernel": n(1, 2, D, 3 * D)},
            "out": {"kernel": n(2, 2, D, D)},
        },
        "last": {"kernel": n(3, D, 5)},
    }
    shapes = jax.eval_shape(lambda: base)
    survey = jlora.survey(plain, shapes, jax.ShapeDtypeStruct((2, T), int))
    trees = []
    for rank in (2, 3):
        made = jlora.lorafy(shapes, rank, "all-linear", survey=survey)
        trees.append(filled(made, base, np.random.default_rng(rank)))
    return [jlora.activated(trees[0], CALL), trees[1]]


def by_hand(on, p, x):
    """Both products of each layer, and the mask's choice of them."""

    def linear(w, h):
        t = w["t"]
        low = (h @ t.a) @ t.b * t.scale
        return h @ w["base"] + jnp.where(on[:, T - h.shape[1] :, None], low, 0)

    open_up = lambda w: {"base": w.base, "t": w.adapters[""]}
    opened = jax.tree.map(
        lambda x: open_up(x) if jlora.is_node(x) else x, p, is_leaf=jlora.is_node
    )
    return net(linear, opened, x)


def test_activated_ids_are_those_from_the_last_invocation_on(trees):
    bank = jlora.bank(trees)
    ids = jax.jit(lambda n, x: jlora.activated_ids(bank, n, x))
    np.testing.assert_array_equal(ids(np.zeros(4, int), X), np.where(ON, 0, -1))
    np.testing.assert_array_equal(ids(np.array([1, -1, 0, 1]), X)[::3], np.ones((2, T)))
    assert (np.asarray(ids(np.array([1, -1, 0, 1]), X)[1:3]) == -1).all()
    assert (np.asarray(ids(np.zeros(4, int), X[:, :1])) == -1).all()


def test_each_token_is_as_by_hand_and_so_are_gradients(trees):
    """A mixture of an activated adapter, one that acts everywhere, and none."""
    numbers = np.array([0, 0, 1, -1])
    on = np.where(numbers[:, None] == 0, ON, (numbers == 1)[:, None])

    def ours(trees):
        bank = jlora.bank(trees)
        ids = jlora.activated_ids(bank, numbers, X)
        out = jlora.mixed(plain)(jlora.with_ids(bank, ids), X)
        return jnp.sum(jnp.sin(out)), out

    def theirs(trees):
        rows = [
            by_hand(on[n : n + 1], trees[max(k, 0)], X[n : n + 1])
            for n, k in enumerate(numbers)
        ]
        out = jnp.concatenate(rows)
        return jnp.sum(jnp.sin(out)), out

    half, frozen = zip(*map(jlora.split, trees), strict=True)
    join = lambda half: [jlora.combine(*p) for p in zip(half, frozen, strict=True)]

    @jax.jit
    def both(half):
        return [
            jax.value_and_grad(lambda h, f=f: f(join(h)), has_aux=True)(half)
            for f in (ours, theirs)
        ]

    got, want = both(half)
    assert_close(got[0][1], want[0][1], rtol=1e-5, atol=2e-6)
    assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    # What comes before the invocation is the base's, bit by bit as good as.
    base = plain(jax.tree.map(lambda x: x.base if jlora.is_node(x) else x, trees[0],
                              is_leaf=jlora.is_node), X)  # fmt: skip
    np.testing.assert_allclose(got[0][1][1, :4], base[1, :4], rtol=1e-5, atol=1e-6)
    assert np.abs(got[0][1][1, 4:] - base[1, 4:]).max() > 1e-2


@pytest.mark.parametrize(
    ("fn", "word"),
    [
        (lambda p, x: p["table"][x][:, ::-1] @ p["last"]["kernel"], "no axis"),
        (lambda p, x: p["table"][x].mean(1) @ p["last"]["kernel"], "no axis"),
        (lambda p, x: p["table"][x[:, jnp.arange(T)[::-1]]] @ p["last"]["kernel"], "no axis"),
        (lambda p, x: p["table"][x].reshape(1, -1)[:, :D] @ p["last"]["kernel"],
         "no axis"),
    ],
)  # fmt: skip
def test_tokens_that_are_lost_are_an_error(trees, fn, word):
    bank = jlora.bank(trees)
    mixture = jlora.with_ids(bank, jlora.activated_ids(bank, [0], X[:1]))
    with pytest.raises(
        jlora.UnsupportedOpError, match=rf"'last/kernel'.*{word}.*tokens"
    ):
        jlora.mixed(fn)(mixture, X[:1])


def test_activated_adapters_never_act_everywhere_in_silence(trees):
    bank = jlora.bank(trees)
    for f in (jlora.merge, lambda t: jlora.lora(plain)(t, X)):
        with pytest.raises(jlora.StructureError, match=r"invocation tokens \[5, 6\]"):
            f(jlora.pick(bank, 0))
    jlora.merge(jlora.pick(bank, 1))
    with pytest.raises(jlora.ShapeError, match="activated_ids"):
        jlora.mixed(plain)(jlora.with_ids(bank, [0, 0, 0, 0]), X)
    with pytest.raises(jlora.OptionError, match="one token"):
        jlora.activated(trees[0], [])
    with pytest.raises(jlora.StructureError, match=r"before jlora\.bank"):
        jlora.activated(bank, [1])
    assert jlora.pick(bank, 0)["last"]["kernel"].adapters[""].invocation == CALL


def test_pefts_field_is_read_and_written(tmp_path):
    model, base = make("llama")
    tree = jlora.activated(jlora.lorafy(base, 2, ["query", "value"]), CALL)
    jlora.peft.save(tmp_path / "a", tree, model=model)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [5, 6]
    again = jlora.peft.load(tmp_path / "a", base, model=model)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    with pytest.raises(jlora.StructureError, match="alora_invocation_tokens"):
        jlora.peft.save(
            tmp_path / "b", tree, model=model, config={"alora_invocation_tokens": [1]}
        )


@pytest.mark.oracle
@pytest.mark.parametrize("scan", [False, True])
def test_logits_are_pefts(tmp_path, scan):
    """PEFT's own aLoRA of a Llama, its file read here; and ours read by PEFT."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from jlora import models

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, vocab_size=V,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.3)
    hf.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        alora_invocation_tokens=list(CALL), task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(hf, lora).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(X)).logits.numpy()
        with theirs.disable_adapter():
            plain_logits = theirs(input_ids=torch.tensor(X)).logits.numpy()

    model, base = models.load(tmp_path / "base")
    tree = jlora.peft.load(tmp_path / "adapter", base, model=model)
    jlora.peft.save(tmp_path / "ours", tree, model=model, task_type="CAUSAL_LM")
    if scan:
        model, _ = models.load(tmp_path / "base", scan_layers=True)
        tree = jlora.stack_layers(tree)
    bank = jlora.bank([tree])
    apply = jlora.mixed(lambda p, x: model.apply({"params": p}, x))
    ids = jlora.activated_ids(bank, [0, 0, 0, 0], X)
    got = jax.jit(apply)(jlora.with_ids(bank, ids), X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    assert np.abs(want - plain_logits).max() > 0.1
    assert np.abs(want[2] - plain_logits[2]).max() < 1e-5

    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    with torch.no_grad():
        back = again(input_ids=torch.tensor(X)).logits.numpy()
    np.testing.assert_allclose(back, want, rtol=1e-5, atol=1e-5)


END = 23
PROMPTS = np.array(
    [
        [5, 6, 1, 5, 6, 2],
        [1, 2, 5, 6, 0, 0],  # padding on its right, the invocation before it
        [0, 0, 5, 1, 6, 2],  # and on its left; nobody is called
        [5, 6, 2, 0, 0, 0],
        [0, 3, 1, 2, 5, 6],
    ]
)


@pytest.mark.parametrize("form", [{}, {"scan_layers": True}], ids=["layers", "scan"])
def test_generated_tokens_are_those_of_whole_sequences(form):
    """Greedy, without a cache: the adapter acts from the prompt's invocation on."""
    model, base = make("llama", **form)
    shapes = jax.eval_shape(lambda: base)
    trees = [
        filled(tree, base, np.random.default_rng(n))
        for n, tree in enumerate(
            jlora.lorafy(shapes, 2, ["query", "value", "out", "up", "down"])
            for _ in range(2)
        )
    ]
    bank = jlora.bank([jlora.activated(trees[0], CALL), trees[1]])
    numbers, mask = np.array([0, 0, 0, 1, 0]), (PROMPTS > 0).astype(int)
    how = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": END}
    got = jlora.models.generate(
        model, jlora.with_ids(bank, numbers), PROMPTS, mask,
        transform=jlora.mixed_steps, **how,
    )  # fmt: skip

    apply = jax.jit(jlora.mixed(lambda p, x: model.apply({"params": p}, x)))
    for row, number, new in zip(PROMPTS, numbers, got, strict=True):
        prompt = row[row > 0][None]
        acts = np.asarray(jlora.activated_ids(bank, [number], prompt))
        sequence = prompt
        for token in new:
            more = np.full((1, sequence.size - prompt.size), acts[0, -1])
            ids = np.concatenate([acts, more], axis=1)
            room = ((0, 0), (0, 10 - sequence.size))  # one shape for all lengths
            given = [np.pad(x, room) for x in (ids, sequence)]
            logits = apply(jlora.with_ids(bank, given[0]), given[1])
            assert token == np.argmax(logits[0, sequence.size - 1])
            if token == END:
                break
            sequence = np.append(sequence, [[token]], axis=1)
    none = jlora.models.generate(model, base, PROMPTS, mask, **how)
    same = (got == none).all(axis=1)
    assert same[2]
    assert (~same).sum() >= 2


def test_beams_follow_their_prompts_adapter():
    model, base = make("llama")
    tree = jlora.lorafy(jax.eval_shape(lambda: base), 2, ["query", "value"])
    bank = jlora.bank(
        [jlora.activated(filled(tree, base, np.random.default_rng(0)), CALL)]
    )
    how = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    how |= {"num_beams": 3, "transform": jlora.mixed_steps}
    mask = (PROMPTS > 0).astype(int)
    ids = np.zeros(len(PROMPTS), int)
    got = jlora.models.generate(model, jlora.with_ids(bank, ids), PROMPTS, mask, **how)
    for n, row in enumerate(PROMPTS):
        alone = jlora.models.generate(
            model, jlora.with_ids(bank, [0]), row[None], mask[n][None], **how
        )
        np.testing.assert_array_equal(got[n], alone[0])


def test_an_encoder_is_refused():
    model, base = make("t5")
    bank = jlora.bank([jlora.activated(jlora.lorafy(base, 2, ["query"]), CALL)])
    with pytest.raises(jlora.StructureError, match="without an encoder"):
        jlora.models.generate(
            model, jlora.with_ids(bank, [0]), X[:1], max_new_tokens=2,
            transform=jlora.mixed_steps,
        )  # fmt: skip
