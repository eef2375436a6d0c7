"""Local tasks of lm-evaluation-harness, answered through Louver; no network."""

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")

from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.toy import VOCAB, toy_model
from louver.cli import app
from louver.errors import InputFileError, PolicyError
from louver.experiments.evaluation import Config, run, scores
from louver.experiments.harness import LouverLM
from louver.experiments.methods import method
from louver.experiments.rows import read_rows
from louver.integrations.transformers import LouverCache, attach

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("default"),
]  # the harness and its libraries warn of their own

WORDS = 400  # of each context: three frames of the sketch

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
doc_to_choice: ["w7 w8 w9", "w7 w8 w11", "w20"]
target_delimiter: " "
metric_list: [{metric: acc}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["nowhere"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tokenizer():
    """A word, a token."""
    vocabulary = {
        word: i for i, word in enumerate(("<pad>", "<unknown>", "<end>", *(f"w{i}" for i in range(3, VOCAB))))
    }
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture(scope="module")
def texts():
    numbers = torch.randint(3, VOCAB, (5, WORDS), generator=torch.Generator().manual_seed(4)).tolist()
    return [" ".join(f"w{i}" for i in line[: WORDS - 30 * place]) for place, line in enumerate(numbers)]


@pytest.fixture(scope="module")
def plain(model, tokenizer):
    """The harness's own answers, by the model as it is."""
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=1024)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, texts, plain):
    """Two task files over the same texts; the answers are those that the plain model gives."""
    folder, data = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("data") / "asked.jsonl"
    answers = generated(plain, texts)
    lines = [{"text": t, "label": i % 3, "answer": a} for i, (t, a) in enumerate(zip(texts, answers, strict=True))]
    data.write_text("\n".join(map(json.dumps, lines)))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def generated(lm, texts):
    until = {"until": ["nowhere"], "max_gen_toks": 6, "do_sample": False}
    return lm.generate_until(asked("generate_until", *((text, until) for text in texts)), disable_tqdm=True)


def louver_lm(model, tokenizer, spec, **options):
    attach(model)
    make = method(spec).make
    return LouverLM(model, tokenizer, lambda: LouverCache(model.config, layer=make), max_length=1024, **options)


@pytest.mark.parametrize("spec", ["dense", "exact:1.0", "budget:1.0", "quest:1"])
def test_everything_scores_and_writes_what_the_harness_does(model, tokenizer, plain, texts, spec):
    lm = louver_lm(model, tokenizer, spec, batch_size=2)  # rows of unequal length, so the shorter are padded
    pairs = asked("loglikelihood", *((text, end) for text in texts for end in (" w7 w8 w9", " w7 w8 w11", " w20")))
    mine, theirs = lm.loglikelihood(pairs, disable_tqdm=True), plain.loglikelihood(pairs, disable_tqdm=True)
    assert [x[0] for x in mine] == pytest.approx([x[0] for x in theirs], abs=2e-3)
    assert [x[1] for x in mine] == [x[1] for x in theirs]
    assert lm.tally.num_steps == 2 * 5 * (3 + 3 + 1)  # layers x contexts x tokens of the continuations
    assert lm.tally.num_exact == lm.tally.num_keys > 0
    assert generated(lm, texts) == generated(plain, texts)


def test_a_rolling_loglikelihood_decodes_its_whole_text(model, tokenizer, plain, texts):
    lm = louver_lm(model, tokenizer, "dense")
    text = asked("loglikelihood_rolling", (texts[0][:200],))
    mine, theirs = (one.loglikelihood_rolling(text, disable_tqdm=True)[0] for one in (lm, plain))
    assert mine == pytest.approx(theirs, abs=1e-2)
    assert lm.tally.num_steps == 2 * len(texts[0][:200].split())


def test_long_contexts_are_cut_as_the_harness_cuts_them(model, tokenizer, texts):
    attach(model)
    short = LouverLM(model, tokenizer, lambda: LouverCache(model.config, policy="dense"), max_length=100)
    pair = asked("loglikelihood", (texts[0], " w7 w8 w9"))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=100)
    answers = [lm.loglikelihood(pair, disable_tqdm=True)[0][0] for lm in (short, theirs)]
    assert answers[0] == pytest.approx(answers[1], abs=2e-3)


def test_few_keys_read_less_and_answer_otherwise(model, tokenizer, tasks):
    config = Config(
        model="toy", tasks=("local_choice", "local_write"), policies=("dense", "budget:0.02"), include_path=tasks
    )  # fmt: skip
    rows = run(config, loaded=(model, tokenizer))
    by = {(row["task"], row["policy"]): row for row in rows}
    assert len(by) == len(rows) == 4
    for task, metric in (("local_choice", "acc"), ("local_write", "exact_match")):
        dense, few = by[task, "dense"], by[task, "budget:0.02"]
        assert dense["metric"] == metric and dense["num_samples"] == 5 and dense["accuracy"] == dense["score"]
        assert dense["exact_fraction"] == 1
        assert (
            few["exact_fraction"] < 0.3
            and few["guarantee"] == "exact"
            and few["bytes_fraction"] < dense["bytes_fraction"]
        )
        assert few["score_low"] <= few["score"] <= few["score_high"]
    assert by["local_write", "dense"]["score"] == 1 > by["local_write", "budget:0.02"]["score"]
    assert model.config._attn_implementation == "sdpa"


def test_the_command(monkeypatch, model, tokenizer, tasks, tmp_path):
    monkeypatch.setattr("louver.experiments.evaluation.load", lambda *_, **__: (model, tokenizer))
    command = ["eval", "toy", "--tasks", "local_choice", "--policy", "budget:0.1", "--limit", "2", "--num-fewshot", "0"]
    done = CliRunner().invoke(app, [*command, "--include-path", str(tasks), "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    (row,) = read_rows(tmp_path / "rows.json")["rows"]
    assert row["num_samples"] == 2 and row["policy"] == "budget:0.1" and "local_choice" in done.output


def test_what_is_wrong_is_said(model, tokenizer, tasks):
    for changes, error, said in (
        ({"tasks": ("nothing",)}, InputFileError, "no task 'nothing'"),
        ({"policies": ("fp9",)}, PolicyError, "no method 'fp9'"),
        ({"metadata": "[1]"}, InputFileError, "wanted a JSON object"),
        ({"metadata": "{"}, InputFileError, "is not JSON"),
    ):
        config = Config(**{"model": "toy", "tasks": ("local_choice",), "include_path": tasks} | changes)
        with pytest.raises(error, match=said):
            run(config, loaded=(model, tokenizer))


def test_lengths_of_ruler_are_lengths():
    figures = {"alias": "niah", "4096,none": 0.5, "4096_stderr,none": "N/A", "8192,none": -1}
    (row,) = scores({"results": {"niah_single_1": figures}, "n-samples": {}})
    assert row["kv_len"] == 4096 and row["score"] == 0.5 and row["score_low"] is None and "accuracy" not in row
