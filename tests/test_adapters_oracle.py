"""Several adapters and their sums beside PEFT's own, and what of PEFT's is wrong."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft_live
import peft_nets
import pytest
from peft_live import logits_of, note, peft, torch
from peft_nets import IDS

import jlora
import jlora.peft

pytestmark = pytest.mark.oracle

# -- several on a net of all kinds of layers -------------------------------------------

SETTINGS = {
    "plain": dict(r=2, lora_alpha=6, target_modules=["q", "v", "emb", "image"]),
    "dora": dict(r=3, lora_alpha=5, use_dora=True, target_modules=["q", "c_attn"]),
    "biased": dict(r=2, use_rslora=True, lora_bias=True, target_modules=["q", "head"]),
}


@pytest.fixture(scope="module")
def theirs():
    """PEFT's model with three adapters, everything they train at random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = iter(SETTINGS.items())
        name, settings = next(names)
        model = peft.get_peft_model(
            peft_live.net(), peft.LoraConfig(**settings), adapter_name=name
        )
        for name, settings in names:
            model.add_adapter(name, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data *= 1 + torch.rand_like(p)
        elif "lora_" in name:
            torch.nn.init.normal_(p, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    peft_live.peft_save(theirs, folder)
    adapters = peft_live.tree_of(peft_live.net())
    for name, tree in jlora.peft.load_all(folder, adapters).items():
        adapters = jlora.add(adapters, name, tree)
    return adapters


@pytest.mark.parametrize(
    "names",
    [["plain"], ["dora"], ["dora", "plain"], ["dora", "plain", "biased"]],
    ids="+".join,
)
def test_active_adapters_are_peft_s(theirs, ours, names, record_property):
    """With DoRA first: in PEFT it scales the updates of those before it too."""
    theirs.base_model.set_adapter(names)
    want = logits_of(theirs, IDS)
    tree = jlora.activate(ours, names).params
    note(record_property, "logits", jlora.lora(peft_nets.apply)(tree, IDS), want)
    note(record_property, "merged", peft_nets.apply(jlora.merge(tree), IDS), want)
    with theirs.disable_adapter():
        base = logits_of(theirs, IDS)
    assert np.max(np.abs(base - want)) > 0.1
    if len(names) > 1:
        theirs.base_model.set_adapter(names[::-1])
        assert np.max(np.abs(logits_of(theirs, IDS) - want)) > 0.1
    off = jlora.disable(ours).params
    note(record_property, "disabled", peft_nets.apply(off, IDS), base)


def test_a_sum_goes_back_to_peft(theirs, ours, tmp_path, record_property):
    """What PEFT cannot make it computes: the exact sum with DoRA in it."""
    mixed = jlora.weighted(ours, {"dora": 1.5})
    jlora.peft.save(tmp_path, mixed, fan_in_fan_out=True)
    want = peft_nets.apply(jlora.merge(mixed), IDS)
    got = logits_of(peft_live.peft_load(peft_live.net(), tmp_path), IDS)
    note(record_property, "logits", got, want)


# -- sums on two layers, against their definitions -------------------------------------


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = torch.nn.Linear(64, 48), torch.nn.Linear(64, 96)

    def forward(self, x):
        return torch.cat([self.q(x), self.v(x)], -1)


VARIANTS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}
WEIGHTS = {"a": 0.7, "b": 0.3}
DENSITY = 0.4


def two_adapters(variant):
    settings = dict(r=8, lora_alpha=16, target_modules=["q", "v"], **VARIANTS[variant])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Two(), peft.LoraConfig(**settings), "a")
        model.add_adapter("b", peft.LoraConfig(**settings))
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data *= 1 + 0.3 * torch.rand_like(p)
        elif "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def change_of(model, names):
    """What active adapters change: the kernel [in, out] over the bias [1, out]."""

    def affine():
        with torch.no_grad():
            bias = model(torch.zeros(1, 64)).numpy()
            return np.concatenate([model(torch.eye(64)).numpy() - bias, bias])

    model.base_model.set_adapter(names)
    active = affine()
    with model.disable_adapter():
        return active - affine()


def change_here(tree, base):
    merged = jlora.merge(tree)
    rows = [
        jnp.concatenate([p[n]["kernel"], p[n]["bias"][None]]) for p in (merged, base)
        for n in ("q", "v")
    ]  # fmt: skip
    return np.asarray(jnp.concatenate(rows[:2], 1) - jnp.concatenate(rows[2:], 1))


def definition(method, changes):
    """The sum as its paper defines it, kernel by kernel and bias by bias."""
    out = np.zeros_like(changes[0])
    weights = list(WEIGHTS.values())
    for rows in (slice(0, 64), slice(64, 65)):
        for columns in (slice(0, 48), slice(48, 144)):
            each = [x[rows, columns] for x in changes]
            if method in ("ties", "magnitude_prune"):
                each = [_largest(x) for x in each]
            if method not in ("ties", "dare_ties"):
                out[rows, columns] = sum(
                    w * x for w, x in zip(weights, each, strict=True)
                )
                continue
            sign = np.where(sum(each) >= 0, 1, -1)
            agree = [np.sign(x) == sign for x in each]
            total = sum(w * x * m for w, x, m in zip(weights, each, agree, strict=True))
            out[rows, columns] = total / np.maximum(sum(m * 1 for m in agree), 1)
    return out


def _largest(x):
    count = int(DENSITY * x.size)
    return np.where(np.abs(x) >= np.sort(np.abs(x), None)[-count], x, 0)


def best(change, rank):
    """The nearest change of that rank, kernel by kernel; the bias as it is."""
    out = change.copy()
    for columns in (slice(0, 48), slice(48, 144)):
        u, s, vt = np.linalg.svd(change[:64, columns], full_matrices=False)
        out[:64, columns] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return out


def off(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


ALL = ("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd",
       "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd")  # fmt: skip
# PEFT's result is off from the definition's by at least this much (docs/guides/adapters.md).
WRONG = {
    "LoRA": dict.fromkeys(
        ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"], 0.75
    ),
    "rsLoRA": dict.fromkeys(ALL, 1.0),
    "DoRA": dict.fromkeys(ALL, 0.15),
    "lora_bias": dict.fromkeys(ALL, 0.3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_beside_peft_s(variant, tmp_path, record_property):
    model = two_adapters(variant)
    changes = [change_of(model, [n]) for n in WEIGHTS]
    peft_live.peft_save(model, tmp_path)
    base = peft_live.tree_of(model.unload())
    model = two_adapters(variant)
    adapters = base
    for name, tree in jlora.peft.load_all(tmp_path, base).items():
        adapters = jlora.add(adapters, name, tree)
    for combination in ALL:
        method = combination.removesuffix("_svd")
        # DARE at density one: what is random there is tested elsewhere.
        density = 1.0 if "dare" in method else DENSITY
        thinned = method not in ("linear", "cat", "svd")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.base_model.add_weighted_adapter(
                [*WEIGHTS], [*WEIGHTS.values()], combination,
                combination_type=combination, density=density if thinned else None,
            )  # fmt: skip
        theirs = change_of(model, [combination])
        how = {"density": density} if thinned else {}
        if "dare" in method:
            how["key"] = jax.random.key(0)
        ours = jlora.weighted(adapters, WEIGHTS, combination, **how)
        full = jlora.weighted(adapters, WEIGHTS, combination, rank=64, **how)
        want = definition(method, changes)
        # Exact at full rank; else the nearest of rank 8, of DoRA its low-rank part.
        assert off(change_here(full, base), want) < 2e-5
        kept = want if method in ("linear", "cat") else best(want, 8)
        got = off(change_here(ours, base), kept)
        if variant == "DoRA" and method == "svd":  # which keeps the gains
            assert off(change_here(ours, base), want) < off(kept, want)
        else:
            assert got < 2e-5, combination
        wrong = off(theirs, kept)
        record_property(f"{variant} {combination}", f"{got:.1e} {wrong:.1e}")
        print(f"{variant:10} {combination:20} ours {got:.1e} PEFT {wrong:.1e}")
        if combination in WRONG[variant]:
            assert wrong > WRONG[variant][combination]
        else:
            assert wrong < 2e-5, combination
