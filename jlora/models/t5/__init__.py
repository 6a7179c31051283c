"""T5 v1.0, v1.1, FLAN-T5, ByT5 and mT5."""

from jlora.models.t5._config import T5Config as T5Config
from jlora.models.t5._model import T5 as T5
from jlora.models.t5._model import shift_right as shift_right
