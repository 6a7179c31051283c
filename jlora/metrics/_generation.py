"""The metrics of generated text together, as the E2E challenge takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from jlora._errors import OptionError
from jlora.metrics._captions import cider, rouge_l
from jlora.metrics._meteor import meteor
from jlora.metrics._ngrams import bleu, chrf, nist

_Texts = Sequence[str]
_References = Sequence[str | Sequence[str]]


def _bleu(predictions: _Texts, references: _References) -> float:
    return bleu(predictions, references, lowercase=True)


_METRICS: Mapping[str, Callable[[_Texts, _References], float]] = MappingProxyType(
    {
        "bleu": _bleu,
        "nist": nist,
        "meteor": meteor,
        "rouge_l": rouge_l,
        "cider": cider,
        "chrf": chrf,
    }
)
_E2E = ("bleu", "nist", "meteor", "rouge_l", "cider")


def generation(
    predictions: _Texts, references: _References, names: Sequence[str] = _E2E
) -> dict[str, float]:
    """Return the metrics of the E2E challenge, each by its name.

    They are those of its `measure_scores.py -p`, BLEU in lower case among them, as
    papers print them: BLEU, METEOR and ROUGE-L (and chrF) of 100, CIDEr of 10, NIST
    without a bound. METEOR matches words and stems alone; see `meteor`.

    Args:
      predictions: a text for each example.
      references: a text for each example, or several, not equally many for all.
      names: which of "bleu", "nist", "meteor", "rouge_l", "cider", "chrf".

    Raises:
      OptionError: a name that is none of those.
      DataError: what the metrics refuse; their own pages say it.

    Source: Dušek, Novikova and Rieser 2020, arXiv:1901.07931;
    github.com/tuetschek/e2e-metrics.

    >>> said = ["The Heron is a cheap pub.", "Go to Blue Quay."]
    >>> true = [["The Heron is a cheap inn."], ["Try Blue Quay.", "See Blue Quay."]]
    >>> {name: round(score, 1) for name, score in generation(said, true).items()}
    {'bleu': 52.3, 'nist': 2.5, 'meteor': 37.8, 'rouge_l': 71.0, 'cider': 5.0}
    """
    for name in names:
        if name not in _METRICS:
            raise OptionError(
                f"no metric of text is called {name!r}.\nThere are "
                f"{', '.join(_METRICS)}."
            )
    return {name: _METRICS[name](predictions, references) for name in names}
