"""How fast a model is served here: prefill, decoding, the time to the first token and from token to token, for batches of several
sizes and for requests that come at random. "Of bytes" and "of products" is what share of the time reading the weights and the
cache, and making the products, takes at least on this machine: at 100 % nothing can be faster. The prompts are random tokens.

examples:
  maverick bench
  maverick bench -m maverick --mesh expert=8 --batch 1,8,64 --prompt 2048 --new 128
  maverick bench -m maverick --batch 64 --rate 4 --requests 200 --plot bench.png
  maverick bench -m maverick --json | jq '.batches[] | {size, decode_rate, decode_bytes}'
"""

import argparse
import json
from pathlib import Path

from maverick_jax.cli import compilation, options, status
from maverick_jax.cli.parser import positive, real, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    parser.add_argument("--batch", type=sizes, default=[1, 8, 64], metavar="B,…", help="requests served side by side (default: 1,8,64)")
    parser.add_argument("--prompt", type=whole, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    parser.add_argument("--new", type=whole, default=64, metavar="N", help="tokens of an answer (default: 64)")
    parser.add_argument("--rate", type=real, metavar="R", help="send requests at random, too, R per second on average")
    parser.add_argument("--requests", type=whole, metavar="N", help="how many with --rate (default: 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw decoding beside its limit, and how long people wait")
    compilation.add_argument(parser)


def sizes(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [positive(size) for size in text.split(",")]


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from maverick_jax.bench import measure
    from maverick_jax.bench.plot import save_plot
    from maverick_jax.errors import UserError
    from maverick_jax.plan.plot import check_plot

    if args.requests is not None and args.rate is None:
        raise UserError("--requests counts those of --rate: give both.")
    if args.plot is not None:
        check_plot(args.plot)
    model = options.load_model(args)
    many = {} if args.requests is None else {"requests": args.requests}
    with status.doing("measuring"):
        report = measure(model, batches=args.batch, prompt=args.prompt, new=args.new, rate=args.rate, **many)
    if report is None:  # process 0 has it
        return 0
    if args.plot is not None:
        save_plot(report, args.plot, model="the mini model" if args.model is None else Path(args.model).resolve().name)
    print(json.dumps(report.as_dict()) if args.json else report)
    return 0
