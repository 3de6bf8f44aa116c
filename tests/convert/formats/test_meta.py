"""Meta's `.pth` files: the same parameters as from the Hugging Face checkpoint of the same model, whatever the ranks and the spelling."""

import dataclasses
import io
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from maverick_jax.checkpoint import load
from maverick_jax.config import Config
from maverick_jax.convert import convert, open_model_directory, open_source
from maverick_jax.convert.formats import names, torch_file
from oracle import tiny_checkpoints
from oracle.forward import TOLERANCE, logits
from oracle.meta_checkpoints import save_meta_checkpoint


def files_of(directory: Path) -> dict[str, bytes]:
    """Path -> content of everything below `params/`."""
    params = directory / "params"
    return {str(file.relative_to(params)): file.read_bytes() for file in params.rglob("*") if file.is_file()}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_parameters_are_those_of_the_hugging_face_checkpoint(release, tmp_path, ranks, fused):
    """Down projections joined on the wrong axis, ranks out of order or q, k, v of one rank beside each other keep every shape."""
    meta = open_source(save_meta_checkpoint(release.model, tmp_path / "meta", ranks=ranks, fused=fused))
    huggingface = open_source(release.huggingface)
    assert meta.kind == f"Meta .pth, {ranks} ranks"
    assert meta.parameters == huggingface.parameters
    for name, (shape, _) in meta.parameters.items():
        whole = (slice(None),) * len(shape)
        assert meta.read(name, whole).tobytes() == huggingface.read(name, whole).tobytes(), name


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_result_is_the_same_to_the_file(release, tmp_path, ranks):
    """Same chunks, same bytes: a conversion can be compared across formats with `diff -r`."""
    convert(save_meta_checkpoint(release.model, tmp_path / "meta", ranks=ranks), tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == files_of(release.converted)


def test_small_chunks_cut_across_ranks(release, tmp_path, monkeypatch):
    """A chunk of ours may begin in one file and end in the next."""
    monkeypatch.setattr("maverick_jax.convert.formats.places.BLOCK", 1 << 12)
    convert(save_meta_checkpoint(release.model, tmp_path / "meta", ranks=4), tmp_path / "meta-out", progress=False)
    ours, plain = open_model_directory(tmp_path / "meta-out"), open_model_directory(release.converted)
    for name in plain.parameters:
        assert ours.read(name, ...).tobytes() == plain.read(name, ...).tobytes(), name


def test_a_slice_is_that_slice_of_the_whole(release, tmp_path, monkeypatch):
    """As a device of a mesh reads its share, across ranks, in pieces smaller than a row."""
    monkeypatch.setattr("maverick_jax.convert.formats.tensor_file.SCRATCH", 64)
    meta = open_source(save_meta_checkpoint(release.model, tmp_path / "meta", ranks=4))
    plain = open_model_directory(release.converted)
    random = np.random.default_rng(0)
    for name in ("attention.query", "attention.key", "attention.output", "feed_forward.experts.down", "feed_forward.experts.up"):
        whole = plain.read(f"text.layers.1.{name}", ...)
        for _ in range(8):
            starts = [int(random.integers(0, size)) for size in whole.shape]
            index = tuple(slice(start, int(random.integers(start + 1, size + 1))) for start, size in zip(starts, whole.shape, strict=True))
            assert meta.read(f"text.layers.1.{name}", index).tobytes() == whole[index].tobytes(), (name, index)


def test_widths_come_from_the_tensors(release, two_ranks):
    """`params.json` has them by formulas only, and a vocabulary of -1."""
    ours, theirs = open_source(two_ranks).config, Config.from_directory(release.huggingface)
    assert Config.from_directory(two_ranks).text.vocab_size == 202048
    same = {"max_position_embeddings": theirs.text.max_position_embeddings}
    assert dataclasses.replace(ours.text, **same) == theirs.text
    assert ours.vision == theirs.vision


def test_the_result_describes_itself(release, two_ranks, tmp_path):
    """Meta has no config.json; `load` and transformers need one."""
    convert(two_ranks, tmp_path / "out", progress=False)
    assert Config.from_directory(tmp_path / "out") == open_source(two_ranks).config
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["source"].keys() == {"consolidated.00.pth", "consolidated.01.pth"}
    key = manifest["tensors"]["text.layers.0.attention.key"]
    assert list(key["from"]) == [f"consolidated.0{rank}.pth:layers.0.attention.wqkv.weight" for rank in (0, 1)]


def test_a_config_that_was_cut_short_is_written_again(two_ranks, tmp_path, monkeypatch):
    """Killed while config.json, which Meta's directory has none of, was being written: what is there is not whole."""
    with monkeypatch.context() as patch:
        patch.setattr("maverick_jax.convert.build.to_orbax.write_manifest", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(two_ranks, tmp_path / "out", progress=False)
    config = tmp_path / "out.partial/config.json"
    os.truncate(config, config.stat().st_size // 2)
    convert(two_ranks, tmp_path / "out", progress=False)
    assert Config.from_directory(tmp_path / "out") == open_source(two_ranks).config


def test_every_row_is_used(release, tmp_path):
    """A row that no checkpoint has is a row that no test proves."""
    stored = set()
    for fused in (True, False):
        source = open_source(save_meta_checkpoint(release.model, tmp_path / f"meta{fused}", ranks=1, fused=fused))
        stored |= {re.sub(r"(layers|resblocks)\.\d+\.", r"\1.{i}.", piece.stored) for parts in source.pieces.values() for piece in parts}
    assert stored == {row.stored for row in names.META}


def test_what_is_no_weight_is_left_out(two_ranks):
    """The released files hold buffers of Transformer Engine, caches and statistics; none of them is a parameter."""
    index = torch_file.read_index(two_ranks / "consolidated.00.pth")
    read = {name for (_, name) in open_source(two_ranks).tensors}
    assert {re.sub(r".*\.", "", name) for name in index.keys() - read} == {
        "freqs", "global_gate_stats_3E", "running_gate_stats_3E", "expert_activation_DE"
    }  # fmt: skip


# --- FP8 ---


def stored_experts(directory: Path, ranks: int) -> dict[str, np.ndarray]:
    """Layer 1's experts as Meta computes with them, [E, in, out] float32: each rank's values times its own scales, then joined."""
    parts: dict[str, list[np.ndarray]] = {"w1": [], "w2": [], "w3": []}
    for rank in range(ranks):
        with torch.serialization.safe_globals([io.BytesIO]):
            values = torch.load(directory / f"consolidated.{rank:02}.pth")
        scales = torch.load(directory / f"fp8_scales_{rank}.pt")
        for part, name in (("w1", "moe_w_in_eD_F"), ("w2", "moe_w_out_eF_D"), ("w3", "moe_w_swiglu_eD_F")):
            scale = scales[f"layers.1.feed_forward.experts.{part}"].float()
            stack = values[f"layers.1.feed_forward.experts.{name}"].float()
            stack = stack.reshape(scale.shape[0], -1, stack.shape[1]) * scale.reshape(scale.shape[0], 1, -1)
            parts[part].append(stack.numpy())
    return {part: np.concatenate(stacks, 1 if part == "w2" else 2) for part, stacks in parts.items()}


@pytest.mark.parametrize("ranks,scale_axes", [(1, 2), (2, 2), (2, 3), (8, 2)])
def test_fp8_values_and_scales_stand_for_the_same_weights(release, tmp_path, ranks, scale_axes):
    """`down` is divided along its inputs, so every rank's scales are a group of their own: joined, they would belong to the wrong rows."""
    meta = save_meta_checkpoint(release.model, tmp_path / "meta", ranks=ranks, fp8=True, scale_axes=scale_axes)
    summary = convert(meta, tmp_path / "out", progress=False)
    assert summary.kind == f"Meta FP8 .pth, {ranks} ranks"
    model, experts = open_model_directory(tmp_path / "out"), stored_experts(meta, ranks)
    for ours, part, groups in (("gate", "w1", 1), ("up", "w3", 1), ("down", "w2", ranks)):
        values, scales = (model.read(f"text.layers.1.feed_forward.experts.{ours}.{leaf}", ...) for leaf in ("values", "scales"))
        E, K, N = experts[part].shape
        assert (values.dtype, values.shape) == (ml_dtypes.float8_e4m3fn, (E, K, N))
        assert (scales.dtype, scales.shape) == (np.float32, (E, groups, N))
        product = values.astype(np.float32).reshape(E, groups, K // groups, N) * scales[:, :, None]
        np.testing.assert_array_equal(product.reshape(E, K, N), experts[part])


def test_fp8_multiplied_out_is_the_product_rounded_once(release, tmp_path):
    """To bfloat16 by way of another narrow dtype, weights would be off by a bit here and there."""
    meta = save_meta_checkpoint(release.model, tmp_path / "meta", ranks=4, fp8=True)
    convert(meta, tmp_path / "out", target="bfloat16", progress=False)
    model, experts = open_model_directory(tmp_path / "out"), stored_experts(meta, 4)
    for ours, part in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        values = model.read(f"text.layers.1.feed_forward.experts.{ours}", ...)
        assert values.tobytes() == experts[part].astype(ml_dtypes.bfloat16).tobytes()


def test_layers_that_meta_left_in_bfloat16_stay_so(release, tmp_path):
    """Its own script skips the first and the last layer."""
    meta = save_meta_checkpoint(release.model, tmp_path / "meta", ranks=2, fp8=True)
    plain = save_meta_checkpoint(release.model, tmp_path / "plain", ranks=2)
    for rank in range(2):
        with torch.serialization.safe_globals([io.BytesIO]):
            mixed, whole = (torch.load(folder / f"consolidated.0{rank}.pth") for folder in (meta, plain))
        mixed |= {name: tensor for name, tensor in whole.items() if name.startswith("layers.3.")}
        torch.save(mixed, meta / f"consolidated.0{rank}.pth")
    source, huggingface = open_source(meta), open_source(release.huggingface)
    down = "layers.{}.feed_forward.experts.down"
    assert f"text.{down.format(1)}.values" in source.parameters
    whole = (slice(None),) * 3
    last = f"text.{down.format(3)}"
    assert source.read(last, whole).tobytes() == huggingface.read(last, whole).tobytes()


# --- Meta's own files and logits ---


@pytest.mark.parametrize("variant", ["maverick", "scout"])
def test_logits_are_those_of_metas_code(shared_dir, tmp_path, variant):
    """Files in Meta's layout and logits that its own code gave for them: text past the chunk, and two pictures."""
    source = shared_dir / "oracle" / f"meta_{variant}"
    reference = np.load(source / "meta_reference.npz")
    convert(source, tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["image_token_index"] = tiny_checkpoints.PATCH
    if variant == "scout":  # the reference was made with a RoPE context that params.json cannot say
        config["text_config"]["rope_parameters"]["original_max_position_embeddings"] = 64
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    model = load(tmp_path / "out", dtype="float32")
    ids, picture_ids, tiles = reference_inputs()
    np.testing.assert_allclose(logits(model, ids), reference["text_logits_fp32"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits(model, picture_ids, tiles), reference["mm_logits_fp32"], rtol=0, atol=TOLERANCE)


def reference_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Those of `make_tiny_llama4.py`, with its generator and in its order."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(10, 900, (2, 53), generator=generator)
    first, second = tiny_checkpoints.image_block(2, 3, 4), tiny_checkpoints.image_block(1, 1, 4)
    words = [torch.randint(10, 900, (count,), generator=generator).tolist() for count in (3, 4, 6)]
    picture_ids = np.array([words[0] + first + words[1] + second + words[2]])
    tiles = (torch.rand((8, 3, 56, 56), generator=generator) * 2 - 1).to(torch.bfloat16)
    return ids.numpy(), picture_ids, tiles.float().numpy()


def test_reading_the_index_reads_no_weights(tmp_path_factory):
    """`torch.load` of one of eight files of Maverick would take 100 GB of memory."""
    import tracemalloc

    file = tmp_path_factory.mktemp("large") / "large.pth"
    torch.save({"large": torch.empty(1 << 26, dtype=torch.bfloat16)}, file)
    before = torch_resident()
    tracemalloc.start()
    found = torch_file.read_index(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["large"].nbytes == 1 << 27
    assert peak < 1 << 22
    assert torch_resident() - before < 1 << 26
    file.unlink()


def torch_resident() -> int:
    """Bytes of memory of this process; torch's allocations are not Python's."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
