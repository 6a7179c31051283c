"""Files of models whose layers PEFT repeats: the tree must repeat them too."""

from __future__ import annotations

import re

from jlora._errors import CheckpointError
from jlora.peft._fields import Config
from jlora.peft._names import Table

# What the modules of layers are called in the models whose layers PEFT repeats.
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(\d+)(?:\.|$)")


def check_depth(config: Config, table: Table, where: str) -> None:
    """Refuse a tree of another depth than a file's `layer_replication` gives.

    Raises:
      CheckpointError: it is of another depth, or the key says no ranges.

    Source: PEFT's `replicate_layers`.
    """
    ranges = config.get("layer_replication")
    if not ranges:
        return
    try:
        depth = sum(end - start for start, end in ranges)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{where}: layer_replication is {ranges!r}, of the wrong type."
        ) from None
    found = [m[1] for name in table.modules() if (m := _LAYER.search(name))]
    layers = max(map(int, found), default=-1) + 1
    if layers != depth:
        raise CheckpointError(
            f"{where}: layer_replication is {ranges}, a model of {depth} layers, and "
            f"the parameters are of one with {layers}.\nRepeat them first: "
            f"jlora.models.load(folder, layer_replication={ranges}), or "
            f"jlora.replicate_layers(params, {ranges}, at=[...])."
        )
