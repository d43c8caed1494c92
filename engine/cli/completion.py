"""`limpet completion`: what a shell sources to complete verbs, options and ids."""

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
    """  # noqa: D301  # \b is click's mark for lines that are to be left as they are
    complete = get_completion_class(shell)
    assert complete is not None, "click knows these shells"
    click.echo(complete(ctx.find_root().command, {}, "limpet", "_LIMPET_COMPLETE").source())
