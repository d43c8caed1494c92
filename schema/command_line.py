"""What a container runs: its config and its image together, by the rule of the CRI and Kubernetes."""

from limpet.schema.cri import ContainerConfig
from limpet.schema.errors import InvalidInputError
from limpet.schema.image import ImageConfig
from limpet.schema.lengths import require_string_fits


def choose_args(image: ImageConfig, config: ContainerConfig) -> tuple[str, ...]:
    """Return the command line. Raises InvalidInputError if neither the image nor the config gives one that can be.

    config.command | config.args | what runs
    ---------------+-------------+-------------------------------
    not given      | not given   | image.entrypoint + image.cmd
    not given      | given       | image.entrypoint + config.args
    given          | not given   | config.command
    given          | given       | config.command + config.args
    """
    command, args = tuple(config.command), tuple(config.args)
    line = command + args if command else image.entrypoint + (args or image.cmd)
    if not line:
        raise InvalidInputError(
            f"container {config.metadata.name!r}: neither its config nor its image says what to run; give `command`"
        )
    if not line[0]:
        raise InvalidInputError(f"container {config.metadata.name!r}: the program's name, its first argument, is ''")
    for number, argument in enumerate(line):
        require_string_fits(f"container {config.metadata.name!r}: argument {number} of its command line", argument)
    return line
