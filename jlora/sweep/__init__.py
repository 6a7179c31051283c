"""Many adapters on one base, trained together in one compiled step.

>>> params = {"query": {"kernel": jnp.ones((3, 2))}}
>>> jobs = grid(rank=[1, 2], learning_rate=[1e-2, 1e-1])
>>> plan = Plan(params, jobs, targets=["query"])
>>> bank = plan.bank(jobs)
>>> def loss_fn(params, batch, key):
...     return jnp.mean((batch["x"] @ params["query"]["kernel"] - batch["y"]) ** 2)
>>> step = sweep_step(loss_fn)
>>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
>>> bank, metrics = step(bank, batch, shared=True)
>>> metrics["loss"].shape, plan.state(bank, 0, jobs[0]).params["query"]["kernel"]
((4,), LowRank('query/kernel', float32[3, 2], rank 1, scale 1))

Each job has its own rank, scale, rates, seed and data, and ends as a run of
`jlora.train` alone would.
"""

try:
    import optax as _optax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'jlora.sweep needs optax, which is not installed: pip install "jlora[train]"'
    ) from error

from jlora.sweep._bank import Bank as Bank
from jlora.sweep._jobs import Hyper as Hyper
from jlora.sweep._jobs import Job as Job
from jlora.sweep._jobs import grid as grid
from jlora.sweep._jobs import paired as paired
from jlora.sweep._jobs import read_jobs as read_jobs
from jlora.sweep._memory import Account as Account
from jlora.sweep._memory import account as account
from jlora.sweep._plan import Plan as Plan
from jlora.sweep._plan import adamw as adamw
from jlora.sweep._plots import Line as Line
from jlora.sweep._plots import plot_heat_map as plot_heat_map
from jlora.sweep._plots import plot_lines as plot_lines
from jlora.sweep._results import Result as Result
from jlora.sweep._results import Results as Results
from jlora.sweep._rules import Halving as Halving
from jlora.sweep._rules import Plateau as Plateau
from jlora.sweep._rules import Rising as Rising
from jlora.sweep._run import run as run
from jlora.sweep._step import SweepEval as SweepEval
from jlora.sweep._step import SweepStep as SweepStep
from jlora.sweep._step import sweep_step as sweep_step

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
