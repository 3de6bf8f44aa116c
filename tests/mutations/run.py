"""Break the code on purpose, one fault at a time, and see whether the tests notice.

The faults stand in `*.toml` beside this file, a table per package: which text becomes which, what goes wrong then, and the narrowest
test that must fail. They are tried in a copy of the checkout.

examples:
  python tests/mutations/run.py
  python tests/mutations/run.py convert sharding
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAILED = 1  # pytest's exit status when tests ran and some failed; others mean that it could not run them
LIMIT_S = 600  # a fault may make a test wait for ever, which is noticed too
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")


class Mutation(NamedTuple):
    """One fault: in `file` the text `before`, which stands there once, becomes `after`; then `tests` must fail."""

    table: str
    file: str
    fault: str
    before: str
    after: str
    tests: list[str]


def read_tables() -> list[Mutation]:
    """Every fault of every table, in order."""
    tables = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.toml"))}
    return [Mutation(name, **values) for name, table in tables.items() for values in table["mutation"]]


def is_noticed(mutation: Mutation, checkout: Path) -> bool:
    """Whether the tests fail with the fault in place, which is taken out again.

    Raises:
      RuntimeError: the tests could not be run.
    """
    file = checkout / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1, f"{mutation.file} does not hold once: {mutation.before!r}"
    file.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests]
    environment = os.environ | {"PYTHONPATH": str(checkout)}  # not what may be installed
    try:
        ended = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(text, encoding="utf-8")
    if ended.returncode not in (0, FAILED):
        said = ended.stdout[-2000:] + ended.stderr[-2000:]
        raise RuntimeError(f"{' '.join(mutation.tests)} could not be run with «{mutation.fault}»:\n{said}")
    return ended.returncode == FAILED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mutations = read_tables()
    names = sorted({mutation.table for mutation in mutations})
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"which to try: {', '.join(names)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.tables) - set(names):
        parser.error(f"no table {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    chosen = [mutation for mutation in mutations if not args.tables or mutation.table in args.tables]
    missed = []
    with tempfile.TemporaryDirectory(prefix="maverick-mutations-") as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(ROOT, checkout, symlinks=True, ignore=NOT_COPIED)
        for mutation in tqdm(chosen, unit="fault", dynamic_ncols=True):
            noticed = is_noticed(mutation, checkout)
            tqdm.write(f"{'noticed' if noticed else 'MISSED '}  {mutation.file}: {mutation.fault}")
            if not noticed:
                missed.append(mutation)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
