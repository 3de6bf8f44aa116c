"""A repository of the Hugging Face Hub: what is fetched of it, without a network, and what is never asked."""

import json
import sys
import types
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from maverick_jax.checkpoint import resolve
from maverick_jax.convert import convert, open_source
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.formats.shards import INDEX
from maverick_jax.convert.proof.verify import verify

NAME = "meta-llama/Llama-4-Maverick"
DESCRIPTIONS = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "LICENSE",
    "USE_POLICY.md",
}
NOT_WANTED = {
    *("README.md", ".gitattributes", "tower.png", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.gguf", "train.py"),
    *("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "tokenizer/tokenizer.json", "LICENSES/MIT"),
    *("additional_chat_templates/old/tool_use.jinja", "additional_chat_templates/notes.txt"),
    *("onnx/model.onnx", "adapter/model.safetensors", "optimizer.pt", "runs/1/events", "coreml/x.mlpackage", "flax_model.msgpack"),
}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
MODEL = {"config.json", "manifest.json", "tokenizer.json", "params/_CHECKPOINT_METADATA", "params/state/text.norm/zarr.json"}
META = {"params.json", "tokenizer.model", "LICENSE", "consolidated.00.pth", "consolidated.01.pth", "fp8_scales_0.pt", "fp8_scales_1.pt"}
REPOSITORIES = {  # what there is, what of it is fetched
    "shards": (DESCRIPTIONS | NOT_WANTED | SHARDS | {INDEX}, DESCRIPTIONS | SHARDS | {INDEX}),
    "shards and a stale file beside them": (DESCRIPTIONS | SHARDS | {INDEX, "model.safetensors"}, DESCRIPTIONS | SHARDS | {INDEX}),
    "shards beside Meta's": (DESCRIPTIONS | SHARDS | {INDEX} | META, DESCRIPTIONS | SHARDS | {INDEX, "params.json", "tokenizer.model"}),
    "one file": (DESCRIPTIONS | NOT_WANTED | {"model.safetensors"}, DESCRIPTIONS | {"model.safetensors"}),
    "Meta's files": (META | NOT_WANTED, META),
    "a model directory": (MODEL | NOT_WANTED | {"model.safetensors"}, MODEL),
    "an adapter": ({"adapter_config.json", "adapter_model.safetensors", "README.md"}, {"adapter_config.json"}),
    "another format": ({"config.json", "model.gguf"}, {"config.json"}),
}  # fmt: skip


class Hub(types.ModuleType):
    """What we use of `huggingface_hub`, over a list of names. Its rule for patterns is the real one."""

    def __init__(self, files: set[str], cache: Path):
        super().__init__("huggingface_hub")
        self.files, self.cache, self.asked = files, cache, []

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None, ignore_patterns=None) -> str:
        self.asked.append((repo_id, revision))
        folder = self.cache / "snapshots/0123abcd"
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            index = {"weight_map": dict(zip("ab", sorted(SHARDS), strict=True))}
            (folder / name).write_text(json.dumps(index) if name == INDEX else "")
        return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def hub(here, tmp_path, monkeypatch) -> Hub:
    module = Hub(set(), tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


@pytest.mark.parametrize("case", REPOSITORIES)
def test_what_is_read_is_fetched_and_no_more(hub, case):
    """The same weights come two or three times in a repository, and are 800 GB each time."""
    hub.files, wanted = REPOSITORIES[case]
    directory = resolve(NAME)
    assert {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()} == wanted
    assert {name for name, _ in hub.asked} == {NAME}
    assert [revision for _, revision in hub.asked] == [None, *["0123abcd"] * (len(hub.asked) - 1)]  # never of two revisions


def test_tokens_are_counted_without_weights(hub):
    """A tokenizer of 28 MB does not wait for 800 GB."""
    hub.files, wanted = DESCRIPTIONS | SHARDS | {INDEX}, DESCRIPTIONS | {INDEX}
    directory = resolve(NAME, weights=False)
    assert {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()} == wanted


@pytest.mark.parametrize(
    ("directories", "name", "message"),
    [
        (["models/maverick"], "models/Maverick", "models/Maverick does not exist: did you mean models/maverick? Or to fetch it from the"),
        (["models/maverick-fp8", "models/maverick-int8"], "models/maverick-int4", "did you mean models/maverick-"),
        (["models/scout"], "models/gemma", "models/gemma does not exist, and models is a directory here: check the path; or to fetch it"),
        (
            ["models/maverick"],
            "model/maverick",
            "did you mean models/maverick? Or to fetch it from the Hugging Face Hub, `hf download model/",
        ),
        (["checkpoints"], "checkpoints/maverick", "does not exist, and checkpoints is a directory here"),
    ],
)
def test_a_path_with_a_slip_is_not_asked_of_the_hub(hub, here, directories, name, message, refused):
    """It waits for a network, tells a stranger what is on the disk, and ends with an error about access rights."""
    for directory in directories:
        (here / directory).mkdir(parents=True)
    with refused(message):
        resolve(name)
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["./maverick", "../maverick", "models/maverick/", "~/maverick", "/maverick", "a/b/c", "maverick", "-/x", "ключ/x"]
)
def test_what_is_no_id_is_a_path(hub, name, refused):
    with refused("does not exist"):
        resolve(name)
    assert hub.asked == []


def test_other_directories_here_do_not_matter(hub, here):
    (here / "data/meta-llama").mkdir(parents=True)
    (here / "meta-llama-notes").mkdir()
    (here / "meta-llama").touch()  # a file
    hub.files = {"config.json", "model.safetensors"}
    assert resolve(NAME).name == "0123abcd"


def test_an_answer_of_the_hub_is_one_line(hub, monkeypatch, refused):
    def gated(*_, **__):
        raise RuntimeError("401 Client Error.\n\nCannot access gated repo\nfor url …")

    monkeypatch.setattr(hub, "snapshot_download", gated)
    with refused(f"{NAME} is no directory here and could not be fetched from the Hugging Face Hub: 401 Client Error."):
        resolve(NAME)


def raising(*kinds: str):
    """What the Hub's client raises: an exception known by the names of its classes."""
    kind = Exception
    for name in reversed(kinds):
        kind = type(name, (kind,), {})

    def fail(*_, **__):
        raise kind("Got: 401 Client Error.\n\nRepository Not Found for url: …")

    return fail


@pytest.mark.parametrize(
    ("kinds", "offline", "reason"),
    [
        (("GatedRepoError", "RepositoryNotFoundError"), "", f"it is gated; accept its terms at https://huggingface.co/{NAME}, then log in"),
        (("RepositoryNotFoundError",), "", "there is no such repository, or it is private; check its name, or log in"),
        (("LocalEntryNotFoundError",), "", "there is no network, and it is not in the cache; give a directory"),
        (("LocalEntryNotFoundError",), "1", "HF_HUB_OFFLINE is set, and it is not in the cache; unset it"),
    ],
    ids=["gated", "not there", "no network", "offline"],
)
def test_the_reason_is_told_and_what_to_do(hub, monkeypatch, tmp_path, maverick, refused, kinds, offline, reason):
    """From every command, and nothing is made."""
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "snapshot_download", raising(*kinds))
    for call in (resolve, open_source, lambda name: convert(name, tmp_path / "out"), lambda name: verify(maverick.converted, name)):
        with refused(f"{NAME} is no directory here and could not be fetched from the Hugging Face Hub: {reason}"):
            call(NAME)
    assert not list(tmp_path.glob("out*"))


def test_a_repository_is_converted_and_compared_with(hub, monkeypatch, maverick, tmp_path):
    """Where it can be loaded from; the same bytes as from a directory."""
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(maverick.source))
    assert convert(NAME, tmp_path / "out").kind == "Hugging Face"
    assert (tmp_path / "out/manifest.json").read_bytes() == (maverick.converted / "manifest.json").read_bytes()
    assert verify(tmp_path / "out", NAME).problems == []


def test_nothing_is_fetched_for_what_cannot_be_made(hub, tmp_path, refused):
    """Eight hundred gigabytes later is too late; a dry run fetches nothing at all."""
    (tmp_path / "out").mkdir()
    for call, reason in (
        (lambda: convert(NAME, tmp_path / "out"), "out exists"),
        (lambda: convert(NAME, tmp_path / "new", target="int5"), "format 'int5' is unknown"),
        (lambda: estimate(NAME, tmp_path / "new"), f"a dry run fetches nothing: `hf download {NAME}` first"),
    ):
        with refused(reason):
            call()
    assert hub.asked == []


@pytest.mark.parametrize("before", ["https://huggingface.co/", "hf://", "https://hf.co/"])
@pytest.mark.parametrize("after", ["", "/tree/main", "?library=transformers"])
def test_of_an_address_the_id_is_enough(hub, tmp_path, refused, before, after):
    for call in (resolve, lambda name: convert(name, tmp_path / "out")):
        with refused(f"is an address: give the Hub's id, {NAME}."):
            call(f"{before}{NAME}{after}")
    assert hub.asked == []


def test_without_its_client_the_way_to_get_it_is_named(here, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(f"{NAME} is no directory here; to fetch it from the Hugging Face Hub, pip install 'maverick-jax[hub]'."):
        resolve(NAME)
