"""Training: the state, the jitted step, evaluation, and the checks around them.

>>> def loss_fn(params, batch, key):
...     return jnp.mean((batch["x"] @ params["kernel"] - batch["y"]) ** 2)
>>> tx = optax.adamw(1e-4)
>>> params = lorafy({"kernel": jnp.ones((3, 2))}, rank=1, targets=["kernel"])
>>> state = TrainState.create(params, tx, jax.random.key(0))
>>> step = make_train_step(loss_fn, tx, accumulate=2, clip_norm=1.0)
>>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
>>> for _ in range(3):
...     state, metrics = step(state, batch)
>>> int(state.step), sorted(metrics)
(3, ['grad_norm', 'loss', 'nonfinite', 'weight'])

`loss_fn(params, batch, key)` is written for plain parameters; the step wraps it in
`jlora.lora`. Only the trainable leaves are differentiated, clipped and optimised.

`fit` is a whole run, in a `RunFolder`: steps, validation, the best adapter, a log,
Ctrl-C, resumption. Its loop calls `Callback`s. `RunSettings`, `option` and
`command_line` make a script's command line of a dataclass; `Report` and `plot_losses`
say what came of the run.
"""

try:
    import optax as _optax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'jlora.train needs optax, which is not installed: pip install "jlora[train]"'
    ) from error

from jlora.train._callbacks import Log as Log
from jlora.train._callbacks import ProgressBar as ProgressBar
from jlora.train._callbacks import Save as Save
from jlora.train._callbacks import Validate as Validate
from jlora.train._command import RunSettings as RunSettings
from jlora.train._command import command_line as command_line
from jlora.train._command import option as option
from jlora.train._command import read_settings as read_settings
from jlora.train._evaluation import EvalStep as EvalStep
from jlora.train._evaluation import check_gradients as check_gradients
from jlora.train._evaluation import evaluate as evaluate
from jlora.train._evaluation import make_eval_step as make_eval_step
from jlora.train._fit import Fit as Fit
from jlora.train._fit import fit as fit
from jlora.train._gradients import LossFn as LossFn
from jlora.train._linear_loss import linear_cross_entropy as linear_cross_entropy
from jlora.train._linear_loss import linear_log_probs as linear_log_probs
from jlora.train._loop import Callback as Callback
from jlora.train._loop import Interrupted as Interrupted
from jlora.train._loop import Loop as Loop
from jlora.train._losses import cross_entropy as cross_entropy
from jlora.train._metrics import MetricsLog as MetricsLog
from jlora.train._plot import plot_losses as plot_losses
from jlora.train._preference import AnswerScores as AnswerScores
from jlora.train._preference import PreferenceKind as PreferenceKind
from jlora.train._preference import dpo_loss as dpo_loss
from jlora.train._report import Report as Report
from jlora.train._report import file_sizes as file_sizes
from jlora.train._report import machine as machine
from jlora.train._report import table as table
from jlora.train._run import RunFolder as RunFolder
from jlora.train._schedule import warmup_schedule as warmup_schedule
from jlora.train._state import TrainState as TrainState
from jlora.train._state import replicate as replicate
from jlora.train._state import unreplicate as unreplicate
from jlora.train._step import Hook as Hook
from jlora.train._step import StepInfo as StepInfo
from jlora.train._step import TrainStep as TrainStep
from jlora.train._step import make_train_step as make_train_step
from jlora.train._trackers import TensorBoard as TensorBoard
from jlora.train._trackers import Tracker as Tracker
from jlora.train._trackers import WandB as WandB
from jlora.train._watch import Watch as Watch
from jlora.train._watchdog import Watchdog as Watchdog

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
