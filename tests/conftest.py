"""Four fake CPU devices, and keys that differ from use to use."""

import itertools
import os
import pathlib
import signal
import sys

if "gpu" not in sys.argv:  # `-m gpu` takes the GPU, and the CPU beside it
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile thousands of tiny programs: LLVM's optimiser is half their time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
# What one module or run has compiled the next reads: two thirds of a second run's time.
# Each worker has its own: JAX's entries are not written in one piece, and another would
# read half of one. Deleting the folder is always safe.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parent.parent
    / ".jax_cache"
    / os.environ.get("PYTEST_XDIST_WORKER", "main")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Forget compiled programs after each module: kept, they come to gigabytes."""
    yield
    jax.clear_caches()


# Modules in which nothing mixes dtypes or ranks without saying so, be it jlora or the
# test's own functions. A file joins when it passes; code of Flax and transformers'
# models does not everywhere.
STRICT = {
    "test_dropout",
    "test_kernel_axes",
    "test_nodes",
    "test_product",
    "test_stack",
    "test_train",
    "test_train_batches",
    "test_train_optimisers",
    "test_train_trees",
}


# What takes longest: whole examples, tutorials and benchmarks, and all else that takes
# more than two and a half seconds of a processor, most of it compilation. CI runs them
# by `-m slow`; the suite without them is what one waits for at work. A line of the file
# is a test's place, or the beginning of several with a * behind it.
LINES = (pathlib.Path(__file__).parent / "slow.txt").read_text().splitlines()
SLOW = {line for line in LINES if line[-1] != "*"}
BEGINNINGS = tuple(line[:-1] for line in LINES if line[-1] == "*")


def pytest_collection_modifyitems(items):
    """Mark what is slow."""
    for item in items:
        place = item.nodeid.removeprefix("tests/")
        if place in SLOW or place.startswith(BEGINNINGS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Refuse implicit promotion, but where a test says that what it calls needs it."""
    is_loose = request.node.get_closest_marker("loose_promotion")
    if is_loose or request.module.__name__ not in STRICT:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def getkey():
    """A function that returns a new PRNG key at each call."""
    counter = itertools.count(1)
    return lambda: jax.random.key(next(counter))


@pytest.fixture
def run(capsys):
    """Run a command line of the console: its status, its stdout and its stderr."""
    from jlora import cli

    def run(*argv):
        status = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture
def done(run):
    """Run a command line that succeeds without a word on stderr; what it printed."""

    def done(*argv):
        status, out, err = run(*argv)
        assert (status, err) == (0, "")
        return out

    return done


@pytest.fixture
def ctrl_c_at(monkeypatch):
    """A function: runs get Ctrl-C at that step, until `monkeypatch.undo()`."""
    from jlora import train

    on_step = train.Log.on_step

    def at(stop):
        def interrupt(self, loop, step, metrics):
            if step == stop:
                os.kill(os.getpid(), signal.SIGINT)
            on_step(self, loop, step, metrics)

        monkeypatch.setattr(train.Log, "on_step", interrupt)

    return at
