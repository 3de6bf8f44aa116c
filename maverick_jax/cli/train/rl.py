"""Learn from its own answers by what they are worth (GRPO): for every prompt a group of answers is drawn, and those that are worth more
than the others of their group become likelier. A line of DATA is {"messages": [...], "answer": "..."}; a conversation that ends with the
assistant has its answer there.

Rewards are exact, number, json, format:REGEX, or a function of your own, reward(text, line) -> float, in FILE.py:FUNCTION; several are
added up, with weights as in 0.2*format:[A-Z].*. A reward that raises or is no number drops its group, three in a row end the run. DATA may
also be a generator of reasoning-gym (pip install '.[gym]'), which scores answers itself.

Answers are drawn at temperature 1 by the engine, with the weights that learn. Where the sampler sent the tokens the trainer sends them too,
so that both speak of the same model; "disagreement" in metrics.jsonl is what is left between them. What OUT gets, and how a run goes on:
maverick train sft --help.

examples:
  maverick train rl --reward exact prompts.jsonl run
  maverick train rl -m maverick --adapter sft/adapter --mesh expert=8 --reward number --reward 0.1*format:.*boxed.* prompts.jsonl run
  maverick train rl --length 512 "reasoning-gym:basic_arithmetic?size=500&seed=1" run
  maverick train rl --reward rewards.py:helpful --prompts 16 --group 16 --steps 500 prompts.jsonl run
"""

import argparse

from maverick_jax.cli import compilation, options
from maverick_jax.cli.parser import positive, real, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from maverick_jax.cli.train import settings

    parser.add_argument("data", metavar="DATA", help="file of prompts, a JSON object per line")
    parser.add_argument("out", metavar="OUT", help="directory of the run")
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    settings.add_learning_arguments(parser)
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="of the optimizer (default: 100)")
    parser.add_argument("--reward", action="append", metavar="R", help="what an answer is worth; repeatable (default: exact)")
    parser.add_argument("--prompts", type=positive, default=8, metavar="N", help="of a step (default: 8)")
    parser.add_argument("--group", type=positive, default=8, metavar="N", help="answers to a prompt (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument(
        "--rest", type=whole, default=50, metavar="N", help="steps without prompts whose answers were all right or all wrong (default: 50)"
    )
    parser.add_argument("--below", type=real, default=0.2, metavar="X", help="a token's ratio counts from 1 - X on (default: 0.2)")
    parser.add_argument("--above", type=real, default=0.28, metavar="X", help="a token's ratio counts up to 1 + X (default: 0.28)")
    parser.add_argument("--kl", type=real, default=0.0, metavar="W", help="weight of the distance to the model before (default: 0)")
    parser.add_argument("--no-replay", action="store_true", help="let the trainer's routers choose experts of their own")
    parser.add_argument("--slots", type=positive, default=64, metavar="N", help="answers drawn at once (default: 64)")
    parser.add_argument("--skip-bad", action="store_true", help="pass over lines that are no conversation, and count them")
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from maverick_jax.cli.train import settings
    from maverick_jax.inference.engine import Engine
    from maverick_jax.model import Llama4
    from maverick_jax.training.policy import Policy
    from maverick_jax.training.rollouts.drawn import Reference
    from maverick_jax.training.rollouts.groups import Draws, Groups
    from maverick_jax.training.rollouts.gym import SCHEME, gym_prompts
    from maverick_jax.training.rollouts.prompts import read_prompts
    from maverick_jax.training.rollouts.rewards import parse
    from maverick_jax.training.rollouts.sampling import Sampler
    from maverick_jax.training.trainer import train

    objective, reward = Policy(args.below, args.above, args.kl), parse(args.reward or ["exact"])
    draws = Draws(args.prompts, args.group, args.rest, rows=args.batch, seed=args.seed)
    start = settings.start(args)
    room = start.length - args.max_new_tokens
    if args.data.startswith(SCHEME):
        prompts, of_gym = gym_prompts(args.data, start.reading, length=room)
        reward = reward if args.reward else of_gym
    else:
        how = {"skip_bad": args.skip_bad, "progress": settings.progress(args)}
        prompts, told = read_prompts(Path(args.data), start.reading, length=room, **how)
        for line in told:
            options.note(line)
    model = options.load_model(args, training=True)
    settings.prepare(model, args)
    replayed = bool(start.config.text.moe_layers) and not args.no_replay

    def engine(model: Llama4) -> Engine:
        most = min(args.slots, args.prompts * args.group)
        return Engine(model, slots=most, max_length=start.length, queue=args.prompts * args.group, routed_experts=replayed, paced=False)

    reference = Reference(model) if args.kl else None
    own = ("reward", "prompts", "group", "max_new_tokens", "rest", "below", "above", "kl", "no_replay")
    model = train(
        model,
        objective,
        Groups(prompts, Sampler(engine, start.reading, max_new_tokens=args.max_new_tokens), reward, draws, options.note, reference),
        settings.optimization(args, args.steps),
        start.out,
        identity=settings.identity(model, args, own=own),
        loop=settings.loop(args),
        frozen=[*args.freeze, *settings.unseen(model, any(prompt.tiles for prompt in prompts))],
        master=args.master,
    )
    settings.keep(model, args, start.out)
    return 0
