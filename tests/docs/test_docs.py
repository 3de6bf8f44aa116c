"""What people read: docstrings that agree with the code, links that lead somewhere, and a site that is built of both."""

import inspect
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import maverick_jax as mj
from maverick_jax import convert, model, plan, prompt, sharding

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name) for module in (mj, convert, model, plan, prompt, sharding) for name in module.__all__
}
CALLS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value) or inspect.isclass(value)}


@pytest.mark.parametrize("name", mj.__all__)
def test_a_public_name_says_what_it_is(name):
    """In its own words, in a sentence: an editor shows it, and the reference begins with it."""
    value = getattr(mj, name)
    text = inspect.getdoc(value) or ""
    assert re.match(r"[^\n]{10,}(\n[^\n]+)*?[.:](\s|$)", text), f"{name}: {text[:100]!r}"
    if inspect.isclass(value):
        assert "__doc__" in vars(value), f"{name} has its parent's docstring"
        assert not text.startswith(f"{name}("), f"{name} has only what Python makes of its fields"


def described(function) -> list[str]:
    """The names under `Args:` of a docstring."""
    block = re.search(r"^Args:\n((?:  .*\n?|\n)+)", inspect.getdoc(function) or "", re.MULTILINE)
    entries = re.findall(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", block[1], re.MULTILINE) if block else []
    return [name.strip(" *") for entry in entries for name in entry.split(",")]


@pytest.mark.parametrize("name", sorted(CALLS))
def test_arguments_that_are_described_are_there(name):
    """A docstring that explains `n_tokens` where the function takes `max_new_tokens` sends its reader into an error."""
    value = CALLS[name]
    calls = [
        value,
        *(member for _, member in inspect.getmembers(value, inspect.isfunction) if member.__module__.startswith("maverick_jax")),
    ]
    for call in calls:
        try:
            taken = inspect.signature(call).parameters
        except ValueError:  # of an exception Python knows none
            continue
        unknown = [argument for argument in described(call) if argument not in taken]
        assert not unknown or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()), (
            f"{call.__qualname__}: {unknown}"
        )


def test_described_arguments_are_found():
    """Of a docstring whose arguments are known, all are."""
    settings = "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty logit_bias min_tokens seed"
    assert described(mj.generate) == f"prompts tiles max_new_tokens {settings} stop_ids".split()


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return "".join(c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN").strip().replace(" ", "-")


def prose(file: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    """Files of the project, and headings in them."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE) if anchor and file.exists() else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            lost.append(link)
    assert not lost


class Page(HTMLParser):
    """The links of an HTML page, and the places that a link can name."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.places |= {value for name, value in attrs if name == "id"}
        self.links |= {value for name, value in attrs if tag == "a" and name == "href"}


def test_the_site(tmp_path):
    """Built without a warning; every public name is in the reference, every page in the contents, and every link leads to its place."""
    pytest.importorskip("pdoc")
    command = [sys.executable, "docs/site/build.py", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {file.resolve(): Page(file) for file in (tmp_path / "site").rglob("*.html")}
    lost = []
    for file, page in pages.items():
        for link in page.links:
            path, _, place = unquote(link).partition("#")
            if re.match(r"\w+:", link):
                continue
            target = (file.parent / path).resolve() if path else file
            if not target.exists() or (place and place not in pages[target].places):
                lost.append(f"{file.name}: {link}")
    assert not lost
    face, index = (pages[(tmp_path / "site" / name).resolve()] for name in ("maverick_jax.html", "index.html"))
    assert set(mj.__all__) <= face.places
    assert {f"docs/{file.stem}.html" for file in PAGES if file.parent.name == "docs"} <= index.links
    assert '<h6 id="arguments">' in (tmp_path / "site" / "maverick_jax.html").read_text(encoding="utf-8")
