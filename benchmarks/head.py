"""The head's loss alone, forward and backward: its bytes, kernels, memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Row, Rows, chosen, race

CPU = (Case("t5-small-8x64"), Case("gpt2-4x128"))
GPU = (Case("llama-1b-2x2048"), Case("t5-base-32x512"))
BUILD = ("jax", "head:head")
CONTENDERS: dict[str, tuple[str, str, Row]] = {
    "jlora": (*BUILD, {}),
    "2,048 classes": (*BUILD, {"chunk": 2048}),
    "64 MiB": (*BUILD, {"chunk_bytes": 64 * 2**20}),
    "whole logits": (*BUILD, {"whole": True}),
}
COLUMNS = (
    "case", "compiled_for", "contender", "median_ms", "cpu_ms", "accessed_mib",
    "kernels", "temporary_mib", "to_whole", "loss", "error",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each case; bytes and kernels of a GPU that is described."""
    target = options.compile_for
    names = options.contenders or tuple(CONTENDERS)
    for one in cases(options, *(GPU if options.gpu or target else CPU)):
        entries = chosen(CONTENDERS, names, case=one.json, target=target)
        result = race(entries, options)
        rows = result.rows({"case": one.title, "compiled_for": target}, names)
        measure = "accessed_mib" if target else "median_ms"
        whole = {row["contender"]: row.get(measure) for row in rows}.get("whole logits")
        for row in rows:
            if whole and measure in row:
                row["to_whole"] = row[measure] / whole
            if target:  # nothing ran
                row |= dict.fromkeys(("median_ms", "min_ms", "cpu_ms", "all_ms"))
        yield rows, result.about


def head(
    case: Mapping[str, Any],
    target: str | None = None,
    whole: bool = False,
    **chunks: Any,
) -> Any:
    """The loss of a case's labels, and its gradient for the head's input.

    Args:
      case: its model and batch.
      target: a GPU that is described to XLA; nothing runs then.
      whole: through the logits.
      **chunks: options of `linear_cross_entropy`.
    """
    import jax
    import jax.numpy as jnp

    import jlora.train
    from benchmarks import jax_steps
    from benchmarks.programs import work_of
    from benchmarks.work import workload

    work = workload(Case(**case))
    features = jax.eval_shape(
        lambda params, batch: work.model.apply(
            {"params": params}, *work.inputs(batch), method="features"
        ),
        work.shapes,
        work.batch,
    )

    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        if not whole:
            return jlora.train.linear_cross_entropy(hidden, kernel, labels, **chunks)[0]
        table = kernel if kernel.shape[0] == hidden.shape[-1] else kernel.T
        logits = jnp.matmul(hidden, table, preferred_element_type=jnp.float32)
        return jlora.train.cross_entropy(logits, labels)[0]

    f = jax.jit(jax.value_and_grad(loss))
    if target:
        there = jax_steps.sharding_on(target)
        on = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)  # noqa: E731
        compiled = f.lower(
            *jax.tree.map(on, (*features, work.batch["labels"]))
        ).compile()
        kernels, accessed = work_of(compiled.as_text() or "")
        facts = {"kernels": kernels, "accessed_mib": accessed / 2**20}
        return lambda: None, facts | _temporary(compiled)
    keys = jax.random.split(jax.random.key(0))
    hidden, kernel = (
        jax.random.normal(key, x.shape, x.dtype) * scale
        for key, x, scale in zip(keys, features, (1, 0.05), strict=True)
    )
    arguments = (hidden, kernel, work.batch["labels"])
    facts = _temporary(f.lower(*arguments).compile())
    facts["loss"] = float(f(*arguments)[0])
    return lambda: jax.block_until_ready(f(*arguments)), facts


def _temporary(compiled: Any) -> dict[str, float]:
    return {"temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20}
