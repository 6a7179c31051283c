"""A BERT of a few thousand random parameters with a tokenizer, as a folder."""

import jax
import tokenizers
from transformers import PreTrainedTokenizerFast

from jlora import models

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 20, "max_position_embeddings": 24, "vocab_size": 40}


def make(folder, words, **config):
    """Save a base model of random parameters and a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    model = models.Bert(config=models.BertConfig(**{**SIZES, **config}))
    ids = jax.numpy.ones((1, 3), int)
    params = model.init(jax.random.key(0), ids)["params"]
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    models.save(model, jax.tree.map(noise, params), folder, overwrite=True)
    return folder
