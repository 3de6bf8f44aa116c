"""Find out how hard the conversations of a file are, by how often a judge answers them right, and keep the hard part. The judge is a model
(-m), or one behind an OpenAI-compatible endpoint, whose key is in OPENAI_API_KEY.

A line of DATA is a conversation that ends with the right answer, or one with "answer". OUT gets scores.jsonl, and in kept.jsonl the lines
whose share of right answers is within --lowest and --highest, as they were: for sft what is hard, for rl what is neither always right nor
never. Interrupted, it goes on when the same command is run again; with other borders it judges nothing anew.

examples:
  maverick train filter conversations.jsonl hard
  maverick train filter --lowest 0.1 --highest 0.9 --reward number -m maverick --mesh expert=8 prompts.jsonl medium
  maverick train filter --endpoint http://localhost:8000/v1 --endpoint-model maverick conversations.jsonl hard
"""

import argparse

from maverick_jax.cli import compilation, options
from maverick_jax.cli.parser import positive, real, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="file of conversations, a JSON object per line")
    parser.add_argument("out", metavar="OUT", help="directory of the scores and of what is kept")
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    parser.add_argument("--endpoint", metavar="URL", help="ask this one, such as http://localhost:8000/v1, instead of a model here")
    parser.add_argument("--endpoint-model", metavar="NAME", help="the judge's name there")
    parser.add_argument("--reward", action="append", metavar="R", help="1 for what is right, see maverick train rl --help (default: exact)")
    parser.add_argument("--count", type=positive, default=8, metavar="K", help="answers to a prompt (default: 8)")
    parser.add_argument("--lowest", type=real, default=0.0, metavar="SHARE", help="of right answers in what is kept (default: 0)")
    parser.add_argument("--highest", type=real, default=0.75, metavar="SHARE", help="of right answers in what is kept (default: 0.75)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--length", type=positive, default=2048, metavar="N", help="tokens of prompt and answer (default: 2048)")
    parser.add_argument("--slots", type=positive, default=64, metavar="N", help="answers drawn at once (default: 64)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the answers (default: 0)")
    parser.add_argument("--skip-bad", action="store_true", help="pass over lines that are no conversation, and count them")
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from maverick_jax.adapter import norms_of
    from maverick_jax.cli.train import settings
    from maverick_jax.errors import UserError
    from maverick_jax.inference.engine import Engine
    from maverick_jax.training.rollouts import filtering
    from maverick_jax.training.rollouts.judges import Endpoint, Here, Judge
    from maverick_jax.training.rollouts.prompts import read_prompts
    from maverick_jax.training.rollouts.rewards import parse
    from maverick_jax.training.run import begin_run

    reward, file = parse(args.reward or ["exact"]), Path(args.data)
    if (args.endpoint is None) != (args.endpoint_model is None):
        raise UserError("--endpoint and --endpoint-model go together: where the judge is, and its name there.")
    start, progress = settings.start(args), settings.progress(args)
    prompts, told = read_prompts(file, start.reading, length=start.length - args.max_new_tokens, skip_bad=args.skip_bad, progress=progress)
    for line in told:
        options.note(line)
    if args.endpoint is not None:
        judge: Judge = Endpoint(args.endpoint, args.endpoint_model)
        who = {"judge": f"{args.endpoint_model} at {args.endpoint}"}
    else:
        model = options.load_model(args)
        judge = Here(Engine(model, slots=args.slots, max_length=start.length, queue=2**20), start.reading)
        who = {"judge (by its norms)": norms_of(model)}
    asked = {f"--{name.replace('_', '-')}": getattr(args, name) for name in ("reward", "count", "max_new_tokens", "seed")}
    begin_run(start.out, {"kind of training": "filter", "data": settings.digest_of(args.data), **who, **asked})
    scores = filtering.score(
        prompts,
        judge,
        reward,
        start.out,
        count=args.count,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        told=options.note,
        progress=progress,
    )
    if not scores:
        raise UserError("no prompt has a score.")
    kept = filtering.keep(file, scores, start.out, lowest=args.lowest, highest=args.highest)
    found = {
        "prompts": len(scores),
        "kept": kept,
        "pass@1": round(sum(score.pass_at(1) for score in scores) / len(scores), 4),
        f"pass@{args.count}": round(sum(score.pass_at(args.count) for score in scores) / len(scores), 4),
    }
    if args.json:
        print(json.dumps({"out": str(start.out), **found}))
    else:
        print(filtering.histogram(scores))
        print(", ".join(f"{name} {value:,}" for name, value in found.items()))
        print(start.out / filtering.KEPT)
    return 0
