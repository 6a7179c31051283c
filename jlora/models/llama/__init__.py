"""The Llama family: Llama, Mistral, Qwen, Gemma, and their mixtures of experts."""

from jlora.models.llama._config import LlamaConfig as LlamaConfig
from jlora.models.llama._feed_forward import router_loss as router_loss
from jlora.models.llama._gemma_config import GemmaConfig as GemmaConfig
from jlora.models.llama._model import Llama as Llama
from jlora.models.llama._moe_config import MoeConfig as MoeConfig
