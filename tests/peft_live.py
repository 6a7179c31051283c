"""PyTorch's side of the live tests: PEFT's models made, saved and loaded."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

CLOSE = dict(rtol=1e-5, atol=1e-5)


def tree_of(model):
    """Its parameters as a Flax tree: kernels [in, out], windows first."""
    tables = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    convs = {n for n, m in model.named_modules() if hasattr(m, "kernel_size")}
    tree = {}
    for name, p in model.named_parameters():
        *parents, last = name.split(".")
        module, value = ".".join(parents), p.detach().numpy()
        if module in tables:
            last = "embedding"
        elif module in convs and last == "weight":
            last, value = "kernel", np.moveaxis(value, (0, 1), (-1, -2))
        elif last == "weight" and value.ndim == 1:
            last = "scale"
        elif last == "weight":
            last, value = "kernel", value if parents[-1] == "c_attn" else value.T
        elif value.ndim == 3:  # experts [E, out, in]
            value = value.swapaxes(1, 2)
        at = tree
        for part in parents:
            at = at.setdefault(part, {})
        at[last] = jnp.asarray(value)
    return tree


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
