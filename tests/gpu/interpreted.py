"""Run the small cases of checks.py in Triton's interpreter, in a process of its own: the mode is chosen when triton is imported."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import interpreter

interpreter.install()

checks = importlib.import_module("checks")  # which imports triton: only now
looks_checks = importlib.import_module("looks_checks")

if __name__ == "__main__":
    for head_dim, frame_len in ((64, 64), (96, 33)):
        print(head_dim, frame_len, checks.check_encoder(head_dim, frame_len, "cpu"), flush=True)
    for case in checks.SMALL:
        print(case.policy, checks.check(case, "cpu"), flush=True)
    for case in checks.ERRORS[:2]:
        print(case.policy, checks.check_within(case, "cpu"), flush=True)
    for case in (looks_checks.LOOKS[i] for i in (0, 1, 6, 8, 9, 10)):
        print(case.policy, looks_checks.check_looks(case, "cpu"), flush=True)
    looks_checks.check_tiny_mass("cpu")
    for policy in ("exact:0.01", "error:0.1", "topk:3"):
        checks.check_centers_above_every_key(policy, "cpu")
    for case in checks.UNKNOWN[1::2]:  # the card takes them all
        checks.check_unknown(*case, "cpu")
        print(*case, flush=True)
