"""VeRA, LoHa and LoKr exchanged with PEFT, live."""

import jax
import numpy as np
import pytest
from peft_live import (
    config_of,
    logits_of,
    net,
    note,
    peft,
    peft_load,
    peft_save,
    same_tensors,
    torch,
    tree_of,
)
from peft_nets import IDS, apply
from tools import randomise

import jlora
import jlora.peft

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*save_projection"),
    pytest.mark.filterwarnings("ignore:.*vera_A and vera_B"),
]
V, H, K = peft.VeraConfig, peft.LoHaConfig, peft.LoKrConfig
PEFT_CASES = {
    "vera": V(r=5, target_modules=["q", "v", "head"], projection_prng_key=3),
    "vera, of a key": V(r=7, target_modules=["q", "head"], save_projection=False),
    "vera, bias, whole": V(r=2, target_modules=["q", "head"], bias="vera_only",
                           modules_to_save=["time"]),
    "vera, conv1d": V(r=3, target_modules=["c_attn"], fan_in_fan_out=True),
    "loha": H(r=2, alpha=5, target_modules=["q", "v", "head"]),
    "loha, conv, patterns": H(
        r=2, target_modules=["q", "image", "time"], rank_pattern={"image": 3},
        alpha_pattern={"q": 3}, modules_to_save=["v"],
    ),
    "loha, a high rank": H(r=5, target_modules=["q"]),
    "lokr": K(r=1, alpha=3, target_modules=["q", "v", "head"]),
    "lokr, conv": K(r=1, target_modules=["image", "time", "head"], decompose_factor=2),
    "lokr, both": K(r=1, target_modules=["head"], decompose_both=True,
                    decompose_factor=3),
}  # fmt: skip


def peft_model(config):
    model = peft.get_peft_model(net(), config).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.6)
    return model


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_pefts_adapter_here_and_back(case, tmp_path, record_property):
    theirs = peft_model(PEFT_CASES[case])
    want = logits_of(theirs, IDS)
    assert np.max(np.abs(want - logits_of(net(), IDS))) > 0.02
    peft_save(theirs, tmp_path / "theirs")
    base = tree_of(net())
    tree = jlora.peft.load(tmp_path / "theirs", base)
    note(record_property, "in", jlora.lora(apply)(tree, IDS), want)
    merged = jlora.merge(tree)
    note(record_property, "merged", apply(merged, IDS), want)
    weights = tree_of(theirs.merge_and_unload())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        merged, weights,
    )  # fmt: skip

    config = jlora.peft.read_config(tmp_path / "theirs")
    jlora.peft.save(tmp_path / "ours", tree, config=config)
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    note(
        record_property,
        "out",
        logits_of(peft_load(net(), tmp_path / "ours"), IDS),
        want,
    )
    flat = config.get("fan_in_fan_out")
    jlora.peft.save(tmp_path / "derived", tree, fan_in_fan_out=flat)
    same_tensors(jlora.peft.load(tmp_path / "derived", base), tree)
    got = logits_of(peft_load(net(), tmp_path / "derived"), IDS)
    note(record_property, "derived", got, want)


T = jlora.Target
CONVS = {"image": T(in_axes=(0, 1, 2)), "time": T(in_axes=(0, 1), rank=1)}
OUR_CASES = {
    "vera": dict(variant=jlora.VeRA(seed=5), rank=4, targets=["q", "v", "head"]),
    "vera, dropout": dict(variant="vera", rank=4, targets=["q"], dropout=0.1,
                          bias="lora_only"),
    "loha": dict(variant="loha", rank=2, alpha=3, targets={**CONVS, "q": T(), "head": T()}),
    "lokr": dict(variant=jlora.LoKr(factor=2), rank=1, targets=["q", "v", "head"]),
    "lokr, both": dict(variant=jlora.LoKr(factor=3, decompose_both=True), rank=1,
                       targets=["head"], alpha=2, train=["time"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OUR_CASES)
def test_our_adapter_in_peft(case, tmp_path, record_property):
    base = tree_of(net())
    tree = randomise(jlora.lorafy(base, **OUR_CASES[case]), jax.random.key(3))
    want = np.asarray(jlora.lora(apply)(tree, IDS))
    jlora.peft.save(tmp_path / "a", tree)
    got = logits_of(peft_load(net(), tmp_path / "a"), IDS)
    note(record_property, "out", got, want)
    back = jlora.peft.load(tmp_path / "a", base)
    same_tensors(back, tree)
    note(record_property, "in", jlora.lora(apply)(back, IDS), want)


def test_pefts_projections_are_made_again_of_the_key(tmp_path):
    base = tree_of(net())
    variant = jlora.VeRA(seed=11)
    tree = jlora.lorafy(base, 4, ["q", "head"], variant=variant)
    tree = randomise(tree, jax.random.key(3))
    config = {"save_projection": False, "projection_prng_key": 11}
    jlora.peft.save(tmp_path / "a", tree, config=config)
    got = logits_of(peft_load(net(), tmp_path / "a"), IDS)
    np.testing.assert_allclose(got, jlora.lora(apply)(tree, IDS), rtol=1e-4, atol=1e-5)
    same_tensors(jlora.peft.load(tmp_path / "a", base), tree)


REFUSED = {
    "rank_dropout": H(r=2, target_modules=["q"], rank_dropout=0.1),
    "module_dropout": K(r=1, target_modules=["q"], module_dropout=0.1),
    "use_effective_conv2d": H(r=2, target_modules=["image"], use_effective_conv2d=True),
    "no form": K(r=8, target_modules=["q"]),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(says, tmp_path):
    peft_save(peft_model(REFUSED[says]), tmp_path)
    with pytest.raises(jlora.CheckpointError, match=says):
        jlora.peft.load(tmp_path, tree_of(net()))


class Grouped(torch.nn.Module):
    """A convolution in two groups and one of each channel alone."""

    def __init__(self):
        super().__init__()
        self.two = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.each = torch.nn.Conv1d(6, 12, 3, groups=6)

    def forward(self, x):
        return self.each(torch.tanh(self.two(x)).flatten(2))


def grouped(p, x):
    """The same with channels last."""

    def conv(w, x, groups, padding, dims):
        return w["bias"] + jax.lax.conv_general_dilated(
            x, w["kernel"], (1,) * (x.ndim - 2), padding, dimension_numbers=dims,
            feature_group_count=groups,
        )  # fmt: skip

    x = conv(p["two"], x, 2, "SAME", ("NHWC", "HWIO", "NHWC"))
    x = np.tanh(x) if isinstance(x, np.ndarray) else jax.numpy.tanh(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return conv(p["each"], x, 6, "VALID", ("NWC", "WIO", "NWC"))


GROUPED = {
    "loha": H(r=2, target_modules=["two", "each"], alpha=3),
    "lokr": K(r=1, target_modules=["two"], decompose_factor=2),
}


@pytest.mark.parametrize("case", GROUPED)
def test_grouped_convolutions(case, tmp_path, record_property):
    make = lambda: net(make=Grouped)
    theirs = peft.get_peft_model(make(), GROUPED[case]).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.6)
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(x)).numpy().swapaxes(1, 2)
    peft_save(theirs, tmp_path / "a")
    base = tree_of(make())
    tree = jlora.peft.load(tmp_path / "a", base)
    x = np.moveaxis(x, 1, -1)
    note(record_property, "in", jlora.lora(grouped)(tree, x), want)
    note(record_property, "merged", grouped(jlora.merge(tree), x), want)
    jlora.peft.save(tmp_path / "b", tree)
    with torch.no_grad():
        again = peft_load(make(), tmp_path / "b")(torch.tensor(np.moveaxis(x, -1, 1)))
    note(record_property, "out", again.numpy().swapaxes(1, 2), want)


def test_pefts_lora_of_a_grouped_convolution_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["two"])
    peft_save(peft.get_peft_model(net(make=Grouped), config), tmp_path)
    with pytest.raises(jlora.CheckpointError, match="grouped convolution"):
        jlora.peft.load(tmp_path, tree_of(net(make=Grouped)))
