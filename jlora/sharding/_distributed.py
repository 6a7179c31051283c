"""Several processes, on one host or many, as one run: they meet before anything else.

JAX does it, and finds what a cluster's launcher says. Here it gets a word for a command
line, and errors that say what is wrong.

Source: https://docs.jax.dev/en/latest/multi_process.html
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from typing import Any

import jax

from jlora._errors import OptionError, ProcessError

AUTO = "auto"
# The first is JAX's own, and launchers for JAX set the others beside it.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FORM = "HOST:PORT,COUNT,INDEX"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where processes meet, how many they are, and which of them this is."""

    address: str
    count: int
    index: int


def initialize(where: str = AUTO, *, timeout: int = 300) -> None:
    """Meet the other processes of a run, by `jax.distributed.initialize`.

    Call it before anything that touches a device. From then on `jax.devices()` are
    those of all processes, and every process makes every call.

    Args:
      where: `"HOST:PORT,COUNT,INDEX"`: an address of process 0's host with a port that
        is free there, how many processes there are, and which of them this is, from 0
        on. `"auto"` takes these from the variables `JAX_COORDINATOR_ADDRESS`,
        `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or, where none of the last two is
        set, from what JAX detects: SLURM, Open MPI, Kubernetes, Cloud TPUs.
      timeout: how many seconds to wait for the others. JAX ends a process that waits in
        vain, which no exception prevents; here it ends with status 1, and says why.

    Raises:
      OptionError: `where` is neither, `"auto"` finds no cluster, or the variables are
        not all there.
      ProcessError: the processes have met before, a device was used before, or the port
        is taken.
    """
    place = place_of(where)
    if jax.distributed.is_initialized():
        raise ProcessError(
            "the processes have met already.\nInitialise once, at the beginning: by "
            "--distributed or in the script, not both."
        )
    meeting: dict[str, Any] = {}
    if place is not None:
        meeting["coordinator_address"] = place.address
        meeting["num_processes"], meeting["process_id"] = place.count, place.index
    came = threading.Event()
    waiting = threading.Thread(
        target=_end_late, args=(came, place, timeout), daemon=True
    )
    waiting.start()
    try:
        jax.distributed.initialize(
            **meeting,
            initialization_timeout=timeout + 60,  # it ends the process without why
        )
    except Exception as error:
        raise _explained(error, place) from error
    finally:
        came.set()


def place_of(where: str) -> Place | None:
    """Read where to meet; None leaves it to JAX.

    Raises:
      OptionError: it cannot be read.

    >>> place_of("node0:1234,4,3")
    Place(address='node0:1234', count=4, index=3)
    """
    if where == AUTO:
        said = [os.environ.get(name) for name in VARIABLES]
        if not any(said[1:]):  # an address alone replaces what JAX finds
            return None
        missing = [n for n, x in zip(VARIABLES, said, strict=True) if not x]
        if missing:
            raise OptionError(
                f"distributed 'auto': {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set.\nSet all three of "
                f"{', '.join(VARIABLES)}, or none of the last two, so that JAX looks "
                "for a cluster."
            )
        parts, source = [x or "" for x in said], ", ".join(VARIABLES)
    else:
        parts, source = where.split(","), "distributed"
    if len(parts) != 3:
        raise OptionError(
            f"distributed {where!r}: expected 'auto', or {_FORM}, such as "
            "'node0:1234,2,0' on the first of two hosts."
        )
    address, count, index = (part.strip() for part in parts)
    return _checked(address, count, index, source)


def _checked(address: str, count: str, index: str, source: str) -> Place:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise OptionError(
            f"{source}: {address!r} is no address.\nWrite the host of process 0 and a "
            "port that is free there, 'node0:1234' say."
        )
    if not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
        raise OptionError(
            f"{source}: process {index!r} of {count!r}.\nProcesses count from 0 on: "
            "of 4 the last is 3."
        )
    return Place(address, int(count), int(index))


def _explained(error: Exception, place: Place | None) -> OptionError | ProcessError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if "before any JAX calls" in said:
        return ProcessError(
            "a device was used before the processes met.\nInitialise first, before "
            "arrays are made and jax.devices() is asked."
        )
    if place is None and isinstance(error, ValueError):
        return OptionError(
            f"distributed 'auto': no cluster is detected ({said}).\nStart the "
            "processes by SLURM's srun, Open MPI's mpirun or a Kubernetes JobSet, "
            f"write {_FORM}, or set {', '.join(VARIABLES)}."
        )
    where = f" at {place.address}" if place else ""
    return ProcessError(
        f"the processes cannot meet{where}: {said}.\nIs the port free on the host of "
        "process 0, and does its name lead there from every host?"
    )


def _end_late(came: threading.Event, place: Place | None, timeout: int) -> None:
    if came.wait(timeout):
        return
    who = f"process {place.index} of {place.count}" if place else "this process"
    where = f" at {place.address}" if place else ""
    sys.stderr.write(
        f"error: {who} has not met the others{where} within {timeout} s.\nAre all of "
        "them running, and can the host of process 0 be reached from the others?\n"
    )
    sys.stderr.flush()
    os._exit(1)
