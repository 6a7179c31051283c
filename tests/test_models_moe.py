"""Mixtures of experts: equal to a loop over experts, under every transformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_decoders import GOLDEN, assert_logits, forward, golden
from tools import equations, randomise

import jlora
from jlora import models
from jlora._errors import StructureError
from jlora.models import MoeConfig
from jlora.models.llama._feed_forward import Experts, Mixture

E, K, D, F, N = 5, 2, 8, 3, 11  # experts, experts a token, widths, tokens
CONFIG = MoeConfig(
    model_type="qwen3_moe",
    hidden_size=D,
    num_attention_heads=1,
    intermediate_size=13,
    moe_intermediate_size=F,
    num_experts=E,
    num_experts_per_tok=K,
    initializer_range=0.5,
)


def case(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (N, D))
    # The third expert is chosen by nobody.
    free = jnp.array([0, 1, 3, 4])
    chosen = free[jax.vmap(lambda k: jax.random.permutation(k, 4)[:K])(
        jax.random.split(keys[1], N)
    )]  # fmt: skip
    weights = jax.random.uniform(keys[2], (N, K))
    layer = Experts(CONFIG)
    params = layer.init(keys[3], x, chosen, weights)["params"]
    return layer, params, x, chosen, weights


def one_by_one(params, x, chosen, weights):
    """Every expert on every token, and of that what was chosen."""
    h = jnp.einsum("nd,edf->nef", x, params["gate_up_proj"])
    gate, up = jnp.split(h, 2, axis=-1)
    y = jnp.einsum("nef,efd->ned", jax.nn.silu(gate) * up, params["down_proj"])
    shares = jnp.zeros((x.shape[0], E))
    for k in range(K):
        shares += jax.nn.one_hot(chosen[:, k], E) * weights[:, k : k + 1]
    return jnp.einsum("ned,ne->nd", y, shares)


def test_experts_and_their_gradients_are_those_of_a_loop():
    layer, params, x, chosen, weights = case()

    def loss(apply):
        return lambda p, x, w: jnp.sum(jnp.sin(apply(p, x, chosen, w)))

    sorted_ = lambda p, *args: layer.apply({"params": p}, *args)
    np.testing.assert_allclose(
        jax.jit(sorted_)(params, x, chosen, weights),
        one_by_one(params, x, chosen, weights),
        atol=1e-5,
    )
    got, want = (
        jax.jit(jax.grad(loss(apply), argnums=(0, 1, 2)))(params, x, weights)
        for apply in (sorted_, one_by_one)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    assert not np.any(got[0]["down_proj"][2])  # of the expert that nobody chose


def test_models_of_an_ensemble_are_mapped_over():
    """`ragged_dot` maps over kernels and tokens together."""
    cases = [case(seed) for seed in range(2)]
    layer = cases[0][0]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[c[1:] for c in cases])
    run = lambda p, *args: layer.apply({"params": p}, *args)
    got = jax.jit(jax.vmap(run))(*stacked)
    for i, (_, *args) in enumerate(cases):
        np.testing.assert_allclose(got[i], one_by_one(*args), atol=1e-5)


def test_each_token_meets_only_its_experts():
    """Two ragged products of N*k rows, and no array of all experts' outputs."""
    layer, params, x, chosen, weights = case()
    run = lambda p, *args: layer.apply({"params": p}, *args)
    program = list(equations(jax.make_jaxpr(run)(params, x, chosen, weights)))
    ragged = [e for e in program if e.primitive.name == "ragged_dot_general"]
    assert [e.outvars[0].aval.shape for e in ragged] == [(N * K, 2 * F), (N * K, D)]
    sizes = [v.aval.size for e in program for v in e.outvars]
    assert max(sizes) == N * K * D


def test_experts_compute_in_bfloat16():
    _, params, x, chosen, weights = case()
    low = Experts(CONFIG, dtype=jnp.bfloat16)
    got = low.apply({"params": params}, x.astype(jnp.bfloat16), chosen, weights)
    assert got.dtype == jnp.bfloat16
    want = one_by_one(params, x, chosen, weights)
    error = np.abs(np.asarray(got, np.float32) - want).max()
    assert error < 0.03 * np.abs(want).max()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_chosen_experts_weights(kind):
    """Softmax over all, then the top; Mixtral divides by their sum, Qwen where asked.

    Experts that return their input tell the weights' sum.
    """
    config = MoeConfig(
        model_type=kind,
        hidden_size=D,
        num_attention_heads=1,
        num_experts=E,
        num_experts_per_tok=K,
    )
    x = jax.random.normal(jax.random.key(0), (1, N, D))
    layer = Mixture(config)
    params = layer.init(jax.random.key(1), x)["params"]
    params["gate"]["kernel"] = jax.random.normal(jax.random.key(2), (D, E))

    class Sum(Experts):
        def __call__(self, x, chosen, weights):
            return jnp.sum(weights, axis=1, keepdims=True) * x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jlora.models.llama._feed_forward.Experts", Sum)
        got = layer.apply({"params": params}, x)
    probs = jax.nn.softmax(x @ params["gate"]["kernel"])
    total = jnp.sort(probs)[..., -K:].sum(-1, keepdims=True)
    np.testing.assert_allclose(got, x if kind == "mixtral" else total * x, rtol=1e-5)


def test_a_text_does_not_depend_on_the_others_in_its_batch():
    """No expert is ever full."""
    model, params, io = golden("mixtral")
    ids = io["input_ids"]
    whole = forward(model, params, ids)
    same = jnp.tile(ids[:1], (4, 1))  # all tokens crowd at the same experts
    assert_logits(forward(model, params, same)[3], whole[0])


def router_logits(form, mask=None):
    model, params, io = golden(form)
    _, kept = forward(model, params, io["input_ids"], mask, mutable=("intermediates",))
    return model.config, kept["intermediates"]


def test_router_loss_counts_tokens_and_probabilities():
    mask = golden("qwen2_moe")[2]["attention_mask"]
    config, kept = router_logits("qwen2_moe", mask)
    (logits,) = jax.tree.leaves(kept)  # the first layer is dense
    assert logits.shape == (4, 9, 5)
    logits = np.asarray(logits)[mask.astype(bool)]  # [tokens, experts]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counts = np.bincount(np.argsort(-probs)[:, :2].reshape(-1), minlength=5)
    want = 5 * np.sum(counts / len(probs) * probs.mean(0))
    np.testing.assert_allclose(models.router_loss(kept, config, mask), want, rtol=1e-5)
    assert abs(want - models.router_loss(kept, config)) > 1e-3  # padding aside


def test_experts_of_layers_that_are_scanned():
    """The same logits and router loss; an adapter for each expert of each layer."""
    _, _, io = golden("mixtral")
    ids = io["input_ids"]
    model, params = models.load(GOLDEN / "mixtral", scan_layers=True)
    assert params["model"]["layers"]["mlp"]["experts"]["down_proj"].shape[:2] == (2, 3)
    logits, kept = forward(model, params, ids, mutable=("intermediates",))
    config, want = router_logits("mixtral")
    np.testing.assert_allclose(
        models.router_loss(kept["intermediates"], config),
        models.router_loss(want, config),
        rtol=1e-6,
    )
    assert_logits(logits, forward(*golden("mixtral")[:2], ids))
    apply = lambda p, ids: model.apply({"params": p}, ids)
    survey = jlora.survey(apply, params, ids)
    tree = jlora.lorafy(params, 2, ["experts"], survey=survey)
    tree = randomise(tree, jax.random.key(0))
    got = jax.jit(jlora.lora(apply))(tree, ids)
    assert_logits(got, forward(model, jlora.merge(tree), ids))
    assert np.abs(got - logits).max() > 0.1


def test_router_loss_is_least_where_experts_share_alike():
    even = jnp.log(jnp.eye(E) + 1e-3)[None]  # [1, E, E]: each wins once
    even = jnp.maximum(even, jnp.roll(even, 1, axis=2))  # and once more
    crowded = jnp.broadcast_to(even[:, :1], even.shape)
    np.testing.assert_allclose(models.router_loss([even], CONFIG), K, rtol=1e-5)
    assert models.router_loss([crowded], CONFIG) > K + 1


def test_router_loss_of_dense_models_is_refused():
    with pytest.raises(StructureError, match="mutable"):
        models.router_loss({}, CONFIG)


@pytest.mark.oracle
@pytest.mark.parametrize("form", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_router_loss_is_pytorchs_live(form, tmp_path):
    torch = pytest.importorskip("torch")
    from golden import make_decoders

    theirs, batch = make_decoders.random_decoder(form, 30), make_decoders.inputs(30)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    _, kept = forward(model, params, ids, mask, mutable=("intermediates",))
    positions = (mask.cumsum(1) - 1) * mask
    with torch.no_grad():
        want = theirs(
            torch.tensor(ids),
            torch.tensor(mask),
            position_ids=torch.tensor(positions),
            output_router_logits=True,
        ).aux_loss
    got = models.router_loss(kept["intermediates"], model.config, mask)
    np.testing.assert_allclose(got, want, rtol=1e-5)
