"""Preference losses and gradients against TRL's formulas in PyTorch."""

import jax
import numpy as np
import pytest
from test_preference_loss import KINDS, POLICY, REFERENCE

from jlora.train import dpo_loss

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle


def by_torch(policy, reference, beta, label_smoothing=0.0, kind="sigmoid"):
    """The mean loss, as TRL's `DPOTrainer` computes it of log-probabilities."""
    logsigmoid = torch.nn.functional.logsigmoid
    delta = (policy[0] - reference[0]) - (policy[1] - reference[1])
    if kind == "sigmoid":
        losses = (
            -logsigmoid(beta * delta) * (1 - label_smoothing)
            - logsigmoid(-beta * delta) * label_smoothing
        )
    elif kind == "ipo":
        losses = (delta - 1 / (2 * beta)) ** 2
    else:
        losses = torch.relu(1 - beta * delta)
    return losses.mean()


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_value_and_gradient(settings, beta):
    def ours(policy):
        (total, count), _ = dpo_loss(policy, REFERENCE, beta=beta, **settings)
        return total / count

    policy, reference = (
        [torch.tensor(np.asarray(x), requires_grad=True) for x in scores]
        for scores in (POLICY, REFERENCE)
    )
    want = by_torch(policy, reference, beta, **settings)
    want.backward()
    value, gradient = jax.value_and_grad(ours)(POLICY)
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    for x, y in zip(gradient, policy, strict=True):
        np.testing.assert_allclose(x, y.grad.numpy(), rtol=1e-4, atol=1e-7)
