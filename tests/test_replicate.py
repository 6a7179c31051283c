"""Repeated layers, and grouped convolutions by a survey."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools import check, randomise

import jlora

LAYERS = {
    str(n): {"q": {"kernel": jax.random.normal(jax.random.key(n), (5, 5))}}
    for n in range(3)
}
BASE = {"layers": LAYERS, "head": jnp.ones((5, 2))}
ORDER = [0, 1, 1, 2]


def test_copies_share_the_base_and_have_adapters_of_their_own():
    deep = jlora.replicate_layers(BASE, [[0, 2], [1, 3]], ["layers"])
    kernels = [deep["layers"][n]["q"]["kernel"] for n in "0123"]
    assert all(
        x is LAYERS[str(n)]["q"]["kernel"] for n, x in zip(ORDER, kernels, strict=True)
    )
    assert deep["head"] is BASE["head"]
    tree = randomise(jlora.lorafy(deep, 2, ["q"]), jax.random.key(1))
    one, two = (tree["layers"][n]["q"]["kernel"] for n in "12")
    assert one.base is two.base
    assert not np.array_equal(one.adapters[""].b, two.adapters[""].b)
    merged = jlora.merge(tree, donate=False)["layers"]
    assert not np.array_equal(merged["1"]["q"]["kernel"], merged["2"]["q"]["kernel"])


def test_a_stack_is_repeated_as_its_layers_are():
    stacked = jlora.stack_layers(BASE)
    got = jlora.replicate_layers(stacked, [[0, 2], [1, 3]], ["layers"])
    want = jlora.stack_layers(
        jlora.replicate_layers(BASE, [[0, 2], [1, 3]], ["layers"])
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    shapes = jax.eval_shape(lambda p: p, stacked)
    deep = jlora.replicate_layers(shapes, [[0, 2], [1, 3]], ["layers"])
    assert deep["layers"]["q"]["kernel"].shape == (4, 5, 5)


@pytest.mark.parametrize(
    "ranges", [[], [[0, 4]], [[2, 1]], [0, 2], [[0]], "01", [[-1, 2]]]
)
def test_ranges_that_cannot_be(ranges):
    with pytest.raises(jlora.OptionError, match="ranges"):
        jlora.replicate_layers(BASE, ranges, ["layers"])


def test_trees_that_cannot_be_repeated():
    with pytest.raises(jlora.StructureError, match="plain parameters"):
        jlora.replicate_layers(jlora.lorafy(BASE, 1, ["q"]), [[0, 1]], ["layers"])
    with pytest.raises(jlora.StructureError, match="no dict"):
        jlora.replicate_layers(BASE, [[0, 1]], ["blocks"])


@pytest.mark.parametrize("variant", ["lora", "loha"])
def test_grouped_convolutions_by_a_survey(variant):
    w = jax.random.normal(jax.random.key(0), (3, 2, 9))  # two channels a group
    x = jax.random.normal(jax.random.key(1), (2, 7, 6))

    def f(p, x):
        return lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=3,
        )  # fmt: skip

    params = {"kernel": w}
    survey = jlora.survey(f, params, x)
    tree = jlora.lorafy(params, 2, ["kernel"], variant=variant, survey=survey)
    tree = randomise(tree, jax.random.key(2))
    check(lambda w, x: f({"kernel": w}, x), tree["kernel"], x)
