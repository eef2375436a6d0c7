"""What a user can get wrong is told in one line, with exit code 2, and nothing is written."""

import json

import pytest
from typer.testing import CliRunner

from louver.cli.app import app


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--policy", "exactly:0.01"], "unknown policy 'exactly'"),
        (["demo", "--policy", "exact:2"], "not a share of the keys"),
        (["demo", "--document", "no-such-file.txt"], "no-such-file.txt"),
        (["demo", "--model", "./no-such-model"], "no such folder"),
        (["demo", "--backend", "abacus"], "'abacus' is not available"),
        (
            ["demo", "--index", "ball", "--policy", "exact:0.01"],
            "needs the sketch's values, which index='ball' has not",
        ),
        (["demo", "--index", "tree"], "wanted one of sketch, flat, ball"),
        (["generate", "./no-such-model", "--prompt-file", "no-such-file.txt"], "no-such-file.txt"),
        (["generate", "./no-such-model", "--prompt-file", __file__], "no such folder"),
        (["generate", "./no-such-model", "--prompt-file", __file__, "--policy", "topk:0"], "keeps nothing"),
        (["generate", "demo", "--prompt-file", __file__, "--index", "tree"], "wanted one of sketch, flat, ball"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path):
    out = tmp_path / "out"
    result = run(*arguments, *(["--out", out] if arguments[0] == "demo" else []))
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.strip()]
    assert says in result.stderr
    assert len(told) == 1 and told[0].startswith("error: "), result.stderr
    assert not out.exists()


def test_info_tells_the_machine(tmp_path):
    path = tmp_path / "info.json"
    result = run("info", "--json", path)
    assert result.exit_code == 0, result.output
    assert "torch" in result.output
    assert json.loads(path.read_text())["rows"] == []


def test_help_teaches_every_command():
    shown = run("--help").output
    for command in ("info", "demo", "generate"):
        assert command in shown
        assert run(command, "--help").exit_code == 0
