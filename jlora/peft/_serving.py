"""What servers would make of an adapter, where that is not what was trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection

from jlora._errors import JloraWarning
from jlora._text import listed
from jlora.peft._config import scale_of
from jlora.peft._fields import Config

_LAYER = re.compile(r"\.\d+\.")


def warn_of_servers(
    config: Config, adapted: Collection[str], modules: Collection[str]
) -> None:
    """Warn, once, of what vLLM and TGI do not read of a decoder's adapter.

    PEFT reads it all; other kinds of models are not served with adapters.

    Args:
      config: what is written.
      adapted: the modules that have an adapter.
      modules: all of the model.

    Source: vLLM's `vllm/lora/peft_helper.py` and TGI's `server/adapters/lora.py`: one
    `lora_alpha` and `r` a file, and projections that every layer has.
    """
    if config.get("task_type") != "CAUSAL_LM":
        return
    plain = scale_of({**config, "rank_pattern": {}, "alpha_pattern": {}}, "")
    scales = {name: scale_of(config, name) for name in adapted}
    off = [
        f"{n} by {x:g}" for n, x in sorted(scales.items()) if abs(x / plain - 1) > 1e-6
    ]
    kinds = {_LAYER.sub(".*.", name) for name in adapted}
    lacking = [n for n in modules if n not in adapted and _LAYER.sub(".*.", n) in kinds]
    said = []
    if off:
        said.append(
            f"vLLM and TGI scale every kernel by the file's alpha/r, {plain:g}, and "
            f"these were trained with another:\n  {listed(off)}"
        )
    if lacking:
        said.append(
            "TGI leaves a projection out in all layers where one layer lacks it, as "
            f"here:\n  {listed(lacking)}"
        )
    if said:
        warnings.warn(
            "a server would not answer as this adapter does, PEFT would.\n"
            + "\n".join(said)
            + "\nFor a server train all layers alike, with one rank and alpha; or "
            "serve the merged model, jlora.merge.",
            JloraWarning,
            stacklevel=3,
        )
