"""The tasks of GLUE and the metrics that its leaderboard takes for each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from numpy.typing import ArrayLike

from jlora._errors import OptionError
from jlora.metrics._classification import accuracy, f1, matthews, pearson, spearman

# By the names of the tasks in `datasets` ("nyu-mll/glue").
_METRICS: Mapping[str, tuple[Callable[..., float], ...]] = {
    "cola": (matthews,),
    "sst2": (accuracy,),
    "mrpc": (accuracy, f1),
    "qqp": (accuracy, f1),
    "stsb": (pearson, spearman),
    "mnli": (accuracy,),
    "qnli": (accuracy,),
    "rte": (accuracy,),
    "wnli": (accuracy,),
}

#: GLUE's tasks, and the names of the metrics that each is judged by.
GLUE_TASKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        task: tuple(metric.__name__ for metric in metrics)
        for task, metrics in _METRICS.items()
    }
)


def glue(task: str, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Return the official metrics of a GLUE task, each by its name.

    Args:
      task: one of `GLUE_TASKS`; "mnli" is for its matched and mismatched halves alike.
      predictions: a class for each example, `[n]`, with 1 for the paraphrases of MRPC
        and QQP; for STS-B a number.
      references: the true classes or numbers, `[n]`.

    Returns:
      The metrics that `GLUE_TASKS[task]` names, as shares (1 is perfect, not 100). A
      task's one score on the leaderboard is their mean.

    Raises:
      OptionError: GLUE has no such task.
      DataError: what the metrics refuse; their own pages say it.

    Source: Wang et al. 2018, arXiv:1804.07461, table 1.

    >>> glue("mrpc", [1, 1, 0, 0], [1, 1, 0, 0])
    {'accuracy': 1.0, 'f1': 1.0}
    """
    if task not in _METRICS:
        near = difflib.get_close_matches(task.lower().replace("-", ""), _METRICS, n=1)
        hint = f" Do you mean {near[0]!r}?" if near else ""
        raise OptionError(
            f"GLUE has no task {task!r}.{hint}\nIts tasks are {', '.join(_METRICS)}."
        )
    return {m.__name__: m(predictions, references) for m in _METRICS[task]}
