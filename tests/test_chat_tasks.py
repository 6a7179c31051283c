"""Chat and preference training: the losses by their definitions, whole runs by name."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import small_models
from tools import adapter_of

import jlora
from jlora import data, models, tasks, train

ASSETS = Path(__file__).parents[1] / "examples" / "assets"
RNG = np.random.default_rng(0)
PAIRS = {
    f"{side}_{name}": rows
    for side, lengths in (("chosen", (5, 7, 4)), ("rejected", (6, 3, 9)))
    for rows in [[RNG.integers(1, 24, n).astype(np.int32) for n in lengths]]
    for name in ("input_ids", "labels")
}
for side in ("chosen", "rejected"):  # two tokens of a prompt
    PAIRS[f"{side}_labels"] = [
        np.where(np.arange(len(x)) < 2, data.IGNORED, x)
        for x in PAIRS[f"{side}_labels"]
    ]


def batch_of(size=4):
    """The three pairs in a batch that is filled up with a fourth."""
    batches = data.Batches(PAIRS, data.shapes_for([PAIRS], 1), size, pad=0)
    return next(iter(batches))


def adapted():
    model, params = small_models.make("llama", scan_layers=True)
    return model, params, adapter_of(params, 1, 2, ["query", "value"])


def log_probs(logits, batch, side):
    """Sums over each answer's tokens and their numbers, by the definition."""
    log_p = np.asarray(jax.nn.log_softmax(logits))
    labels = batch[f"{side}_labels"]
    own = [
        [log_p[n, t - 1, x] for t, x in enumerate(row) if t and x >= 0]
        for n, row in enumerate(labels[:3])
    ]
    return np.array([np.sum(x) for x in own]), np.array([len(x) for x in own])


def test_the_reference_is_the_base_of_the_same_tree():
    model, params, tree = adapted()
    batch = batch_of()
    apply = jax.jit(model.apply)
    sides = ("chosen", "rejected")

    def scores(params):
        logits = lambda x: apply(
            {"params": params}, batch[f"{x}_input_ids"], batch[f"{x}_attention_mask"]
        )
        return [log_probs(logits(x), batch, x) for x in sides]

    policy, reference = scores(jlora.merge(tree)), scores(params)
    given = [train.AnswerScores(*(sums for sums, _ in x)) for x in (policy, reference)]
    want, metrics = train.dpo_loss(*given, beta=0.3)
    loss_fn = tasks.preference_loss(model, beta=0.3)
    got, found = jax.jit(jlora.lora(loss_fn))(tree, batch, None)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for name, x in metrics.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-3, atol=1e-4)
    # The chosen answer's own loss beside it.
    loss_fn = tasks.preference_loss(model, beta=0.3, sft_weight=0.5)
    (total, _), found = jax.jit(jlora.lora(loss_fn))(tree, batch, None)
    nll = -np.sum(np.asarray(policy[0][0]) / policy[0][1])
    np.testing.assert_allclose(total, want[0] + 0.5 * nll, rtol=1e-4)
    np.testing.assert_allclose(found["sft"][0], nll, rtol=1e-4)
    # What was asked before training says the same, here of means as IPO has them.
    mean = [train.AnswerScores(*(x / n for x, n in y)) for y in (policy, reference)]
    want, _ = train.dpo_loss(*mean, beta=0.3, kind="ipo")
    asked = {f"{side}_reference": np.pad(getattr(mean[1], side), (0, 1))
             for side in sides}  # fmt: skip
    loss_fn = tasks.preference_loss(model, beta=0.3, kind="ipo")
    again, _ = jax.jit(jlora.lora(loss_fn))(tree, {**batch, **asked}, None)
    np.testing.assert_allclose(again, want, rtol=1e-4)


def test_a_step_holds_the_base_once_and_learns_the_preference():
    model, params, tree = adapted()
    size = lambda x: sum(y.nbytes for y in jax.tree.leaves(x))
    loss_fn, tx, batch = tasks.preference_loss(model), optax.adam(3e-2), batch_of()
    taken = tasks.step_memory(loss_fn, tree, tx, batch)
    state = train.TrainState.create(tree, tx)
    given = size((state.trainable, state.opt_state, batch)) + size(params)
    assert given <= taken["arguments"] < given + 0.1 * size(params)
    step = train.make_train_step(loss_fn, tx)
    for _ in range(6):
        state, metrics = step(state, batch)
    assert metrics["accuracy"] == 1
    assert metrics["margin"] > 0.3
    assert metrics["loss"] < 0.6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = ASSETS / "tiny-chat"
    config = models.LlamaConfig(
        **{
            **small_models.LLAMA,
            "num_hidden_layers": 1,
            "max_position_embeddings": 128,
        },
        vocab_size=768,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = models.Llama(config)
    params = model.init(jax.random.key(0), small_models.IDS)["params"]
    models.save(model, params, folder, tokenizer_from=tokenizer)
    return folder


SMALL = "--buckets 1 --batch-size 8 --steps 2 --eval-every 2 --lr 0.01 --warmup 0"
SMALL += " --ask 3 --max-new-tokens 3 --valid-size 8"


def done(name, folder, tmp_path, *words, size=24):
    kinds = {"chat": "sft", "preference": "preferences"}
    files = [str(ASSETS / "chat" / f"{kinds[name]}.{x}.jsonl")
             for x in ("train", "test")]  # fmt: skip
    argv = [] if size is None else ["--train-size", str(size)]
    argv += [*SMALL.split(), "--model", str(folder), "--train", files[0]]
    argv += ["--valid", files[1], "--output", str(tmp_path / "run"), *words]
    tasks.run(name, train.read_settings(tasks.KINDS[name].settings, argv))
    return tmp_path / "run"


def test_a_whole_run_on_packed_conversations(tiny, tmp_path):
    run = done("chat", tiny, tmp_path, "--pack", "--max-length", "96")
    report = (run / "report.md").read_text()
    assert "24 conversations in" in report
    assert "| perplexity |" in report
    assert (run / "merged" / "chat_template.jinja").exists()
    assert len((run / "outputs" / "after.txt").read_text().splitlines()) == 3
    merged, base = models.load(run / "merged")[1], models.load(tiny)[1]
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), merged, base)
    assert sum(jax.tree.leaves(changed)) == 2  # query and value


def test_conversations_that_are_streamed(tiny, tmp_path):
    words = ["--pack", "--max-length", "96"]
    run = done("chat", tiny, tmp_path, *words, "--streaming", size=None)
    report = (run / "report.md").read_text()
    assert "| perplexity |" in report
    assert "train: " not in report  # nobody has counted them
    assert "held out: 8 conversations in" in report


def test_streamed_conversations_are_those_that_are_read(tiny):
    tokenizer = data.load_tokenizer(tiny)
    file = ASSETS / "chat" / "sft.train.jsonl"
    talks = data.read_conversations(file)[:20]
    known = {"answers": "last", "stops": [1], "vocabulary": 768}
    want = data.tokenise_chats(tokenizer, talks, 40, **known).columns
    rows = [json.loads(x) for x in file.read_text().splitlines()[:20]]
    got = data.EncodeChats(tokenizer, 40, **known)(rows)
    assert got.keys() == want.keys()
    for name, column in want.items():
        for one, other in zip(got[name], column, strict=True):
            np.testing.assert_array_equal(one, other)
    none = data.EncodeChats(tokenizer, 2)(rows)  # of which nothing is left
    assert none == {"input_ids": [], "labels": []}
    with pytest.raises(jlora.DataError, match="row 1 has the columns text; expected"):
        data.EncodeChats(tokenizer, 40)([{"text": "x"}])


def test_a_whole_run_on_preferences(tiny, tmp_path):
    run = done("preference", tiny, tmp_path, "--precompute", "--loss", "hinge")
    report = (run / "report.md").read_text()
    assert "| chosen gained more than rejected | 0% |" in report
    assert (run / "outputs" / "rewards.png").stat().st_size > 5000
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if row["event"] == "valid"]
    assert valid[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert valid[-1]["margin"] != 0


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("chat", "--model x", "data is needed"),
        ("chat", "--model x --train y --streaming", "each of --train and --valid"),
        ("chat", "--train x", "a model is needed"),
        ("chat", "--model x --dataset y --train z", "brings its own splits"),
        ("preference", "--model x --train y --full", "add --precompute"),
        ("preference", "--model x --train y --loss ipo --label-smoothing 0.1", "is of"),
    ],
)
def test_options_that_do_not_go_together(name, argv, message):
    with pytest.raises(jlora.OptionError, match=message):
        train.read_settings(tasks.KINDS[name].settings, argv.split())
