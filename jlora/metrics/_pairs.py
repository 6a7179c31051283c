"""Predictions beside their references: what every metric asks of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jlora._errors import DataError


def equally_long(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raise unless each prediction has its reference, and there is one at least."""
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions):,} predictions stand beside {len(references):,} "
            "references.\nPass one prediction for each example, in the same order."
        )
    if not len(predictions):
        raise DataError("there is no prediction to score.\nPass one at least.")


def classes(predictions: ArrayLike, references: ArrayLike) -> tuple[Any, Any]:
    """The two as vectors of classes: integers, booleans or names."""
    pair = _vectors(predictions, references)
    for name, values in zip(("predictions", "references"), pair, strict=True):
        if values.dtype.kind not in "iubUS":
            raise DataError(
                f"the {name} are {values.dtype} and no classes.\nPass integers or "
                "names: of logits [examples, classes] their argmax over the last axis."
            )
    if (pair[0].dtype.kind in "US") != (pair[1].dtype.kind in "US"):
        raise DataError(
            f"predictions of {pair[0].dtype} cannot equal references of "
            f"{pair[1].dtype}.\nName the classes in the same way in both."
        )
    return pair


def numbers(predictions: ArrayLike, references: ArrayLike) -> tuple[Any, Any]:
    """The two as vectors of finite float64."""
    pair = _vectors(predictions, references)
    for name, values in zip(("predictions", "references"), pair, strict=True):
        if values.dtype.kind not in "iubf":
            raise DataError(
                f"the {name} are {values.dtype}, and a correlation needs numbers."
            )
        if not (finite := np.isfinite(values)).all():
            where = int(np.argmin(finite))
            raise DataError(
                f"the {name} hold {values[where]} at {where}.\nA correlation needs "
                "finite numbers: look why the model gives none."
            )
    return pair[0].astype(np.float64), pair[1].astype(np.float64)


def _vectors(predictions: ArrayLike, references: ArrayLike) -> tuple[Any, Any]:
    pair = _vector("predictions", predictions), _vector("references", references)
    equally_long(*pair)
    return pair


def _vector(name: str, values: ArrayLike) -> Any:
    vector = np.asarray(values)
    if vector.dtype.kind == "V":  # JAX's own floats, bfloat16 among them
        vector = vector.astype(np.float32)
    if vector.ndim != 1:
        raise DataError(
            f"the {name} have the shape {vector.shape}, and one value an example is "
            "needed.\nOf logits [examples, classes] pass the argmax over the last "
            "axis, of regressions [examples, 1] the only column."
        )
    return vector


def texts(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The predictions, and the references of each as a list, however many they are."""
    for name, given in (("predictions", predictions), ("references", references)):
        if isinstance(given, str):
            raise DataError(
                f"the {name} are one string.\nPass a list, with one entry an example."
            )
    equally_long(predictions, references)
    several = [[each] if isinstance(each, str) else [*each] for each in references]
    for i, (said, true) in enumerate(zip(predictions, several, strict=True)):
        if not isinstance(said, str) or not all(isinstance(x, str) for x in true):
            raise DataError(
                f"example {i} has a prediction or a reference that is no text."
            )
        if not any(text.strip() for text in true):
            raise DataError(
                f"example {i} has no reference.\nLeave it out, here and among the "
                "predictions."
            )
    return [*predictions], several
