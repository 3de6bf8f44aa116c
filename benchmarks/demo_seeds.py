"""Whether the demo's stages are better than their controls, over seeds: `python benchmarks/demo_seeds.py OUT/report.json ...`.

Each file is of `maverick train demo OUT --seed N`, with the same settings; results are in docs/performance.md.
"""

import argparse
import json
from pathlib import Path

from maverick_jax.training.demo.report import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", metavar="REPORT", type=Path, nargs="+", help="report.json of a seed")
    print(table([json.loads(file.read_text()) for file in parser.parse_args().reports]))


if __name__ == "__main__":
    main()
