"""A policy per layer reaches its layer, a tuning file is read back, and what does not fit the model is refused."""

import json

import pytest
import torch

from integrations.tiny_models import VOCAB, gemma3, llama
from louver.errors import InputFileError, PolicyError
from louver.integrations.transformers import LouverCache, attach


def specs(cache):
    return [layer.attention.policy.spec for layer in cache.served_layers]


def test_every_layer_gets_its_own_policy():
    model = llama(num_hidden_layers=3)
    cache = attach(model, policy={"default": "exact:0.01", 1: "topk:5", "2": "dense"})
    assert specs(cache) == ["exact:0.01", "topk:5", "dense"]
    ids = torch.randint(1, VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, **cache.kwargs())
    exact = [layer.exact_fraction for layer in cache.stats.per_layer()]
    assert exact[2] == 1 and exact[1] < 1
    cache.reset()
    assert specs(cache) == ["exact:0.01", "topk:5", "dense"]
    assert "2 layers have their own" in repr(cache)


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({1: "topk:5"}, "needs a 'default'"),
        ({"default": "topk:5", 9: "dense"}, "names no layer that Louver serves"),
        ({"default": "topk:5", "last": "dense"}, "names no layer that Louver serves"),
        ({"default": "topk:5", 0: "nothing"}, "unknown policy"),
    ],
)
def test_what_fits_no_layer_is_refused(choice, complaint):
    with pytest.raises(PolicyError, match=complaint):
        LouverCache(llama().config, choice)


def test_a_layer_with_a_window_has_no_policy():
    with pytest.raises(PolicyError, match="full attention"):
        LouverCache(gemma3().config, {"default": "exact:0.01", 0: "dense"})


def test_a_tuning_file(tmp_path):
    path, model = tmp_path / "tuning.json", llama()
    path.write_text(json.dumps({"policies": {"default": "exact:0.05", "1": "exact:0.01"}, "num_layers": 2, "rows": []}))
    assert specs(LouverCache.from_tuning(path, model.config)) == ["exact:0.05", "exact:0.01"]
    assert specs(attach(model, tuning=path)) == ["exact:0.05", "exact:0.01"]
    with pytest.raises(InputFileError, match="tuned for a model with 2 layers, this one has 3"):
        LouverCache.from_tuning(path, llama(num_hidden_layers=3).config)
    with pytest.raises(InputFileError, match="no such file; `louver tune"):
        LouverCache.from_tuning(tmp_path / "nothing", model.config)
    with pytest.raises(InputFileError, match="is a folder"):
        LouverCache.from_tuning(tmp_path, model.config)
    path.write_text("{}")
    with pytest.raises(InputFileError, match="not what `louver tune` writes"):
        LouverCache.from_tuning(path, model.config)
