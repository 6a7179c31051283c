"""BERT and RoBERTa in Flax, with Hugging Face's names for the parameters.

`bert.encoder.layer.0.attention.self.query.weight` is found at
`bert/encoder/layer/0/attention/self/query/kernel`, and so on throughout: linear layers
hold `kernel` as [in, out] and `bias`, tables `embedding`, layer norms `weight` and
`bias`. As in the files, a base model's names begin at `embeddings` and `encoder`.

RoBERTa is the same encoder; it counts positions past its padding, and its heads differ.

Letters in shapes: B batch, S tokens, H heads, D width of a head, d the residual
stream, V the vocabulary.

Source: Devlin et al. 2019, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jlora._errors import ShapeError, StructureError
from jlora.models._parts.attention import Masking
from jlora.models._parts.layers import ACTIVATIONS, along_last
from jlora.models._parts.segments import check_segments, keys_seen
from jlora.models.bert._config import BertConfig
from jlora.models.bert._layers import BertModule, Embeddings, Layer


class Encoder(BertModule):
    """The blocks."""

    def setup(self) -> None:
        """Declare them."""
        self.layer = self.blocks([self.part(Layer)] * self.config.num_hidden_layers)

    def __call__(
        self, x: Array, masking: Array | Masking | None, deterministic: bool
    ) -> Array:
        """[B, S, d] -> [B, S, d]."""

        def step(layer: Any, x: Array, past: None, own: None) -> tuple[Array, None]:
            return layer(x, masking, deterministic), None

        length = self.config.num_hidden_layers
        return self.run_blocks(self.layer, step, x, length=length)[0]


class Pooler(BertModule):
    """tanh(dense) of the first token."""

    def setup(self) -> None:
        """Declare the projection."""
        self.dense = self.linear(self.config.hidden_size)

    def __call__(self, x: Array) -> Array:
        """[B, S, d] -> [B, d]."""
        return jnp.tanh(self.dense(x[:, 0]))


class Bert(BertModule):
    """A BERT or RoBERTa without a head.

    Attributes:
      config: sizes and choices.
      dtype: what it computes in. Norms, scores and softmax stay in float32.
      param_dtype: what `init` makes parameters in.
      scan_layers: whether blocks are scanned, and their parameters stacked.
      remat: whether the backward pass computes a block's activations again.
      attn_implementation: `"einsum"`, `"xla"` or `"cudnn"`, as in `Configured`.
    """

    def setup(self) -> None:
        """Declare embeddings, blocks and, where there is one, the pooler."""
        self.embeddings = self.part(Embeddings)()
        self.encoder = self.part(Encoder)()
        if self.config.pooler:
            self.pooler = self.part(Pooler)()

    def torch_names(self) -> dict[str, tuple[str, ...]]:
        """Return what PyTorch calls by another name than the tree: nothing."""
        return {}

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
    ) -> Array:
        """Return the hidden states of every token.

        Args:
          input_ids: `[B, S]`.
          attention_mask: `[B, S]`, 0 at padding; `None` attends to everything.
          token_type_ids: `[B, S]`, which sentence a token is of; `None` is all 0.
          deterministic: `False` drops out, and needs `rngs={"dropout": key}`.
          segment_ids: `[B, S]`, where several texts stand in a row, as
            `jlora.data.pack` has them: the number of each token's text. Tokens see
            those of their own alone, and positions begin anew in each.

        Returns:
          `[B, S, d]` in `dtype`; `mean_pool` makes sentence embeddings of them.

        Raises:
          ShapeError: more tokens than positions, or inputs that are not alike.
        """
        _check_inputs(self.config, input_ids, attention_mask, token_type_ids)
        check_segments("segment_ids", segment_ids, input_ids)
        x = self.embeddings(input_ids, token_type_ids, deterministic, segment_ids)
        seen = keys_seen(attention_mask, segment_ids, segment_ids)
        x = self.encoder(x, self.masking_of(seen), deterministic)
        if self.config.pooler and self.is_initializing():
            self.pooler(x)  # declares its parameters
        return x

    def pool(self, hidden: Array) -> Array:
        """Return `[B, d]`, the pooler's output for the hidden states `[B, S, d]`.

        Raises:
          ShapeError: the checkpoint came without a pooler.
        """
        if not self.config.pooler:
            raise ShapeError(
                "This model has no pooler: its checkpoint holds none, or its head "
                "needs none.\nmodels.mean_pool makes embeddings without one."
            )
        return self.pooler(hidden)


class Headed(BertModule):
    """A BERT or RoBERTa with a head, which a subclass declares and applies.

    Attributes:
      config: sizes and choices.
      dtype: what it computes in.
      param_dtype: what `init` makes parameters in.
      scan_layers: whether blocks are scanned, and their parameters stacked.
      remat: whether the backward pass computes a block's activations again.
      attn_implementation: `"einsum"`, `"xla"` or `"cudnn"`, as in `Configured`.
    """

    #: Whether the head answers for each token, not for the row.
    of_tokens: ClassVar[bool] = True

    def setup(self) -> None:
        """Declare the encoder."""
        self.base = self.part(Bert)(name=self.config.prefix)

    def head(self, x: Array, deterministic: bool) -> Array:
        """[B, S, d] -> the logits."""
        raise NotImplementedError

    def torch_names(self) -> dict[str, tuple[str, ...]]:
        """Return what PyTorch calls by another name than the tree: nothing."""
        return {}

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
    ) -> Array:
        """Return the head's logits; the arguments are those of `Bert`.

        Raises:
          StructureError: several texts in a row, and a head that sees one.
        """
        if segment_ids is not None and not self.of_tokens:
            raise StructureError(
                f"segment_ids: {type(self).__name__} makes one answer of a row, from "
                "its first token, so a row holds one text.\nPack for heads that answer "
                "for each token (masked_lm, or none); batch these by length: "
                "jlora.data.Batches."
            )
        x = self.base(
            input_ids, attention_mask, token_type_ids, deterministic, segment_ids
        )
        return self.head(x, deterministic)


class BertClassifier(Headed):
    """A BERT or RoBERTa that classifies sequences, or scores them: `[B, num_labels]`.

    Trained by regression, its logits are the scores themselves; `label_loss` knows.
    """

    of_tokens = False

    def setup(self) -> None:
        """Declare encoder and classifier."""
        super().setup()
        if self.config.roberta:
            self.classifier = self.part(RobertaClassifier)()
        else:
            self.drop = self.classifier_dropout()
            self.classifier = self.linear(self.config.num_labels)

    def head(self, x: Array, deterministic: bool) -> Array:
        """[B, S, d] -> [B, num_labels]."""
        if self.config.roberta:
            return self.classifier(x[:, 0], deterministic)
        x = self.drop(self.base.pool(x), deterministic=deterministic)
        return self.classifier(x)


class RobertaClassifier(BertModule):
    """RoBERTa's classifier: two layers over the first token."""

    def setup(self) -> None:
        """Declare the layers."""
        self.dense = self.linear(self.config.hidden_size)
        self.out_proj = self.linear(self.config.num_labels)
        self.drop = self.classifier_dropout()

    def __call__(self, x: Array, deterministic: bool) -> Array:
        """[B, d] -> [B, num_labels]."""
        x = jnp.tanh(self.dense(self.drop(x, deterministic=deterministic)))
        return self.out_proj(self.drop(x, deterministic=deterministic))


class BertMaskedLM(Headed):
    """A BERT or RoBERTa that fills masked tokens: `[B, S, V]`."""

    def setup(self) -> None:
        """Declare encoder and head."""
        super().setup()
        if self.config.roberta:
            self.lm_head = self.part(RobertaLMHead)()
        else:
            self.cls = self.part(BertHeads)()

    def torch_names(self) -> dict[str, tuple[str, ...]]:
        """Return what PyTorch calls the users of the shared leaves, by their paths.

        The decoder multiplies with the word embeddings (".T"), and adds a bias that
        the head holds and does not use itself, hence the parentheses.
        """
        base = self.config.prefix
        head = "lm_head" if self.config.roberta else "cls.predictions"
        words = f"{base}.embeddings.word_embeddings"
        return {
            f"{base}/embeddings/word_embeddings": (words, f"{head}.decoder.T"),
            f"{head.replace('.', '/')}/bias": (f"({head})", f"{head}.decoder"),
        }

    def head(self, x: Array, deterministic: bool) -> Array:
        """[B, S, d] -> [B, S, V]."""
        head = self.lm_head if self.config.roberta else self.cls.predictions
        x, bias = head(x)
        logits = self.base.embeddings.word_embeddings.attend(x)
        return logits + along_last(bias, logits)


class RobertaLMHead(BertModule):
    """What RoBERTa does before the tied decoder, and the decoder's bias."""

    def setup(self) -> None:
        """Declare layer, norm and bias."""
        self.dense = self.linear(self.config.hidden_size)
        self.layer_norm = self.norm()
        self.bias = self.vocabulary_bias()

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """[B, S, d] -> [B, S, d], and the bias [V]."""
        # The activation is not the configuration's.
        x = self.layer_norm(ACTIVATIONS["gelu"](self.dense(x)))
        return x, self.bias.astype(self.dtype)


class BertHeads(BertModule):
    """The level of BERT's names that holds its pretraining heads."""

    def setup(self) -> None:
        """Declare the masked-LM head."""
        self.predictions = self.part(BertLMHead)()


class BertLMHead(BertModule):
    """What BERT does before the tied decoder, and the decoder's bias."""

    def setup(self) -> None:
        """Declare transform and bias."""
        self.transform = self.part(BertLMTransform)()
        self.bias = self.vocabulary_bias()

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """[B, S, d] -> [B, S, d], and the bias [V]."""
        return self.transform(x), self.bias.astype(self.dtype)


class BertLMTransform(BertModule):
    """norm(act(dense))."""

    def setup(self) -> None:
        """Declare layer and norm."""
        self.dense = self.linear(self.config.hidden_size)
        self.LayerNorm = self.norm()

    def __call__(self, x: Array) -> Array:
        """[B, S, d] -> [B, S, d]."""
        return self.LayerNorm(ACTIVATIONS[self.config.hidden_act](self.dense(x)))


def with_its_head(config: BertConfig, **settings: Any) -> BertModule:
    """Return the model whose head `config.head` names."""
    kinds = {"classification": BertClassifier, "masked_lm": BertMaskedLM}
    return kinds.get(config.head, Bert)(config=config, **settings)


def mean_pool(
    hidden: Array, attention_mask: Array | None = None, *, normalize: bool = False
) -> Array:
    """Return sentence embeddings: the mean of the hidden states, padding left out.

    Args:
      hidden: `[B, S, d]`, from a base model.
      attention_mask: `[B, S]`, 0 at padding; `None` is no padding.
      normalize: whether embeddings get length 1, so that products are cosines.

    Returns:
      `[B, d]` in float32; zeros where a row is all padding.

    >>> hidden = jnp.array([[[1.0, 3.0], [3.0, 5.0], [9.0, 9.0]]])
    >>> mean_pool(hidden, jnp.array([[1, 1, 0]]))
    Array([[2., 4.]], dtype=float32)
    """
    hidden = hidden.astype(jnp.float32)
    if attention_mask is None:
        attention_mask = jnp.ones(hidden.shape[:2], jnp.int32)
    kept = attention_mask.astype(bool)[..., None]  # [B, S, 1]
    total = jnp.sum(jnp.where(kept, hidden, 0.0), axis=1)
    mean = total / jnp.maximum(jnp.sum(kept, axis=1, dtype=jnp.float32), 1)
    if not normalize:
        return mean
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def label_loss(logits: Array, labels: Array, config: BertConfig) -> tuple[Array, Array]:
    """Return the summed loss of a classifier, and the number of terms it sums.

    What is summed follows `config.problem_type`: squared errors for regression, the
    cross entropy of integer labels, or one binary cross entropy for each label. Where
    it is `None`, a single label is regression, integer labels are classes, and other
    labels several at once.

    Args:
      logits: `[B, num_labels]`.
      labels: `[B]` classes, of which negative ones are left out; or `[B]` scores
        where there is one label; or `[B, num_labels]`.
      config: names the problem.

    Returns:
      The sum and the count, float32 scalars; their ratio is PyTorch's loss.

    Raises:
      ShapeError: labels that do not fit the logits.

    >>> config = BertConfig(head="classification", num_labels=1)
    >>> scores, wanted = jnp.array([[2.0], [4.0]]), jnp.array([1.0, 1.0])
    >>> total, count = label_loss(scores, wanted, config)
    >>> float(total / count)
    5.0
    """
    logits = logits.astype(jnp.float32)
    problem = config.problem_type or _problem(logits, labels)
    wanted = logits.shape
    if problem == "single_label_classification" or labels.ndim == 1 == wanted[-1]:
        wanted = wanted[:-1]
    if labels.shape != wanted:
        raise ShapeError(
            f"labels are {labels.shape}, but for {problem} with logits {logits.shape} "
            f"they are {wanted}."
        )
    if problem == "single_label_classification":
        counted = labels >= 0
        chosen = jnp.where(counted, labels, 0)[:, None]
        logp = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(logp, chosen, axis=-1)[:, 0]
        total = -jnp.sum(jnp.where(counted, logp, 0))
        return total, jnp.sum(counted, dtype=jnp.float32)
    labels = labels.reshape(logits.shape).astype(jnp.float32)
    if problem == "regression":
        losses = jnp.square(logits - labels)
    else:
        losses = jax.nn.softplus(logits) - labels * logits
    return jnp.sum(losses), jnp.float32(losses.size)


def _problem(logits: Array, labels: Array) -> str:
    if logits.shape[-1] == 1:
        return "regression"
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    return ("multi" if not integers else "single") + "_label_classification"


def _check_inputs(config: BertConfig, ids: Array, *others: Array | None) -> None:
    room = config.max_position_embeddings - config.first_position
    if ids.ndim != 2 or ids.shape[1] > room:
        raise ShapeError(
            f"input_ids are {ids.shape}; they must be [batch, length] with at most "
            f"{room} tokens, which is what this model has positions for.\nTruncate "
            "in the tokenizer."
        )
    for other in others:
        if other is not None and other.shape != ids.shape:
            raise ShapeError(
                f"attention_mask and token_type_ids must be {ids.shape} as input_ids "
                f"are, and one is {other.shape}."
            )
