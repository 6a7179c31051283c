"""`jlora inspect --values`: norms, singular values and effective ranks from factors."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tools import randomise

import jlora
from jlora import checkpoint, cli
from jlora.cli._inspect._values import COLUMNS, Factors, Values

GOLDEN = Path(__file__).parent / "golden" / "peft"
T5 = GOLDEN / "t5_qv" / "adapter"


def seen(capsys, *argv):
    assert cli.main(["inspect", *map(str, argv), "--values", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_row(report, name, delta, a, b):
    """The row of a kernel whose whole update, `[in, out]`, the test has formed."""
    unit = "module" if report["kind"] == "peft_adapter" else "kernel"
    (row,) = [row for row in report[f"{unit}s"] if row[unit] == name]
    expected = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False)
    values = np.asarray(report["singular_values"][name])
    np.testing.assert_allclose(values, expected[: values.size], rtol=1e-5, atol=1e-7)
    parts = values / values.sum()
    rank = np.exp(-(parts * np.log(parts)).sum())
    wanted = [np.linalg.norm(x) for x in (a, b, delta)] + [values[0], rank]
    np.testing.assert_allclose([row[c] for c in COLUMNS], wanted, rtol=6e-4)


def test_of_pefts_factors(capsys):
    (report,) = seen(capsys, T5)
    tensors = load_file(T5 / "adapter_model.safetensors")
    name = "decoder.block.0.layer.1.EncDecAttention.v"
    down, up = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    check_row(report, name, 2.0 * (up @ down).T, down, up)
    assert len(report["singular_values"]) == 6


def test_of_a_checkpoints_kernels_of_any_axes(capsys, tmp_path):
    params = {
        "query": {"kernel": jnp.zeros((5, 2, 3))},  # [in, heads, each]
        "out": {"kernel": jnp.zeros((2, 3, 7))},
    }
    targets = {
        "query": jlora.Target(rank=2, alpha=3.0, in_axes=(0,), out_axes=(1, 2)),
        "out": jlora.Target(rank=3, in_axes=(0, 1), out_axes=(2,)),
    }
    tree = randomise(jlora.lorafy(params, targets=targets), jax.random.key(1))
    checkpoint.save_adapter(tmp_path / "a", tree)
    (report,) = seen(capsys, tmp_path / "a")
    merged = jlora.merge(tree)
    for name, ins in (("query", 5), ("out", 6)):
        delta = np.asarray(merged[name]["kernel"])
        (adapter,) = tree[name]["kernel"].adapters.values()
        delta = delta.reshape(ins, -1)
        check_row(report, f"{name}/kernel", delta, adapter.a, adapter.b)


def test_a_stack_has_a_spectrum_for_each_layer(capsys, tmp_path):
    base = {"layers": {"q": {"kernel": jnp.zeros((3, 5, 7))}}}
    target = jlora.Target(rank=2, batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    tree = randomise(jlora.lorafy(base, targets={"q": target}), jax.random.key(2))
    checkpoint.save_adapter(tmp_path / "a", tree)
    (report,) = seen(capsys, tmp_path / "a")
    delta = np.asarray(jlora.merge(tree)["layers"]["q"]["kernel"])
    values = np.asarray(report["singular_values"]["layers/q/kernel"])
    assert values.shape == (3, 2)
    expected = np.linalg.svd(delta, compute_uv=False)[:, :2]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    (row,) = report["kernels"]
    np.testing.assert_allclose(row["norm_sAB"], np.linalg.norm(delta), rtol=6e-4)


@pytest.mark.parametrize("variant", ["vera", "loha"])
def test_other_forms_are_the_update_that_they_make(variant, capsys, tmp_path):
    base = {"q": {"kernel": jnp.zeros((5, 7))}}
    tree = jlora.lorafy(base, 2, ["q"], variant=variant)
    tree = randomise(tree, jax.random.key(3))
    checkpoint.save_adapter(tmp_path / "a", tree)
    (report,) = seen(capsys, tmp_path / "a")
    delta = np.asarray(jlora.merge(tree)["q"]["kernel"])
    values = np.asarray(report["singular_values"]["q/kernel"])
    expected = np.linalg.svd(delta, compute_uv=False)
    size = min(values.size, expected.size)
    np.testing.assert_allclose(values[:size], expected[:size], rtol=1e-4, atol=1e-6)


def test_extremes():
    rng = np.random.default_rng(0)
    one = Factors(rng.normal(size=(5, 1)), rng.normal(size=(1, 3)), -2.0)
    assert Values.of(one).effective_rank == pytest.approx(1)
    none = Factors(rng.normal(size=(5, 2)), np.zeros((2, 3)), 2.0)
    assert (Values.of(none).effective_rank, Values.of(none).norm) == (0, 0)
    alike = Factors(np.eye(5)[:, :3], np.eye(3), 2.0)
    assert Values.of(alike).effective_rank == pytest.approx(3)
    wide = Factors(rng.normal(size=(2, 3)), rng.normal(size=(3, 7)), 1.0)  # r > in
    delta = np.linalg.svd(wide.a @ wide.b, compute_uv=False)
    np.testing.assert_allclose(Values.of(wide).singular_values[:2], delta, rtol=1e-6)


def test_the_table_and_the_picture(capsys, tmp_path):
    argv = ["inspect", str(T5), "--plot"]
    assert cli.main([*argv, str(tmp_path / "norms.png")]) == 0
    out = capsys.readouterr().out
    assert "norm sAB  largest  effective rank" in out
    assert "tensors" not in out.splitlines()[9]
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*argv, str(tmp_path / "norms.doc")]) == 2
    base = str(T5.parent / "base")
    assert cli.main(["inspect", base, "--plot", str(tmp_path / "x.png")]) == 1
    assert "there is no adapter here" in capsys.readouterr().err


def test_weights_that_are_missing(capsys, tmp_path):
    folder = shutil.copytree(T5, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert cli.main(["inspect", str(folder), "--values"]) == 1
    assert "its values cannot be read" in capsys.readouterr().err
