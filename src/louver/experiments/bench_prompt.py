"""What encoding adds to a prompt: the time a model's layers spend on their sketches, beside the prefill they are part of.

One prefill of the demo's model in one process. Timed is ``LouverAttention.observe`` of every layer: the metric from the first
queries, and the encoding of the blocks the prompt filled. The rest of the prefill is what the model would do without Louver.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from louver.attention.layer import LouverAttention
from louver.errors import InputFileError
from louver.experiments.decoding import prefill
from louver.experiments.demo_model import demo_model
from louver.experiments.document import python_topics
from louver.experiments.rows import Row
from louver.kernels import resolve_backend
from louver.kernels.cpu import native
from louver.policies.spec import parse
from louver.shapes import PerRow


class TimedAttention(LouverAttention):
    """A layer that adds up the seconds it observes."""

    seconds = 0.0

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """As LouverAttention, timed."""
        begin = time.perf_counter()
        super().observe(queries, kv_start, softmax_scale)
        self.seconds += time.perf_counter() - begin


def run(
    num_tokens: int, policies: tuple[str, ...], backend: str, on_progress: Callable[[int, int], None]
) -> Iterator[Row]:
    """A row per policy: what the prompt took, what of it went into the sketch, and the ratio to the rest.

    Raises:
        InputFileError: the demo's model is not to be had, or transformers is not installed.
    """
    try:
        from louver.integrations.transformers import LouverCache, attach
    except ImportError as error:
        raise InputFileError("--prompt needs transformers: pip install 'louver[transformers]'") from error
    model, tokenizer = demo_model()
    attach(model)
    ids = torch.tensor([tokenizer(python_topics(tokenizer, num_tokens).text)["input_ids"]])[:, :num_tokens]
    for number, policy in enumerate(policies):
        layers: list[TimedAttention] = []

        def make(index: int, policy: str = policy, layers: list[TimedAttention] = layers) -> TimedAttention:
            layers.append(TimedAttention(policy, backend=backend))
            return layers[-1]

        cache, done = LouverCache(model.config, layer=make), number * ids.shape[1]
        begin = time.perf_counter()
        prefill(model, cache, ids, lambda n, done=done: on_progress(done + n, len(policies) * ids.shape[1]))
        total = time.perf_counter() - begin
        encoding = sum(layer.seconds for layer in layers)
        yield {
            "kv_len": ids.shape[1],
            "num_layers": len(layers),
            "num_q_heads": model.config.num_attention_heads,
            "num_kv_heads": model.config.num_key_value_heads,
            "head_dim": model.config.hidden_size // model.config.num_attention_heads,
            "dtype": "float32",
            "backend": resolve_backend(backend),
            "num_threads": torch.get_num_threads(),
            "instruction_set": native.instruction_set() if resolve_backend(backend) == "cpu" else None,
            "policy": parse(policy).spec,
            "prefill_ms": 1e3 * (total - encoding),
            "encode_ms": 1e3 * encoding,
            "encode_share": encoding / (total - encoding),
            "guarantee": parse(policy).guarantee,
        }
