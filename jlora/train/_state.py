"""The training state, and its copies on several devices for `jax.pmap`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._processes import put
from jlora._tree.dropout import with_dropout
from jlora._tree.partition import combine, split
from jlora.train._form import Lying
from jlora.train._static import Rest, is_array, put_together, take_apart

if TYPE_CHECKING:
    import optax

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on, as a pytree.

    Between steps on one device leaves that are alike lie in stacks. The halves, and
    `params`, are cut from them when they, or the state's leaves, are asked for; whoever
    waits for a step waits for its metrics, `jax.block_until_ready(metrics)`.

    Attributes:
      step: how many updates were made, int32.
      trainable: the trainable half of the lorafied tree, see `jlora.split`.
      frozen: the other half. The step hands it on, the same arrays: it is neither
        copied nor donated.
      opt_state: optimiser state of the trainable leaves alone.
      key: the run's PRNG key. It stays as it is; step n uses it folded with n.
    """

    step: Array
    trainable: Tree
    frozen: Tree
    opt_state: Any
    key: Array

    def __getattr__(self, name: str) -> Any:
        # Asked only for what is not there: what a step has left as it lies.
        lying: Lying | None = self.__dict__.get("lying")
        if lying is None or name not in ("trainable", "opt_state"):
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}"
            )
        _, trainable, opt_state = lying.moving()
        self.__dict__.update(trainable=trainable, opt_state=opt_state)
        return self.__dict__[name]

    def __reduce__(self) -> Any:
        fields = dataclasses.fields(self)
        return type(self), tuple(getattr(self, f.name) for f in fields)

    @classmethod
    def create(
        cls,
        params: Tree,
        tx: optax.GradientTransformation,
        key: Array | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> TrainState:
        """The state before the first step.

        Trainable leaves are copied, so a step that donates its state leaves `params`
        usable. If a leaf lies on a mesh, leaves that lie nowhere in particular are
        replicated over it.

        Args:
          params: a lorafied tree, of arrays or of shapes (which give an abstract
            state, for restoring into). Leaves that are no arrays, such as Equinox's
            activation functions, belong to the frozen half and to the compiled program.
          tx: the optimiser. It sees the trainable half only; label trees for
            `optax.multi_transform` are `jlora.split(jlora.labels(params))[0]`.
          key: the run's PRNG key; None is `jax.random.key(0)`.
          mesh: leaves that lie on no mesh are replicated over this one.

        Raises:
          StructureError: nothing in `params` is trained.
        """
        key = jax.random.key(0) if key is None else key
        leaves = jax.tree.leaves(params)
        make = functools.partial(_new_state, cls, tx)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            return _abstract(make, params, key)
        return _together(make(params, key), mesh)

    @classmethod
    def as_it_lies(cls, lying: Lying, frozen: Tree, key: Array) -> TrainState:
        """A state of which the moving halves are made when they are asked for."""
        state = object.__new__(cls)
        step = lying.buffers[0]
        state.__dict__.update(step=step, frozen=frozen, key=key, lying=lying)
        return state

    @functools.cached_property
    def params(self) -> Tree:
        """The lorafied tree: evaluate, merge or save this."""
        return combine(self.trainable, self.frozen)

    @functools.cached_property
    def evaluated(self) -> tuple[Tree, list[Any], Rest]:
        """`params` without dropout; its arrays, and the rest of it."""
        tree = with_dropout(self.params, None)
        return tree, *take_apart(tree)


def _abstract(make: Callable[..., TrainState], params: Tree, key: Array) -> TrainState:
    """The state's shapes, and what is no array as it is."""
    arrays, rest = take_apart(params)
    kept: list[Rest] = []

    def arrays_of(arrays: list[Any], key: Array) -> list[Any]:
        found, structure = take_apart(make(put_together(arrays, rest), key))
        kept.append(structure)
        return found

    shapes = jax.eval_shape(arrays_of, arrays, key)
    return put_together(shapes, kept[0])


def _new_state(
    cls: type[TrainState], tx: optax.GradientTransformation, params: Tree, key: Array
) -> TrainState:
    trainable, frozen = split(with_dropout(params, None))
    trainable = jax.tree.map(_own, trainable)
    # Left on the host, a NumPy base would be sent to the device at every step.
    frozen = jax.tree.map(_to_device, frozen)
    # Some optimisers keep the parameters themselves; no buffer is donated twice.
    opt_state = jax.tree.map(_own, tx.init(trainable))
    return cls(jnp.zeros((), jnp.int32), trainable, frozen, opt_state, key)


def _own(x: Any) -> Array:
    return strongly_typed(jnp.copy(x))


def strongly_typed(x: Array) -> Array:
    """X with its dtype as its own: a weak one would be compiled for anew."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return x if is_key else x.astype(x.dtype)


def _to_device(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _together(state: TrainState, wanted: Mesh | None) -> TrainState:
    """Place leaves that never were where others lie: on their mesh, or their device.

    A step's results all are where one of its arguments was put; the next step would be
    compiled anew for them.
    """
    leaves = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return state
    meshes = (x.sharding.mesh for x in leaves if isinstance(x.sharding, NamedSharding))
    mesh = wanted or next((m for m in meshes if isinstance(m, Mesh)), None)
    where: Any = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    if where is None:
        devices = {x.sharding for x in leaves if x.committed}
        if len(devices) != 1:
            return state
        where = devices.pop()

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array) or isinstance(x.sharding, NamedSharding):
            return x
        return x if x.committed and wanted is None else put(x, where)

    return jax.tree.map(place, state)


# -- pmap ------------------------------------------------------------------------------


def replicate(
    state: TrainState, devices: Sequence[jax.Device] | None = None
) -> TrainState:
    """The state with a leading axis of devices, for `parallel="pmap"`."""
    devices = list(jax.local_devices() if devices is None else devices)
    mesh = Mesh(np.array(devices), ("batch",))
    along = NamedSharding(mesh, PartitionSpec("batch"))

    def one(x: Any) -> Any:
        if not is_array(x):
            return x
        x = jnp.asarray(x)
        return jax.device_put(jnp.broadcast_to(x, (len(devices), *x.shape)), along)

    return jax.tree.map(one, state)


def unreplicate(tree: Tree) -> Tree:
    """The first device's copy: undo `replicate`, or read metrics of a pmapped step."""
    return jax.tree.map(lambda x: x[0] if is_array(x) else x, tree)
