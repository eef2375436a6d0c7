"""The commands, put together."""

import typer

from louver.cli.bench import bench
from louver.cli.capture import capture
from louver.cli.demo import demo
from louver.cli.evaluate import evaluate
from louver.cli.experiment import experiment
from louver.cli.generate import generate
from louver.cli.info import info
from louver.cli.profile import profile
from louver.cli.report import report
from louver.cli.tune import tune

app = typer.Typer(
    name="louver",
    help="Long-context LLM decoding that reads a fraction of the KV cache and certifies what it did not read. "
    "Start with louver demo, then louver generate on text of your own; louver profile says what a model would gain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(demo)
app.command()(generate)
app.command()(capture)
app.add_typer(experiment, name="experiment")
app.command("eval")(evaluate)
app.command()(profile)
app.command()(tune)
app.command()(bench)
app.command()(report)


def main() -> None:
    """Entry point of the ``louver`` script."""
    app()
