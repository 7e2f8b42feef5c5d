"""Where a result comes from: code, commit, machine, versions. Read once per process: later edits did not run."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
# Versions of what is computed. A commit that changes results raises a number, so that earlier runs, checkpoints and
# cached images no longer count as equal. tests/test_identity.py refuses a change of the deciding code without that.
# Splits, labels and pixels need no version, because the digest of the data covers them.
VERSIONS = {"decoding": 3, "network": 1, "batches": 1, "training": 1, "execution": 3, "evaluation": 1}
OF_TRAINING = ("network", "batches", "training", "execution")
OF_EVALUATION = ("decoding", "batches", "execution", "evaluation")
RECORDED_PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pillow", "scikit-learn")
PRINTABLE_DIFF_CHARACTERS = 5_000_000
# The command of this process, in the form that resumes its work, without secrets; empty if it is not an effv2 command.
COMMAND = ContextVar("COMMAND", default="")
# Commands of git that ignore the settings of the user and of the checkout, and also read another owner's checkout.
GIT = ("git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-C", str(PACKAGE.parent))
CHANGED_FILES = ("status", "--porcelain", "--untracked-files=normal")
CHANGES = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")


def code_version(parts: tuple[str, ...] = OF_TRAINING) -> str:
    """Return the versions of the parts that decide a run (by default those of a training), and torch's."""
    return ", ".join([*(f"{part} {VERSIONS[part]}" for part in parts), f"torch {metadata.version('torch')}"])


def sha256_of_file(path: Path) -> str:
    """Hash the content of a file; OSError if it can't be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_values(values: Any) -> str:
    """Hash plain values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@cache
def git_state() -> tuple[str, str] | None:
    """Return the commit of the package's checkout, and its uncommitted changes; None without a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(*CHANGED_FILES) or ""
    return commit.strip(), changed and f"{changed}\n{_git(*CHANGES) or ''}"[:PRINTABLE_DIFF_CHARACTERS]


@cache
def machine() -> dict[str, str]:
    """Return processor, cores, memory, accelerator, system and versions by plain names."""
    import psutil
    import torch

    versions = {package: metadata.version(package) for package in RECORDED_PACKAGES}
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": sys.version.split()[0],
    } | versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _git(*words: str) -> str | None:
    """Run git on the checkout around the package; None without git or a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    # Without git's variables, which can name another checkout (within a hook) or another program for differences.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        found = subprocess.run([*GIT, *words], env=plain, capture_output=True, timeout=30, check=True)  # noqa: S603
        return found.stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
