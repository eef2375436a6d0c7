"""Every small case once: the program that compute-sanitizer watches.

every_check.py [DEVICE] [FROM:TO]    DEVICE: "cuda" or (default) "cpu"; FROM:TO: of the cases in turn, as a sanitizer is slow
"""

import sys
from functools import partial

import checks
import looks_checks

CASES = [
    *(partial(checks.check, case) for case in checks.SMALL),
    *(partial(checks.check_within, case) for case in checks.ERRORS),
    *(partial(looks_checks.check_looks, case) for case in looks_checks.LOOKS),
    partial(checks.check_centers_above_every_key, "exact:0.01"),
    looks_checks.check_tiny_mass,
]

if __name__ == "__main__":
    device, chosen = (*sys.argv[1:], *("cpu", ":")[len(sys.argv) - 1 :])
    first, last = (int(end) if end else None for end in chosen.split(":"))
    for number, check in list(enumerate(CASES))[first:last]:
        print(number, getattr(check, "args", ""), check(device), flush=True)
