"""python -m catalogue FOLDER [START...]: make the cases in FOLDER, run AdaptKit on them, print what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

from . import CASES
from .ask import ask, faults

SLOW = 1.0


def main(folder: str, *starts: str) -> int:
    """The number of cases with a wrong answer."""
    chosen = [case for name, case in sorted(CASES.items()) if not starts or name.startswith(starts)]
    Path(folder).mkdir(parents=True)
    answers = ask(chosen, Path(folder).resolve())
    wrong = {name: found for name, answer in answers.items() if (found := faults(answer))}
    for name, found in sorted(wrong.items()):
        print(f"{name} [{CASES[name].must} {CASES[name].code}] {CASES[name].text}: " + " | ".join(found[:4]))
    for name, answer in answers.items():
        if CASES[name].code and answer.seen["heavy"]:
            print(f"{name} imported {', '.join(answer.seen['heavy'])}")
        if answer.seen["seconds"] > SLOW:
            print(f"{name} took {answer.seen['seconds']:.1f} s")
    print(f"{len(chosen)} cases, {len(wrong)} wrong")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(1, main(*sys.argv[1:])))
