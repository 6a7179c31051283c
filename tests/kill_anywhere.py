"""Kill a run at random moments, and see that it ends as the undisturbed one, bit for bit.

    python tests/kill_anywhere.py --kills 50

Each run is killed (SIGKILL) a few times, resumed after each and let finish after the
last. It saves its state after every third step, which takes most of its time: most
kills land while a state is being written, is renamed, or an old one is deleted. A kill
after which the run does not go on from a whole checkpoint, or has to fall back on an
earlier one, is a failure, and so is an end that differs in one bit.
"""

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora import checkpoint, train  # imported once: an attempt is a fork of this

assert checkpoint  # which training imports when it first saves
EVERY, SIZE, RANK = 3, 768, 256


class Stream:
    """Batches that follow from the step alone."""

    def __len__(self):
        return 10

    def stream(self, step):
        while True:
            yield {"x": noise(step, (8, SIZE)), "y": noise(-1, (8, SIZE))}
            step += 1


def noise(seed, shape):
    rng = np.random.default_rng(seed + 1)
    return rng.normal(size=shape).astype(np.float32)


def loss_fn(params, batch, key):
    difference = batch["x"] @ params["dense"]["kernel"] - batch["y"]
    return jnp.mean(difference**2) + 1e-3 * jax.random.uniform(
        jax.random.key(0) if key is None else key
    )


class Say(train.Callback):
    """Tells the parent process where the run begins."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_start(self, loop):
        os.write(self.pipe, f"{loop.position}\n".encode())


def attempt(folder, pipe, steps):
    """A run from its beginning, or from where it was killed, to its end."""
    warnings.simplefilter("error", jlora.JloraWarning)
    base = {"dense": {"kernel": jnp.asarray(noise(7, (SIZE, SIZE))) / SIZE**0.5}}
    params = jlora.lorafy(base, RANK, ["dense"], key=jax.random.key(1))
    is_saved = (folder / "state").is_dir()
    claim = train.RunFolder.resume if is_saved else train.RunFolder.claim
    options = {} if is_saved else {"overwrite": True}
    with claim(folder, {}, **options) as run:
        fit = train.fit(
            loss_fn, params, optax.adamw(3e-3), Stream(), run, steps=steps,
            valid=[next(Stream().stream(1000))], eval_every=EVERY, keep_best=1,
            callbacks=[Say(pipe)],
        )  # fmt: skip
        end = {
            "state": digest(fit.state),
            "params": digest(fit.params),
            "best": [fit.best_step, fit.best_loss, fit.first_loss],
            "log": [
                [row["event"], row["step"], row["loss"]] for row in run.metrics.rows()
            ],
            "kept": sorted(p.name for p in (folder / "state").glob("[0-9]*")),
        }
    (folder / "end.json").write_text(json.dumps(end))


def digest(tree):
    """One number for all bits of a tree."""
    found = hashlib.blake2b()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        found.update(f"{path} {x.dtype} {x.shape}".encode() + np.asarray(x).tobytes())
    return found.hexdigest()


def forked(folder, log, steps):
    """Begin an attempt in a process of its own: its id, and what it says of itself."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        for stream in (1, 2):
            os.dup2(log, stream)
        attempt(folder, writing, steps)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def begun(pipe):
    """The step at which an attempt begins; None if it ended before."""
    with open(pipe, "rb", buffering=0) as said:
        line = said.readline()
    return int(line) if line else None


def is_within_a_save(folder):
    """Whether something was being written when the process was killed."""
    left = [*folder.glob("state/*orbax-checkpoint-tmp*"), *folder.glob(".adapter.*")]
    halves = [p for p in folder.glob("state/[0-9]*") if not (p / "config").is_dir()]
    return bool(left or halves)


def undisturbed(folder, log, steps):
    """How a run ends that nobody kills, and how long it takes."""
    pid, pipe = forked(folder, log, steps)
    assert begun(pipe) == 0, "the undisturbed run did not begin"
    began = time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0, "the undisturbed run failed"
    return json.loads((folder / "end.json").read_text()), time.monotonic() - began


def killed(folder, log, steps, moment):
    """One attempt, killed at a moment after its beginning; None if it ended before."""
    whole = [int(p.name) for p in folder.glob("state/[0-9]*") if p.name.isdigit()]
    pid, pipe = forked(folder, log, steps)
    start = begun(pipe)
    if start is not None:
        reading = os.pidfd_open(pid)
        select.select([reading], [], [], moment)
        os.close(reading)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert start == max(whole, default=0), f"began at {start}, with states of {whole}"
    if not os.WIFSIGNALED(status):
        assert status == 0, "an attempt failed; see the log"
        return None
    return is_within_a_save(folder)


def main(argv=None):
    """Run a command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--each", type=int, default=5, help="kills a run, at most")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    rng, within, kills, runs = random.Random(asked.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as root, open(f"{root}/log.txt", "wb") as log:
        said = log.fileno(), asked.steps
        try:
            want, seconds = undisturbed(Path(root, "undisturbed"), *said)
            while kills < asked.kills:
                runs += 1
                folder = Path(root, f"run-{runs}")
                for _ in range(min(asked.each, asked.kills - kills)):
                    moment = rng.uniform(0, seconds / 2)
                    found = killed(folder, *said, moment)
                    if found is None:  # it was over before: the machine is quicker now
                        seconds *= 0.8
                        break
                    kills, within = kills + 1, within + found
                if not (folder / "end.json").exists():
                    pid, pipe = forked(folder, *said)
                    begun(pipe)
                    assert os.waitpid(pid, 0)[1] == 0, "the last attempt failed"
                got = json.loads((folder / "end.json").read_text())
                assert got == want, f"run {runs} ends otherwise"
                print(f"run {runs}: equal, {kills} kills so far", flush=True)
        except AssertionError:
            print(Path(root, "log.txt").read_text()[-4000:], file=sys.stderr)
            raise
    print(
        f"{kills} kills in {runs} runs, {within} of them while something was written: "
        "each run ended bit for bit as the undisturbed one"
    )
    return within


if __name__ == "__main__":
    main()
