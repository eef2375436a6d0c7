"""A capture holds what the model's attention saw, and comes back from its file as it was."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention

from experiments.captures import tiny_capture
from experiments.words import Words
from integrations import tiny_models
from louver.errors import InputFileError
from louver.experiments.capture import Capture, Config, full_attention_layers, run


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 5)
    return path


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_over_the_capture_is_the_models_own(family, prompt):
    """The captured layer's attention, put through the layer's output projection, is what the model computed."""
    model = tiny_models.FAMILIES[family]()
    seen = {}
    layer_idx = full_attention_layers(model)[-1]
    projection = model.model.layers[layer_idx].self_attn.o_proj
    handle = projection.register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    captured = run(Config(prompt_file=prompt, num_queries=10), loaded=(model, Words()))
    handle.remove()
    layer = captured.layers[layer_idx]
    assert layer.keys.shape == (2, 220, 64) and layer.queries.shape == (4, 10, 64)
    assert captured.query_positions.tolist() == list(range(210, 220))
    mask = torch.arange(220) <= captured.query_positions[:, None]
    out = scaled_dot_product_attention(
        layer.queries[None], layer.keys[None], layer.values[None], mask, scale=captured.softmax_scale, enable_gqa=True
    )
    torch.testing.assert_close(out[0].transpose(0, 1).flatten(1), seen["x"][0, -10:], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_only_layers_with_full_attention_can_be_named(prompt):
    model = tiny_models.gemma3()
    assert full_attention_layers(model) == [1, 3]
    assert list(run(Config(prompt_file=prompt, layers=(3,)), loaded=(model, Words())).layers) == [3]
    with pytest.raises(InputFileError, match=r"layers \[0\] are not among"):
        run(Config(prompt_file=prompt, layers=(0,)), loaded=(model, Words()))


def test_a_short_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputFileError, match="9 tokens"):
        run(Config(prompt_file=tmp_path / "short.txt"), loaded=(tiny_models.llama(), Words()))


def test_a_file_comes_back_as_it_was(tmp_path):
    captured = tiny_capture()
    captured.save(tmp_path / "folder" / "x.safetensors")
    again = Capture.load(tmp_path / "folder" / "x.safetensors")
    assert again.model == "random" and again.softmax_scale == captured.softmax_scale
    assert list(again.layers) == [0, 3] and torch.equal(again.query_positions, captured.query_positions)
    for i, layer in captured.layers.items():
        assert all(torch.equal(x, getattr(again.layers[i], name)) for name, x in vars(layer).items())


def test_fitting_and_measured_queries_do_not_overlap():
    captured = tiny_capture()
    positions = captured.query_positions.tolist()
    assert positions[captured.fitting()] == list(range(536, 568))
    assert positions[captured.measured()] == [569, 585]


def test_anything_else_is_one_clear_error(tmp_path):
    with pytest.raises(InputFileError, match="no such file"):
        Capture.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputFileError, match="not a safetensors file"):
        Capture.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InputFileError, match="not a capture"):
        Capture.load(tmp_path / "other")
    save_file({"layers.0.keys": torch.zeros(1)}, tmp_path / "half", {"format": "louver-capture-1"})
    with pytest.raises(InputFileError, match="lacks"):
        Capture.load(tmp_path / "half")
