"""Learn which of two answers is preferred (DPO), with pictures and tools. A line of DATA is {"messages": [...], "chosen": "...",
"rejected": "..."}; answers may be messages or lists of them, and Hugging Face's preference datasets are read as they are.

Both answers are compared with what the model said of them before training, which is found out once and kept in OUT. What else OUT gets, and
how a run goes on: maverick train sft --help.

examples:
  maverick train dpo pairs.jsonl run
  maverick train dpo -m maverick --adapter sft/adapter --mesh expert=8 --beta 0.1 --hold-out 0.05 pairs.jsonl run
  maverick train dpo --normalize --beta 5 --smoothing 0.1 pairs.jsonl run
"""

import argparse

from maverick_jax.cli import compilation, options
from maverick_jax.cli.parser import real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from maverick_jax.cli.train import settings

    parser.add_argument("data", metavar="DATA", help="file of pairs, a JSON object per line")
    parser.add_argument("out", metavar="OUT", help="directory of the run")
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    settings.add_learning_arguments(parser)
    settings.add_conversation_arguments(parser)
    parser.add_argument("--beta", type=real, default=0.1, metavar="B", help="how closely it stays to what it was (default: 0.1)")
    parser.add_argument("--smoothing", type=real, default=0.0, metavar="SHARE", help="pairs that may be the wrong way round (default: 0)")
    parser.add_argument("--normalize", action="store_true", help="compare per token, so that length is no merit; takes a higher --beta")
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from maverick_jax.cli.train import settings
    from maverick_jax.training.data.pairs import PairRows, read_pairs
    from maverick_jax.training.flops import flops_per_token
    from maverick_jax.training.preference import Preference, reference
    from maverick_jax.training.run import begin_run
    from maverick_jax.training.trainer import train

    objective = Preference(args.beta, args.smoothing, args.normalize)
    start, file = settings.start(args), Path(args.data)
    progress = settings.progress(args)
    pairs, told = read_pairs(file, start.reading, length=start.length, long=args.long, skip_bad=args.skip_bad, progress=progress)
    for line in told:
        options.note(line)
    rows = PairRows(pairs, start.reading, start.length)
    model = options.load_model(args, training=True)
    settings.prepare(model, args)
    identity = settings.identity(model, args, own=("accumulate", "long", "beta", "smoothing", "normalize", "hold_out"))
    begin_run(start.out, identity)
    rows.reference_P2 = reference(model, rows, start.out / "reference.npy", batch=args.batch, progress=progress)
    data, held_out = settings.batches(rows, args)
    per_token = flops_per_token(start.config, start.length, adapters_only=not args.full)
    model = train(
        model,
        objective,
        data,
        settings.optimization(args, settings.steps(args, data.steps_per_epoch)),
        start.out,
        identity=identity,
        loop=settings.loop(args, per_token * start.length * 2 * args.batch * args.accumulate),
        held_out=held_out,
        frozen=[*args.freeze, *settings.unseen(model, rows.pictures)],
        master=args.master,
    )
    settings.keep(model, args, start.out)
    return 0
