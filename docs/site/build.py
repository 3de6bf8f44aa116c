"""Build the documentation as a static site: README and guides as pages, and an API reference made from the docstrings.

Needs the extra `docs`, and no network. A warning, a name that is not there or a link that leads nowhere ends it with an error.

  python docs/site/build.py site
"""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from pathlib import Path, PurePosixPath

import pdoc
import pdoc.render

import maverick_jax

ROOT = Path(__file__).parents[2]
TEMPLATES = Path(__file__).parent
INFERENCE = tuple(f"inference.{name}" for name in ("cache", "chat", "engine", "generate", "grammar", "handle", "request", "sampling"))
MODULES = ("checkpoint", "config", "convert", "errors", *INFERENCE, "model", "ops", "plan", "prompt", "sharding")
PAGES = ("README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))), "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#]+)(?=[)#])")  # the file of a Markdown link within the project


def main(out: Path) -> None:
    """Write the site into the folder `out`, which is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    resolve_lazy_names()
    pdoc.render.configure(docformat="google", template_directory=TEMPLATES, show_source=False)
    pdoc.render.env.globals |= {"pages": {page: title(page) for page in PAGES}, "address": address}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # What a class inherits, its constructor's names are not those of its module: they are shown as they are written.
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        pdoc.pdoc("maverick_jax", *(f"maverick_jax.{name}" for name in MODULES), output_directory=out)
    for page in PAGES:
        write_page(page, out)


def resolve_lazy_names() -> None:
    """pdoc reads a module's dictionary, where names that are imported on first use are not."""
    for name in maverick_jax.__all__:
        setattr(maverick_jax, name, getattr(maverick_jax, name))


def write_page(page: str, out: Path) -> None:
    """A Markdown file as a page; files that it links and that are no pages are copied beside it."""
    to_root = "../" * page.count("/")

    def follow(link: re.Match) -> str:
        target = (ROOT / page).parent.joinpath(link[1]).resolve().relative_to(ROOT).as_posix()
        if target in PAGES:
            return to_root + address(target)
        (out / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / target, out / target)
        return link[1]

    text = LINK.sub(follow, (ROOT / page).read_text(encoding="utf-8"))
    file = out / address(page)
    file.parent.mkdir(exist_ok=True)
    html = pdoc.render.env.get_template("page.html.jinja2").render(page=page, text=text, to_root=to_root, modules=MODULES)
    file.write_text(html, encoding="utf-8")


def address(page: str) -> str:
    """`docs/planning.md` -> `docs/planning.html`; the README is where one begins."""
    return "index.html" if page == "README.md" else PurePosixPath(page).with_suffix(".html").as_posix()


def title(page: str) -> str:
    """The heading of a Markdown file."""
    return (ROOT / page).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
