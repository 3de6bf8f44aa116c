"""Learn the assistant's answers in a file of conversations, with pictures and tools: LoRA on attention, dense, shared and routed experts,
or --full. A line of DATA is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}; what other roles
say is read and not learned. Examples share rows, and none sees another.

OUT gets checkpoints, metrics.jsonl, curves for TensorBoard and at the end adapter/ (PEFT's format, for --adapter, maverick export
--merge, PEFT and vLLM) or with --full model/. The same command goes on with a run that ended early. What fits on a machine
says maverick plan --train.

examples:
  maverick train sft conversations.jsonl run
  maverick train sft -m maverick-fp8 --mesh expert=8 --length 8192 --batch 8 --remat layers conversations.jsonl run
  maverick train sft -m maverick --full --master --mesh data=4,expert=16,tensor=2 conversations.jsonl run
  maverick generate -m maverick-fp8 --adapter run/adapter "hello"
"""

import argparse

from maverick_jax.cli import compilation, options
from maverick_jax.cli.parser import real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from maverick_jax.cli.train import settings

    parser.add_argument("data", metavar="DATA", help="file of conversations, a JSON object per line")
    parser.add_argument("out", metavar="OUT", help="directory of the run")
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    settings.add_learning_arguments(parser)
    settings.add_conversation_arguments(parser)
    parser.add_argument("--no-packing", action="store_true", help="one example per row")
    parser.add_argument(
        "--balance", type=real, default=0.0, metavar="W", help="weight of an even load of the experts in the loss (default: 0)"
    )
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from maverick_jax.cli.train import settings
    from maverick_jax.training.data.files import read_examples
    from maverick_jax.training.data.rows import Conversations
    from maverick_jax.training.flops import flops_per_token
    from maverick_jax.training.next_token import NextToken
    from maverick_jax.training.trainer import train

    start, file = settings.start(args), Path(args.data)
    reading = {"long": args.long, "skip_bad": args.skip_bad, "progress": settings.progress(args)}
    examples, told = read_examples(file, start.reading, length=start.length, **reading)
    for line in told:
        options.note(line)
    rows = Conversations(examples, start.reading, start.length, packing=not args.no_packing)
    data, held_out = settings.batches(rows, args)
    optimization = settings.optimization(args, settings.steps(args, data.steps_per_epoch))
    model = options.load_model(args, training=True)
    settings.prepare(model, args)
    per_token = flops_per_token(start.config, start.length, adapters_only=not args.full)
    model = train(
        model,
        NextToken(args.balance),
        data,
        optimization,
        start.out,
        identity=settings.identity(model, args, own=("accumulate", "long", "balance", "no_packing", "hold_out")),
        loop=settings.loop(args, per_token * start.length * args.batch * args.accumulate),
        held_out=held_out,
        frozen=[*args.freeze, *settings.unseen(model, rows.pictures)],
        master=args.master,
    )
    settings.keep(model, args, start.out)
    return 0
