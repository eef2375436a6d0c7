"""The table of claims in docs/reproduce.md, from stored rows and the catalog of experiments; tables.py writes it with the others."""

from pathlib import Path

from louver.experiments.catalog import experiments
from louver.experiments.experiment import Experiment
from louver.experiments.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "reproduce.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- claims -->\n", "<!-- end claims -->"


def table() -> str:
    """A line per experiment: what the paper says, what our rows say, and the command behind them."""
    lines = ["| claim of the paper | command | our figure | comment |", "|---|---|---|---|"]
    return "\n".join([*lines, *(line(described) for described in experiments().values())]) + "\n"


def line(described: Experiment) -> str:
    """One line; an experiment without stored rows has a command and no figure."""
    path = RESULTS / f"{described.name.replace('-', '_')}.json"
    path = path if path.exists() else RESULTS / f"{described.name}.json"
    command, figure = f"`louver experiment {described.name}`", "no rows stored; run the command"
    if path.exists():
        document = read_rows(path)
        command = f"`{document['machine']['command']}`"
        figure = f"{described.finding(document['rows'])} (benchmarks/results/{path.name})"
    cells = (described.claim, command, figure, described.caveat or "–")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def is_fresh(check: bool) -> bool:
    """Whether the table was up to date; unless check is set it is afterwards."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    fresh = before + BEGIN + table() + END + rest.split(END)[1]
    if fresh != text and not check:
        PAGE.write_text(fresh, encoding="utf-8")
    return fresh == text
