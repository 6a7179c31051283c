"""The example of three frameworks, with fewer steps."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import bring_your_own_model as example


@pytest.mark.parametrize("make", [example.linen, example.flax_nnx, example.equinox])
def test_an_adapter_learns_what_the_base_does_not_know(make, monkeypatch):
    monkeypatch.setattr(example, "BASE_STEPS", 150)
    monkeypatch.setattr(example, "ADAPTER_STEPS", 150)
    base, adapted, merged = example.teach(make.__name__, make())
    assert adapted < 0.3 * base
    assert merged == pytest.approx(adapted, rel=0.05)
