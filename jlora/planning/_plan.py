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
    """Say what a training run takes: bytes a device, operations, traffic, time.

    Nothing is allocated, downloaded or run. The training step of `jlora.train` is
    traced on shapes, and its program read operation by operation: how the mesh cuts
    each value, what devices send for it, what is in memory at once. Parameters, states
    and batches are exact; temporaries are an estimate of what XLA will do, which mostly
    puts the whole within a tenth of XLA's own account: see the guide to planning for
    where it does not. `compiled=True` asks XLA.

    Args:
      model: a model's folder or its `config.json`, what stands in one, a configuration
        or a model of `jlora.models`; with `loss_fn`, any tree of parameters or shapes.
      batch: of a step, on all devices together: (examples, tokens), of an
        encoder-decoder (examples, tokens, tokens of the answer). With `loss_fn`, a tree
        of arrays or shapes.
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
      layout: where parameters lie, as of `jlora.sharding.rules`.
      uneven: likewise, for axes that the mesh does not divide.
      devices: an accelerator by name, of those below, or a `jlora.Accelerator`.
      scan_layers: as of `jlora.models.load`; a model of many layers that are not
        scanned takes long to trace.
      remat: likewise.
      attn_implementation: likewise; `"cudnn"` can be traced on a GPU alone.
      loss_fn: a loss of your own, `(params, batch, key)`; `precision` is then up to it.
      compiled: compile the step too, and take XLA's account of memory. The mesh has
        then to be one that `jax.devices()` can make. The account is of these devices:
        a CPU's XLA computes in float32 where a GPU's computes in bfloat16.
      remedies: whether to plan what would make it smaller too; None does so where it
        does not fit.
      **lorafy: more arguments of `jlora.lorafy`.

    Returns:
      The plan; prints as a table.

    Raises:
      OptionError: an argument that cannot be; a `compiled` plan for other devices than
        there are.
      CheckpointError: a configuration that cannot be read or honoured.
      ShapeError: a batch or a kernel that the mesh does not divide; a block of a form.
      TargetError: as of `jlora.lorafy`.

    The numbers of accelerators are those of data sheets, a device's, without sparsity;
    the network between machines is what the maker's reference machines have.

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
