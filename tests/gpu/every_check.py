"""Every small case once, on the device named ("cuda"; default "cpu"): the program that compute-sanitizer watches."""

import sys

import checks
import looks_checks

if __name__ == "__main__":
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    for case in checks.SMALL:
        print(case, checks.check(case, device), flush=True)
    for case in checks.ERRORS:
        print(case, checks.check_within(case, device), flush=True)
    for case in looks_checks.LOOKS:
        print(case, looks_checks.check_looks(case, device), flush=True)
    looks_checks.check_tiny_mass(device)
