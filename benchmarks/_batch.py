"""Random numbers that every framework shares."""

from __future__ import annotations

import numpy as np

from benchmarks._cases import Case

# Of an untied head: with saturated logits a benchmark times denormals.
HEAD_STD = 0.02


def batch_of(case: Case) -> dict[str, np.ndarray]:
    """Return random tokens, the same in every framework."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, case.config["vocab_size"], (case.batch, case.source))
    if case.target:
        shape = (case.batch, case.target)
        labels = rng.integers(2, case.config["vocab_size"], shape)
    else:
        last = np.full((case.batch, 1), -100)
        labels = np.concatenate([ids[:, 1:], last], axis=1)
    return {"input_ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}
