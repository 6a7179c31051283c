"""Losses of pairs, of which one answer is preferred to the other: DPO and its kin."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jlora._errors import OptionError, ShapeError
from jlora._tree.options import one_of
from jlora.train._gradients import at_least_f32

Array = Any
PreferenceKind = Literal["sigmoid", "ipo", "hinge"]
KINDS = get_args(PreferenceKind)


class AnswerScores(NamedTuple):
    """What a model gives to pairs of answers.

    Attributes:
      chosen: `[B]`, the log-probability of each answer that is preferred, a sum over
        its tokens (of IPO their mean).
      rejected: `[B]`, that of the other answer to the same prompt.
    """

    chosen: Array
    rejected: Array


def dpo_loss(
    policy: AnswerScores,
    reference: AnswerScores,
    mask: Array | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: PreferenceKind = "sigmoid",
) -> tuple[tuple[Array, Array], dict[str, tuple[Array, Array]]]:
    """Direct preference optimisation: the chosen answer above the rejected one.

    With h = (log p/p_ref)(chosen) - (log p/p_ref)(rejected) the loss of a pair is

    - `sigmoid`: -(1 - eps) log s(beta h) - eps log s(-beta h), eps being the share of
      pairs that may be labelled the wrong way round (conservative DPO);
    - `ipo`: (h - 1/(2 beta))², of mean log-probabilities a token;
    - `hinge`: max(0, 1 - beta h), that of SLiC.

    Args:
      policy: of the model that is trained.
      reference: of the model that it started from; no gradient goes there.
      mask: `[B]`, what each pair counts; None is 1.
      beta: how dear it is to leave the reference; larger stays closer.
      label_smoothing: eps, of `sigmoid`.
      kind: one of the three.

    Returns:
      What a loss function of `jlora.train` returns: the sum and the count, and metrics
      as such pairs: `reward_chosen` and `reward_rejected`, beta times what an answer
      gained on the reference; `margin`, their difference; `accuracy`, how often it is
      above 0.

    Raises:
      OptionError: beta is not above 0, label_smoothing not in [0, 0.5), or does not
        belong to the kind.
      ShapeError: scores of different shapes.

    Source: Rafailov et al. 2023, arXiv:2305.18290; Mitchell 2023, "A note on DPO with
    noisy preferences"; IPO, Azar et al. 2023, arXiv:2310.12036; SLiC-HF, Zhao et al.
    2023, arXiv:2305.10425.

    >>> policy = AnswerScores(jnp.array([-3.0]), jnp.array([-9.0]))
    >>> reference = AnswerScores(jnp.array([-5.0]), jnp.array([-6.0]))
    >>> (total, count), metrics = dpo_loss(policy, reference, beta=0.1)
    >>> [round(float(x[0]), 3) for x in (metrics["margin"], (total, count))]
    [0.5, 0.474]
    """
    _check(policy, reference, mask, beta, label_smoothing, kind)
    pairs = zip(map(jnp.asarray, policy), map(jnp.asarray, reference), strict=True)
    gains = [at_least_f32(x) - at_least_f32(jax.lax.stop_gradient(y)) for x, y in pairs]
    h = gains[0] - gains[1]
    if kind == "sigmoid":
        right, wrong = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = jax.nn.relu(1 - beta * h)
    weight = jnp.ones_like(h) if mask is None else jnp.asarray(mask).astype(h.dtype)
    count = jnp.sum(weight)
    # A pair that does not count may hold anything.
    total = lambda x: jnp.sum(jnp.where(weight != 0, x * weight, 0))  # noqa: E731
    metrics = {
        "reward_chosen": beta * gains[0],
        "reward_rejected": beta * gains[1],
        "margin": beta * h,
        "accuracy": (h > 0).astype(h.dtype),
    }
    return (total(losses), count), {k: (total(x), count) for k, x in metrics.items()}


def _check(
    policy: AnswerScores,
    reference: AnswerScores,
    mask: Array | None,
    beta: float,
    label_smoothing: float,
    kind: str,
) -> None:
    one_of("kind", kind, KINDS)
    if not beta > 0:
        raise OptionError(f"beta={beta!r}: expected a number above 0.")
    if not 0 <= label_smoothing < 0.5:
        raise OptionError(
            f"label_smoothing={label_smoothing!r}: expected a share of pairs, at least "
            "0 and below 0.5."
        )
    if label_smoothing and kind != "sigmoid":
        raise OptionError(f"label_smoothing is of kind='sigmoid', not of {kind!r}.")
    shapes = [jnp.shape(x) for x in (*policy, *reference)]
    shapes += [] if mask is None else [jnp.shape(mask)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ShapeError(
            f"scores of pairs are {shapes}: expected [B] for the chosen and rejected "
            "answers of policy and reference (and the mask)."
        )
