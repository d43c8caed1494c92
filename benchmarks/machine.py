"""The conditions that figures depend on: the machine, the file system, the installed versions."""

import os
import platform
import sqlite3
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from limpet.recovery.mounts import find_file_system

_PACKAGES = ("limpet", "sqlalchemy", "msgspec", "lmdb", "diskcache")
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


def describe_machine(directory: str) -> dict[str, Any]:
    """Return the machine and the file system of `directory`. `durable` is False if a flush writes to no disk."""
    file_system = find_file_system(os.stat(directory).st_dev)
    return {
        "cpu": _read_cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "file_system": file_system,
        "durable": file_system not in _IN_MEMORY,
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of the measured packages; "" for one that is not installed."""
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    return {**found, **{name: _read_version(name) for name in _PACKAGES}, "commit": read_commit()}


def read_commit() -> str:
    """Return the commit of this file's checkout, with "+" if it was changed; "" if there is no checkout."""
    directory, name = os.path.split(os.path.realpath(__file__))
    git = ("git", "-C", directory)
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", name], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or installed without a checkout
        return ""
    return commit.stdout.strip() + ("+" if changed.stdout else "")


def _read_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read_cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in {"model name", "Model"}:
                return value.strip()
    return platform.machine()
