"""The files of a cgroup, as the kernel shows them: one short text each."""

import os


def read_text(path: str) -> str:
    """Return what is in a file of the kernel's, without the newline at its end. Raises OSError."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def write_line(path: str, text: str) -> None:
    """Write a line into a file of the kernel's, in one write, as it expects. Raises OSError with the file's name."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"{text}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = path
        raise
