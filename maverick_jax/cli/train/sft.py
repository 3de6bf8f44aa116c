"""Learn the assistant's answers in a file of conversations, with pictures and tools: LoRA on attention, dense, shared and routed experts,
or --full. A line of DATA is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}; what other roles
say is read and not learned. Examples share rows, and none sees another.

OUT gets checkpoints, metrics.jsonl, curves for TensorBoard and at the end adapter/ (PEFT's format, for --adapter, maverick export
--merge, PEFT and vLLM) or with --full model/. The same command goes on with a run that ended early.

examples:
  maverick train sft conversations.jsonl run
  maverick train sft -m maverick-fp8 --mesh expert=8 --length 8192 --batch 8 --remat layers conversations.jsonl run
  maverick train sft -m maverick --full --master --mesh data=4,expert=16,tensor=2 conversations.jsonl run
  maverick generate -m maverick-fp8 --adapter run/adapter "hello"
"""

import argparse

from maverick_jax.cli import compilation, interrupt, options
from maverick_jax.cli.parser import real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from maverick_jax.cli.train import settings

    parser.add_argument("data", metavar="DATA", help="file of conversations, a JSON object per line")
    parser.add_argument("out", metavar="OUT", help="directory of the run")
    options.add_model_arguments(parser)
    settings.add_learning_arguments(parser)
    parser.add_argument("--no-packing", action="store_true", help="one example per row")
    parser.add_argument(
        "--long", default="drop", metavar="HOW", help="examples beyond --length: drop, cut-start or cut-end (default: drop)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="pass over lines that are no conversation, and count them")
    parser.add_argument(
        "--balance", type=real, default=0.0, metavar="W", help="weight of an even load of the experts in the loss (default: 0)"
    )
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from maverick_jax.checkpoint import resolve
    from maverick_jax.cli.train import settings
    from maverick_jax.config import Config
    from maverick_jax.training.data.files import read_examples, reading_of
    from maverick_jax.training.data.pipeline import Batches, Order
    from maverick_jax.training.data.rows import Conversations
    from maverick_jax.training.flops import flops_per_token
    from maverick_jax.training.next_token import NextToken
    from maverick_jax.training.trainer import check_place, train

    out, file = Path(args.out), Path(args.data)
    check_place(out)
    directory = resolve(args.model)
    config = Config.from_directory(directory)
    length = min(args.length, config.text.max_position_embeddings)
    reading = reading_of(directory, config)
    examples, told = read_examples(
        file, reading, length=length, long=args.long, skip_bad=args.skip_bad, progress=not (args.quiet or args.json)
    )
    for line in told:
        options.note(line)
    data = Batches(Conversations(examples, reading, length, packing=not args.no_packing), Order(args.batch, args.accumulate, args.seed))
    optimization = settings.optimization(args, data.steps_per_epoch)
    model = options.load_model(args, training=True)
    settings.prepare(model, args)
    interrupt.hint(f"{out} has checkpoints: run the same command again to go on.")
    per_step = flops_per_token(config, length, adapters_only=not args.full) * length * args.batch * args.accumulate
    model = train(
        model,
        NextToken(args.balance),
        data,
        optimization,
        out,
        identity=settings.identity(model, args, file, **{"--long": args.long, "--balance": args.balance, "--no-packing": args.no_packing}),
        loop=settings.loop(args, per_step),
        frozen=[*args.freeze, *settings.unseen(model, examples)],
        master=args.master,
    )
    kept = settings.keep(model, args, out)
    print(json.dumps({"out": str(out), "learned": str(kept)}) if args.json else kept)
    return 0
