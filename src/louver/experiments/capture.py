"""Captures: the queries, keys and values a real model's attention sees, for experiments that need no model.

One dense forward pass over a text. Kept per layer: all keys and values, and the queries of the last positions, after rotary
embedding. A file is safetensors, ``layers.{i}.queries`` [num_q_heads, num_queries, head_dim], ``layers.{i}.keys`` and
``.values`` [num_kv_heads, kv_len, head_dim], ``query_positions`` int64 [num_queries], and metadata strings ``model``,
``softmax_scale`` and ``format``. A query at position p sees keys 0..p. Queries of the first half are for fitting, every 16th of
the second half is for measuring.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.errors import InputFileError
from louver.experiments.demo_model import FOLDER_NAME, HUB_ID, demo_model, load_model
from louver.experiments.document import python_topics, read_text
from louver.experiments.rows import write_bytes

FORMAT = "louver-capture-1"
NAME = "louver-capture"
NUM_LAYERS = 8  # taken by default, evenly spread
SHORTEST_TOKENS = 64

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to capture. Every field changes results."""

    model: str | None = None  # a folder or a name on the model hub; None: the offline model
    prompt_file: Path | None = None  # a text file; None: Python's own help topics
    layers: tuple[int, ...] | None = None  # None: eight, evenly spread over the layers with full attention
    every_layer: bool = False  # all layers with full attention
    num_queries: int = 512  # at the last positions
    max_tokens: int = 8192  # the text is cut here


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer's attention saw."""

    queries: Float[Tensor, "num_q_heads num_queries head_dim"]
    keys: Float[Tensor, "num_kv_heads kv_len head_dim"]
    values: Float[Tensor, "num_kv_heads kv_len head_dim"]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.queries.shape[0] // self.keys.shape[0]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The captured layers of one forward pass, by layer index."""

    model: str
    softmax_scale: float
    query_positions: Int[Tensor, " num_queries"]
    layers: dict[int, Layer]

    @property
    def kv_len(self) -> int:
        """Tokens."""
        return next(iter(self.layers.values())).keys.shape[1]

    def fitting(self) -> slice:
        """The queries that may fit something, a metric say: those of the first half."""
        return slice(0, len(self.query_positions) // 2)

    def measured(self, stride: int = 16) -> slice:
        """The queries that are measured: every 16th of the second half."""
        return slice(len(self.query_positions) // 2 + 1, None, stride)

    def shape_fields(self) -> dict[str, int | str]:
        """The fields of a result row that say what was measured on."""
        layer = next(iter(self.layers.values()))
        return {
            "data": self.model,
            "kv_len": self.kv_len,
            "head_dim": layer.keys.shape[2],
            "num_q_heads": layer.queries.shape[0],
            "num_kv_heads": layer.keys.shape[0],
            "num_layers": len(self.layers),
        }

    def save(self, path: Path) -> None:
        """Write the capture; the file appears complete or not at all."""
        from safetensors.torch import save

        tensors = {"query_positions": self.query_positions}
        for i, layer in self.layers.items():
            tensors |= {f"layers.{i}.{name}": x.contiguous() for name, x in vars(layer).items()}
        metadata = {"model": self.model, "softmax_scale": repr(self.softmax_scale), "format": FORMAT}
        write_bytes(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> "Capture":
        """Read a capture.

        Raises:
            InputFileError: there is no such file, or it is no capture.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise InputFileError(f"{path}: no such file; `louver capture --out {path}` makes one")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()  # a safe_open handle can't be iterated itself
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise InputFileError(f"{path}: not a safetensors file ({error})") from None
        if metadata.get("format") != FORMAT:
            raise InputFileError(f"{path}: not a capture (wanted format {FORMAT!r}, got {metadata.get('format')!r})")
        indices = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layers.")})
        parts = ("queries", "keys", "values")
        try:
            layers = {i: Layer(**{p: tensors[f"layers.{i}.{p}"] for p in parts}) for i in indices}
            positions, scale = tensors["query_positions"], float(metadata["softmax_scale"])
        except KeyError as error:
            raise InputFileError(f"{path}: the capture lacks {error}") from None
        if not layers:
            raise InputFileError(f"{path}: the capture holds no layer")
        return cls(
            model=metadata.get("model", "unknown"), softmax_scale=scale, query_positions=positions, layers=layers
        )


def run(
    config: Config,
    on_progress: Progress = lambda stage, done, total: None,
    loaded: tuple[Any, Any] | None = None,
    say: Callable[[str], None] | None = None,
    ids: Int[Tensor, "1 kv_len"] | None = None,
) -> Capture:
    """Run the text through the model once. ``loaded`` is a (model, tokenizer) that is already there; say as in demo_model.

    ids: the tokens to capture in place of the config's text.

    Raises:
        InputFileError: the model, the text or a layer is not there, or the text is too short.
        UnsupportedModelError: the model does not do plain softmax attention.
    """
    from louver.integrations.transformers.support import check_model

    model, tokenizer = loaded or (demo_model(say) if config.model is None else load_model(config.model))
    check_model(model)
    ids = text_tokens(tokenizer, config) if ids is None else ids
    chosen = _choose(config, full_attention_layers(model))
    with _recording(model, chosen, config.num_queries, on_progress) as recorder, torch.no_grad():
        # The decoder without its head: nobody needs the logits of a long text.
        model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
    missing = set(chosen) - recorder.layers.keys()
    if missing:
        raise InputFileError(f"layers {sorted(missing)} did not attend through transformers' attention interface")
    kv_len = ids.shape[1]
    return Capture(
        model=_name(config, model),
        softmax_scale=recorder.softmax_scale,
        query_positions=torch.arange(max(0, kv_len - config.num_queries), kv_len),
        layers={i: recorder.layers[i] for i in chosen},
    )


def full_attention_layers(model: Any) -> list[int]:
    """The layers whose attention sees every token."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return [i for i, layer in enumerate(DynamicCache(config=model.config).layers) if type(layer) is DynamicLayer]


def _name(config: Config, model: Any) -> str:
    name = config.model or Path(getattr(model.config, "name_or_path", "")).name or "unnamed"
    return HUB_ID if name == FOLDER_NAME else name


def text_tokens(tokenizer: Any, config: Config) -> Int[Tensor, "1 kv_len"]:
    """The tokens that are captured.

    Raises:
        InputFileError: the text is not there, or too short.
    """
    if config.prompt_file is None:
        text = python_topics(tokenizer, config.max_tokens).text
    else:
        text = read_text(Path(config.prompt_file))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : config.max_tokens]
    if ids.shape[1] < SHORTEST_TOKENS:
        raise InputFileError(f"the text has {ids.shape[1]} tokens; wanted at least {SHORTEST_TOKENS}")
    return ids


def _choose(config: Config, available: list[int]) -> list[int]:
    if not available:
        raise InputFileError("the model has no layer with full attention; there is nothing to capture")
    if config.every_layer:
        return available
    if config.layers is None:
        spread = torch.linspace(0, len(available) - 1, min(NUM_LAYERS, len(available))).round().long()
        return [available[i] for i in spread.tolist()]
    if bad := sorted(set(config.layers) - set(available)):
        raise InputFileError(f"layers {bad} are not among those with full attention: {available}")
    return sorted(set(config.layers))


class _Recorder:
    """An attention function that keeps what it is given and then does what transformers' SDPA does."""

    def __init__(self, chosen: list[int], num_queries: int, on_progress: Progress) -> None:
        self.layers: dict[int, Layer] = {}
        self.softmax_scale = 0.0
        self._chosen, self._num_queries, self._on_progress = chosen, num_queries, on_progress
        self._attended = 0

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if module.layer_idx in self._chosen:
            self.softmax_scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            last = query[0, :, -self._num_queries :]
            self.layers[module.layer_idx] = Layer(
                **{n: x.clone().cpu() for n, x in (("queries", last), ("keys", key[0]), ("values", value[0]))}
            )
        out = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        self._attended += 1
        total = module.config.num_hidden_layers
        self._on_progress("Reading the text, layer by layer", min(self._attended, total), total)
        return out


@contextmanager
def _recording(model: Any, chosen: list[int], num_queries: int, on_progress: Progress) -> Iterator[_Recorder]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    recorder = _Recorder(chosen, num_queries, on_progress)
    AttentionInterface.register(NAME, recorder)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield recorder
    finally:
        model.set_attn_implementation(before)
