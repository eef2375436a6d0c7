import pytest
import torch

from integrations.scenarios import Prompts
from integrations.tiny_models import VOCAB
from louver.attention import DenseAttention, LouverAttention
from louver.sketch.layout import SketchConfig

# How the layers of a cache are served. Each decodes the same tokens as transformers' own sdpa; blocks are short, so that
# short prompts close some.
SERVED_BY = {
    "dense": lambda layer_idx: DenseAttention(),
    "exact:1.0": lambda layer_idx: LouverAttention("exact:1.0", config=SketchConfig(frame_len=8)),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they give on models this small, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SERVED_BY)
def layer(request):
    """A factory layer_idx -> LayerAttention."""
    return SERVED_BY[request.param]


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Random tokens with a repeated passage, so that prompt lookup finds something."""
    generator = torch.Generator().manual_seed(11)

    def draw(n: int) -> torch.Tensor:
        return torch.randint(2, VOCAB, (n,), generator=generator)

    passage = draw(9)
    rows = [torch.cat([passage, draw(14), passage, draw(5), passage[:4]]), draw(23), draw(35)]
    return Prompts(rows=rows, follow_up=draw(6)[None], pad=0)
