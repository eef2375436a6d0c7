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
        (["generate", "demo", "--prompt-file", __file__, "--store", "disk"], "--store disk needs --store-path"),
        (["bench", "--kv-lens", "512,0"], "wanted at least one key"),
        (["bench", "--shape", "8,0,64"], "wanted num_q_heads,num_kv_heads,head_dim"),
        (["capture", "--layers", ""], "--layers: '' in '' can't be read"),
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


PLACES = {
    "info": "--json",
    "demo": "--json",
    "generate demo --prompt-file text": "--json",
    "capture": "--out",
    "experiment pruning --capture none": "--json",
    "experiment precision --capture none": "--plot",
    "experiment all": "--out",
    "eval demo --tasks none": "--json",
    "profile": "--html",
    "tune": "--json",
    "bench": "--json",
    "report .": "--out",
}


@pytest.mark.parametrize("command", PLACES)
def test_a_result_that_can_not_be_written_is_told_before_the_work(command, tmp_path, monkeypatch):
    """At once, not after the minutes or hours that made it; nothing is read, run or left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("Some text.")
    for place, says in (("text/file", "is a file, not a folder"), (".", "is a folder; wanted the name of a file")):
        if place == "." and command == "experiment all":
            continue  # wants a folder
        result = run(*command.split(), PLACES[command], place)
        assert result.exit_code == 2 and says in result.stderr, result.output
        assert result.stderr.count("\n") == 1 and not result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_place_that_fails_all_the_same_is_named_as_it_was_asked_for(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device", str(tmp_path / ".info.json.x8y2"))

    monkeypatch.setattr("tempfile.mkstemp", full)
    result = run("info", "--json", tmp_path / "info.json")
    assert result.exit_code == 2 and result.stderr == f"error: {tmp_path / 'info.json'}: No space left on device\n"


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
