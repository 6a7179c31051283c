"""Variants on kinds of kernels, and the page that tells of them."""

import pytest
import variant_table


@pytest.mark.parametrize("key", variant_table.ROWS, ids="-".join)
def test_a_row_is_that_of_the_merged_kernels(key):
    _, off = variant_table.rows()[key]
    assert off["value"] < 2e-5
    assert off["gradient"] < 2e-5


def test_the_page_is_that_of_the_code():
    assert variant_table.PAGE.read_text() == variant_table.page(variant_table.rows())
