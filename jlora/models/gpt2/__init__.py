"""GPT-2."""

from jlora.models.gpt2._config import GPT2Config as GPT2Config
from jlora.models.gpt2._model import GPT2 as GPT2
