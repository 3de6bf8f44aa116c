"""Answer a file of requests in OpenAI's batch format, a JSON object per line. Results go to OUT as they are made, with the custom_id
of their request, in any order. What OUT has already is not done again, so a batch that was interrupted goes on when the same
command is run again; what failed is tried again. Nothing is fetched: pictures are data:image/...;base64 addresses. A line's `model` has
no effect, but where adapters have names: then it is one of them, or the model's.

Exit status 1 if a request failed; OUT says why, in the place of its answer.

examples:
  maverick batch requests.jsonl results.jsonl
  maverick batch -m maverick --mesh expert=8 --max-length 8192 requests.jsonl results.jsonl
  maverick batch -m maverick --adapter support=runs/support/adapter requests.jsonl results.jsonl
  maverick batch -m maverick --slots 64 --draft 4 --json requests.jsonl results.jsonl
"""

import argparse

from maverick_jax.cli import compilation, interrupt, options

FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="IN", help='such as {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": …}'
    )
    parser.add_argument("out", metavar="OUT", help="file of results; an earlier run's is gone on with")
    options.add_model_arguments(parser)
    options.add_adapters_argument(parser)
    options.add_engine_arguments(parser)
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    import json

    from tqdm import tqdm

    from maverick_jax.serving.batch import Requests, Results, Tally, serve
    from maverick_jax.sharding import multihost

    name = options.model_name(args)
    if not multihost.is_first():  # which reads and writes the files
        with options.engine_for(args, [name]) as engine:
            engine.follow()
        return 0
    requests = Requests(args.source)
    with Results(args.out, requests) as results:  # a wrong file is reported before a large model is loaded
        interrupt.hint(f"What is finished stays in {args.out}: run the same command again to go on.")
        progress = not (args.quiet or args.json)
        with options.engine_for(args, [name]) as engine:
            if progress:
                options.note(str(engine.room))
            with tqdm(total=len(requests), unit="request", smoothing=0, disable=None if progress else True, dynamic_ncols=True) as bar:

                def show(tally: Tally) -> None:
                    bar.set_postfix_str(f"{tally.tokens_per_second:,.0f} tokens/s", refresh=False)
                    bar.update(tally.done + tally.failed + tally.skipped - bar.n)

                tally = engine.lead(lambda: serve(engine, requests, results, model=name, told=show))
    if args.json:
        print(json.dumps(tally.as_dict()))
    else:
        options.note(str(tally))
    return FAILED if tally.failed else 0
