"""The whole of post-training on the embedded mini model, offline: its answers to new questions about drawn numbers and bars are filtered,
supervised, reinforced and preferred, each stage beside a control that differs in one thing, all asked the same 4,000 held-out questions.

OUT gets a run of the trainer per stage, report.json, and report.png where matplotlib is installed.

examples:
  maverick train demo
  maverick train demo --seed 1 --minutes 60 out
"""

import argparse

from maverick_jax.cli import compilation, options
from maverick_jax.cli.parser import real, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", nargs="?", default="demo-training", help="a new directory (default: demo-training)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of questions, order and answers (default: 0)")
    parser.add_argument(
        "--minutes", type=real, default=15.0, metavar="N", help="at most, of two cores; what is held out stays (default: 15)"
    )
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from maverick_jax.cli.train import plots, settings
    from maverick_jax.errors import UserError
    from maverick_jax.training.demo import pipeline
    from maverick_jax.training.demo.report import table
    from maverick_jax.training.demo.settings import in_minutes

    if not args.minutes > 0:
        raise UserError(f"--minutes is {args.minutes:g}: give a number above 0.")
    out = Path(args.out)
    report = pipeline.run(out, in_minutes(args.minutes), seed=args.seed, told=options.note, progress=settings.progress(args))
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if plots.can_plot():
        plots.save_plots(report, out / "report.png")
    else:
        options.note("report.png is not drawn: that needs matplotlib, install maverick-jax with the extra `notebooks`.")
    print(json.dumps({"out": str(out), **report}) if args.json else table([report]))
    return 0
