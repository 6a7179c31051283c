"""The folder of a run: claimed by one process, continued, or replaced when asked."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from jlora._errors import OptionError
from jlora._files import local_path
from jlora._processes import agree, on_first
from jlora.train._metrics import MetricsLog

SETTINGS = "settings.json"  # its presence marks a folder as a run
TASK = "task"  # its settings say by this what trained it
SWEEP = "sweep"  # and by this what varies, where it is many runs of `jlora sweep`
LOCK = ".lock"
ROOT = Path("runs")


class RunFolder:
    """A folder that one process writes a run into.

    With several processes all make one, on a file system that they share: the first
    writes, and the others know where.

    Make one by `RunFolder.claim` or `RunFolder.resume`; close it, or use it in a `with`
    statement, so that another may resume the run.

    Attributes:
      path: the folder.
      settings: what the run was asked to do, as JSON.
      resumed: whether it goes on with what is there.
      metrics: its log.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        resumed: bool,
        lock: TextIO | None,
    ) -> None:
        self.path, self.settings, self.resumed = path, dict(settings), resumed
        self.metrics = MetricsLog(path / "metrics.jsonl", writes=lock is not None)
        self._lock = lock

    @property
    def writes(self) -> bool:
        """Whether this process writes it; of several the first does."""
        return self._lock is not None

    adapter = property(lambda self: self.path / "adapter", doc="The best adapter.")
    state = property(lambda self: self.path / "state", doc="What resuming needs.")
    merged = property(lambda self: self.path / "merged", doc="A Hugging Face folder.")
    outputs = property(lambda self: self.path / "outputs", doc="What the model says.")
    plot = property(lambda self: self.path / "loss.png", doc="The plotted losses.")
    report = property(lambda self: self.path / "report.md", doc="The report.")

    @classmethod
    def claim(
        cls,
        path: str | Path | None,
        settings: Mapping[str, Any],
        *,
        name: str = "run",
        overwrite: bool = False,
    ) -> RunFolder:
        """Make a folder for a new run; of several processes one gets it.

        Args:
          path: the folder; None takes the first free `runs/NAME-N`.
          settings: written into it, as JSON.
          name: the `NAME`.
          overwrite: replace another run that is there. Only what a run writes is
            removed, and nothing of a run that is going on.

        Raises:
          OptionError: the folder holds another run or something else, or cannot be
            made.
          CheckpointError: `path` is the address of a bucket.
        """
        take = functools.partial(_claimed, path, settings, name, overwrite)
        return cls._taken(take, settings, resumed=False)

    @classmethod
    def resume(
        cls, path: str | Path, settings: Mapping[str, Any] | None = None
    ) -> RunFolder:
        """Go on with a run that stopped.

        Args:
          path: its folder.
          settings: what is to replace its settings; None keeps them.

        Raises:
          OptionError: there is no run, nothing was saved yet, or it is going on.
        """
        folder = local_path(path)
        kept = saved_settings(folder)
        settings = kept if settings is None else settings
        return cls._taken(lambda: (folder, _lock(folder)), settings, resumed=True)

    @classmethod
    def _taken(
        cls,
        take: Callable[[], tuple[Path, TextIO]],
        settings: Mapping[str, Any],
        *,
        resumed: bool,
    ) -> RunFolder:
        """Take a folder, of several processes the first; all are to see it."""
        locks: list[TextIO] = []

        def work() -> str:
            folder, lock = take()
            locks.append(lock)
            return str(folder)

        try:
            folder = Path(on_first("taking the folder of the run", work))
            _check_together(folder, settings)
        except BaseException:
            for lock in locks:
                lock.close()
            raise
        return cls(folder, settings, resumed, locks[0] if locks else None)

    def save_settings(self) -> None:
        """Write the settings; `fit` does so once a run goes on with new ones."""
        if self._lock is None:
            return
        new = self.path / (SETTINGS + ".new")
        new.write_text(_json(self.settings), encoding="utf-8")
        os.replace(new, self.path / SETTINGS)

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        script, place = Path(sys.argv[0]), str(self.path)
        if script.stem == "jlora" or script.parent.name == "jlora":  # the console
            command = "sweep" if SWEEP in self.settings else "train"
            return shlex.join(["jlora", command, "--resume", place])
        return shlex.join(["python", str(script), "--output", place, "--resume"])

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        self.close()
        is_asked = kind is KeyboardInterrupt and self._lock is not None
        if is_asked and self.state.exists():
            print(f"\nTo continue:\n  {self.resume_command}", file=sys.stderr)


_WRITTEN = (
    *("adapter", "state", "merged", "outputs", "loss.png", "report.md", "report.html"),
    *("tensorboard", "wandb"),
    *("metrics.jsonl", "metrics.jsonl.new", SETTINGS, SETTINGS + ".new"),
)


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a run that can be resumed.

    Raises:
      OptionError: there is none.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise OptionError(
            f"{folder} holds no run to resume ({SETTINGS} is missing).\nStart one "
            "without --resume."
        )
    if not (folder / "state").is_dir():
        raise OptionError(
            f"the run in {folder} stopped before its first step; nothing was saved "
            "yet.\nStart it again with --overwrite."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be read: {error}.") from error
    return dict(settings)


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), indent=2) + "\n"


def _claimed(
    path: str | Path | None, settings: Mapping[str, Any], name: str, overwrite: bool
) -> tuple[Path, TextIO]:
    """Make a folder for a new run; return it, and its lock."""
    try:
        folder = _numbered(name) if path is None else local_path(path)
        _check_free(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            _check_free(folder, overwrite)  # nobody else changes it from now on
            _clear(folder)
            with (folder / SETTINGS).open("x", encoding="utf-8") as file:
                file.write(_json(settings))
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        where = error.filename or path
        raise OptionError(
            f"the folder {path or ROOT} cannot be written: {error.strerror} "
            f"({where}).\nChoose another one."
        ) from error
    return folder, lock


def _check_together(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse processes of which one sees no folder, or was asked for another run."""
    own = json.loads(_json(settings))
    missing = None
    if not (folder / SETTINGS).is_file():
        missing = OptionError(
            f"the folder {folder}, which the first process writes, is not seen by "
            f"process {jax.process_index()} on {socket.gethostname()}.\nChoose an "
            "--output on a file system that all hosts share."
        )
    for index, other in enumerate(agree("taking the folder of the run", missing, own)):
        differing = [k for k in own.keys() | other.keys() if own.get(k) != other.get(k)]
        if differing:
            raise OptionError(
                f"process {jax.process_index()} was started with other settings than "
                f"process {index}: {', '.join(sorted(differing))}.\nGive every process "
                "the same command line; --distributed alone may differ."
            )


def _numbered(name: str) -> Path:
    """Make the first free `runs/NAME-N`; making it is what claims it."""
    ROOT.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = ROOT / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there are numbers enough")


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder of another run, or of something else."""
    if (folder / SETTINGS).exists():
        if not overwrite:
            raise OptionError(
                f"{folder} holds another run.\nContinue it with --resume, replace it "
                "with --overwrite, or choose another --output."
            )
    elif folder.exists() and (
        not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())
    ):
        raise OptionError(f"{folder} exists and is no run; choose another --output.")


def _clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for name in _WRITTEN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _lock(folder: Path) -> TextIO:
    """Return the open lock file; the lock goes when it is closed, or the process."""
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"the folder {folder} cannot be written: {error.strerror}.\nChoose another "
            "one."
        ) from error
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on Windows
        return file
    except BlockingIOError as error:
        file.seek(0)
        process = file.read().strip() or "?"
        file.close()
        raise OptionError(
            f"the run in {folder} is going on, in process {process}.\nStop it first, "
            "or choose another folder."
        ) from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
