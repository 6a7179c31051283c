"""Several processes on a command line: `--distributed`."""

from __future__ import annotations

import dataclasses

from jlora._errors import OptionError
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

    def check_alone(self, what: str) -> None:
        """Refuse several processes where there is to be one.

        Args:
          what: needs it: `"a sweep"`.

        Raises:
          OptionError: `--distributed` was given.
        """
        if self.distributed is not None:
            raise OptionError(
                f"--distributed: {what} runs in one process, on all devices of its "
                "host.\nLeave the option out, or start each of the runs by itself."
            )
