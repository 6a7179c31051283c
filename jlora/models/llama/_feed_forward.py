"""Feed-forward layers of the Llama family: dense, and mixtures of experts.

In a mixture every token meets the few experts that a router chooses for it. Pairs of
token and expert are sorted by expert, and each expert's kernel multiplies its own run
of them (`jax.lax.ragged_dot`): shapes do not depend on the choice, no token is dropped.

Letters in shapes: B batch, T tokens, d the residual stream, f an expert's width,
E experts, k experts a token, N tokens of all texts.

Source: Shazeer 2020, arXiv:2002.05202 (gate); Jiang et al. 2024, arXiv:2401.04088;
Fedus et al. 2022, arXiv:2101.03961 (`router_loss`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora._errors import StructureError
from jlora.models._parts.decoder import DecoderModule
from jlora.models._parts.explicit import on_own_examples
from jlora.models._parts.layers import ACTIVATIONS, RMSNorm
from jlora.models.llama._moe_config import MoeConfig


class LlamaModule(DecoderModule):
    """What the parts of a Llama share."""

    def rms_norm(self) -> RMSNorm:
        """Return a norm."""
        c = self.config
        offset = 1.0 if c.kind.centred else 0.0
        return RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, offset)


class FeedForward(LlamaModule):
    """(act(x·gate) * x·up)·down, `width` wide in between."""

    width: int = 0

    def setup(self) -> None:
        """Declare the projections."""
        c = self.config
        self.gate_proj = self.linear(self.width, bias=c.mlp_bias)
        self.up_proj = self.linear(self.width, bias=c.mlp_bias)
        self.down_proj = self.linear(c.hidden_size, bias=c.mlp_bias)

    def __call__(self, x: Array) -> Array:
        """[..., d] -> [..., d]."""
        act = ACTIVATIONS[self.config.hidden_act]
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


class Experts(LlamaModule):
    """E feed-forward layers, stacked: gate and up [E, d, 2f] in one, down [E, f, d]."""

    def setup(self) -> None:
        """Declare the kernels."""
        c = self.config
        E, d = c.num_experts, c.hidden_size
        f = c.moe_intermediate_size or c.intermediate_size
        self.gate_up_proj = self.kernels("gate_up_proj", (E, d, 2 * f))
        self.down_proj = self.kernels("down_proj", (E, f, d))

    def kernels(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return a stack of kernels, in the dtype it is computed with."""
        init = nn.initializers.normal(self.config.initializer_range)
        kernels: Array = self.param(name, init, shape, self.param_dtype)
        return kernels.astype(self.dtype)

    def __call__(self, x: Array, chosen: Array, weights: Array) -> Array:
        """Return the weighted sum of what the chosen experts make of each token.

        Args:
          x: `[N, d]`.
          chosen: `[N, k]`, numbers of experts.
          weights: `[N, k]`, float32.

        Returns:
          `[N, d]`.
        """
        kernels = (self.gate_up_proj, self.down_proj)
        return on_own_examples(self._of_tokens, kernels, x, chosen, weights)

    def _of_tokens(
        self, kernels: tuple[Array, Array], x: Array, chosen: Array, weights: Array
    ) -> Array:
        """What `__call__` returns, of the tokens of a device."""
        gate_up_proj, down_proj = kernels
        k = chosen.shape[1]
        order = jnp.argsort(chosen.reshape(-1))  # [N*k] pairs, by expert
        sizes = jnp.bincount(chosen.reshape(-1), length=self.config.num_experts)
        sizes = sizes.astype(jnp.int32)
        h = lax.ragged_dot(x[order // k], gate_up_proj, sizes)  # [N*k, 2f]
        gate, up = jnp.split(h, 2, axis=-1)
        h = ACTIVATIONS[self.config.hidden_act](gate) * up
        y = lax.ragged_dot(h, down_proj, sizes)  # [N*k, d]
        y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)  # [N, k, d]
        y = y.astype(jnp.float32) * weights[..., None]
        return jnp.sum(y, axis=1).astype(self.dtype)


class Mixture(LlamaModule):
    """A router and its experts, beside them the expert that all tokens meet."""

    def setup(self) -> None:
        """Declare the parts."""
        c = self.config
        self.gate = self.linear(c.num_experts, bias=False)
        self.experts = self.part(Experts)()
        if c.shared_expert_intermediate_size is not None:
            width = c.shared_expert_intermediate_size
            self.shared_expert = self.part(FeedForward, width=width)()
            self.shared_expert_gate = self.linear(1, bias=False)

    def __call__(self, x: Array) -> Array:
        """[B, T, d] -> [B, T, d]; offers the router's logits `[B, T, E]`."""
        c = self.config
        logits = self.gate(x)
        self.sow("intermediates", "router_logits", logits)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen = lax.top_k(probs, c.num_experts_per_tok)  # [B, T, k]
        if c.kind.norm_topk or c.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
        y = self.experts(*flat).reshape(x.shape)
        if c.shared_expert_intermediate_size is None:
            return y
        return y + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


def router_loss(
    intermediates: Any, config: MoeConfig, attention_mask: Array | None = None
) -> Array:
    """Return how unevenly the routers of a model spread tokens over experts.

    It is 1 times k where all experts get the same, and grows with their differences; a
    loss adds `config.router_aux_loss_coef` times it:

        logits, kept = model.apply(
            {"params": params}, ids, mask, mutable=["intermediates"]
        )
        uneven = models.router_loss(kept["intermediates"], model.config, mask)

    Args:
      intermediates: what the model offered, the routers' logits `[B, T, E]`.
      config: the model's.
      attention_mask: `[B, T]`, 0 at padding, which does not count.

    Returns:
      A float32 scalar.

    Raises:
      StructureError: `intermediates` hold no router's logits.

    Source: Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6, over all layers.
    """
    found = jax.tree.leaves(intermediates)
    if not found:
        raise StructureError(
            "intermediates hold no router's logits.\nCall model.apply with "
            'mutable=["intermediates"], and pass what it returns beside the logits; '
            "dense models have no router."
        )
    E, k = config.num_experts, config.num_experts_per_tok
    B, T = found[0].shape[-3:-1]
    logits = jnp.concatenate([x.reshape(-1, B, T, E) for x in found])  # [L, B, T, E]
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jax.nn.one_hot(lax.top_k(probs, k)[1], E).sum(axis=-2)
    mask = jnp.ones((B, T)) if attention_mask is None else attention_mask
    counts = jnp.broadcast_to(mask.astype(jnp.float32), logits.shape[:-1])[..., None]
    share, mean = (
        jnp.sum(a * counts, axis=(0, 1, 2)) / jnp.sum(counts) for a in (chosen, probs)
    )
    return E * jnp.sum(share * mean)
