"""Checkpoints on Orbax: adapters, whole training states, merged parameters.

    save_adapter   load_adapter    the adapters alone, kilobytes to megabytes
    save_state     restore_state   a run that goes on bit for bit; `Checkpoints` keeps
                                   the last and the best of them
    save_merged    load_merged     plain parameters, the adapters folded in

The frozen base is not written again. Its fingerprint is, and an adapter or a state is
restored onto no other base. A checkpoint appears whole or not at all, replaces nothing
unasked, and every array in it is checked against its digest when it is read. Several
processes call each function together, on a file system that they share.
"""

from jlora.checkpoint._adapters import load_adapter as load_adapter
from jlora.checkpoint._adapters import load_merged as load_merged
from jlora.checkpoint._adapters import load_metadata as load_metadata
from jlora.checkpoint._adapters import save_adapter as save_adapter
from jlora.checkpoint._adapters import save_merged as save_merged
from jlora.checkpoint._fingerprint import Fingerprint as Fingerprint
from jlora.checkpoint._fingerprint import fingerprint as fingerprint
from jlora.checkpoint._manager import Checkpoints as Checkpoints
from jlora.checkpoint._states import restore_state as restore_state
from jlora.checkpoint._states import save_state as save_state

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
