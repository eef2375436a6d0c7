"""vLLM's server with the plug-in, on the loopback interface: eight clients at once get what an engine in this process says."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.engine import engine
from serving.scenarios import decode, text

pytestmark = [pytest.mark.vllm, pytest.mark.model]

PROMPTS = [text(120 * i, 150 + 60 * (i % 4)) for i in range(8)]
NUM_TOKENS = 16
READY_S = 240


@contextmanager
def server(folder, log: Path):
    """A server that has answered /health; ended by its process id, its children with it."""
    import urllib.error
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; the command itself looks for a distribution named vllm, which the build for CPUs is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
    command += ["--additional-config", '{"louver": {"log_interval_s": 1}}']
    variables = {"LOUVER_VLLM_POLICY": "exact:1.0", "VLLM_LOGGING_LEVEL": "INFO"}
    variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + READY_S
            while True:
                assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"the server is not ready:\n{log.read_text()[-3000:]}"
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except (urllib.error.URLError, TimeoutError):
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the session started here, nothing else
                process.wait()


def test_eight_clients_at_once_get_what_an_engine_offline_says(folder, tmp_path):
    from openai import OpenAI

    with engine(folder, None, max_num_seqs=8) as llm:
        offline = [llm.get_tokenizer().decode(tokens) for tokens in decode(llm, PROMPTS, NUM_TOKENS)]
    log = tmp_path / "server.log"
    with server(folder, log) as url, OpenAI(base_url=url, api_key="none", timeout=120) as client:

        def complete(prompt: str) -> str:
            answer = client.completions.create(
                model=folder, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            online = list(pool.map(complete, PROMPTS))
        time.sleep(2)
        complete("One more step, so that the log's line is due.")
    assert online == offline
    said = log.read_text()
    assert "Louver decodes with exact:1" in said
    assert "of dense bytes" in said, "the log has no line on what Louver did"
