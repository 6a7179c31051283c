"""Repeated layers, and grouped convolutions by a survey."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small_models import logits, make
from tools import check, randomise

import jlora
from jlora import models

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


# -- checkpoints -----------------------------------------------------------------------

RANGES = [[0, 2], [1, 2]]
STACKS = {"llama": "layers", "roberta": "layer"}


@pytest.fixture(scope="module", params=STACKS)
def saved(request, tmp_path_factory):
    model, params = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    models.save(model, params, folder, overwrite=True)
    return request.param, folder, params


def test_a_checkpoint_is_loaded_deeper(saved, tmp_path):
    kind, folder, params = saved
    deeper, got = models.load(folder, layer_replication=RANGES)
    want = jlora.replicate_layers(params, RANGES, [STACKS[kind]])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    by_path = jlora._paths.leaves_by_path(got)
    at = f"{STACKS[kind]}/1/"
    copied = [
        (x, by_path[p.replace(at, at[:-2] + "2/")])
        for p, x in by_path.items()
        if at in p
    ]
    assert len(copied) > 5
    assert all(x is y for x, y in copied)
    # The deeper model is one of that depth, and goes into a file as such.
    models.save(deeper, got, tmp_path / "deep")
    again, read = models.load(tmp_path / "deep")
    assert again.config == deeper.config
    np.testing.assert_array_equal(logits(again, read, kind), logits(deeper, got, kind))


def test_a_scanned_one_and_a_quantised_one(saved):
    kind, folder, params = saved
    at = [{"roberta": "encoder/layer"}.get(kind, STACKS[kind])]
    want = jlora.replicate_layers(params, RANGES, at)
    _, stacked = models.load(folder, layer_replication=RANGES, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, stacked, jlora.stack_layers(want, at))
    _, codes = models.load(
        folder, layer_replication=RANGES, quantize=jlora.quantizer("int8")
    )
    leaves = jlora._paths.leaves_by_path(codes, is_leaf=jlora.is_node)
    nodes = {path: x for path, x in leaves.items() if jlora.is_node(x)}
    first = f"{STACKS[kind]}/1/"
    copied = [path for path in nodes if first in path]
    assert len(copied) >= 4
    for path in copied:
        other = nodes[path.replace(first, first[:-2] + "2/")]
        assert other.codes is nodes[path].codes


@pytest.mark.parametrize(
    "ranges", [[[0, 3]], [[1, 1]], [], "all", [[0, 1, 2]], [[-1, 1]]]
)
def test_ranges_that_a_checkpoint_has_not(saved, ranges):
    with pytest.raises(jlora.OptionError, match="of this model's 2 layers"):
        models.load(saved[1], layer_replication=ranges)


def test_layers_that_cannot_be_copied(tmp_path):
    model, params = make("t5")
    models.save(model, params, tmp_path / "t5")
    with pytest.raises(jlora.OptionError, match="encoder/block and decoder/block"):
        models.load(tmp_path / "t5", layer_replication=[[0, 1]])
    model, params = make("gpt2")
    config = dataclasses.replace(model.config, scale_attn_by_inverse_layer_idx=True)
    models.save(model.clone(config=config), params, tmp_path / "gpt2")
    with pytest.raises(jlora.OptionError, match="divides by a layer's number"):
        models.load(tmp_path / "gpt2", layer_replication=[[0, 2], [0, 1]])
