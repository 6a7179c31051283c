"""Metrics: predictions beside references, and a number for them.

    accuracy  f1  matthews      of classes
    pearson  spearman           of numbers
    glue  GLUE_TASKS            the official metrics of each task of GLUE

Each is one function of predictions and references. Numbers come from the libraries that
the field takes, scikit-learn and SciPy. Nothing here knows of models or of LoRA.

>>> accuracy([0, 1, 1, 0], [0, 1, 0, 0])
0.75
"""

from jlora.metrics._classification import accuracy as accuracy
from jlora.metrics._classification import f1 as f1
from jlora.metrics._classification import matthews as matthews
from jlora.metrics._classification import pearson as pearson
from jlora.metrics._classification import spearman as spearman
from jlora.metrics._glue import GLUE_TASKS as GLUE_TASKS
from jlora.metrics._glue import glue as glue

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
