"""Every rule: value and dtype, structure, gradient; under jit."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from tools import TOL, assert_close, check, lowrank, result_shapes

import jlora

DTYPES = list(TOL)


def normal(key, *shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_dot_general(getkey, dtype, axis, side):
    w = lowrank(getkey(), (7, 5), dtype=dtype)
    x = normal(getkey(), 3, w.shape[axis], dtype=dtype)

    def f(w, x):
        if side == "right":
            return lax.dot_general(x, w, (((1,), (axis,)), ((), ())))
        return lax.dot_general(w, x, (((axis,), (1,)), ((), ())))

    check(f, w, x, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "ins", "outs", "equation", "x_shape"),
    [
        ((11, 3, 5), (0,), (1, 2), "bld,dhk->blhk", (2, 7, 11)),
        ((3, 5, 11), (0, 1), (2,), "blhk,hkd->bld", (2, 7, 3, 5)),
        ((3, 5, 11), (1,), (0, 2), "bk,hkd->bhd", (2, 5)),
        ((11, 3, 5), (0,), (1, 2), "dhk,bd->khb", (7, 11)),
        ((7, 5), (0,), (1,), "bi,io->ob", (3, 7)),
    ],
)
def test_any_axes(getkey, shape, ins, outs, equation, x_shape):
    w = lowrank(getkey(), shape, in_axes=ins, out_axes=outs)
    x = normal(getkey(), *x_shape)
    check(lambda w, x: jnp.einsum(equation, w, x) if equation[0] == "d"
          else jnp.einsum(equation, x, w), w, x)  # fmt: skip


@pytest.mark.parametrize(
    "equation",
    ["ebi,eio->ebo", "bi,eio->beo", "bei,eio->bo", "ebi,eio->bo"],
)
def test_expert_kernels_have_an_adapter_each(getkey, equation):
    w = lowrank(getkey(), (3, 7, 5), batch_axes=(0,), in_axes=(1,))
    assert w.adapters[""].a.shape == (3, 7, 2)
    sizes = {"e": 3, "b": 11, "i": 7}
    x = normal(getkey(), *(sizes[c] for c in equation.split(",")[0]))
    check(lambda w, x: jnp.einsum(equation, x, w), w, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_dot(getkey, dtype):
    w = lowrank(getkey(), (3, 7, 5), batch_axes=(0,), in_axes=(1,), dtype=dtype)
    x = normal(getkey(), 11, 7, dtype=dtype)
    sizes = jnp.array([4, 0, 7])
    check(lambda w, x: lax.ragged_dot(x, w, sizes), w, x, dtype=dtype)
    survey = jlora.survey(lambda w, x: lax.ragged_dot(x, w, sizes), w.base, x)
    assert survey.axes("") == ((1,), (2,), (0,), False)


def test_mixed_precision_keeps_the_base_dtype(getkey):
    w = lowrank(getkey(), (7, 5), dtype=jnp.bfloat16)
    x = normal(getkey(), 3, 7, dtype=jnp.bfloat16)
    assert w.adapters[""].a.dtype == jnp.float32
    out = jlora.lora(lambda w, x: x @ w)(w, x)
    assert out.dtype == jnp.bfloat16
    f = lambda w, x: lax.dot(x, w, preferred_element_type=jnp.float32)
    assert jlora.lora(f)(w, x).dtype == jnp.float32
    assert_close(jlora.lora(f)(w, x), f(w.merged(), x), **TOL[jnp.bfloat16])


def test_wrong_axes_name_the_mend(getkey):
    w = lowrank(getkey(), (3, 5, 7), in_axes=(0,))
    f = lambda w, x: jnp.einsum("bhk,hkd->bd", x, w)
    with pytest.raises(jlora.ShapeError, match=r"in_axes=\(0, 1\), out_axes=\(2,\)"):
        jlora.lora(f)(w, normal(getkey(), 2, 3, 5))


@settings(deadline=None, max_examples=12)
@given(st.permutations(["i", "h", "k"]), st.sampled_from(["left", "right"]), st.data())
def test_dot_general_for_any_axis_order(order, side, data):
    sizes = {"i": 7, "h": 3, "k": 5, "b": 2, "c": 11}
    ins = data.draw(st.sampled_from([("i",), ("h", "k"), ("i", "k")]))
    axes = tuple(order.index(n) for n in ins)
    key = jax.random.key(3)
    w = lowrank(key, tuple(sizes[n] for n in order), in_axes=axes)
    x_names = data.draw(st.permutations(["b", "c", *ins]))
    out = data.draw(st.permutations([n for n in ["b", "c", *order] if n not in ins]))
    x = normal(key, *(sizes[n] for n in x_names))
    left, right = "".join(order), "".join(x_names)

    def f(w, x):
        if side == "left":
            return jnp.einsum(f"{left},{right}->{''.join(out)}", w, x)
        return jnp.einsum(f"{right},{left}->{''.join(out)}", x, w)

    check(f, w, x, grad=False)


# -- layout ----------------------------------------------------------------------------

LAYOUTS = {
    "transpose": ((7, 5), {}, lambda w, x: x @ w.T.T),
    "reshape": ((7, 3, 5), {}, lambda w, x: x @ w.reshape(7, 15)),
    "split_in": ((6, 5), {}, lambda w, x: jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 3), w.reshape(2, 3, 5))),
    "expand": ((7, 5), {}, lambda w, x: jnp.einsum("bi,zio->bzo", x, w[None])),
    "tile": ((7, 5), {}, lambda w, x: jnp.einsum("bi,zio->bzo", x, jnp.broadcast_to(w, (3, 7, 5)))),
    "tile_sum": ((7, 5), {}, lambda w, x: jnp.einsum("bzi,zio->bo", jnp.stack([x, 2 * x, -x], 1), jnp.broadcast_to(w, (3, 7, 5)))),
    "slice_out": ((7, 5), {}, lambda w, x: x @ w[:, 1:4]),
    "slice_in": ((7, 5), {}, lambda w, x: x[:, 2:6] @ w[2:6]),
    "stride": ((7, 5), {}, lambda w, x: x @ w[:, ::2]),
    "rev": ((7, 5), {}, lambda w, x: x @ w[::-1, ::-1]),
    "split": ((7, 6), {}, lambda w, x: [x @ p for p in jnp.split(w, [2, 3], axis=1)]),
    "row": ((7, 5), {}, lambda w, x: x[:, :5] @ w[1]),
    "dynamic_slice": ((7, 5), {}, lambda w, x: x @ lax.dynamic_slice_in_dim(w, jnp.int32(1), 3, 1)),
    "layer": ((3, 7, 5), {"batch_axes": (0,), "in_axes": (1,)}, lambda w, x: x @ w[1]),
    "dynamic_layer": ((3, 7, 5), {"batch_axes": (0,), "in_axes": (1,)}, lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.int32(2), 0, keepdims=False)),
    "concatenate_out": ((7, 5), {}, lambda w, x: x @ jnp.concatenate([w, 2 * w, jnp.ones((7, 2)), -w], 1)),
    "concatenate_in": ((7, 5), {}, lambda w, x: jnp.tile(x, 2) @ jnp.concatenate([w, w / 3], 0)),
    "slice_of_concatenate": ((7, 5), {}, lambda w, x: x @ jnp.concatenate([w, 2 * w], 1)[:, 3:8]),
    "stack": ((7, 5), {}, lambda w, x: jnp.einsum("bi,zio->zbo", x, jnp.stack([w, 2 * w]))),
    "stack_last": ((7, 5), {}, lambda w, x: jnp.einsum("bi,ioz->zbo", x, jnp.stack([w, 2 * w], -1))),
    "stack_mixed": ((7, 5), {}, lambda w, x: jnp.einsum("bi,zio->zbo", x, jnp.stack([w, jnp.ones((7, 5))]))),
    "scale": ((7, 5), {}, lambda w, x: x @ (-(2 * w) / x[0, 0])),
    "copy": ((7, 5), {}, lambda w, x: x @ jnp.copy(w)),
    "barrier": ((7, 5), {}, lambda w, x: x @ lax.optimization_barrier(w)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(getkey, name):
    shape, target, f = LAYOUTS[name]
    w = lowrank(getkey(), shape, **target)
    x = normal(getkey(), 3, w.shape[len(target.get("batch_axes", ()))])
    # The base itself is moved about, as the program says; so its shape may appear.
    check(f, w, x, structure=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_forms_no_update(getkey, name):
    """What a layout costs beyond the dense program is small: no [i, o] array."""
    shape, target, f = LAYOUTS[name]
    w = lowrank(getkey(), shape, **target)
    x = normal(getkey(), 3, w.shape[len(target.get("batch_axes", ()))])
    low = result_shapes(jlora.lora(f, stop_frozen=False), w, x)
    dense = result_shapes(f, w.base, x)
    big = lambda shapes: Counter(s for s in shapes if s[-2:] == shape[-2:])
    assert not big(low) - big(dense)


def test_cast_then_use(getkey):
    w = lowrank(getkey(), (7, 5))
    x = normal(getkey(), 3, 7, dtype=jnp.bfloat16)
    check(lambda w, x: x @ w.astype(jnp.bfloat16), w, x, dtype=jnp.bfloat16,
          structure=False)  # fmt: skip


def test_stop_gradient_reaches_the_factors(getkey):
    w = lowrank(getkey(), (7, 5))
    half, frozen = jlora.split(w)
    x = normal(getkey(), 3, 7)
    f = jlora.lora(lambda w, x: jnp.sum(x @ lax.stop_gradient(w)))
    grads = jax.grad(lambda t: f(jlora.combine(t, frozen), x))(half)
    assert all(not jnp.any(g) for g in jax.tree.leaves(grads))


def test_mixing_inputs_and_outputs_is_refused(getkey):
    w = lowrank(getkey(), (7, 5))
    with pytest.raises(jlora.UnsupportedOpError, match="`reshape`"):
        jlora.lora(lambda w: w.reshape(35))(w)


# -- gather, conv ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_shape", [(4,), (2, 3)])
@pytest.mark.parametrize("how", ["take", "index", "take_out", "one_row"])
def test_gather(getkey, dtype, ids_shape, how):
    w = lowrank(getkey(), (11, 5), dtype=dtype)
    ids = jax.random.randint(getkey(), ids_shape, 0, 5)
    f = {
        "take": lambda w, ids: jnp.take(w, ids, axis=0),
        "index": lambda w, ids: w[ids],
        "take_out": lambda w, ids: jnp.take(w, ids, axis=1),
        "one_row": lambda w, ids: lax.gather(
            w, ids[..., None],
            lax.GatherDimensionNumbers((ids.ndim,), (0,), (0,)), (1, 5),
        ),
    }[how]  # fmt: skip
    check(f, w, ids, dtype=dtype)


def test_gather_out_of_bounds_is_the_base_functions(getkey):
    w = lowrank(getkey(), (11, 5))
    ids = jnp.array([0, 11, 3])
    f = lambda w: jnp.take(w, ids, axis=0, mode="fill", fill_value=7.0)
    assert_close(jlora.lora(f)(w), f(w.merged()), **TOL[jnp.float32])


@pytest.mark.parametrize("ids_shape", [(4,), (2, 3)])
@pytest.mark.parametrize("batch", [0, 1])
def test_gather_along_a_stack_gives_adapted_kernels(getkey, ids_shape, batch):
    """A kernel for each token, each with its own adapter."""
    shape, ins = ((3, 7, 5), 1) if batch == 0 else ((7, 3, 5), 0)
    w = lowrank(getkey(), shape, batch_axes=(batch,), in_axes=(ins,))
    ids = jax.random.randint(getkey(), ids_shape, 0, 3)
    x = normal(getkey(), *ids_shape, 7)

    def f(w, x, ids):
        each = jnp.moveaxis(jnp.take(w, ids, axis=batch), -2 if ins else 0, -2)
        return jnp.einsum("...i,...io->...o", x, each)

    check(f, w, x, ids)


def test_tied_table_is_one_adapter(getkey):
    w = lowrank(getkey(), (11, 5))
    ids = jnp.array([[1, 3, 2]])
    check(lambda w, ids: jnp.take(w, ids, axis=0) @ w.T, w, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "strided", "dilated", "groups", "transpose"])
def test_conv(getkey, dtype, case):
    groups = 2 if case == "groups" else 1
    w = lowrank(getkey(), (3, 2, 4 // groups, 6), in_axes=(0, 1, 2), dtype=dtype)
    x = normal(getkey(), 2, 9, 8, 4, dtype=dtype)

    def f(w, x):
        if case == "transpose":
            return lax.conv_transpose(x, w, (2, 2), "SAME")
        return lax.conv_general_dilated(
            x, w, (2, 1) if case == "strided" else (1, 1), "SAME",
            rhs_dilation=(1, 2) if case == "dilated" else None,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    check(f, w, x, dtype=dtype)


def test_conv_in_torch_layout(getkey):
    w = lowrank(getkey(), (6, 4, 3, 2), in_axes=(1, 2, 3), out_axes=(0,))
    x = normal(getkey(), 2, 4, 9, 8)
    f = lambda w, x: lax.conv(x, w, (1, 1), "VALID")
    check(f, w, x)


# -- control flow ----------------------------------------------------------------------

# What a loop or branch does with a kernel it closes over or is given.
CONTROL = {
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "jit_twice": lambda w, x: jax.jit(lambda x: jax.jit(jnp.sin)(x @ w))(x),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x),
    "remat_policy": lambda w, x: jax.checkpoint(
        lambda w, x: jnp.sin(x @ w), policy=jax.checkpoint_policies.dots_saveable
    )(w, x),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: 2 * x @ w),
    "cond_operand": lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: 3 * x @ w, w),
    "switch": lambda w, x: lax.switch(1, [lambda w: x @ w, lambda w: x @ w * 3], w),
    "scan_const": lambda w, x: lax.scan(lambda c, _: (jnp.sin(c @ w), c), x, None, 3),
    "scan_carry": lambda w, x: lax.scan(
        lambda c, _: ((c[0], jnp.sin(c[1] @ c[0])), None), (w, x), None, 3)[0][1],
    "vmap": lambda w, x: jax.vmap(lambda x: x @ w)(x),
    "vmap_scan": lambda w, x: jax.vmap(
        lambda x: lax.scan(lambda c, _: (c @ w, None), x, None, 2)[0])(x),
    "custom_jvp": lambda w, x: jax.nn.silu(jax.nn.relu(x @ w)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow(getkey, name):
    w = lowrank(getkey(), (7, 7))
    x = normal(getkey(), 3, 7)
    check(CONTROL[name], w, x, structure=name != "scan_carry")


def test_while_loop(getkey):
    w = lowrank(getkey(), (7, 7))
    f = lambda w, x: lax.fori_loop(0, 3, lambda _, c: jnp.sin(c @ w), x)
    check(f, w, normal(getkey(), 3, 7))
    g = lambda w, x: lax.while_loop(
        lambda c: jnp.sum(c[1] @ w) < 1e4,
        lambda c: (c[0] + 1, c[1] * 2 + c[1] @ w),
        (0, x),
    )[0]
    check(g, w, jnp.ones((3, 7)), grad=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 2])
def test_scan_over_stacked_kernels(getkey, reverse, unroll):
    w = lowrank(getkey(), (3, 7, 7), batch_axes=(0,), in_axes=(1,))
    f = lambda w, x: lax.scan(
        lambda c, w: (jnp.sin(c @ w), c), x, w, reverse=reverse, unroll=unroll
    )
    check(f, w, normal(getkey(), 5, 7))
    # Also where the stack is not the kernel's first axis.
    w = lowrank(getkey(), (7, 3, 7), batch_axes=(1,), in_axes=(0,))
    g = lambda w, x: f(jnp.moveaxis(w, 1, 0), x)
    check(g, w, normal(getkey(), 5, 7), structure=False)


def test_scan_with_remat_and_unadapted_xs(getkey):
    w = lowrank(getkey(), (3, 7, 7), batch_axes=(0,), in_axes=(1,))
    bias = normal(getkey(), 3, 7)

    def f(w, bias, x):
        step = jax.checkpoint(lambda c, wb: (jnp.sin(c @ wb[0] + wb[1]), None))
        return lax.scan(step, x, (w, bias))[0]

    check(f, w, bias, normal(getkey(), 5, 7))


def test_vmap_outside(getkey):
    ws = [lowrank(getkey(), (7, 5)) for _ in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *ws)
    x = normal(getkey(), 2, 7)
    got = jax.vmap(jlora.lora(lambda w, x: x @ w), in_axes=(0, None))(stacked, x)
    want = jnp.stack([x @ w.merged() for w in ws])
    assert_close(got, want, **TOL[jnp.float32])


def test_vmap_inside_over_experts(getkey):
    w = lowrank(getkey(), (3, 7, 5), batch_axes=(0,), in_axes=(1,))
    x = normal(getkey(), 3, 2, 7)
    check(lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), w, x)


def test_custom_rules_are_kept(getkey):
    """A straight-through estimator over the kernel keeps its own derivative."""

    @jax.custom_vjp
    def doubled(x, w):
        return x @ w

    doubled.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda res, g: (3 * g @ res[1].T, 5 * res[0].T @ g),
    )
    w = lowrank(getkey(), (7, 5))
    check(
        lambda w, x: doubled(jnp.sin(x), w), w, normal(getkey(), 3, 7), structure=False
    )

    @jax.custom_jvp
    def tripled(x, w):
        return x @ w

    tripled.defjvp(lambda p, t: (p[0] @ p[1], 3 * t[0] @ p[1] + 7 * p[0] @ t[1]))
    check(
        lambda w, x: tripled(jnp.sin(x), w), w, normal(getkey(), 3, 7), structure=False
    )

    # An integer operand has no gradient and does not disturb.
    @jax.custom_vjp
    def picked(w, ids, x):
        return jnp.take(x @ w, ids, axis=0)

    picked.defvjp(
        lambda w, ids, x: (picked(w, ids, x), (w, ids, x)),
        lambda r, g: (
            2 * r[2].T @ jnp.zeros((3, 5)).at[r[1]].add(g),
            None,
            g @ r[0].T * 0 + 1,
        ),
    )
    f = lambda w, x: picked(w, jnp.array([0, 2, 1]), x)
    check(f, w, normal(getkey(), 3, 7), structure=False)


# -- dropout ---------------------------------------------------------------------------


def test_dropout_is_inverted_on_the_input_and_off_without_a_key(getkey):
    tree = {"w": lowrank(getkey(), (7, 5), dropout=0.5)}
    x = normal(getkey(), 4, 7)
    f = jlora.lora(lambda p, x: x @ p["w"])
    assert_close(f(tree, x), x @ tree["w"].merged(), **TOL[jnp.float32])
    on = jlora.with_dropout(tree, getkey())
    t = tree["w"].adapters[""]
    low = (f(on, x) - x @ tree["w"].base) / t.scale  # drop(x) @ a @ b
    dropped = jnp.linalg.lstsq((t.a @ t.b).T, low.T)[0].T  # up to the null space
    masks = jax.random.bernoulli(
        jax.random.fold_in(on["w"].adapters[""].key, 1), 0.5, x.shape
    )
    want = jnp.where(masks, 2 * x, 0) @ t.a @ t.b
    assert_close(low, want, rtol=1e-4, atol=1e-4)
    assert dropped.shape == x.shape
    assert_close(f(jlora.with_dropout(on, None), x), f(tree, x), rtol=0, atol=0)


def test_dropout_has_a_key_a_path_and_a_layer(getkey):
    params = {n: {"kernel": jnp.zeros((3, 7, 7))} for n in ("query", "value")}
    target = jlora.Target(batch_axes=(0,), in_axes=(1,), rank=2, dropout=0.5)
    tree = jlora.lorafy(params, targets={"query": target, "value": target})
    on = jlora.with_dropout(tree, getkey())
    keys = [on[n]["kernel"].adapters[""].key for n in params]
    assert keys[0].shape == (3,)
    data = jnp.concatenate([jax.random.key_data(k) for k in keys])
    assert len({tuple(map(int, row)) for row in data}) == 6

    def f(p, x):
        step = lambda c, w: (jnp.sin(c @ w + x), None)
        return lax.scan(step, x, p["query"]["kernel"])[0]

    jax.jit(jlora.lora(f))(on, normal(getkey(), 2, 7))
