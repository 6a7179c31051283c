"""PEFT's adapters on parameters: where in the file each one is.

A parameter that is targeted itself, and not by its module, wraps the module; a second
one wraps the first wrapper. So of a module with `gate_up_proj` and `down_proj` the keys
are `experts.base_layer.lora_A` and `experts.lora_A`: what the model declares last is
outermost, in whatever order `target_parameters` names them.

Source: PEFT 0.21.2, `BaseTuner._inject_parameters`.
"""

from __future__ import annotations

from jlora.peft._config import targets_parameter
from jlora.peft._fields import Config
from jlora.peft._names import Param, Table


def targeted_parameters(config: Config, table: Table) -> dict[str, Param]:
    """The parameters that the configuration targets, by the module of their keys.

    Raises:
      TargetError: several in one module, whose order is not known.
    """
    by_module: dict[str, list[Param]] = {}
    if config.get("target_parameters"):
        for key, param in table.params.items():
            if targets_parameter(config, key):
                by_module.setdefault(param.module, []).append(param)
    return {
        module + ".base_layer" * inside: param
        for module, params in by_module.items()
        for inside, param in enumerate(reversed(table.in_order(params)))
    }
