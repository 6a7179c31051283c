"""Reading the `config.json` of models that decode: what is known, what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jlora._errors import CheckpointError, JloraWarning, ShapeError
from jlora._text import listed
from jlora.models._parts.layers import ACTIVATIONS

# Keys that every file may hold, and that change no logit of a language model.
_HARMLESS = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|use_cache|model_type"
    r"|output_.*|return_dict|task_specific_params|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|auto_map|gradient_checkpointing|tokenizer_class"
    r"|prefix|pruned_heads|chunk_size_feed_forward|decoder_start_token_id"
    r"|sep_token_id|pretraining_tp|max_length|min_length|do_sample|temperature"
    r"|top_k|top_p|typical_p|num_beams|num_beam_groups|diversity_penalty"
    r"|length_penalty|early_stopping|repetition_penalty|num_return_sequences"
    r"|(encoder_)?no_repeat_ngram_size|bad_words_ids|(begin_)?suppress_tokens"
    r"|forced_(bos|eos)_token_id|exponential_decay_length_penalty"
    r"|remove_invalid_values|torchscript|tf_legacy_loss|use_bfloat16"
    r"|loss_type|transformers\.js_config|(_)?attn_implementation(_.*)?|.*flash_attn.*"
    r"|(model_|tokenizer_)?max_(seq|sequence|position|model)?_?(len|length)|seq_length"
    r"|(bos|cls|eos|mask|pad|sep|unk|begin|end|im_start|im_end)_token(_id)?"
)
# What the name of a key speaks of where it may change what is computed. A key that
# speaks of nothing of the kind is some tool's note; `transformers` reads it no more.
_MATTERS = re.compile(
    r"(^|_)(act|activation|adapter|adapters|alibi|alpha|attn|attention|beta|bias|biases"
    r"|block|blocks|cap|causal|clip|conv|cross|decoder|depth|dim|dims|dropout|embd"
    r"|embed|embedding|embeddings|encoder|eps|epsilon|expert|experts|factor|ffn|fp8"
    r"|freq|fused|gate|gated|gating|gelu|group|groups|head|heads|hidden|interleaved"
    r"|intermediate|kernel|kv|latent|layer|layers|layerdrop|linear|lora|mamba|mask"
    r"|mlp|moe|multi|multiplier|mup|nope|norm|norms|normalization|normalize|ntk"
    r"|parallel|partial|peft|pooler|pooling|position|positions|positional|pre|post|qk"
    r"|qkv|quant|quantization|quantized|quantize|query|key|value|rank|ratio|relative"
    r"|residual|rms|rmsnorm|rope|rotary|router|scalar|scale|scaled|scaling|scales"
    r"|sequential|shared|shift|sink|sinks|size|sliding|softcap|softcapping|softmax"
    r"|sparse|sparsity|std|temperature|theta|tie|tied|tying|type|types|untied"
    r"|vocab|width|window|windows|yarn)(s|_|$)"
)
# Values of keys that are not read: each says that nothing is to be done.
_NOTHING: tuple[Any, ...] = (None, False, {}, [], "")


def read_keys(
    kind: str, cls: Any, config: Mapping[str, Any], harmless: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the dataclass `cls` in a `config.json`, and the other keys.

    Args:
      kind: the model's name, for errors.
      cls: the configuration class. A null stands for the default, as in files of
        older releases, but in fields that may be `None`.
      config: the parsed file.
      harmless: a regular expression; keys it matches change no logit, beside those
        that every file may hold.

    Raises:
      CheckpointError: another key whose value says that something is to be computed.

    Warns:
      JloraWarning: other keys that nothing reads.
    """
    # What are no keys of the file.
    own = ("extra", "rope", "local_rope", "generation")
    types = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.name not in own}
    known = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key in types and (value is not None or "None" in types[key])
    }
    for key, value in known.items():
        check_type(kind, key, value, types[key])
    extra = {key: value for key, value in config.items() if key not in types}
    pass_over(kind, extra, harmless)
    return known, extra


# What a field's annotation allows, and how a message says it.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda x: type(x) is int and abs(x) < 2**31, "a whole number"),
    "float": (
        lambda x: type(x) in (int, float) and math.isfinite(x) and abs(x) < 2**63,
        "a number",
    ),
    "bool": (lambda x: isinstance(x, bool), "true or false"),
    "str": (lambda x: isinstance(x, str), "text"),
    "None": (lambda x: x is None, "null"),
    "tuple[int, ...]": (
        lambda x: isinstance(x, tuple) and all(type(y) is int for y in x),
        "a list of whole numbers",
    ),
    "tuple[str, ...]": (
        lambda x: isinstance(x, tuple) and all(isinstance(y, str) for y in x),
        "a list of texts",
    ),
}
_LAYERS = re.compile(r"(num_.*)?layers|n_layer")
_MOST_LAYERS = 10_000  # more than any model has; a list as long is harmless


def check_type(kind: str, key: str, value: Any, annotation: str) -> None:
    """Refuse a value of another type than its field's.

    Raises:
      CheckpointError: it is, or it is too large to be meant.
    """
    allowed = annotation.split(" | ")
    if any(name not in _TYPES for name in allowed):
        return
    said = " or ".join(_TYPES[name][1] for name in allowed)
    is_right = any(_TYPES[name][0](value) for name in allowed)
    if is_right and _LAYERS.fullmatch(key) and type(value) is int:
        is_right, said = value <= _MOST_LAYERS, f"at most {_MOST_LAYERS:,}"
    if not is_right:
        shown = f"{value!r:.60}"
        raise CheckpointError(
            f"{kind} config: {key} is {shown}; it must be {said}.\nThe config.json is "
            "damaged or of another kind."
        )


def pass_over(kind: str, extra: Mapping[str, Any], harmless: str) -> None:
    """Pass over keys that change nothing; the others of `read_keys` are refused.

    Raises:
      CheckpointError: a key whose name speaks of what is computed, and whose value
        does not switch it off.

    Warns:
      JloraWarning: keys that nothing reads.
    """
    unknown = {
        key: value
        for key, value in extra.items()
        if not (_HARMLESS.fullmatch(key) or re.fullmatch(harmless, key))
        and not any(value is none or value == none for none in _NOTHING)
    }
    for key, value in unknown.items():
        if _MATTERS.search(key.lower()):
            raise CheckpointError(
                f"{kind} config: {key} is {value!r}, and this model does not know that "
                "key.\nIf it does not change what is computed, remove it from "
                "config.json; otherwise the model is of another kind."
            )
    if unknown:
        lines = [f"{key}: {str(value)[:60]}" for key, value in unknown.items()]
        warnings.warn(
            f"{kind} config: keys that nothing here reads were passed over:\n  "
            f"{listed(lines)}",
            JloraWarning,
            stacklevel=5,
        )


def check_sizes(kind: str, config: Any, names: Collection[str]) -> None:
    """Refuse sizes that are no positive integers."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ShapeError(
                f"{kind} config: {name} is {value!r}; it must be a positive integer."
            )


def check_divides(kind: str, config: Any, part: str, whole: str) -> None:
    """Refuse sizes of which one must be a multiple of the other."""
    few, many = getattr(config, part), getattr(config, whole)
    if many % few:
        raise ShapeError(
            f"{kind} config: {whole} is {many}; it must be a multiple of {part}, {few}."
        )


def check_activation(kind: str, name: str) -> None:
    """Refuse activations without an implementation."""
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{kind} config: the activation {name!r} is not known.\n"
            f"Known are {', '.join(sorted(ACTIVATIONS))}."
        )


def plain(value: Any) -> Any:
    """Return a field's value as JSON holds it."""
    return list(value) if isinstance(value, tuple) else value
