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
from jlora.models.bert import Bert as Bert
from jlora.models.bert import BertClassifier as BertClassifier
from jlora.models.bert import BertConfig as BertConfig
from jlora.models.bert import BertMaskedLM as BertMaskedLM
from jlora.models.bert import label_loss as label_loss
from jlora.models.bert import mean_pool as mean_pool
from jlora.models.gpt2 import GPT2 as GPT2
from jlora.models.gpt2 import GPT2Config as GPT2Config
from jlora.models.llama import GemmaConfig as GemmaConfig
from jlora.models.llama import Llama as Llama
from jlora.models.llama import LlamaConfig as LlamaConfig
from jlora.models.llama import MoeConfig as MoeConfig
from jlora.models.llama import router_loss as router_loss
from jlora.models.t5 import T5 as T5
from jlora.models.t5 import T5Config as T5Config
from jlora.models.t5 import shift_right as shift_right

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
