"""A small model of every family, with random parameters of which none is zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jlora import models

IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 10]])
LLAMA = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 16}
T5 = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
BERT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 20, "max_position_embeddings": 16, "head": "masked_lm"}


def make(kind, vocab=24, tied=True, **form):
    """A small model with random parameters, none of them zero."""
    more = {"vocab_size": vocab}
    if kind != "roberta":
        more["tie_word_embeddings"] = tied
    config, model = {
        "t5": lambda: (models.T5Config(**T5, **more), models.T5),
        "gpt2": lambda: (
            models.GPT2Config(n_embd=12, n_layer=2, n_head=2, n_positions=16, **more),
            models.GPT2,
        ),
        "llama": lambda: (models.LlamaConfig(**LLAMA, **more), models.Llama),
        "gemma2": lambda: (
            models.GemmaConfig(**LLAMA, sliding_window=3, **more),
            models.Llama,
        ),
        "roberta": lambda: (
            models.BertConfig(**BERT, model_type="roberta", **more),
            models.BertMaskedLM,
        ),
    }[kind]()
    model = model(config=config, **form)
    # One program makes them, and NumPy the noise: each shape would compile its own.
    start = jax.jit(lambda: model.init(jax.random.key(0), *inputs(kind))["params"])

    def noisy(x):
        noise = np.random.default_rng(x.size).normal(0, 0.3, x.shape)
        return jnp.asarray(np.asarray(x, np.float32) + noise, jnp.float32)

    return model, jax.tree.map(noisy, start())


def inputs(kind):
    return (IDS, None, IDS) if kind == "t5" else (IDS,)


def logits(model, params, kind):
    return np.asarray(jax.jit(model.apply)({"params": params}, *inputs(kind)))


def one_layer_t5(source, folder):
    """Save a folder's T5 with one random layer, which compiles fast; its parameters."""
    model, _ = models.load(source)
    small = dataclasses.replace(model.config, num_layers=1, num_decoder_layers=1)
    ids = np.ones((1, 1), np.int32)
    model = models.T5(config=small)
    params = jax.jit(model.init)(jax.random.key(0), ids, None, ids)["params"]
    models.save(model, params, folder, tokenizer_from=source)
    return params
