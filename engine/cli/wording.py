"""The library's errors in the words of the command line: what to call, or to give, is a verb or an option there."""

import re

_BRINGS = "a program that brings it has to have the state open"
_WORDS = {
    r"\brecover\(\)": "limpet recover",
    r"stop it first, or remove it with force": "stop it first, or give --force",
    r"cannot delete (sandbox .*); delete them first, or remove it with them": r"cannot remove \1; give --force",
    r"; release the container and make it anew": "; remove the container and make it anew",
    r"^runtime_handler (.*); give it to Engine\.open in `runtimes`$": rf"--runtime \1; {_BRINGS}",
    r"; open one with that$": f"; {_BRINGS}",
    r"; open an engine with `cni` to remove it$": "; a program whose engine has `cni` has to have the state open",
    r"; open the engine with starter=.*$": "; install limpet anew",
    r"; give `command`$": "; give a COMMAND",
    r"\bcall again\b": "try again",
    r"^working_dir ": "--workdir ",
    r"^name (?=['\"])": "--name ",
}
"""What is said for a Python program, as a pattern, and what is said here."""


def tell_error(error: BaseException) -> str:
    """Return an error's text on one line, in the words of the command line."""
    text = " ".join(str(error).split())
    for pattern, words in _WORDS.items():
        text = re.sub(pattern, words, text)
    return text
