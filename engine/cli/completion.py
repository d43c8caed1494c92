"""`limpet completion`: print the script with which a shell completes verbs, options and ids."""

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash:  limpet completion bash > ~/.local/share/bash-completion/completions/limpet
    zsh:   limpet completion zsh > a file named _limpet in a directory of $fpath
    fish:  limpet completion fish > ~/.config/fish/completions/limpet.fish
    """  # noqa: D301  # \b tells click not to rewrap the lines
    complete = get_completion_class(shell)
    assert complete is not None, "click supports these shells"
    click.echo(complete(ctx.find_root().command, {}, "limpet", "_LIMPET_COMPLETE").source())
