"""How much of a GPU a layer's cache takes, known before it takes it."""

from torch import Tensor

from louver.errors import OutOfRoomError
from louver.geometry.bounds import slice_lengths
from louver.sketch.accounting import frame_bytes, key_block_bytes
from louver.sketch.layout import SketchConfig


def sketch_bytes_per_block(config: SketchConfig, head_dim: int) -> int:
    """Bytes that the sketch of one block of one KV head takes, as ``Sketch.memory_bytes`` counts them."""
    dims = head_dim + head_dim % 2
    keys = key_block_bytes(dims, len(slice_lengths(dims, config.slice_dims)), config.frame_len) + 4
    return keys + (config.frame_len * (dims // 2) + frame_bytes(dims) + 4 if config.values else 0)


def check_room(
    keys: Tensor,
    num_tokens: int,
    config: SketchConfig | None,
    on_gpu: bool,
    max_gpu_bytes: int,
    layers: int = 1,
    *,
    capacity: int | None = None,
    num_blocks: int | None = None,
) -> None:
    """Raise an OutOfRoomError if num_tokens tokens like keys, sketched (None: not), would take more than max_gpu_bytes.

    on_gpu: the exact keys and values are there as well. The figures are those of ``layers`` layers.
    capacity, num_blocks: tokens and blocks per row that buffers will have room for, those reserved and the room to grow included
    (default: just the tokens held).
    """
    heads = keys.shape[0] * keys.shape[1] * layers
    exact = 2 * heads * keys.shape[3] * keys.element_size()

    def block_bytes(config: SketchConfig) -> int:
        return heads * sketch_bytes_per_block(config, keys.shape[3])

    capacity = num_tokens if capacity is None else capacity
    need, room = capacity * exact if on_gpu else 0, capacity if on_gpu else num_tokens
    if config is not None:
        num_blocks = num_tokens // config.frame_len if num_blocks is None else num_blocks
        need, room = need + num_blocks * block_bytes(config), max(room, num_blocks * config.frame_len)
    if need <= max_gpu_bytes:
        return

    def fits(config: SketchConfig | None, on_gpu: bool) -> int:
        per_token = (0 if config is None else block_bytes(config) / config.frame_len) + (exact if on_gpu else 0)
        return int(max_gpu_bytes / per_token) if per_token else 0

    advice = [f"{fits(config, on_gpu):,} tokens as it is"]
    if on_gpu and config is not None:
        advice.append(f"{fits(config, False):,} with store='host'")
    if config is not None and config.values:
        keys_only = SketchConfig(frame_len=config.frame_len, slice_dims=config.slice_dims, values=False)
        advice.append(
            f"{fits(keys_only, False):,} with store='host' and a retrieval policy, whose sketch has no values"
        )
    with_room = f", with room for {room:,}," if room > num_tokens else ""
    raise OutOfRoomError(
        f"{num_tokens:,} tokens{with_room} would take {need / 2**20:,.1f} MiB of the GPU and max_gpu_bytes allows "
        f"{max_gpu_bytes / 2**20:,.1f} MiB. What would fit, with reserve_tokens as large: {'; '.join(advice)}"
    )
