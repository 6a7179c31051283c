"""Jobs in one step end as they would alone, at their own rank."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tools import assert_close

import jlora
import jlora.train as jt
from jlora import sweep

V, D, H, B = 13, 7, 11, 4
TARGETS = ["query", "value"]
JOBS = sweep.paired(
    rank=[1, 3, 5],
    learning_rate=[1e-2, 3e-3, 2e-2],
    weight_decay=[0.0, 0.1, 0.01],
    dropout=[0.0, 0.1, 0.5],
    alpha=[2.0, None, 7.0],
    rslora=[False, False, True],
    seed=[4, 1, 2],
    hyper=[{"b1": 0.9}, {"b1": 0.5}, {"b1": 0.8}],
    init=["default", "default", "gaussian"],
)
COMPARED = (0, 2)  # with runs of their own, each of which is compiled


def optimizer(hp):
    return optax.adamw(hp.learning_rate, b1=hp.b1, weight_decay=hp.weight_decay)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(5), 3)
    normal = lambda k, *shape: jax.random.normal(k, shape) * 0.3
    return {
        "query": {"kernel": normal(keys[0], D, H), "bias": jnp.zeros(H)},
        "value": {"kernel": normal(keys[1], H, D)},
        "head": {"kernel": normal(keys[2], D, V)},
    }


def logits(p, x):
    h = jnp.tanh(x @ p["query"]["kernel"] + p["query"]["bias"])
    return (h @ p["value"]["kernel"]) @ p["head"]["kernel"]


def loss_fn(p, batch, key):
    out = logits(p, batch["x"])
    if key is not None:  # noise of the run's own
        out = out + 0.01 * jax.random.normal(key, out.shape)
    return jt.cross_entropy(out, batch["y"])


def make_batch(step, stream=0):
    rng = np.random.default_rng([stream, step])
    x = rng.normal(size=(B, 3, D)).astype(np.float32)
    return {"x": x, "y": rng.integers(0, V, (B, 3)).astype(np.int32)}


def stacked(batches):
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


def alone(params, job, steps, stream=0, **options):
    tx = optimizer(jlora.sweep.Hyper(sweep._jobs.hyper_of(job)))
    tree = job.lorafy(params, targets=TARGETS, **options)
    state = jt.TrainState.create(tree, tx, job.key)
    step = jt.make_train_step(loss_fn, tx, clip_norm=0.5)
    losses = []
    for i in range(steps):
        state, metrics = step(state, make_batch(i, stream))
        losses.append(metrics["loss"])
    return state, np.array(losses)


@pytest.fixture(scope="module")
def plan(params):
    return sweep.Plan(params, JOBS, optimizer, targets=TARGETS)


@pytest.fixture(scope="module")
def step():
    return sweep.sweep_step(loss_fn, optimizer, clip_norm=0.5)


@pytest.fixture(scope="module")
def trained(plan, step):
    """A bank after 50 steps, each slot with data of its own; and its losses."""
    bank, losses = plan.bank(JOBS), []
    for i in range(50):
        bank, metrics = step(bank, stacked([make_batch(i, s) for s in range(3)]))
        losses.append(metrics["loss"])
    return bank, np.array(losses)


def test_each_job_ends_as_it_would_alone(params, plan, trained):
    bank, losses = trained
    for slot in COMPARED:
        job = JOBS[slot]
        state, own_losses = alone(params, job, 50, stream=slot)
        assert_close(losses[:, slot], own_losses, atol=1e-5, rtol=0)
        found = plan.state(bank, slot, job)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        moved = lambda s: (s.step, s.trainable, s.opt_state)
        jax.tree.map(
            lambda x, y: assert_close(x, y, atol=3e-5, rtol=0),
            moved(found), moved(state),
        )  # fmt: skip
        b = found.params["value"]["kernel"].adapters[""].b
        assert b.shape[0] == job.rank
        assert jnp.abs(b).min() > 0


def test_what_a_smaller_rank_leaves_stays_zero(trained):
    bank, _ = trained
    t = bank.trainable["query"]["kernel"].adapters[""]
    assert t.a.shape == (3, D, 5)
    for slot, job in enumerate(JOBS):
        assert not np.any(t.a[slot, :, job.rank :])
        assert not np.any(t.b[slot, job.rank :])
    mu = jax.tree.leaves(bank.opt_state[0].mu)
    assert all(not np.any(x[0, ..., 1:, :]) for x in mu[1::2])


def test_who_shares_the_step_changes_nothing(params, plan, trained, step):
    bank, _ = trained
    again = plan.bank([JOBS[1], JOBS[0], JOBS[0]])
    for i in range(50):
        batches = [make_batch(i, s) for s in (1, 0, 0)]
        again, _ = step(again, stacked(batches))
    for slot, job in ((0, 1), (1, 0)):
        one, two = plan.state(again, slot, JOBS[job]), plan.state(bank, job, JOBS[job])
        pairs = zip(
            jax.tree.leaves(one.trainable), jax.tree.leaves(two.trainable), strict=True
        )
        assert all(np.allclose(x, y, atol=1e-6, rtol=0) for x, y in pairs)
    assert step.cache_size() == 1


def test_a_slot_is_replaced_and_the_others_keep_their_bits(plan, step):
    def run(replace):
        bank = plan.bank(JOBS)
        for i in range(4):
            if replace and i == 2:
                bank = plan.put(bank, 1, JOBS[0], plan.start(JOBS[0]))
            bank, metrics = step(bank, stacked([make_batch(i, s) for s in range(3)]))
        return bank, metrics["loss"]

    (one, _), (two, losses) = run(False), run(True)
    assert step.cache_size() == 1
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    for x, y in leaves:
        if (
            x.ndim
            and x.shape[0] == 3
            and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ):
            np.testing.assert_array_equal(x[0], y[0])
            np.testing.assert_array_equal(x[2], y[2])
    assert two.step.tolist() == [4, 2, 4]
    assert not np.array_equal(one.trainable["query"]["kernel"].adapters[""].b[1],
                              two.trainable["query"]["kernel"].adapters[""].b[1])  # fmt: skip
    assert np.isfinite(losses).all()


def test_a_slot_that_is_not_finite_stands_still_alone(plan, step):
    bank = plan.bank(JOBS)
    before = jax.tree.map(np.asarray, (bank.trainable, bank.opt_state))
    batches = [make_batch(0, s) for s in range(3)]
    batches[1]["x"][0, 0, 0] = np.nan
    bank, metrics = step(bank, stacked(batches))
    assert metrics["nonfinite"].tolist() == [False, True, False]
    after = (bank.trainable, bank.opt_state)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x[1], y[1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    moved = bank.trainable["query"]["kernel"].adapters[""].b
    assert np.any(moved[0])
    assert np.any(moved[2])


def test_a_shared_batch_and_groups_give_the_same(plan, step):
    def losses(shared, step=step):
        bank = plan.bank(JOBS)
        for i in range(3):
            batch = make_batch(i)
            batch = batch if shared else stacked([batch] * 3)
            bank, metrics = step(bank, batch, shared=shared)
        return np.array(metrics["loss"])

    want = losses(False)
    assert_close(losses(True), want, atol=1e-6, rtol=0)
    grouped = lambda n: sweep.sweep_step(loss_fn, optimizer, group=n, clip_norm=0.5)
    assert_close(losses(True, grouped(1)), want, atol=1e-6, rtol=0)
    with pytest.raises(jlora.OptionError, match="group=2 does not divide"):
        losses(True, grouped(2))


def test_what_lies_below_the_adapters_is_computed_once(params):
    jobs = sweep.grid(rank=[2], learning_rate=[1e-3, 1e-2, 3e-2])
    plan = sweep.Plan(params, jobs, targets=["value"])
    step = sweep.sweep_step(lambda p, batch, key: jnp.mean(logits(p, batch["x"]) ** 2))
    text = step.lower(plan.bank(jobs), make_batch(0), shared=True).as_text()
    tanh = [line for line in text.splitlines() if "stablehlo.tanh" in line]
    assert len(tanh) == 1
    assert f"tensor<{B}x3x{H}xf32>" in tanh[0]
    # and above them the slots' inputs meet the base in one product
    assert f"tensor<3x{B}x3x{D}xf32>, tensor<{D}x{V}xf32>" in text


def test_slots_divide_over_devices(params):
    """Each device trains its own slots, and none tells another anything."""
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("slots",), axis_types=axes)
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    jobs = sweep.paired(rank=[1, 2, 3, 4], seed=[1, 2, 3, 4], dropout=0.1)
    batch = stacked([make_batch(0, s) for s in range(4)])
    ends = []
    for on_mesh in (False, True):
        base = jax.device_put(params, place()) if on_mesh else params
        plan = sweep.Plan(base, jobs, targets=TARGETS)
        bank = plan.bank(jobs, sharding=place("slots") if on_mesh else None)
        given = jax.device_put(batch, place("slots")) if on_mesh else batch
        step = sweep.sweep_step(loss_fn, clip_norm=0.5)
        bank, _ = step(bank, given)
        bank = plan.put(bank, 2, jobs[0], plan.start(jobs[0]))
        bank, metrics = step(bank, given)
        ends.append((bank, np.array(metrics["loss"])))
    assert step.cache_size() == 1
    text = step.lower(bank, given).compile().as_text()
    assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", text)
    (one, losses), (two, again) = ends
    a, b = (x.trainable["value"]["kernel"].adapters[""].b for x in (one, two))
    assert [s.data.shape for s in b.addressable_shards] == [(1, *a.shape[1:])] * 4
    assert_close(again, losses, atol=1e-6, rtol=0)
    assert_close(b, a, atol=1e-6, rtol=0)
    assert np.all(np.any(a, axis=(1, 2)))


def test_evaluation_of_all_slots(params, plan, trained):
    bank, _ = trained
    batch = make_batch(99)
    total, count = sweep.SweepEval(loss_fn)(bank, batch, shared=True)["loss"]
    for slot in COMPARED:
        tree = plan.state(bank, slot, JOBS[slot]).params
        want = jt.evaluate(
            jt.make_eval_step(lambda p, b: {"loss": loss_fn(p, b, None)}), tree, [batch]
        )
        assert abs(total[slot] / count[slot] - want["loss"]) < 1e-5


# -- jobs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sweep.grid(rnak=[1]), "did you mean rank"),
        (lambda: sweep.grid(lora_alpha=[1]), "lora_alpha is alpha here"),
        (lambda: sweep.grid(rank=2), "nothing to choose from"),
        (lambda: sweep.paired(rank=[1, 2], seed=[1, 2, 3]), "unlike length"),
        (lambda: sweep.Job(name="x", rank=1.5), "job 'x': rank=1.5"),
        (lambda: sweep.Job(name="x", dropout=1.0), "probability"),
        (lambda: sweep.Job(name="x", learning_rate="1"), "learning_rate='1'"),
        (lambda: sweep.Job(name="x", hyper={"learning_rate": 1.0}), "fields of a Job"),
        (lambda: sweep.Job(name=" "), "name=' '"),
    ],
)
def test_jobs_that_cannot_be(make, words):
    with pytest.raises(jlora.LoraError, match=words):
        make()


def test_a_plan_refuses_what_cannot_share_a_bank(params):
    one, two = sweep.Job(name="one"), sweep.Job(name="two", hyper={"b1": 0.9})
    make = lambda jobs, *args, **more: sweep.Plan(
        params, jobs, *args, **{"targets": ["query"], **more}
    )
    small = [sweep.Job(name="one", rank=2)]
    with pytest.raises(jlora.OptionError, match="'one': 2 times"):
        make([one, one])
    with pytest.raises(jlora.OptionError, match="the same names"):
        make([one, two])
    with pytest.raises(jlora.ShapeError, match="job 'one': rank=8"):
        make([one])
    with pytest.raises(jlora.OptionError, match=r"asks for hp\.b3"):
        make(small, lambda hp: optax.adam(hp.learning_rate, b1=hp.b3))
    with pytest.raises(jlora.OptionError, match="returns float"):
        make(small, lambda hp: hp.learning_rate)
    adapt = lambda params, job: jlora.lorafy(params, 1, [job.data])
    jobs = sweep.paired(name=["one", "two"], data=["query", "value"])
    with pytest.raises(jlora.OptionError, match="'two' has other trainable leaves"):
        sweep.Plan(params, jobs, adapt=adapt)


def test_an_optimiser_that_decides_by_a_traced_number(params):
    jobs = sweep.grid(rank=[2], learning_rate=[1e-3, 1e-2])
    make = lambda hp: optax.adam(1.0 if hp.learning_rate > 1 else 0.1)
    plan = sweep.Plan(params, jobs, make, targets=["query"])
    step = sweep.sweep_step(loss_fn, make)
    with pytest.raises(jlora.OptionError, match="Write a schedule"):
        step(plan.bank(jobs), make_batch(0), shared=True)


def test_jobs_from_a_file(tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"name": "a", "rank": 2, "data": "a.txt"}\n\n{"name": "b"}\n')
    a, b = sweep.read_jobs(file)
    assert (a.rank, a.data, b.name, a.to_json()) == (
        2, "a.txt", "b", {"name": "a", "rank": 2, "data": "a.txt"},
    )  # fmt: skip
    file.write_text('{"name": "a"}\n{"name": "b", "alhpa": 2}\n')
    with pytest.raises(jlora.DataError, match=r"line 2(.|\n)*did you mean alpha"):
        sweep.read_jobs(file)
