"""The commands, put together."""

import typer

from louver.cli.info import info

app = typer.Typer(
    name="louver",
    help="Long-context LLM decoding that reads a fraction of the KV cache and certifies what it did not read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)


@app.callback()
def _root() -> None:
    """Keep subcommands by name even while there is one."""


def main() -> None:
    """Entry point of the ``louver`` script."""
    app()
