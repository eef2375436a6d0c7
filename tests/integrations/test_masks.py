"""Padding is read from the masks transformers builds; a mask that says anything else is obeyed densely."""

import warnings

import pytest
import torch
from transformers import DynamicCache

from integrations.conftest import SERVED_BY
from integrations.scenarios import as_argument, generate
from integrations.tiny_models import llama
from louver.errors import LouverWarning
from louver.integrations.transformers import attach
from louver.integrations.transformers.padding import NO_PADDING, Padding, PaddingReader, read_padding


def mask_of(*rows: str) -> torch.Tensor:
    """Bool [batch, 1, 1, kv_len] from rows such as "..###"."""
    return torch.tensor([[letter == "#" for letter in row] for row in rows])[:, None, None]


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        (["#####"], ()),
        (["..###", "#####"], (2, 0)),
        ([".....", "....#"], (5, 4)),
        (["###.."], None),
        (["#.###"], None),
        ([".#.##", "#####"], None),
    ],
)
def test_read_padding(rows, counts):
    padding = read_padding(mask_of(*rows))
    if counts is None:
        assert padding is None
    else:
        assert padding is not None and padding.counts == counts
        assert padding.kv_start is None if counts == () else padding.kv_start.tolist() == list(counts)


def test_read_padding_of_a_prompt():
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    prompt = torch.stack([causal, causal & (torch.arange(4) >= 2)])[:, None]
    assert read_padding(prompt).counts == (0, 2)


def test_read_padding_of_other_masks():
    assert read_padding(None) is NO_PADDING
    assert read_padding(torch.zeros(1, 1, 1, 5)) is None  # additive
    assert read_padding(torch.ones(1, 2, 1, 5, dtype=torch.bool)) is None  # per head
    assert read_padding(torch.ones(1, 5, dtype=torch.bool)) is None


def test_reads_a_mask_once():
    reader, mask = PaddingReader(), mask_of("..###")
    assert reader(mask) is reader(mask)
    assert reader(mask_of(".####")).counts == (1,)
    assert reader(None) is NO_PADDING


def test_selects_rows():
    padding = read_padding(mask_of("..###", "#####", ".####")).select(torch.tensor([2, 2, 0]))
    assert padding.counts == (1, 1, 2)
    assert padding.kv_start.tolist() == [1, 1, 2]


def decode(model, cache, ids, masks) -> torch.Tensor:
    """Logits of several calls in a row, each with the mask given for it."""
    with torch.no_grad():
        calls = zip(ids, masks, strict=True)
        return torch.cat([model(chunk, attention_mask=mask, **as_argument(cache)).logits for chunk, mask in calls], 1)


def both_ways(ids, masks, layer):
    """Logits by sdpa and by Louver, and Louver's cache."""
    model = llama()
    expected = decode(model, DynamicCache(config=model.config), ids, masks)
    cache = attach(model, layer=layer)
    return expected, decode(model, cache, ids, masks), cache


def test_padding_of_another_batch_has_not_grown():
    two, three = Padding(torch.tensor([2, 0]), (2, 0)), Padding(torch.tensor([2, 0, 1]), (2, 0, 1))
    for kv_len in (0, 1, 5):
        assert not two.grows_to(three, kv_len) and not three.grows_to(two, kv_len)
    assert NO_PADDING.grows_to(three, 0) and three.grows_to(NO_PADDING, 0) and not NO_PADDING.grows_to(three, 1)
    assert two.grows_to(Padding(torch.tensor([4, 0]), (4, 0)), 2)


def test_right_padding_is_attended_densely(prompts, layer):
    prompt, steps = prompts.left_padded["input_ids"], list(prompts.follow_up[0].expand(3, -1)[..., None].unbind(1))
    holes = torch.ones_like(prompt)
    holes[1, -9:] = 0
    masks = [holes]
    for _ in steps:
        masks.append(torch.nn.functional.pad(masks[-1], (0, 1), value=1))
    with pytest.warns(LouverWarning, match="mask") as caught:
        expected, logits, cache = both_ways([prompt, *steps], masks, layer)
    torch.testing.assert_close(logits, expected)
    assert len(caught) == 1
    assert cache.stats.num_dense_calls == len(steps) * len(cache.served_layers)
    assert cache.summary().num_steps == 0


def test_padding_that_changes_is_attended_densely(prompts, layer):
    prompt, mask = prompts.left_padded["input_ids"], prompts.left_padded["attention_mask"]
    token = prompts.follow_up[:, :1].expand(3, 1)
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    with pytest.warns(LouverWarning, match="mask"):
        expected, logits, cache = both_ways([prompt, token], [mask, torch.ones_like(longer)], layer)
    torch.testing.assert_close(logits, expected)
    assert cache.summary().num_steps == 0


@pytest.mark.parametrize("chunk", [3, 7, 20])
def test_left_padding_longer_than_a_chunk_of_the_prompt_is_served(prompts, layer, chunk):
    """A row whose every token so far was padding may have more of it: prefill in chunks, as generate(prefill_chunk_size=N)."""
    prompt, mask = prompts.left_padded["input_ids"], prompts.left_padded["attention_mask"].clone()
    mask[1, :25] = 0
    ids = [*prompt[:, :-3].split(chunk, 1), *prompt[:, -3:].split(1, 1)]
    ends = torch.tensor([part.shape[1] for part in ids]).cumsum(0)
    masks = [mask[:, :end] for end in ends]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, logits, cache = both_ways(ids, masks, layer)
    for row, length in enumerate(mask.sum(1)):
        torch.testing.assert_close(logits[row, -length:], expected[row, -length:], rtol=1e-4, atol=1e-5)
    assert cache.summary().num_steps >= 3 * len(cache.served_layers)
    assert cache.stats.num_dense_calls == 0


def test_left_padding_is_served(prompts, layer):
    prompt, mask = prompts.left_padded["input_ids"], prompts.left_padded["attention_mask"]
    ids, masks = [prompt[:, :-3], *prompt[:, -3:].split(1, 1)], [mask[:, : prompt.shape[1] - 3 + i] for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, logits, cache = both_ways(ids, masks, layer)
    for row, length in enumerate(mask.sum(1)):  # what a padding token sees is nobody's business
        torch.testing.assert_close(logits[row, -length:], expected[row, -length:], rtol=1e-4, atol=1e-5)
    assert cache.summary().num_steps == 3 * len(cache.served_layers)


def test_a_prompt_in_chunks_and_tokens_one_by_one(prompts, layer):
    ids = prompts.single["input_ids"]
    for chunks in ([11, 8, 1, 1, 9, 1], [1] * 20):
        expected, logits, _ = both_ways(list(ids[:, : sum(chunks)].split(chunks, 1)), [None] * len(chunks), layer)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_everything_cropped_leaves_no_padding_behind(prompts, layer):
    model = llama()
    single = generate(model, prompts.single, DynamicCache(config=model.config), 8)
    cache = attach(model, layer=layer)
    generate(model, prompts.left_padded, cache, 4)
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, prompts.single, cache, 8), single)
    assert cache.stats.num_dense_calls == 0


def test_several_tokens_are_served_under_a_causal_mask_only(prompts):
    """As many as hook.MOST_TOKENS, padded or not; a mask that hides more, or less, is obeyed densely."""
    layer = SERVED_BY["exact:1.0"]
    prompt, mask = prompts.left_padded["input_ids"], prompts.left_padded["attention_mask"]
    for new, served in ((2, True), (16, True), (17, False)):
        ids = [prompt[:, :-new], prompt[:, -new:]] if new < 17 else [prompt[:, :-17], prompt[:, -17:]]
        padded = [mask[:, : ids[0].shape[1]], mask]
        expected, logits, cache = both_ways(ids, padded, layer)
        for row, length in enumerate(mask.sum(1)):
            torch.testing.assert_close(logits[row, -length:], expected[row, -length:], rtol=1e-4, atol=1e-5)
        assert (cache.summary().num_steps == 2) is served
    ids, length = prompts.single["input_ids"], prompts.single["input_ids"].shape[1]
    tree = torch.ones(4, length, dtype=torch.bool).tril(length - 4)
    tree[2, -3] = False  # two guesses beside each other
    full = torch.ones(4, length, dtype=torch.bool)
    for odd in (tree, full):
        _, logits, cache = both_ways([ids[:, :-4], ids[:, -4:]], [None, odd[None, None]], layer)
        expected, _, _ = both_ways([ids[:, :-4], ids[:, -4:]], [None, odd[None, None]], SERVED_BY["dense"])
        torch.testing.assert_close(logits, expected)
        assert cache.summary().num_steps == 0
