"""How fast is the converter beside `cp`, and how much memory does it take? On checkpoints of Maverick's real matrices.

    python benchmarks/convert_at_full_size.py speed   # 8 GB, cold cache, synced: cp, convert without and with digests
    python benchmarks/convert_at_full_size.py memory  # 33 GB: one dense and one mixture layer with all 128 experts

`--folder` says where: `speed` needs 17 GB there, `memory` 67 GB; all of it is removed. Weights are noise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from maverick_jax.config import Config, TextConfig
from maverick_jax.convert.formats import safetensors
from maverick_jax.convert.formats.names import find_places

# In a process of its own, which says when it began and ended, and the most memory it held.
CONVERT = """
import json, pathlib, re, sys, time
from maverick_jax.convert import convert
begin = time.monotonic()
summary = convert(sys.argv[1], sys.argv[2], digests=sys.argv[3] == "digests", progress=False)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"seconds": time.monotonic() - begin, "peak": peak, "bytes": summary.bytes_read}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("speed", "memory"))
    parser.add_argument("--folder", default=".", help="on the disk to measure (default: here)")
    parser.add_argument("--repeats", type=int, default=3, help="of the speed measurement (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder, "source")
        experts = {"speed": 28, "memory": 128}[args.question]
        size = write_checkpoint(source, experts)
        print(f"{size / 1e9:.2f} GB: {experts} experts", flush=True)
        if args.question == "memory":
            report("convert", size, run_convert(source, Path(folder, "out"), "digests"))
            return
        rounds = [measure_round(source, Path(folder)) for _ in range(args.repeats)]
        for name in rounds[0]:
            report(name, size, min((one[name] for one in rounds), key=lambda result: result["seconds"]))
        for name in ("convert", "convert with digests"):
            ratios = sorted(one["cp"]["seconds"] / one[name]["seconds"] for one in rounds)
            print(f"{name}: {', '.join(f'{ratio:.2f}' for ratio in ratios)} x the rate of cp in the same round")


def measure_round(source: Path, folder: Path) -> dict[str, dict[str, float]]:
    """cp and both conversions, one after the other."""
    found = {"cp": run_cp(source, folder / "copy")}
    for name, digests in (("convert", "none"), ("convert with digests", "digests")):
        found[name] = run_convert(source, folder / "out", digests)
    return found


def run_cp(source: Path, out: Path) -> dict[str, float]:
    drop_cache(source)
    begin = time.monotonic()
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        subprocess.run(["sync", file], check=True)
    seconds = time.monotonic() - begin
    shutil.rmtree(out)
    return {"seconds": seconds}


def run_convert(source: Path, out: Path, digests: str) -> dict[str, float]:
    drop_cache(source)
    run = subprocess.run([sys.executable, "-c", CONVERT, source, out, digests], check=True, capture_output=True, text=True)
    shutil.rmtree(out)
    return json.loads(run.stdout)


def report(name: str, size: int, result: dict[str, float]) -> None:
    peak = f", {result['peak'] / 1e6:.0f} MB of memory" if "peak" in result else ""
    print(f"{name}: {result['seconds']:.1f} s, {size / 1e6 / result['seconds']:.0f} MB/s{peak}", flush=True)


def drop_cache(source: Path) -> None:
    for file in source.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_checkpoint(directory: Path, experts: int) -> int:
    """One dense and one mixture layer of Maverick, vocabulary 256, no vision; the bytes of its weights."""
    text = TextConfig(
        vocab_size=256,
        hidden_size=5120,
        intermediate_size=8192,
        intermediate_size_mlp=16384,
        num_hidden_layers=2,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=experts,
        moe_layers=(1,),
        nope_layers=(),
    )
    config, dtype = Config(text=text), np.dtype(ml_dtypes.bfloat16)
    shapes = {stored: (place.stored_shape, dtype) for stored, place in find_places(config).values()}
    size = left = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    # Small normal numbers: noise of bits would hold NaN.
    noise = np.random.default_rng(0).normal(0, 0.02, (1 << 25) - 17).astype(dtype).tobytes()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_huggingface()))
    with open(directory / "model.safetensors", "wb") as file:
        file.write(safetensors.make_header(shapes))
        while left > 0:
            left -= file.write(noise[:left])
    return size


if __name__ == "__main__":
    main()
