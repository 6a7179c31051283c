"""Generation of mixed batches: each prompt's tokens are those of its own adapter."""

import jax
import numpy as np
import pytest
from small_models import make
from test_mixed import filled
from tools import compilations

import jlora
from jlora import models

PROMPTS = np.array([[3, 4, 5, 6], [7, 8, 9, 0], [10, 11, 0, 0]])
CASES = {
    "t5, beams": ("t5", {"num_beams": 2}, {}),
    "llama, scanned, samples": (
        "llama",
        {"do_sample": True, "num_return_sequences": 2, "key": jax.random.key(0)},
        {"scan_layers": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_each_prompts_adapter(case):
    kind, settings, form = CASES[case]
    model, base = make(kind, **form)
    tree = jlora.lorafy(jax.eval_shape(lambda: base), 2, ["query", "value"])
    trees = [filled(tree, base, np.random.default_rng(n)) for n in range(2)]
    nought = lambda x, m: 0 * x if m else x
    none = jax.tree.map(nought, trees[0], jlora.trainable_mask(tree))
    how = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, **settings}
    mask = (PROMPTS > 0).astype(int)

    def tokens(params, transform):
        out = models.generate(model, params, PROMPTS, mask, transform=transform, **how)
        return out.reshape(len(PROMPTS), -1)

    each = np.stack([tokens(t, jlora.lora) for t in (*trees, none)])
    bank, rows = jlora.bank(trees), np.arange(len(PROMPTS))
    ids = np.array([1, -1, 0])
    mixture = lambda ids: tokens(jlora.with_ids(bank, ids), jlora.mixed_steps)
    np.testing.assert_array_equal(mixture(ids), each[ids, rows])
    other = ids[::-1].copy()
    assert compilations(mixture, (other,)) == 0
    np.testing.assert_array_equal(mixture(other), each[other, rows])
    assert all((one != each[2]).any() for one in each[:2]), "a test of nothing"


def test_prompts_and_numbers_must_fit():
    model, base = make("llama")
    bank = jlora.bank([jlora.lorafy(base, 2, ["query"])])
    how = {"max_new_tokens": 2, "transform": jlora.mixed_steps}
    with pytest.raises(jlora.ShapeError, match="each of 2 examples"):
        models.generate(model, jlora.with_ids(bank, [0, 0]), PROMPTS, **how)
    with pytest.raises(jlora.StructureError, match="with_ids"):
        models.generate(model, bank, PROMPTS, **how)
