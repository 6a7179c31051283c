"""PEFT's adapter folders, read and written: `adapter_config.json` and its tensors.

    params = jlora.peft.load("someones/adapter", params)    # trained in PyTorch
    jlora.peft.save("ours", params, task_type="SEQ_2_SEQ_LM")   # for PEFT, vLLM, TGI

The tree is matched to PyTorch's modules by name: `encoder/block/0/layer/0/
SelfAttention/q/kernel` is the weight of `encoder.block.0.layer.0.SelfAttention.q`; a
model that knows better says so, `model=`, or you do, `names=`.

LoRA, rsLoRA and DoRA on linear layers, embeddings, tied heads, convolutions and
experts, VeRA, LoHa and LoKr on layers; ranks and alphas by pattern; biases of adapters;
trained rows of tables; whole modules and biases; several adapters in a folder. What a
file says and jlora cannot honour is an error.
"""

from jlora.peft._api import load as load
from jlora.peft._api import load_all as load_all
from jlora.peft._api import read_config as read_config
from jlora.peft._api import save as save

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
