"""Several processes convert one checkpoint: each its share, into one directory that all of them see."""

import json
import shutil

from maverick_jax.cli.main import MISTAKE
from maverick_jax.convert import convert
from maverick_jax.convert.build.building import MARK
from processes import MAVERICK

CONVERT = (*MAVERICK, "convert")


def test_two_processes_make_what_one_makes(start, cases, tmp_path):
    """Every file of the result is the same, the manifest with its digests included; only process 0 speaks."""
    case = cases["scout"]
    run = start([(*CONVERT, case.source, "out", "--workers", 2)] * 2)
    assert run.statuses() == [0, 0], run.err(0) + run.err(1)
    assert run.out(0) == "out\n"
    assert run.out(1) + run.err(1) == ""
    files = [
        sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()) for root in (tmp_path / "out", case.converted)
    ]
    assert files[0] == files[1]
    assert all((tmp_path / "out" / name).read_bytes() == (case.converted / name).read_bytes() for name in files[0])
    assert not list(tmp_path.glob("*.partial"))


def test_two_processes_quantize_a_model_directory(start, cases, tmp_path):
    """What one of them makes of it, and of the checkpoint."""
    model = cases["scout"].converted
    run = start([(*CONVERT, model, "out", "--format", "int8")] * 2)
    assert run.statuses() == [0, 0], run.err(0) + run.err(1)
    convert(model, tmp_path / "alone", target="int8")
    alone = {file.relative_to(tmp_path / "alone"): file.read_bytes() for file in (tmp_path / "alone").rglob("*") if file.is_file()}
    assert alone == {file.relative_to(tmp_path / "out"): file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


def test_both_processes_work(start, cases, tmp_path):
    """A share is what a process reads, not what it is told to print."""
    count = "import sys; from maverick_jax.convert import Source, convert; from maverick_jax.sharding import multihost\n"
    count += "multihost.initialize(); read, bytes_read = Source.read, []\n"
    count += "Source.read = lambda *args: bytes_read.append(read(*args)) or bytes_read[-1]\n"
    count += "convert(sys.argv[1], 'out', progress=False); print(sum(values.nbytes for values in bytes_read))"
    run = start([("-c", count, cases["maverick"].source)] * 2)
    assert run.statuses() == [0, 0], run.err(0) + run.err(1)
    shares = [int(run.out(process).splitlines()[-1]) for process in (0, 1)]
    assert sum(shares) == json.loads((tmp_path / "out/manifest.json").read_text())["bytes"]
    assert min(shares) > sum(shares) / 3


def test_directories_that_are_not_the_same_are_found_before_work_begins(start, cases, tmp_path):
    """Two hosts without a shared disk would each make half a model."""
    apart = "import os, sys; os.mkdir(os.environ['JAX_PROCESS_ID']); os.chdir(os.environ['JAX_PROCESS_ID'])\n"
    apart += "from maverick_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    run = start([("-c", apart, "convert", cases["maverick"].source, "out")] * 2)
    assert run.statuses() == [MISTAKE, MISTAKE]
    for process in (0, 1):
        assert "process 1 cannot see out.partial, which process 0 made: give all processes one directory" in run.one_line(process)
    assert not list(tmp_path.glob("*/out"))


def test_what_a_killed_run_left_does_not_get_in(cases, tmp_path):
    """The mark by which processes see that they share a directory."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / f"{MARK}0123").touch()
    convert(cases["maverick"].source, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob(f"{MARK}*"))


def test_copies_of_the_checkpoint_are_told_apart_before_work_begins(start, cases, tmp_path):
    """Hosts with copies of their own cannot go on with each other's work: times differ, and perhaps more."""
    for name in ("0", "1"):
        shutil.copytree(cases["maverick"].source, tmp_path / name, copy_function=shutil.copyfile)
    run = start([(*CONVERT, name, "out") for name in ("0", "1")])
    assert run.statuses() == [MISTAKE, MISTAKE]
    assert "the processes of this run differ. the checkpoint (files, sizes, times) or what becomes of it is" in run.one_line(0)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
