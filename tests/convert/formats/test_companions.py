"""What is copied beside the weights: the checkpoint's own files, and none that a link in it chooses."""

import os
import shutil
from pathlib import Path

import pytest
from etils import epath

from maverick_jax.checkpoint import identity, load, save
from maverick_jax.convert import convert, export
from maverick_jax.convert.build import remote
from maverick_jax.convert.build.estimate import estimate
from maverick_jax.convert.formats.companions import MAX_COMPANION, copy_companions, find_companions

SECRET = "the key of somebody's house"


@pytest.fixture
def home(tmp_path) -> Path:
    """A directory with a checkpoint, a secret beside it, and nothing else."""
    (tmp_path / "home/checkpoint").mkdir(parents=True)
    (tmp_path / "home/id_rsa").write_text(SECRET)
    (tmp_path / "home/checkpoint/config.json").write_text("{}")
    return tmp_path / "home"


def chain(home: Path) -> None:
    """Over a link that lies in the checkpoint itself."""
    (home / "checkpoint/notes").symlink_to("../id_rsa")
    (home / "checkpoint/LICENSE").symlink_to("notes")


def through_a_folder(home: Path) -> None:
    (home / "checkpoint/folder").symlink_to("..")
    (home / "checkpoint/LICENSE").symlink_to("folder/id_rsa")


def like_the_hub(home: Path) -> None:
    """A cache of the attacker's making, whose blobs are the user's."""
    (home / ".ssh").mkdir()
    shutil.move(home / "id_rsa", home / ".ssh/id_rsa")
    (home / "snapshots").mkdir()
    shutil.move(home / "checkpoint", home / "snapshots/checkpoint")
    (home / "checkpoint").symlink_to("snapshots/checkpoint")
    (home / "blobs").symlink_to(".ssh")
    (home / "checkpoint/LICENSE").symlink_to("../../blobs/id_rsa")


def link(name: str, target: str):
    return lambda home: (home / "checkpoint" / name).symlink_to(target.format(home=home))


OUTSIDE = "is a link to ..., outside the checkpoint: put the file itself in its place, or remove the link."
NOWHERE = "is a link that leads nowhere or in a circle: fetch the file again, or remove the link."
REFUSED = {
    "a file beside it": (link("LICENSE", "../id_rsa"), f"LICENSE {OUTSIDE}"),
    "a whole path": (link("tokenizer.json", "{home}/id_rsa"), f"tokenizer.json {OUTSIDE}"),
    "out and in and out again": (link("USE_POLICY.md", "../checkpoint/../id_rsa"), f"USE_POLICY.md {OUTSIDE}"),
    "over another link": (chain, f"LICENSE {OUTSIDE}"),
    "over a folder": (through_a_folder, f"LICENSE {OUTSIDE}"),
    "a folder of templates": (
        lambda home: ((home / "secret.jinja").write_text(SECRET), link("additional_chat_templates", "..")(home)),
        f"secret.jinja {OUTSIDE}",
    ),
    "over what looks like the Hub's cache": (like_the_hub, f"LICENSE {OUTSIDE}"),
    "a neighbour whose name begins as ours": (
        lambda home: ((home / "checkpoint-secret").write_text(SECRET), link("LICENSE", "../checkpoint-secret")(home)),
        f"LICENSE {OUTSIDE}",
    ),
    "a device": (link("chat_template.jinja", "/dev/zero"), f"chat_template.jinja {OUTSIDE}"),
    "nowhere": (link("LICENSE", "absent"), f"LICENSE {NOWHERE}"),
    "a circle": (link("LICENSE", "LICENSE"), f"LICENSE {NOWHERE}"),
    "a file of gigabytes": (
        lambda home: ((home / "checkpoint/LICENSE").touch(), os.truncate(home / "checkpoint/LICENSE", MAX_COMPANION + 1)),
        "LICENSE has 268,435,457 bytes, more than the 268,435,456 of any such file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_link_that_leads_out_is_refused(home, tmp_path, case, refused):
    """Whoever made the checkpoint would choose which of the user's files are published."""
    change, message = REFUSED[case]
    change(home)
    (tmp_path / "out").mkdir()
    with refused(message):
        copy_companions(home / "checkpoint", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_links_inside_and_in_the_cache_of_the_hub_are_followed(tmp_path):
    """The Hub's client keeps each file once, under its digest, and links to it from every revision."""
    cache = tmp_path / "hub/models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/0123abcd").mkdir(parents=True)
    for name, blob in (("config.json", "f00"), ("LICENSE", "ba5")):
        (cache / "blobs" / blob).write_text(name)
        (cache / "snapshots/0123abcd" / name).symlink_to(f"../../blobs/{blob}")
    (cache / "snapshots/0123abcd/tokenizer.json").write_text("own")
    (cache / "snapshots/0123abcd/tokenizer_config.json").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to("hub/models--org--name/snapshots/0123abcd")
    for number, directory in enumerate([cache / "snapshots/0123abcd", tmp_path / "link"]):
        (tmp_path / str(number)).mkdir()
        copy_companions(directory, tmp_path / str(number))
        copied = {file.name: file.read_text() for file in (tmp_path / str(number)).iterdir()}
        assert copied == {"config.json": "config.json", "LICENSE": "LICENSE", "tokenizer.json": "own", "tokenizer_config.json": "own"}
        assert not any(file.is_symlink() for file in (tmp_path / str(number)).iterdir())


def test_named_templates_in_their_folder_are_carried_along(maverick, tmp_path):
    """Without them a converted model would answer without its tools."""
    source = shutil.copytree(maverick.source, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("tools")
    model = Path(convert(source, tmp_path / "model", progress=False).out)
    again = export(model, tmp_path / "again", progress=False)
    (tmp_path / "local").mkdir()
    remote._copy(epath.Path(model), epath.Path(tmp_path / "local"))
    for copy in (model, again, tmp_path / "local"):
        assert (copy / "additional_chat_templates/tool_use.jinja").read_text() == "tools"


def test_folders_and_pipes_are_passed_over(home):
    """To open a pipe that nobody writes to would wait for ever."""
    os.mkfifo(home / "checkpoint/LICENSE")
    (home / "checkpoint/tokenizer").mkdir()
    (home / "checkpoint/tokenizer_old").symlink_to("..")
    assert [file.name for file in find_companions(home / "checkpoint")] == ["config.json"]
    assert set(identity(home / "checkpoint")) == {"config.json", "the tokenizer", "the checkpoint"}


def test_a_file_that_may_not_be_read_is_named(home, monkeypatch, refused):
    monkeypatch.setattr(os, "access", lambda file, _: Path(file).name != "config.json")
    with refused("config.json cannot be read (Permission denied)"):
        find_companions(home / "checkpoint")


def test_every_command_refuses_before_it_writes(maverick, tmp_path, refused):
    """Not after the hours that the weights take, and with nothing left."""
    (tmp_path / "id_rsa").write_text(SECRET)
    source = shutil.copytree(maverick.source, tmp_path / "source")
    model = shutil.copytree(maverick.converted, tmp_path / "model")
    for directory in (source, model):
        (directory / "LICENSE").symlink_to("../id_rsa")
    loaded = load(model)  # reading is no harm
    for make in (
        lambda out: convert(source, out, progress=False),
        lambda out: estimate(source, out),
        lambda out: export(model, out, progress=False),
        lambda out: save(loaded, out),
        lambda out: save(loaded, out, companions=source),
    ):
        with refused(f"LICENSE {OUTSIDE}"):
            make(tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_a_bucket_with_a_file_of_gigabytes_is_not_fetched(tmp_path, refused):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "local").mkdir()
    for name in ("manifest.json", "tokenizer.json"):
        (tmp_path / "bucket" / name).touch()
    os.truncate(tmp_path / "bucket/tokenizer.json", MAX_COMPANION + 1)
    with refused("tokenizer.json has 268,435,457 bytes, more than the 268,435,456 of any such file: copy the directory again."):
        remote._copy(epath.Path(tmp_path / "bucket"), epath.Path(tmp_path / "local"))
