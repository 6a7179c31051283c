"""Variants on kinds of kernels, and the page that tells of them."""

import jax
import pytest
import variant_table
from tools import equations

import jlora


@pytest.mark.parametrize("key", variant_table.ROWS, ids="-".join)
def test_a_row_is_that_of_the_merged_kernels(key):
    check(variant_table.row(*key)[1])


@pytest.mark.parametrize("base", variant_table.BASES)
def test_every_variant_on_another_base_is_that_of_the_merged_kernel(base):
    check(variant_table.column(base)[1])


def check(off):
    assert 0 < off["value"] < 2e-5
    assert 0 < off["gradient"] < 2e-5


def test_the_page_is_that_of_the_code():
    assert variant_table.PAGE.read_text() == variant_table.page()


@pytest.mark.parametrize("kind", variant_table.KINDS)
def test_dropout_of_the_table_is_on(kind):
    tree = variant_table.cell("dropout", "plain", kind)
    program = jax.make_jaxpr(jlora.lora(variant_table.function(kind)))(tree)
    drawn = "random_bits" in {e.primitive.name for e in equations(program)}
    assert drawn == (kind != "embedding")  # an id has no inputs to drop
