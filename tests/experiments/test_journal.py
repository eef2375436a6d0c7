"""An aborted run goes on where it was, and never takes another machine's or another setting's results for its own."""

import pytest

from experiments.toy import ToyTokenizer, toy_model
from louver.experiments import denoising, journal, long_generation, perplexity, quality
from louver.experiments.branching import Prompt
from louver.experiments.journal import Journal

POLICIES = ("exact:0.05", "streaming:0.2")
RUNS = {
    quality: quality.Config(
        tasks=("quote", "documents"), kv_lens=(300,), policies=POLICIES, num_samples=4, batch=3, floor=0.0
    ),
    perplexity: perplexity.Config(kv_len=200, num_steps=8, num_samples=3, policies=POLICIES, batch=2),
    denoising: denoising.Config(
        kept=(0.1,), tasks=("quote",), kv_lens=(300,), num_samples=2, text_len=200, num_texts=2
    ),
    long_generation: long_generation.Config(kv_len=150, num_steps=12, policies=POLICIES),
}


def test_results_are_found_again(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "rows.json"
    first = Journal.beside(path)
    assert first.get(task="a") is None
    first.put({"x": [1.5, True]}, task="a", kv_len=3)
    first.put([1], task="b")
    assert first.get(kv_len=3, task="a") == {"x": [1.5, True]} and first.get(task="a") is None
    kept = path.with_name("rows.json.partial")
    kept.write_text(kept.read_text()[:-4])  # stopped while it wrote the last line
    again = Journal.beside(path)
    assert again.get(task="a", kv_len=3) == {"x": [1.5, True]} and again.get(task="b") is None
    monkeypatch.setattr(journal, "machine", lambda *_: {"device": "another", "versions": {}})
    assert Journal.beside(path).get(task="a", kv_len=3) is None
    again.close()
    assert not kept.exists()


@pytest.mark.parametrize("experiment", RUNS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_an_aborted_run_goes_on(experiment, tmp_path, monkeypatch):
    config, loaded, rows = RUNS[experiment], (toy_model(), ToyTokenizer()), tmp_path / "rows.json"
    whole = experiment.run(config, loaded=loaded, journal=Journal.beside(tmp_path / "whole.json"))
    lines = (tmp_path / "whole.json.partial").read_text().splitlines(keepends=True)
    (tmp_path / "rows.json.partial").write_text("".join(lines[: len(lines) // 2]))
    assert experiment.run(config, loaded=loaded, journal=Journal.beside(rows)) == whole
    assert len((tmp_path / "rows.json.partial").read_text().splitlines()) == len(lines)
    monkeypatch.setattr(Prompt, "read", None)  # nothing is left to do
    assert experiment.run(config, loaded=loaded, journal=Journal.beside(rows)) == whole
