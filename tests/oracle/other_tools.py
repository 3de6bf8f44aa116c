"""A Hugging Face checkpoint as other tools would have written it, made by changing a copy of transformers' own."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
PARTS = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


def load_tensors(directory: Path) -> Tensors:
    """All tensors of a directory."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def replace_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 2) -> Path:
    """Put these tensors in the place of a directory's, with an index."""
    for file in directory.glob("model*"):
        file.unlink()
    names, where = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        inside = names[shard::shards]  # a layer's tensors are spread, as no tool would, which makes it harder
        save_file({name: tensors[name].contiguous() for name in inside}, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(inside, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def take_apart(tensors: Mapping[str, torch.Tensor], *, where: Callable[[str], bool] = lambda _: True) -> Tensors:
    """Stacks of experts [E, in, out] as a matrix [out, in] for each, as compressors and trainers that see only `nn.Linear` write them.

    Args:
      where: of which stacks, by their names; all.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj") or not where(name):
            found[name] = tensor
            continue
        stacks = zip(PARTS[:2], tensor.chunk(2, dim=-1), strict=True) if last == "gate_up_proj" else [(PARTS[2], tensor)]
        for part, stack in stacks:
            found |= {f"{prefix}.{expert}.{part}.weight": matrix.T.contiguous() for expert, matrix in enumerate(stack)}
    return found


def rename_tensors(directory: Path, rename: Callable[[str], str]) -> Path:
    """Change names in headers and index; the tensors' bytes stay where they are."""
    for file in directory.glob("*.safetensors"):
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = {name if name == "__metadata__" else rename(name): entry for name, entry in json.loads(content[8:end]).items()}
        text = json.dumps(entries).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    if (directory / INDEX).is_file():
        values = json.loads((directory / INDEX).read_text())
        values["weight_map"] = {rename(name): file for name, file in values["weight_map"].items()}
        (directory / INDEX).write_text(json.dumps(values))
    return directory
