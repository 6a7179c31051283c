"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora

MODULES = sorted(m.name for m in pkgutil.walk_packages(jlora.__path__, "jlora."))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    names = {name: getattr(jlora, name) for name in jlora.__all__}
    names |= {"jax": jax, "jnp": jnp, "jlora": jlora, "optax": optax} | vars(module)
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert not result.failed
