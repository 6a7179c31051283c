"""Metrics of labels and of scores: one value an example."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from jlora._errors import DataError
from jlora.metrics._pairs import classes, numbers


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Return the share of predictions that are their reference, 0 to 1.

    Args:
      predictions: a class for each example, `[n]`: integers, booleans or names.
      references: the true classes, `[n]`.

    Raises:
      DataError: the two differ in length, are empty, or hold no classes.

    >>> accuracy([0, 1, 2, 3], [0, 1, 2, 2])
    0.75
    """
    said, true = classes(predictions, references)
    return float(np.mean(said == true))


def f1(
    predictions: ArrayLike,
    references: ArrayLike,
    *,
    positive: Any = 1,
    average: Literal["binary", "macro", "micro", "weighted"] = "binary",
) -> float:
    """Return F1, the harmonic mean of precision and recall, 0 to 1, by scikit-learn.

    Args:
      predictions: a class for each example, `[n]`: integers, booleans or names.
      references: the true classes, `[n]`.
      positive: the class that is looked for, with `average="binary"`.
      average: over the classes as scikit-learn has it; "binary" is of one class.

    Returns:
      F1, and 0 where nothing is found.

    Raises:
      DataError: the two differ in length, are empty, or hold no classes; or they
        hold more than two, and the average is "binary".

    >>> round(f1([1, 1, 0, 0], [1, 0, 1, 1]), 3)
    0.4
    """
    from sklearn.metrics import f1_score

    said, true = classes(predictions, references)
    if average == "binary":
        found = np.union1d(said, true)
        if len(found) > 2:
            raise DataError(
                f"binary F1 is of two classes, and here are {len(found)}: "
                f'{found[:8].tolist()}.\nPass average="macro", or "micro".'
            )
        said, true = said == positive, true == positive
    return float(f1_score(true, said, average=average, zero_division=0.0))


def matthews(predictions: ArrayLike, references: ArrayLike) -> float:
    """Return Matthews' correlation of two labellings, -1 to 1, by scikit-learn.

    Args:
      predictions: a class for each example, `[n]`: integers, booleans or names.
      references: the true classes, `[n]`.

    Returns:
      The correlation, and 0 where all predictions or all references are one class.

    Raises:
      DataError: the two differ in length, are empty, or hold no classes.

    >>> round(matthews([1, 1, 0, 0], [1, 0, 0, 0]), 3)
    0.577
    """
    from sklearn.metrics import matthews_corrcoef

    said, true = classes(predictions, references)
    return float(matthews_corrcoef(true, said))


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Return Pearson's correlation of two series of numbers, -1 to 1, by SciPy.

    Args:
      predictions: a number for each example, `[n]`.
      references: the true numbers, `[n]`.

    Returns:
      The correlation, and NaN where one side is constant: it is not defined there.

    Raises:
      DataError: the two differ in length, or hold fewer than two or not finite numbers.

    >>> round(pearson([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]), 3)
    0.982
    """
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: ArrayLike, references: ArrayLike) -> float:
    """Return Spearman's correlation of ranks, -1 to 1, by SciPy; ties share a rank.

    Args:
      predictions: a number for each example, `[n]`.
      references: the true numbers, `[n]`.

    Returns:
      The correlation, and NaN where one side is constant: it is not defined there.

    Raises:
      DataError: the two differ in length, or hold fewer than two or not finite numbers.

    >>> round(spearman([1.0, 2.0, 40.0], [1.0, 2.0, 3.0]), 3)
    1.0
    """
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _correlation(
    function: Callable[..., Any], predictions: ArrayLike, references: ArrayLike
) -> float:
    from scipy.stats import ConstantInputWarning

    said, true = numbers(predictions, references)
    if len(said) < 2:
        raise DataError("a correlation needs two examples at least, and here is one.")
    with warnings.catch_warnings():  # NaN says it, as the docstrings tell
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(function(said, true).statistic)
