"""How adapters start from nothing and from the kernel: against the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora import NonFiniteError, OptionError, ShapeError, _compat
from jlora._tree import from_kernel

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), dtype)


PARAMS = {
    "linear": normal(0, (7, 5)),
    "heads": normal(1, (7, 2, 3)),
    "stack": normal(2, (3, 7, 5)),
    "mixed": normal(3, (5, 2, 3, 2)),
    "half": normal(4, (7, 5), jnp.bfloat16),
}
AXES = {
    "linear": ((), (0,), (1,)),
    "heads": ((), (0,), (1, 2)),
    "stack": ((0,), (1,), (2,)),
    "mixed": ((2,), (1, 3), (0,)),
    "half": ((), (0,), (1,)),
}


def lorafy(params=PARAMS, init="pissa", **options):
    targets = {
        name: jlora.Target(
            in_axes=AXES[name][1], out_axes=AXES[name][2], batch_axes=AXES[name][0]
        )
        for name in params
    }
    return jlora.lorafy(params, RANK, targets, alpha=ALPHA, init=init, **options)


def matrices(name, kernel):
    """A kernel as [n, i, o], in float64."""
    batch, ins, outs = AXES[name]
    x = np.transpose(np.asarray(kernel, np.float64), (*batch, *ins, *outs))
    sizes = [int(np.prod([kernel.shape[d] for d in dims])) for dims in AXES[name]]
    return x.reshape(sizes)


def principal(w, rank=RANK):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def qr_part(w):
    q, r = np.linalg.qr(np.swapaxes(w, -1, -2))
    return SCALE * np.swapaxes(q[..., :RANK] @ r[..., :RANK, :], -1, -2)


@pytest.fixture(scope="module")
def pissa():
    return lorafy()


def check_parts(tree, params, part, tol):
    """The update is that part of each kernel, and the base is the rest."""
    for name, node in tree.items():
        want = part(matrices(name, params[name]))
        off = tol if params[name].dtype == jnp.float32 else 0.03
        np.testing.assert_allclose(matrices(name, node.delta()), want, atol=off)
        rest = matrices(name, params[name]) - want
        np.testing.assert_allclose(matrices(name, node.base), rest, atol=off)
        assert node.base.dtype == params[name].dtype
        assert node.adapters[""].shifted
        assert node.adapters[""].a.dtype == jnp.float32


def test_pissa_takes_the_best_approximation_out_of_every_kind_of_kernel(pissa):
    check_parts(pissa, PARAMS, principal, 1e-5)
    t = pissa["linear"].adapters[""]
    np.testing.assert_allclose(t.a.T @ t.a, t.b @ t.b.T, atol=1e-5)  # halved


def test_olora_takes_the_first_columns_of_q():
    params = {n: PARAMS[n] for n in ("linear", "mixed")}
    tree = lorafy(params, "olora")
    check_parts(tree, params, qr_part, 1e-5)
    b = tree["linear"].adapters[""].b
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-5)


def test_the_randomised_decomposition_comes_close():
    u, _, vt = np.linalg.svd(np.random.default_rng(5).normal(0, 1, (61, 53)), False)
    w = (u * 0.8 ** np.arange(53)) @ vt
    tree = jlora.lorafy({"w": jnp.asarray(w, jnp.float32)}, 3, ["w"],
                        init="pissa_niter_4")  # fmt: skip
    np.testing.assert_allclose(tree["w"].delta(), principal(w, 3), atol=1e-4)
    rough = jlora.lorafy({"w": jnp.asarray(w, jnp.float32)}, 3, ["w"],
                         init=jlora.init.PiSSA(niter=0))  # fmt: skip
    worse = np.linalg.norm(rough["w"].delta() - principal(w, 3))
    assert worse > 3 * np.linalg.norm(tree["w"].delta() - principal(w, 3))


def test_the_function_starts_as_it_was(pissa):
    def f(p, x):
        x = x @ p["linear"]  # [b, 5]
        y = jnp.einsum("bo,omhn->bmhn", x, p["mixed"])
        return jnp.tanh(x).sum() + jnp.sin(y).sum(0)

    half, frozen = jlora.split({n: pissa[n] for n in ("linear", "mixed")})

    @jax.jit
    def values_and_gradient(half, x):
        g = lambda t: jlora.lora(f)(jlora.combine(t, frozen), x)
        return g(half), f(PARAMS, x), jax.grad(lambda t: jnp.sum(g(t)))(half)

    got, want, grads = values_and_gradient(half, normal(6, (4, 7)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(grads))  # of A and of B


def test_in_bfloat16_the_base_makes_up_for_the_factors(pissa):
    """Products see rounded factors; their product, not an exact one, is taken out."""
    node, x = pissa["half"], normal(7, (50, 7), jnp.bfloat16)
    t = node.adapters[""]
    for factor in (SCALE * t.a, t.b):
        np.testing.assert_allclose(factor, factor.astype(jnp.bfloat16), rtol=1e-6)
    f = lambda w, x: jax.lax.dot(x, w, preferred_element_type=jnp.float32)
    want = f(PARAMS["half"], x)
    off = jnp.linalg.norm(jlora.lora(f)(node, x) - want)
    exact = lorafy({"half": PARAMS["half"].astype(jnp.float32)})["half"]
    plain = jlora.lora(f)(exact.map(exact.base.astype(jnp.bfloat16), lambda t: t), x)
    assert off < jnp.linalg.norm(plain - want)
    lost = jnp.abs(node.value() - PARAMS["half"].astype(jnp.float32))
    half_ulp = 2.0**-8 * jnp.abs(node.base.astype(jnp.float32))
    assert bool(jnp.all(lost <= 1.01 * half_ulp))  # one rounding of the base, no more


def test_slices_of_a_fused_kernel_start_from_their_own():
    w = normal(8, (5, 12))
    params = {"c_attn": {"kernel": w}}
    tree = jlora.lorafy(params, RANK, ["query", "value"], alpha=ALPHA, init="pissa")
    node = tree["c_attn"]["kernel"]
    assert {*node.adapters} == {"query", "value"}
    want = np.zeros(w.shape)
    for part in (slice(0, 4), slice(8, 12)):
        want[:, part] = principal(np.asarray(w, np.float64)[:, part])
    np.testing.assert_allclose(node.delta(), want, atol=1e-5)
    np.testing.assert_allclose(node.base, w - want, atol=1e-5)
    np.testing.assert_array_equal(node.base[:, 4:8], w[:, 4:8])


def test_doras_magnitude_is_that_of_the_kernel_as_it_was():
    node = lorafy({"linear": PARAMS["linear"]}, dora=True)["linear"]
    want = jnp.linalg.norm(PARAMS["linear"], axis=0)
    np.testing.assert_allclose(node.adapters[""].magnitude, want, rtol=1e-5)
    np.testing.assert_allclose(node.merged(), PARAMS["linear"], atol=1e-5)


def test_sharded_kernels_stay_sharded(pissa):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("x", "y"))
    w = normal(9, (8, 12))
    where = NamedSharding(mesh, PartitionSpec("x", "y"))
    make = lambda w: jlora.lorafy({"w": w}, RANK, ["w"], init="pissa")["w"]
    node, plain = make(jax.device_put(w, where)), make(w)
    assert node.base.sharding == where
    t = node.adapters[""]
    assert t.b.sharding.spec == PartitionSpec(None, "y")
    np.testing.assert_allclose(node.base, plain.base, atol=1e-5)
    np.testing.assert_allclose(node.delta(), plain.delta(), atol=1e-5)


def test_shapes_and_traced_kernels(pissa):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert jax.tree.structure(lorafy(shapes)) == jax.tree.structure(pissa)
    traced = jax.jit(lambda p: lorafy(p)["linear"].base)({"linear": PARAMS["linear"]})
    np.testing.assert_allclose(traced, pissa["linear"].base, atol=1e-6)


def test_kernels_alike_share_a_program():
    before = _compat.compilations(from_kernel._factors)
    params = {str(n): normal(n, (11, 3)) for n in range(4)}
    jlora.lorafy(params, RANK, [*params], init="pissa")
    assert _compat.compilations(from_kernel._factors) == before + 1


def test_orthogonal_factors_have_no_product():
    node = lorafy({"stack": PARAMS["stack"]}, "orthogonal")["stack"]
    t = node.adapters[""]
    assert not t.shifted
    assert node.base is PARAMS["stack"]
    assert float(jnp.max(jnp.abs(node.delta()))) < 1e-6
    assert min(float(jnp.std(x)) for x in (t.a, t.b)) > 0.02
    assert jnp.any(t.a[0] != t.a[1])  # each layer has its own


def test_zero_a():
    params = {"w": jnp.zeros((30, 40, 50))}
    spec = {"w": jlora.Target(in_axes=(0,))}
    t = jlora.lorafy(params, 4, spec, init="zero_a")["w"].adapters[""]
    assert not jnp.any(t.a)
    assert float(jnp.std(t.b)) == pytest.approx(0.5, rel=0.03)


def test_objects_and_names_mean_the_same(pissa):
    tree = lorafy({"linear": PARAMS["linear"]}, jlora.init.PiSSA())
    np.testing.assert_array_equal(tree["linear"].base, pissa["linear"].base)
    assert jlora.init.named("pissa_niter_16") == jlora.init.PiSSA(niter=16)
    assert repr(jlora.init.PiSSA(niter=4)) == "PiSSA(niter=4)"
    mixed = {"linear": jlora.Target(init="olora"), "half": jlora.Target(init="zero_a")}
    tree = jlora.lorafy({n: PARAMS[n] for n in mixed}, RANK, mixed)
    assert tree["linear"].adapters[""].shifted
    assert not tree["half"].adapters[""].shifted


@pytest.mark.parametrize(
    ("init", "error", "says"),
    [
        ("pisa", OptionError, "did you mean 'pissa'"),
        ("pissa_niter_x", OptionError, "pissa_niter_N"),
        ("eva", OptionError, r"jlora.init.eva\(fn, tree, batches\)"),
        ("lora_ga", OptionError, r"jlora.init.lora_ga\(loss_fn, tree, batches\)"),
        ("lora-ga", OptionError, "did you mean 'lora_ga'"),
        (jlora.init.PiSSA, OptionError, r"init=PiSSA is a class.*\n.*PiSSA\(\)"),
    ],
)
def test_names_that_cannot_be(init, error, says):
    with pytest.raises(error, match=says):
        lorafy(init=init)


def test_settings_that_cannot_be():
    for niter in (-1, 2.0, True):
        with pytest.raises(OptionError, match="number of iterations"):
            jlora.init.PiSSA(niter=niter)
    with pytest.raises(ShapeError, match="rank=6 for the kernel 'w'"):
        jlora.lorafy({"w": PARAMS["linear"]}, 6, ["w"], init="pissa")
    with pytest.raises(ShapeError, match="rank=3: orthogonal factors need an even"):
        jlora.lorafy({"w": PARAMS["linear"]}, 3, ["w"], init="orthogonal")
    broken = {"w": PARAMS["linear"].at[0, 0].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match=r"kernel 'w' \(7, 5\) float32.*PiSSA"):
        jlora.lorafy(broken, 2, ["w"], init="pissa")
