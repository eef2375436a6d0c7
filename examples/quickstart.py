"""Louver in two minutes: on plain tensors, then inside a language model. Run: python examples/quickstart.py"""

import torch
from transformers.utils import logging

import louver
from louver.experiments import demo_model
from louver.integrations.transformers import attach

logging.disable_progress_bar()


def on_tensors() -> None:
    """Search and attend over 5,000 cached keys: 4 KV heads, 12 query heads, head_dim 64."""
    torch.manual_seed(0)
    offsets = 2 * torch.randn(1, 4, 1, 64)
    keys = torch.randn(1, 4, 5000, 64) + offsets
    values = torch.randn(1, 4, 5000, 64)
    q = 4 * torch.randn(1, 12, 64)
    index = louver.SketchIndex.build(keys, values)

    tau = torch.full((1, 12), 120.0)
    found = index.search(q, tau)
    scores = (q.unflatten(1, (4, 3)).double() @ keys.double().mT).flatten(1, 2)
    assert torch.equal(found.mask(5000), scores >= 120), "a key that matters was lost"
    print(
        f"search: all {found.indices.numel()} of {12 * 5000} keys above tau; {found.scanned_fraction:.1%} of keys read"
    )

    exact = louver.attend(q, index, policy="dense").out
    for policy in ("exact:0.01+unread:0.05", "budget:0.05"):
        result = louver.attend(q, index, policy=policy)
        error = (result.out - exact).norm(dim=-1)
        assert (error <= result.certificate + result.arithmetic_bound).all(), "the certificate did not hold"
        print(
            f"{policy:23s} error {error.mean() / exact.norm(dim=-1).mean():.2%}, at most "
            f"{result.certificate.mean() / exact.norm(dim=-1).mean():.1f}x the output, bytes {result.stats.bytes_fraction:.1%}"
        )


def in_a_model() -> None:
    """Generate with a small model whose cache Louver serves."""
    model, tokenizer = demo_model()
    text = "Louvers are slats that let light through and keep rain out. " * 20 + "Louvers keep out the"
    inputs = tokenizer(text, return_tensors="pt")
    cache = attach(model)
    out = model.generate(**inputs, **cache.kwargs(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(repr(tokenizer.decode(out[0, inputs.input_ids.shape[1] :])))
    print(cache)


if __name__ == "__main__":
    on_tensors()
    in_a_model()
