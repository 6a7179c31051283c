"""What every maker of golden files does; the makers run as modules of a package."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path


def write_versions(folder: Path, *packages: str) -> None:
    """Write `versions.json`: of Python, PyTorch, transformers and other packages."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", *packages):
        versions[package] = importlib.metadata.version(package)
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
