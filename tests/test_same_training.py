"""The same training in two frameworks: PEFT's loss curve and adapter, and jlora's.

One base, one adapter that PEFT made, the same batches, AdamW with decoupled decay, a
schedule and clipping; 50 steps of each. What differs is who computes.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jlora
import jlora.peft
import jlora.train
from jlora import models

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle
STEPS, BATCHES, V = 50, 7, 29
CLOSE = 1e-4  # relative; 4e-6 is measured, and 4e-2 for the least mistake below
ENCODER = dict(
    vocab_size=V, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, max_position_embeddings=13, initializer_range=0.3,
    num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
T5 = dict(
    vocab_size=V, d_model=12, d_ff=20, d_kv=4, num_heads=3, num_layers=2,
    decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0,
)  # fmt: skip
TOKENS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its adapter and its training.

    Attributes:
      model: a class of transformers, and what its configuration is made of.
      adapter: of a `LoraConfig`.
      loss: jlora's loss of a model, its parameters and a batch.
      labels: what kind of labels PyTorch takes.
      clip: a norm that some steps exceed and others do not.
      step: of `jlora.train.make_train_step`.
    """

    model: tuple[str, dict[str, Any]]
    adapter: dict[str, Any]
    loss: Callable[..., Any]
    labels: str
    clip: float
    step: dict[str, Any] = dataclasses.field(default_factory=dict)


def t5_loss(model, params, batch, key):
    labels = batch["labels"]
    logits = model.apply(
        {"params": params},
        batch["input_ids"],
        batch["attention_mask"],
        models.shift_right(labels, model.config),
    )
    return jlora.train.cross_entropy(logits, labels)


def label_loss(model, params, batch, key):
    logits = model.apply(
        {"params": params}, batch["input_ids"], batch["attention_mask"]
    )
    return models.label_loss(logits, batch["labels"], model.config)


def causal_loss(model, params, batch, key):
    logits = model.apply(
        {"params": params}, batch["input_ids"], batch["attention_mask"]
    )
    return jlora.train.cross_entropy(logits[:, :-1], batch["labels"][:, 1:])


CASES = {
    "t5 1.1": Case(
        ("T5ForConditionalGeneration",
         dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
        dict(target_modules=["q", "v", "wi_0", "wo"], r=3, lora_alpha=5,
             task_type="SEQ_2_SEQ_LM"),
        t5_loss, "tokens", 3.0),
    # Microbatches of unequal numbers of labels are to add up to the batch.
    "t5 1.0, accumulated": Case(
        ("T5ForConditionalGeneration", dict(T5, feed_forward_proj="relu")),
        dict(target_modules=["q", "v"], r=2, lora_alpha=8, task_type="SEQ_2_SEQ_LM"),
        t5_loss, "tokens", 1.0, dict(accumulate=3)),
    "roberta": Case(
        ("RobertaForSequenceClassification", dict(ENCODER, pad_token_id=1)),
        dict(target_modules=["query", "value"], r=3, lora_alpha=5, use_rslora=True,
             task_type="SEQ_CLS"),
        label_loss, "classes", 1.4),
    "bert": Case(
        ("BertForSequenceClassification", dict(ENCODER, pad_token_id=0)),
        dict(target_modules=["query", "value", "intermediate.dense"], r=2,
             rank_pattern={"value": 3}, alpha_pattern={"query": 7},
             bias="lora_only", task_type="SEQ_CLS"),
        label_loss, "classes", 1.0),
    "gpt2": Case(
        ("GPT2LMHeadModel",
         dict(vocab_size=V, n_positions=13, n_embd=12, n_layer=2, n_head=3,
              resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
              initializer_range=0.3, **TOKENS)),
        dict(target_modules=["c_attn", "c_fc"], r=3, lora_alpha=5, fan_in_fan_out=True,
             task_type="CAUSAL_LM"),
        causal_loss, "prompts", 1.0),
    "llama": Case(
        ("LlamaForCausalLM",
         dict(vocab_size=V, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
              num_attention_heads=3, num_key_value_heads=1,
              initializer_range=0.3, **TOKENS)),
        dict(target_modules="all-linear", r=2, lora_alpha=5, task_type="CAUSAL_LM"),
        causal_loss, "prompts", 1.8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdamW:
    """An optimiser that both frameworks have, by the papers' names."""

    rate: float = 2e-2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-3  # so large that it matters whether it is under the root
    decay: float = 0.3
    warmup: int = 5
    eps_in_root: bool = False

    def at(self, step):
        """The rate: up to its peak in `warmup` steps, then down to zero."""
        up, down = (step + 1) / self.warmup, (STEPS - step) / (STEPS - self.warmup)
        return self.rate * (jnp.minimum if isinstance(step, jax.Array) else min)(
            up, down
        )

    def optax(self):
        root = {"eps_root": self.eps**2, "eps": 0.0}
        return optax.adamw(
            self.at, *self.betas, weight_decay=self.decay,
            **(root if self.eps_in_root else {"eps": self.eps}),
        )  # fmt: skip

    def torch(self, parameters):
        out = torch.optim.AdamW(
            parameters, 1.0, self.betas, self.eps, weight_decay=self.decay
        )
        return out, torch.optim.lr_scheduler.LambdaLR(out, self.at)


def batches(case):
    """Padded, with another number of labels in each."""
    rng = np.random.default_rng(0)
    pad = case.model[1]["pad_token_id"]
    for _ in range(BATCHES):
        ids = rng.integers(2, V, (6, 11))
        length = rng.integers(2, 12, (6, 1))
        mask = (np.arange(11) < length).astype(np.int64)
        if case.labels == "tokens":
            labels = rng.integers(2, V, (6, 7))
            labels[np.arange(7) >= rng.integers(1, 8, (6, 1))] = -100
        elif case.labels == "prompts":
            asked = np.arange(11) < rng.integers(0, 5, (6, 1))
            labels = np.where((mask == 1) & ~asked, ids, -100)
        else:
            labels = rng.integers(0, ENCODER["num_labels"], 6)
            mask[2:4] = mask[2:4, ::-1]  # on the left as well
        yield {
            "input_ids": np.where(mask, ids, pad),
            "attention_mask": mask,
            "labels": labels,
        }


def train_peft(case, adamw, folder):
    """PEFT's losses; its adapter before and after lies in `first` and `last`."""
    name, settings = case.model
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    base = kind(kind.config_class(**settings))
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn_like(p))
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**case.adapter)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))  # no B is zero
    save(model, folder / "first")
    optimiser, schedule = adamw.torch(trained)
    data, losses = list(batches(case)), []
    for step in range(STEPS):
        batch = {k: torch.tensor(v) for k, v in data[step % BATCHES].items()}
        optimiser.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, case.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    save(model, folder / "last")
    return np.array(losses)


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def train_jlora(case, adamw, folder, **changes):
    """jlora's losses and norms, and the trained tree."""
    model, params = models.load(folder / "base")
    params = jlora.peft.load(folder / "first", params)
    tx = adamw.optax()
    state = jlora.train.TrainState.create(params, tx)
    loss = functools.partial(case.loss, model)
    settings = {"clip_norm": case.clip, **case.step, **changes}
    step = jlora.train.make_train_step(loss, tx, **settings)
    data, metrics = list(batches(case)), []
    for i in range(STEPS):
        state, found = step(state, data[i % BATCHES])
        metrics.append((found["loss"], found["grad_norm"]))
    losses, norms = np.array(jax.device_get(metrics)).T
    return losses, norms, state.params


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """At these sizes PyTorch's threads do nothing but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """A case, its folder, and PEFT's losses."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("run")
    return case, folder, train_peft(case, AdamW(), folder)


def apart(got, want):
    """The largest relative difference of two curves."""
    return float(np.max(np.abs(got - want) / np.abs(want)))


def test_the_same_curve_and_the_same_adapter(trained, record_property, tmp_path):
    case, folder, want = trained
    got, norms, params = train_jlora(case, AdamW(), folder)
    record_property("losses", apart(got, want))
    assert apart(got, want) < CLOSE
    # Something was learned, and clipping was at work in some steps only.
    assert want[-BATCHES:].mean() < 0.8 * want[:BATCHES].mean()
    assert 0 < np.sum(norms > case.clip) < STEPS

    config = jlora.peft.read_config(folder / "first")
    jlora.peft.save(tmp_path / "last", params, config=config)
    files = [f / "last" / "adapter_model.safetensors" for f in (tmp_path, folder)]
    first = load_file(folder / "first" / "adapter_model.safetensors")
    ours, theirs = map(load_file, files)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        moved = np.max(np.abs(value - first[key]))
        off = np.max(np.abs(ours[key] - value)) / moved
        record_property(key, float(off))
        assert moved > 1e-2, key
        assert off < 1e-3, key


@pytest.mark.parametrize("trained", ["roberta"], indirect=True)
@pytest.mark.parametrize(
    ("adamw", "changes"),
    [
        (AdamW(eps_in_root=True), {}),
        (AdamW(decay=0.0), {}),
        (AdamW(), {"clip_norm": None}),
    ],
    ids=["eps in the root", "decay", "clipping"],
)
def test_another_training_gives_another_curve(trained, adamw, changes):
    case, folder, want = trained
    got, _, _ = train_jlora(case, adamw, folder, **changes)
    assert apart(got, want) > 100 * CLOSE
