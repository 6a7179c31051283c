"""Compiled programs are kept for the next run, where the user says, or nowhere."""

import os
import subprocess
import sys

import pytest

import jlora
from jlora._programs import keep_programs

RUN = """
import jax, jax.numpy as jnp
from jlora._programs import keep_programs
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
folder = keep_programs({where})
x = jax.jit(lambda x: jnp.linalg.svd(jnp.tanh(x) @ x.T)[1])(jnp.ones((5, 7)))
hits, misses = (sum(n.endswith(f"/cache_{{k}}") for n in found) for k in ("hits", "misses"))
print(folder, hits, misses)
"""


def outcome(where, home, **env):
    """The folder, and how many programs were read and written, in a new process."""
    kept = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    kept |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **env}
    kept.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    code = RUN.format(where=where)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept
    )
    assert done.returncode == 0, done.stderr
    folder, hits, misses = done.stdout.split()
    return folder, int(hits), int(misses)


def test_the_next_run_compiles_nothing(tmp_path):
    folder, hits, misses = outcome(None, tmp_path)
    assert folder == str(tmp_path / "jlora" / "programs")
    assert hits == 0
    assert misses > 0
    assert outcome(None, tmp_path) == (folder, misses, 0)


def test_jaxs_own_settings_come_first(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    assert outcome(None, tmp_path, **own)[0] == own["JAX_COMPILATION_CACHE_DIR"]
    off = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    assert outcome(None, tmp_path, **off) == ("None", 0, 0)
    assert outcome("'off'", tmp_path) == ("None", 0, 0)
    assert not (tmp_path / "jlora").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    """An error where it was asked for; the user's own one is done without."""
    (tmp_path / "file").touch()
    with pytest.raises(jlora.OptionError, match="--compilation-cache"):
        keep_programs(tmp_path / "file" / "programs")
    assert outcome(None, tmp_path / "file") == ("None", 0, 0)


def test_entries_that_a_killed_process_left_are_made_anew(tmp_path):
    folder, _, misses = outcome(None, tmp_path)
    entries = list((tmp_path / "jlora" / "programs").glob("*-cache"))
    assert len(entries) == misses > 1
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
        os.utime(entry, (1, 1))
    assert outcome(None, tmp_path, PYTHONWARNINGS="error")[1:] == (0, misses)
    assert outcome(None, tmp_path, PYTHONWARNINGS="error")[1:] == (misses, 0)
