"""JAX's strict settings: no implicit promotion of dtypes, none of ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import IDS, inputs, make

from jlora import models

MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama", "gemma2", "roberta"])
def test_models_need_no_implicit_promotion(kind, dtype):
    model, params = make(kind, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    args = (IDS, MASK, *inputs(kind)[2:])
    want = model.apply({"params": params}, *args)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(model.init, jax.random.key(0), *inputs(kind))
        got = jax.jit(model.apply)({"params": params}, *args)
        if kind == "t5":
            how = {"repetition_penalty": 1.2, "num_beams": 2, "min_new_tokens": 2}
            how |= {"bad_words_ids": [[3, 4]], "no_repeat_ngram_size": 2}
            models.generate(model, params, IDS, MASK, max_new_tokens=3, **how)
    assert got.dtype == dtype
    tol = 1e-5 if dtype == jnp.float32 else 0.1
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, atol=tol * np.abs(want).max())
