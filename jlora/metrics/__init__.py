"""Metrics: predictions beside references, and a number for them.

    accuracy  f1  matthews      of classes
    pearson  spearman           of numbers
    glue  GLUE_TASKS            the official metrics of each task of GLUE
    bleu  chrf  nist  meteor    of texts, with one reference or several
    rouge_l  cider
    generation                  those of the E2E challenge together

Each is one function of predictions and references. Numbers come from the libraries that
the field takes: scikit-learn, SciPy and sacrebleu. NIST, METEOR, ROUGE-L and CIDEr, for
which others need Perl and Java, are written by their papers and checked against those
programs. Nothing here knows of models or of LoRA.

>>> accuracy([0, 1, 1, 0], [0, 1, 0, 0])
0.75
"""

from jlora.metrics._captions import cider as cider
from jlora.metrics._captions import rouge_l as rouge_l
from jlora.metrics._classification import accuracy as accuracy
from jlora.metrics._classification import f1 as f1
from jlora.metrics._classification import matthews as matthews
from jlora.metrics._classification import pearson as pearson
from jlora.metrics._classification import spearman as spearman
from jlora.metrics._generation import generation as generation
from jlora.metrics._glue import GLUE_TASKS as GLUE_TASKS
from jlora.metrics._glue import glue as glue
from jlora.metrics._meteor import meteor as meteor
from jlora.metrics._ngrams import bleu as bleu
from jlora.metrics._ngrams import chrf as chrf
from jlora.metrics._ngrams import nist as nist

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
