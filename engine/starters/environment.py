"""A container's environment: what its image and its config say, and of the host only what is named here."""

from collections.abc import Iterable, Mapping

from limpet.engine.starters.users import Account
from limpet.schema.cri import ContainerConfig
from limpet.schema.errors import InvalidInputError, quote
from limpet.schema.image import ImageConfig
from limpet.schema.lengths import require_string_fits

HOST_VARIABLES: Mapping[str, str] = {
    "PATH": "the host's programs are found as the engine finds them",
    "HOME": "where programs keep what is the user's",
    "USER": "who the program runs as",
    "LOGNAME": "the same, as POSIX names it",
    "SHELL": "what programs take for `sh -c`",
    "LANG": "messages and characters as on the host",
    "TZ": "times as on the host",
    "TMPDIR": "a host may have no room in /tmp",
}
"""What a container of the `host` image gets of the engine's environment, and why. No other variable is handed on."""


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where neither an image with layers nor its config have one, as Docker and containerd do it."""


def merge_environment(image: ImageConfig, config: ContainerConfig) -> tuple[str, ...]:
    """Return NAME=value for each variable; the image's, overridden by the config's.

    Raises InvalidInputError for what no environment can hold.
    """
    merged: dict[str, str] = {}
    for entry in image.env:
        name, _, value = entry.partition("=")
        if not _is_variable(name, value):
            raise InvalidInputError(f"the image's environment variable {quote(entry)}: a name without NUL is needed")
        require_string_fits(f"the image's environment variable {quote(name)}", entry)
        merged[name] = value
    for pair in config.envs:
        if not _is_variable(pair.key, pair.value):
            raise InvalidInputError(f"environment variable {pair.key!r}: a name without '=' and NUL is needed")
        require_string_fits(f"environment variable {quote(pair.key)}", f"{pair.key}={pair.value}")
        merged[pair.key] = pair.value
    return tuple(f"{name}={value}" for name, value in merged.items())


def add_missing(environment: tuple[str, ...], defaults: Mapping[str, str]) -> tuple[str, ...]:
    """Return NAME=value for each variable, with those of the defaults that are not among them."""
    given = {entry.partition("=")[0] for entry in environment}
    return (*environment, *(f"{name}={value}" for name, value in defaults.items() if name not in given))


def choose_host_environment(
    environment: Mapping[bytes, bytes], inherited: Iterable[str], account: Account | None, *, is_engine_user: bool
) -> dict[str, str]:
    """Return the host's part of the environment of a container of the `host` image.

    HOME, USER, LOGNAME and SHELL are the engine's if the program runs as its user, and otherwise, or where the engine
    has none, what /etc/passwd says. Values are bytes as they are: what is not UTF-8 is a surrogate (PEP 383).
    """
    own = _describe(account)
    names = [name for name in HOST_VARIABLES if is_engine_user or name not in own]
    found = {name: environment[name.encode()] for name in (*names, *inherited) if name.encode() in environment}
    return own | {name: value.decode("utf-8", "surrogateescape") for name, value in found.items()}


def require_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of variables to inherit. Raises InvalidInputError for one that is no name."""
    is_list = not isinstance(names, str) and isinstance(names, Iterable)
    found: tuple[object, ...] = tuple(names) if is_list else (names,)
    for name in found:
        if not is_list or not _is_variable(name, ""):
            raise InvalidInputError(f"inherit_env {quote(name)}: a list of names of variables is needed, without '='")
    return tuple(map(str, found))


def require_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables. Raises InvalidInputError, which never shows a value, if an environment cannot hold them."""
    if not isinstance(variables, Mapping):
        raise InvalidInputError(
            f"secret_env: a mapping from names to values is needed, not a {type(variables).__name__}"
        )
    for name, value in variables.items():
        if not _is_variable(name, value):
            raise InvalidInputError(f"secret_env {quote(name)}: texts are needed, a name without '=' and no NUL")
        require_string_fits(f"secret_env {quote(name)}", f"{name}={value}")
    return dict(variables)


def _describe(account: Account | None) -> dict[str, str]:
    if account is None:
        return {"HOME": "/"}
    shell = {"SHELL": account.shell} if account.shell else {}
    return {"HOME": account.home, "USER": account.name, "LOGNAME": account.name, **shell}


def _is_variable(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, str):
        return False
    try:
        (name + value).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return bool(name) and "=" not in name and "\0" not in name + value
