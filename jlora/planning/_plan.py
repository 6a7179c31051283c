"""`jlora.plan`: what a run takes on each device, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optax

    from jlora.planning._machines import Accelerator
    from jlora.planning._report import Plan


def plan(
    model: Any,
    *,
    batch: Any,
    rank: int = 8,
    targets: Any = ("query", "value"),
    quantize: str | None = None,
    full: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    precision: str = "float32",
    tx: optax.GradientTransformation | None = None,
    accumulate: int = 1,
    clip: float | None = 1.0,
    mesh: Any = None,
    layout: Any = "fsdp+tensor",
    uneven: str = "error",
    devices: str | Accelerator = "h100",
    scan_layers: bool = True,
    remat: bool = False,
    attn_implementation: str = "einsum",
    loss_fn: Callable[..., Any] | None = None,
    compiled: bool = False,
    remedies: bool | None = None,
    **lorafy: Any,
) -> Plan:
    """Say what a training run takes: bytes per device, operations, traffic, time.

    Nothing is allocated, downloaded or run. The training step of `jlora.train` is
    traced on shapes, and its program is read operation by operation: how the mesh cuts
    each value, what devices send for it, what is in memory at once. Parameters, states
    and batches are exact. Temporaries are an estimate of what XLA will do, which mostly
    puts the whole within a tenth of XLA's own account; the guide to planning says where
    it does not. `compiled=True` asks XLA.

    Args:
      model: a model's folder or its `config.json`, the contents of one, a configuration
        or a model of `jlora.models`; with `loss_fn`, any tree of parameters or shapes.
      batch: a step's, over all devices: (examples, tokens) or, for an encoder-decoder,
        (examples, tokens, tokens of the answer). With `loss_fn`, a tree of arrays or
        shapes.
      rank: of the adapters.
      targets: as of `jlora.lorafy`.
      quantize: keep the frozen base in this form, as of `jlora.quantize`.
      full: train every weight instead.
      dora: DoRA.
      dropout: of the adapters' inputs.
      precision: what the base is kept in and the model computes in; adapters and the
        optimiser's state are float32.
      tx: the optimiser; None is `optax.adamw`.
      accumulate: parts a batch is cut into.
      clip: the gradient's norm; None is off.
      mesh: `"data=2,fsdp=4"`, a mapping, or a mesh; an abstract one needs no devices.
        None is one device. A size may not be -1: there are no devices to count.
      layout: how parameters are spread, as in `jlora.sharding.rules`.
      uneven: what to do with axes that the mesh does not divide, as there.
      devices: an accelerator by its name below, or a `jlora.Accelerator`.
      scan_layers: as in `jlora.models.load`; a model of many layers that are not
        scanned takes long to trace.
      remat: as in `jlora.models.load`.
      attn_implementation: likewise; `"cudnn"` can be traced only on a GPU.
      loss_fn: a loss of your own, `(params, batch, key)`; `precision` is then up to it.
      compiled: compile the step too, and use XLA's account of memory. `jax.devices()`
        must then be enough for the mesh. The account is for these devices: on a CPU XLA
        computes in float32 where it computes in bfloat16 on a GPU.
      remedies: whether to plan also what would make it smaller; None does so if it
        does not fit.
      **lorafy: more arguments of `jlora.lorafy`.

    Returns:
      The plan; prints as a table.

    Raises:
      OptionError: an argument that is not allowed; a `compiled` plan for devices that
        this machine does not have.
      CheckpointError: a configuration that cannot be read or honoured.
      ShapeError: a batch or a kernel that the mesh does not divide; a block of a form.
      TargetError: as of `jlora.lorafy`.

    The numbers of accelerators are from data sheets, per device and without sparsity;
    the network between machines is that of the maker's reference machines.

    ========  =======  ==========  =============  ============  =============
    name      memory   bandwidth   bf16 products  in a machine  to the others
    ========  =======  ==========  =============  ============  =============
    a100-40   40 GiB   1.56 TB/s   312 TFLOP/s    300 GB/s      25 GB/s
    a100-80   80 GiB   2.04 TB/s   312 TFLOP/s    300 GB/s      25 GB/s
    h100      80 GiB   3.35 TB/s   989 TFLOP/s    450 GB/s      50 GB/s
    h200      141 GB   4.8 TB/s    989 TFLOP/s    450 GB/s      50 GB/s
    b200      180 GB   7.7 TB/s    2,250 TFLOP/s  900 GB/s      50 GB/s
    l4        24 GB    0.3 TB/s    121 TFLOP/s    32 GB/s       12.5 GB/s
    v5e       16 GiB   0.82 TB/s   197 TFLOP/s    200 GB/s      3.1 GB/s
    v5p       95 GiB   2.77 TB/s   459 TFLOP/s    600 GB/s      6.3 GB/s
    v6e       32 GiB   1.64 TB/s   918 TFLOP/s    400 GB/s      12.5 GB/s
    ========  =======  ==========  =============  ============  =============

    Source: NVIDIA's data sheets of the A100 (SXM), H100 (SXM), H200 (SXM), HGX B200 and
    L4; Google's "TPU v5e", "TPU v5p" and "TPU v6e" (docs.cloud.google.com/tpu/docs).
    Collectives send what ring algorithms send: Thakur et al. 2005,
    doi:10.1177/1094342005051521.

    >>> llama = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256,
    ...     "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1000}
    >>> found = plan(llama, batch=(4, 32), rank=4, devices="l4")
    >>> found.fits, found.trainable
    (True, 8192)
    """
    from jlora.planning._make import make
    from jlora.planning._read import Request

    return make(
        Request(
            model=model,
            batch=batch,
            rank=rank,
            targets=targets,
            quantize=quantize,
            full=full,
            dora=dora,
            dropout=dropout,
            precision=precision,
            tx=tx,
            accumulate=accumulate,
            clip=clip,
            mesh=mesh,
            layout=layout,
            uneven=uneven,
            devices=devices,
            scan_layers=scan_layers,
            remat=remat,
            attn_implementation=attn_implementation,
            loss_fn=loss_fn,
            lorafy=lorafy,
        ),
        compiled=compiled,
        remedies=remedies,
    )
