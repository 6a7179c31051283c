"""Several processes on a command line: `--distributed`."""

from __future__ import annotations

import dataclasses

from jlora._options import option
from jlora.sharding._distributed import initialize


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """How the processes of a run find each other."""

    distributed: str | None = option(
        None,
        "one run of several processes, each started by this command: auto (SLURM, Open "
        "MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID), or where they meet, how many they are and which one this is",
        metavar="auto|HOST:PORT,COUNT,INDEX",
        extends=True,
        group="devices",
    )

    def meet(self) -> None:
        """Wait for the other processes, if the option says that there are some.

        Raises:
          OptionError: it cannot be read, or no cluster is found.
          ProcessError: the processes cannot meet.
        """
        if self.distributed is not None:
            initialize(self.distributed)
