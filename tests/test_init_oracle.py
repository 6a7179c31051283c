"""Initialisations against PEFT's, on the same weights and data."""

import importlib
import warnings

import numpy as np
import peft_nets
import pytest
from peft_live import (
    config_of,
    logits_of,
    net,
    note,
    peft,
    peft_load,
    torch,
    transformers,
    tree_of,
)
from safetensors.numpy import load_file

import jlora
import jlora.peft

# After PyTorch and PEFT are known to be there.
CordaConfig = importlib.import_module("peft.tuners.lora.config").CordaConfig
preprocess_loraga = importlib.import_module("peft.tuners.lora.loraga").preprocess_loraga

pytestmark = pytest.mark.oracle

SETTINGS = dict(r=2, lora_alpha=5.0)


def started(init, modules, make=net, **settings):
    """PEFT's model as it starts."""
    config = peft.LoraConfig(
        **{**SETTINGS, **settings}, target_modules=modules, init_lora_weights=init
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(make(), config).eval()


def lorafied(init, modules, **options):
    entries = {m: jlora.Target(init=init) for m in modules}
    return jlora.lorafy(tree_of(net()), 2, entries, alpha=5.0, **options)


def parts(model, name):
    """PEFT's update and base of one layer, as [in, out]."""
    layer = model.base_model.model.get_submodule(name)
    delta = layer.get_delta_weight("default").detach().numpy()
    base = layer.base_layer.weight.detach().numpy()
    flat = isinstance(layer.base_layer, transformers.pytorch_utils.Conv1D)
    return (delta, base) if flat else (delta.T, base.T)


def assert_starts_alike(model, tree, modules, record_property):
    for name in modules:
        node = tree[name]["kernel"]
        delta, base = parts(model, name)
        assert np.max(np.abs(delta)) > 0.1
        note(record_property, f"{name} update", node.delta(), delta)
        note(record_property, f"{name} base", node.base, base)


@pytest.mark.parametrize(
    ("init", "modules", "rslora"),
    [
        ("pissa", ["q", "v", "c_attn", "head"], False),
        ("pissa", ["q", "c_attn"], True),
        ("olora", ["q", "v", "head"], False),
    ],
)
def test_factors_of_the_kernel(init, modules, rslora, record_property):
    model = started(init, modules, use_rslora=rslora)
    tree = lorafied(init, modules, rslora=rslora)
    assert_starts_alike(model, tree, modules, record_property)


def test_orthogonal(record_property):
    """Random, so alike in what they are: each factor's size, and their product."""
    torch.manual_seed(0)
    layer = started("orthogonal", ["head"], r=8).base_model.model.head
    theirs = [getattr(layer, f"lora_{x}")["default"].weight for x in "AB"]
    tree = jlora.lorafy(tree_of(net()), 8, ["head"], init="orthogonal")
    t = tree["head"]["kernel"].adapters[""]
    for x, y in zip((t.a, t.b), theirs, strict=True):
        assert np.std(x) == pytest.approx(float(y.detach().std()), rel=0.3)
    assert float(layer.get_delta_weight("default").detach().abs().max()) < 1e-6
    assert np.max(np.abs(tree["head"]["kernel"].delta())) < 1e-6


def randomise(model):
    for n, p in enumerate(model.parameters()):
        if p.requires_grad:
            torch.manual_seed(n)
            torch.nn.init.normal_(p, std=0.4)


def save(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_of_a_base_that_peft_makes_again(init, tmp_path, record_property):
    """PEFT's file of a changed base is read here as PEFT reads it, on the original."""
    modules = ["q", "v"] if init == "olora" else ["q", "c_attn"]
    model = started(init, modules)
    randomise(model)
    want = logits_of(model, peft_nets.IDS)
    save(model, tmp_path)
    again = logits_of(peft_load(net(), tmp_path), peft_nets.IDS)
    np.testing.assert_allclose(again, want, rtol=1e-4, atol=1e-4)
    tree = jlora.peft.load(tmp_path, tree_of(net()))
    got = jlora.lora(peft_nets.apply)(tree, peft_nets.IDS)
    note(record_property, "logits", got, want)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_conversion_is_pefts(rslora, tmp_path, record_property):
    """The same file as PEFT's conversion, of the same factors before and after."""
    modules = ["q", "v"]
    model = started("pissa", modules, use_rslora=rslora)
    model.peft_config["default"].init_lora_weights = True
    save(model, tmp_path / "initial")
    residual = tree_of(bare(model))
    initial = jlora.peft.load(tmp_path / "initial", residual, shifted_base=True)
    randomise(model)
    want = logits_of(model, peft_nets.IDS)
    model.peft_config["default"].init_lora_weights = "pissa"
    save(model, tmp_path / "after")
    after = jlora.peft.load(tmp_path / "after", residual, shifted_base=True)
    save(model, tmp_path / "theirs",
         path_initial_model_for_weight_conversion=str(tmp_path / "initial"))  # fmt: skip
    jlora.peft.save(tmp_path / "ours", after, initial=initial)

    files = [load_file(tmp_path / x / "adapter_model.safetensors")
             for x in ("ours", "theirs")]  # fmt: skip
    assert files[0].keys() == files[1].keys()
    for key, x in files[0].items():
        np.testing.assert_allclose(x, files[1][key], rtol=1e-6, err_msg=key)
    ours, theirs = (config_of(tmp_path / x) for x in ("ours", "theirs"))
    for key in ("r", "target_modules", "use_rslora", "init_lora_weights"):
        assert ours[key] == theirs[key], key
    assert ours["lora_alpha"] == pytest.approx(theirs["lora_alpha"], rel=1e-6)
    for folder in ("ours", "theirs"):  # both on the original base, here and in PEFT
        tree = jlora.peft.load(tmp_path / folder, tree_of(net()))
        got = jlora.lora(peft_nets.apply)(tree, peft_nets.IDS)
        note(record_property, f"{folder} here", got, want)
        again = logits_of(peft_load(net(), tmp_path / folder), peft_nets.IDS)
        note(record_property, f"{folder} there", again, want)


def bare(model):
    """The base under PEFT's layers, as it is now."""
    plain = net()
    own = model.base_model.model.state_dict()
    plain.load_state_dict(
        {n: own.get(n, own.get(_under(n), None)) for n in plain.state_dict()}
    )
    return plain


def _under(name):
    module, _, last = name.rpartition(".")
    return f"{module}.base_layer.{last}"


# -- from data -------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(0, peft_nets.V, (1, 40))


def test_eva(record_property):
    """The same ranks, the same subspaces, the same scales."""
    modules = ["q", "v", "c_attn"]
    config = peft.LoraConfig(
        r=2, lora_alpha=5.0, target_modules=modules, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.5),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(narrow(), config)
        peft.initialize_lora_eva_weights(
            model, [torch.tensor(IDS)], forward_fn=lambda model, ids: model(ids),
            prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )  # fmt: skip
    tree = jlora.lorafy(tree_of(narrow()), 2, modules, alpha=5.0)
    out = jlora.init.eva(peft_nets.apply, tree, [IDS], rho=1.5)
    ranks = []
    for name in modules:
        layer = model.base_model.model.get_submodule(name)
        a = layer.lora_A["default"].weight.detach().numpy().T
        t = out[name]["kernel"].adapters[""]
        ranks.append(t.rank)
        assert t.a.shape == a.shape
        note(record_property, f"{name} span", projection(t.a), projection(a))
        note(record_property, f"{name} lengths", np.asarray(t.a).T @ t.a, a.T @ a)
        assert float(t.scale) == pytest.approx(layer.scaling["default"])
    assert sum(ranks) == 6
    assert len({*ranks}) > 1  # they were shared out


def narrow():
    """A net whose first layers see little but one direction."""
    model = net()
    model.emb.weight.data[:, 1:] *= 0.02
    model.q.weight.data *= 9
    model.v.weight.data *= 30
    return model


def projection(a):
    q, _ = np.linalg.qr(np.asarray(a, np.float64))
    return q @ q.T


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(mode, record_property):
    pytest.importorskip("attr")  # PEFT's module imports it and does not ask for it
    from peft.tuners.lora.corda import preprocess_corda

    modules = ["q", "v", "c_attn"]
    model = net()
    config = peft.LoraConfig(
        **SETTINGS, target_modules=modules, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = lambda: model(torch.tensor(IDS))
        preprocess_corda(model, config, run_model=run)
        model = peft.get_peft_model(model, config)
    tree = jlora.lorafy(tree_of(net()), 2, modules, alpha=5.0)
    out = jlora.init.corda(peft_nets.apply, tree, [IDS], mode=mode)
    assert_starts_alike(model, out, modules, record_property)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga(direction, record_property):
    """Each factor up to the signs of singular vectors, which say nothing."""
    modules = ["q", "v"]
    model = net()
    config = peft.LoraConfig(
        **SETTINGS, target_modules=modules, init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(
            direction=direction, scale="stable", stable_gamma=16
        ),
    )  # fmt: skip
    step = lambda: model(torch.tensor(IDS)).square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_loraga(model, config, step)
        model = peft.get_peft_model(model, config)
    loss = lambda p, ids: (peft_nets.apply(p, ids) ** 2).mean()
    tree = jlora.lorafy(tree_of(net()), 2, modules, alpha=5.0)
    out = jlora.init.lora_ga(loss, tree, [IDS], direction=direction, scale="peft")
    for name in modules:
        node = out[name]["kernel"]
        layer = model.base_model.model.get_submodule(name)
        a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach().numpy().T
                for x in "AB")  # fmt: skip
        ours = [np.asarray(x) for x in (node.adapters[""].a, node.adapters[""].b)]
        signs = [np.sign(np.sum(ours[0] * a, 0)), np.sign(np.sum(ours[1] * b, 1))]
        note(record_property, f"{name} a", ours[0] * signs[0], a)
        size = np.max(np.abs(b))
        note(record_property, f"{name} b", ours[1] * signs[1][:, None] / size, b / size)
        base = layer.base_layer.weight.detach().numpy().T
        update = 2.5 * (ours[0] * signs[0] * signs[1]) @ ours[1]
        shifted = np.asarray(node.merged()) - update
        note(record_property, f"{name} base", shifted, base)


def test_loftq(record_property):
    """Of bitsandbytes' codes and PEFT's decomposition; its own loop needs a GPU."""
    functional = pytest.importorskip("bitsandbytes").functional
    from peft.utils.loftq_utils import _low_rank_decomposition

    w = torch.tensor(np.random.default_rng(0).normal(size=(7, 64)), dtype=torch.float32)
    rest = w.clone()
    for _ in range(3):
        codes, state = functional.quantize_4bit(rest, quant_type="nf4", blocksize=64)
        q = functional.dequantize_4bit(codes, state)
        found = _low_rank_decomposition(w - q, reduced_rank=2)
        update = found["L"] @ found["R"]
        rest = w - update
    tree = jlora.lorafy({"w": {"kernel": w.numpy().T}}, 2, ["w"])
    node = jlora.init.loftq(tree, "nf4", steps=3, double=False)["w"]["kernel"]
    note(record_property, "update", node.delta(), update.numpy().T)
    note(record_property, "base", node.value() - node.delta(), q.numpy().T)
