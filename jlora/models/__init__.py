"""Flax models that read and write Hugging Face's safetensors, without PyTorch.

    model, params = models.load("google/flan-t5-small")
    logits = model.apply({"params": params}, ids, mask, decoder_ids)
    tokens = models.generate(model, params, ids, mask, num_beams=4)
    models.save(model, params, "out")

The models know nothing of LoRA. `jlora.lora` adapts their pure functions, here with
`models.generate(..., transform=jlora.lora)`.
"""

from jlora.models._generate.config import GenerationConfig as GenerationConfig
from jlora.models._generate.generate import generate as generate
from jlora.models._generate.generate import generate_with as generate_with
from jlora.models._hf.load import load as load
from jlora.models._hf.save import save as save
from jlora.models._hf.tables import resize_vocabulary as resize_vocabulary
from jlora.models._hf.tables import untie as untie
from jlora.models.bert._config import BertConfig as BertConfig
from jlora.models.bert._model import Bert as Bert
from jlora.models.bert._model import BertClassifier as BertClassifier
from jlora.models.bert._model import BertMaskedLM as BertMaskedLM
from jlora.models.bert._model import label_loss as label_loss
from jlora.models.bert._model import mean_pool as mean_pool
from jlora.models.gpt2._config import GPT2Config as GPT2Config
from jlora.models.gpt2._model import GPT2 as GPT2
from jlora.models.llama._config import LlamaConfig as LlamaConfig
from jlora.models.llama._feed_forward import router_loss as router_loss
from jlora.models.llama._gemma_config import GemmaConfig as GemmaConfig
from jlora.models.llama._model import Llama as Llama
from jlora.models.llama._moe_config import MoeConfig as MoeConfig
from jlora.models.t5._config import T5Config as T5Config
from jlora.models.t5._model import T5 as T5
from jlora.models.t5._model import shift_right as shift_right

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
