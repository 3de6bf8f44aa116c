"""Learn what a larger model says of every token. The teacher is asked once about all conversations of a file, and its likeliest tokens are
kept in OUT (384 B per token for 64 of them); then it is let go, and the student learns from both, the teacher's guesses and the
conversations' own words. With --on-policy the student answers itself, and the teacher, which stays in memory, says of every token of the
answer what it would have said.

Both must have the same tokenizer. A line of DATA is as for maverick train sft; with --on-policy as for maverick train rl. What OUT gets,
and how a run goes on: maverick train sft --help.

examples:
  maverick train distill -m scout --teacher maverick --mesh expert=8 conversations.jsonl run
  maverick train distill --teacher teacher --soft-begin 1 --soft-end 0.2 --top 32 conversations.jsonl run
  maverick train distill --teacher teacher --on-policy --steps 200 prompts.jsonl run
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maverick_jax.cli import compilation, options
from maverick_jax.cli.parser import positive, real

if TYPE_CHECKING:
    from maverick_jax.cli.train.settings import Start
    from maverick_jax.model import Llama4
    from maverick_jax.training.held_out import HeldOut
    from maverick_jax.training.trainer import Data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from maverick_jax.cli.train import settings

    parser.add_argument("data", metavar="DATA", help="file of conversations, a JSON object per line")
    parser.add_argument("out", metavar="OUT", help="directory of the run")
    options.add_model_arguments(parser)
    options.add_adapter_argument(parser)
    parser.add_argument("--teacher", metavar="DIR", required=True, help="model directory, PyTorch checkpoint or Hub id")
    settings.add_learning_arguments(parser)
    settings.add_conversation_arguments(parser)
    parser.add_argument("--top", type=positive, default=64, metavar="K", help="likeliest tokens that are kept (default: 64)")
    parser.add_argument("--soft-begin", type=real, default=1.0, metavar="W", help="weight of the teacher in the first step (default: 1)")
    parser.add_argument("--soft-end", type=real, default=0.5, metavar="W", help="weight of the teacher in the last step (default: 0.5)")
    parser.add_argument("--no-packing", action="store_true", help="one example per row")
    parser.add_argument("--on-policy", action="store_true", help="learn from the student's own answers")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="of such an answer (default: 256)")
    parser.add_argument("--slots", type=positive, default=64, metavar="N", help="answers drawn at once (default: 64)")
    options.add_report_arguments(parser)
    compilation.add_argument(parser)


@options.on_every_process
@compilation.programs_kept
def run(args: argparse.Namespace) -> int:
    from maverick_jax.cli.train import settings
    from maverick_jax.training.distillation.objective import Distillation
    from maverick_jax.training.trainer import train

    start = settings.start(args)
    model, pictures, data, held_out, steps = (_own_answers if args.on_policy else _conversations)(args, start)
    own = ("accumulate", "long", "hold_out", "teacher", "top", "soft_begin", "soft_end", "no_packing", "on_policy", "max_new_tokens")
    model = train(
        model,
        Distillation(reverse=args.on_policy),
        data,
        settings.optimization(args, steps),
        start.out,
        identity=settings.identity(model, args, own=own),
        loop=settings.loop(args),
        held_out=held_out,
        frozen=[*args.freeze, *settings.unseen(model, pictures)],
        master=args.master,
    )
    settings.keep(model, args, start.out)
    return 0


def _conversations(args: argparse.Namespace, start: Start) -> tuple[Llama4, bool, Data, HeldOut | None, int]:
    """The student, whether there are pictures, and the conversations with what the teacher said of them."""
    from maverick_jax.cli.train import settings
    from maverick_jax.training.data.files import read_examples
    from maverick_jax.training.data.rows import Conversations
    from maverick_jax.training.distillation.objective import Schedule
    from maverick_jax.training.distillation.teachings import Scheduled, TaughtRows, Teachings

    schedule = Schedule(args.soft_begin, args.soft_end)
    how = {"long": args.long, "skip_bad": args.skip_bad, "progress": settings.progress(args)}
    examples, told = read_examples(Path(args.data), start.reading, length=start.length, **how)
    for line in told:
        options.note(line)
    rows = Conversations(examples, start.reading, start.length, packing=not args.no_packing)
    teachings = Teachings(start.out / "teacher", rows, args.top)
    if teachings.missing < len(rows):
        teachings.find_out(_teacher(args, start), batch=args.batch, progress=settings.progress(args))
    batches, held_out = settings.batches(TaughtRows(rows, teachings), args)
    steps = settings.steps(args, batches.steps_per_epoch)
    model = options.load_model(args, training=True)
    settings.prepare(model, args)
    return model, rows.pictures, Scheduled(batches, schedule, steps), held_out, steps


def _own_answers(args: argparse.Namespace, start: Start) -> tuple[Llama4, bool, Data, None, int]:
    """The student, whether there are pictures, and the student's answers with what the teacher says of them."""
    from maverick_jax.cli.train import settings
    from maverick_jax.inference.engine import Engine
    from maverick_jax.training.distillation.on_policy import OnPolicy
    from maverick_jax.training.rollouts.prompts import read_prompts
    from maverick_jax.training.rollouts.sampling import Sampler

    how = {"skip_bad": args.skip_bad, "progress": settings.progress(args)}
    prompts, told = read_prompts(Path(args.data), start.reading, length=start.length - args.max_new_tokens, **how)
    for line in told:
        options.note(line)
    teacher = _teacher(args, start)
    model = options.load_model(args, training=True)
    settings.prepare(model, args)
    count = args.batch * args.accumulate

    def engine(model: Llama4) -> Engine:
        return Engine(model, slots=min(args.slots, count), max_length=start.length, queue=count, paced=False)

    sampler = Sampler(engine, start.reading, max_new_tokens=args.max_new_tokens)
    data = OnPolicy(prompts, sampler, teacher, k=args.top, rows=args.batch, accumulate=args.accumulate, seed=args.seed)
    return model, any(prompt.tiles for prompt in prompts), data, None, settings.steps(args, len(prompts) / count)


def _teacher(args: argparse.Namespace, start: Start) -> Llama4:
    """The teacher, which must be the one that began the run, and speak the student's tokens."""
    from maverick_jax.adapter import norms_of
    from maverick_jax.checkpoint import resolve
    from maverick_jax.prompt import Tokenizer
    from maverick_jax.training.distillation.teachings import check_tokenizers
    from maverick_jax.training.run import begin_run

    check_tokenizers(start.reading.tokenizer, Tokenizer.from_directory(resolve(args.teacher)), start.config.text.vocab_size)
    teacher = options.load_model(argparse.Namespace(**{**vars(args), "model": args.teacher, "adapter": None}), training=True)
    begin_run(start.out, {"kind of training": "distill", "teacher (by its norms)": norms_of(teacher)})
    return teacher
