"""PyTorch's side of the live tests: a net, and PEFT's models made, saved, loaded."""

import json
import warnings

import jax
import numpy as np
import peft_nets
import pytest
from peft_nets import D, E, V

import jlora
import jlora.peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CLOSE = dict(rtol=1e-5, atol=1e-5)


class Experts(torch.nn.Module):
    """Of every expert half the tokens: [E, out, in], as in transformers 5."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.empty(E, 10, D))
        self.down_proj = torch.nn.Parameter(torch.empty(E, D, 5))

    def forward(self, x):
        gate, up = torch.einsum("btd,eod->ebto", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebto,edo->btd", torch.tanh(gate) * up, self.down_proj)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(V, D)
        self.q = torch.nn.Linear(D, D)
        self.v = torch.nn.Linear(D, D, bias=False)
        self.c_attn = transformers.pytorch_utils.Conv1D(2 * D, D)
        self.image = torch.nn.Conv2d(2, 7, (3, 2), stride=(1, 2), padding=(1, 0))
        self.time = torch.nn.Conv1d(D, D, 3, padding=1)
        self.experts = Experts()
        self.head = torch.nn.Linear(3 * 7, V)

    def forward(self, ids):
        x = self.emb(ids)
        x = x + torch.tanh(self.q(x)) * self.v(x)
        a, b = self.c_attn(x).split(D, -1)
        x = x + torch.tanh(a) * b + self.time(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.experts(x)
        x = self.image(torch.stack([x, torch.sin(x)], 1))  # [B, 7, T, 3]
        return self.head(torch.tanh(x).permute(0, 2, 1, 3).flatten(2))


def net(seed=0, make=Net):
    torch.manual_seed(seed)
    model = make().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def tree_of(model):
    """A model's parameters as a Flax tree."""
    return peft_nets.tree_of(
        {n: p.detach().numpy() for n, p in model.named_parameters()}
    )


def peft_model(model, seed=1, **settings):
    """PEFT's model with everything it trains at random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    for p in out.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.4)
    return out


def peft_save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def peft_load(model, folder):
    """PEFT's own reading of a folder; a key too few is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def config_of(folder):
    """The configuration with lists as sets: PEFT's have no order."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {k: set(v) if isinstance(v, list) else v for k, v in config.items()}


def note(record_property, name, got, want):
    """1e-5 of the logits' size; the largest difference stays in the run's record."""
    size = max(1.0, float(np.max(np.abs(want))))
    off = float(np.max(np.abs(np.asarray(got) - want))) / size
    record_property(name, off)
    assert off < 1e-5


def same_tensors(x, y):
    pairs = [jax.tree_util.tree_leaves_with_path(t) for t in (x, y)]
    for (p, a), (q, b) in zip(*pairs, strict=True):
        assert p == q
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), p


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).numpy()


def goes_round(
    make, settings, apply, ids, least, tmp_path, record_property, derived=True
):
    """PEFT's adapter gives PEFT's logits here, merged too, and goes back the same.

    `least` is how much the adapter must change of the base's logits at least. With
    `derived` it goes back once more, under the configuration that the tree tells.
    """
    theirs = peft_model(make(), **settings)
    want = logits_of(theirs, ids)
    assert np.max(np.abs(want - logits_of(make(), ids))) > least
    peft_save(theirs, tmp_path / "theirs")
    base = tree_of(make())
    tree = jlora.peft.load(tmp_path / "theirs", base)
    note(record_property, "in", jlora.lora(apply)(tree, ids), want)
    note(record_property, "merged", apply(jlora.merge(tree), ids), want)

    config = jlora.peft.read_config(tmp_path / "theirs")
    jlora.peft.save(tmp_path / "ours", tree, config=config)
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    same_tensors(jlora.peft.load(tmp_path / "ours", base), tree)
    again = logits_of(peft_load(make(), tmp_path / "ours"), ids)
    note(record_property, "out", again, want)

    if not derived:
        return
    flat = config.get("fan_in_fan_out")
    jlora.peft.save(tmp_path / "derived", tree, fan_in_fan_out=flat)
    same_tensors(jlora.peft.load(tmp_path / "derived", base), tree)
    again = logits_of(peft_load(make(), tmp_path / "derived"), ids)
    note(record_property, "derived", again, want)
