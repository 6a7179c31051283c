"""What each axis of a parameter is, by its path: the one table of all model families.

    embed    the residual stream            vocab    the vocabulary
    heads    heads times their width        expert   experts of a mixture
    mlp      hidden units                   qkv, gate_up    two or three of them in one

A row gives the names of a leaf's last axes. What stands before them, layers that are
scanned, is not cut. Parameters that are not worth cutting have a row of no names.

Source: the idea of naming axes and of mapping the names in a second table is that of
t5x and MaxText (`logical_axis_rules`).
"""

from __future__ import annotations

from collections.abc import Mapping

Names = tuple[str | None, ...]

# What the families of `jlora.models` have, by the path's end; the first row counts.
TABLE: tuple[tuple[str, Names], ...] = (
    # Norms and biases, also those of a stack of layers.
    (r"(^|/)(bias|scale)$", ()),
    (r"norm\w*/weight$", ()),
    (r"LayerNorm/weight$", ()),
    (r"(^|/)ln_\w+/weight$", ()),
    # Embeddings.
    (r"(^|/)(shared|embed_tokens|wte|word_embeddings)/embedding$", ("vocab", "embed")),
    (r"(^|/)(wpe|position_embeddings|token_type_embeddings)/embedding$",
     (None, "embed")),
    (r"relative_attention_bias/embedding$", ()),
    # Attention: T5; GPT-2; BERT and RoBERTa; the Llama family.
    (r"Attention/[qkv]/kernel$", ("embed", "heads")),
    (r"Attention/o/kernel$", ("heads", "embed")),
    (r"attn/c_attn/kernel$", ("embed", "qkv")),
    (r"attn/c_proj/kernel$", ("heads", "embed")),
    (r"attention/self/(query|key|value)/kernel$", ("embed", "heads")),
    (r"attention/output/dense/kernel$", ("heads", "embed")),
    (r"self_attn/[qkv]_proj/kernel$", ("embed", "heads")),
    (r"self_attn/o_proj/kernel$", ("heads", "embed")),
    # Feed-forward layers, in the same order; mixtures last.
    (r"DenseReluDense/wi(_\d)?/kernel$", ("embed", "mlp")),
    (r"DenseReluDense/wo/kernel$", ("mlp", "embed")),
    (r"mlp/c_fc/kernel$", ("embed", "mlp")),
    (r"mlp/c_proj/kernel$", ("mlp", "embed")),
    (r"intermediate/dense/kernel$", ("embed", "mlp")),
    (r"output/dense/kernel$", ("mlp", "embed")),
    (r"(gate|up)_proj/kernel$", ("embed", "mlp")),
    (r"down_proj/kernel$", ("mlp", "embed")),
    (r"experts/gate_up_proj$", ("expert", "embed", "gate_up")),
    (r"experts/down_proj$", ("expert", "mlp", "embed")),
    (r"(^|/)(gate|shared_expert_gate)/kernel$", ("embed", None)),
    # Heads.
    (r"(^|/)lm_head/kernel$", ("embed", "vocab")),
    (r"(^|/)(pooler/dense|transform/dense|lm_head/dense|classifier(/dense|/out_proj)?)/kernel$",
     ("embed", None)),
)  # fmt: skip

# Over which axes of the mesh a layout cuts them; what is not there is whole.
FSDP = {"embed": "fsdp", "expert": "expert"}
TENSOR = {
    "heads": "tensor",
    "qkv": "tensor",
    "mlp": "tensor",
    "gate_up": "tensor",
    "vocab": "tensor",
    "expert": "expert",
}
LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "replicated": {},
    "fsdp": FSDP,
    "tensor": TENSOR,
    "fsdp+tensor": {**FSDP, **TENSOR},
}
LOGICAL = sorted({name for _, names in TABLE for name in names if name})
