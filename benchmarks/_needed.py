"""The operations and bytes that a training step cannot do without, counted by hand.

Products only: softmax, norms and the optimiser are left out, so that the time these
take at the measured rate of a large matmul is a bound no implementation reaches.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks._cases import NAMES, Case


class Product(NamedTuple):
    """A linear layer: `tokens` rows times a kernel `[i, o]`.

    `role` is as in `jlora.lorafy`; `first` says that its input depends on nothing
    trained, so that no gradient flows past it.
    """

    role: str
    tokens: int
    i: int
    o: int
    first: bool = False


def flops(case: Case, *, full: bool = False) -> float:
    """Return the operations of a step that trains adapters, or with `full` all.

    A product costs 2·tokens·i·o forward, the same for the gradient of its input, and
    the same for that of its kernel; attention's two products have two gradients each.
    """
    total = 3.0 * attention(case)
    for p in products(case):
        base = 2.0 * p.tokens * p.i * p.o
        # Full fine-tuning trains the embedding, which is below the first layers.
        total += 3 * base if full else base * (1 if p.first else 2)
        if not full and adapted(p.role, case):
            down, up = (
                2.0 * p.tokens * case.rank * p.i,
                2.0 * p.tokens * case.rank * p.o,
            )
            total += 3 * up + (2 if p.first else 3) * down
    return total


def bytes_moved(case: Case) -> float:
    """Return the least a LoRA step reads and writes: kernels twice, adapters' state."""
    width = 2 if case.dtype == "bfloat16" else 4
    base = sum(p.i * p.o * (1 if p.first else 2) for p in products(case)) * width
    trained = sum(
        case.rank * (p.i + p.o) for p in products(case) if adapted(p.role, case)
    )
    return base + trained * 4 * 2 * 3  # factors and AdamW's two moments, in and out


def adapted(role: str, case: Case) -> bool:
    """Return whether a layer of that role carries an adapter."""
    if case.targets == "all-linear":
        return role != "head"
    return bool({role, NAMES[case.family].get(role)} & set(case.targets))


def products(case: Case) -> list[Product]:
    """Return every linear layer of the model."""
    return {"t5": _t5, "gpt2": _gpt2, "llama": _llama}[case.family](case)


def attention(case: Case) -> float:
    """Return the operations of attention's two products, forward."""
    c, B, S, T = case.config, case.batch, case.source, case.target
    if case.family == "t5":
        inner = c["num_heads"] * c["d_kv"]
        pairs = c["num_layers"] * S * S + c["num_decoder_layers"] * (T * T + T * S)
        return 4.0 * B * inner * pairs
    if case.family == "gpt2":
        return 4.0 * B * c["n_embd"] * c["n_layer"] * S * S
    inner = c["num_attention_heads"] * c["head_dim"]
    return 4.0 * B * inner * c["num_hidden_layers"] * S * S


def _t5(case: Case) -> list[Product]:
    c = case.config
    d, f, inner = c["d_model"], c["d_ff"], c["num_heads"] * c["d_kv"]
    source, target = case.batch * case.source, case.batch * case.target

    def attend(queries: int, keys: int, first: bool) -> list[Product]:
        return [
            Product("query", queries, d, inner, first),
            Product("key", keys, d, inner, first),
            Product("value", keys, d, inner, first),
            Product("out", queries, inner, d),
        ]

    def feed(n: int) -> list[Product]:
        up = [Product(role, n, d, f) for role in ("gate", "up")]
        return [*up, Product("down", n, f, d)]

    out = [Product("head", target, d, c["vocab_size"])]
    for i in range(c["num_layers"]):
        out += attend(source, source, i == 0) + feed(source)
    for i in range(c["num_decoder_layers"]):
        out += attend(target, target, i == 0) + attend(target, source, False)
        out += feed(target)
    return out


def _gpt2(case: Case) -> list[Product]:
    d, n = case.config["n_embd"], case.batch * case.source
    out = [Product("head", n, d, case.config["vocab_size"])]
    roles = ("query", "value")
    fused = case.targets == "all-linear" or not set(roles) & set(case.targets)
    for i in range(case.config["n_layer"]):
        if fused:
            out.append(Product("c_attn", n, d, 3 * d, i == 0))
        else:
            out += [Product(r, n, d, d, i == 0) for r in ("query", "key", "value")]
        out.append(Product("out", n, d, d))
        out += [Product("up", n, d, 4 * d), Product("down", n, 4 * d, d)]
    return out


def _llama(case: Case) -> list[Product]:
    c, n = case.config, case.batch * case.source
    d, f = c["hidden_size"], c["intermediate_size"]
    q, kv = (
        c[name] * c["head_dim"]
        for name in ("num_attention_heads", "num_key_value_heads")
    )
    out = [Product("head", n, d, c["vocab_size"])]
    for i in range(c["num_hidden_layers"]):
        widths = {"query": q, "key": kv, "value": kv}
        out += [Product(role, n, d, w, i == 0) for role, w in widths.items()]
        out += [Product("out", n, q, d), Product("down", n, f, d)]
        out += [Product(role, n, d, f) for role in ("gate", "up")]
    return out
