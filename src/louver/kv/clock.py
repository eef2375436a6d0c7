"""How many tokens a cache holds, kept on the device: what a captured step, whose launches never change, reads and moves on."""

import torch


class Clock:
    """How many tokens there are, on the device: ``kv_len`` of them (int32 [batch]), the last at ``position`` (int64 [1])."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.kv_len = torch.zeros(batch, dtype=torch.int32, device=device)

    def set(self, held: int) -> None:
        """Every row holds so many tokens."""
        self.position.fill_(held - 1)
        self.kv_len.fill_(held)

    def tick(self) -> None:
        """Every row holds one token more, without a word from the host."""
        self.position += 1
        self.kv_len += 1
