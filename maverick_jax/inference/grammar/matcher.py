"""Which tokens may come next in an answer of a given form.

llguidance (extra `grammar`) compiles the form and follows it. Masks are made on the host, while the device computes logits.
Always: a `Matcher` has followed the tokens that it accepted, in order, and no others; an answer that ends where it may is valid.

Shape suffixes: N rows of masks, W words of a mask: ceil(vocabulary / 32).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from maverick_jax.errors import UserError
from maverick_jax.inference.grammar.form import Grammar, can_end
from maverick_jax.prompt import Tokenizer

if TYPE_CHECKING:
    import llguidance

KEPT = 32  # compiled forms
STATES = 50_000  # of a form's automaton, 1 to 2 kB each
SYMBOLS = 50_000  # of a form's rules
COMPILING_S = 30  # most forms take milliseconds, a thousand properties 40
COMPILERS = 4  # forms that are compiled at the same time
STACK = 512 << 20  # bytes of address space; a chain of 26,000 rules, as many as a form may have, takes half of it
TOGETHER = 4  # rows, from which on several threads save more than waking them costs
# Between the parts of JSON: nothing, a space, or a new line and its indentation. Without a bound a model may write blanks for ever.
BLANK = r"( |\n( {0,40}|\t{0,20}))?"

Result = TypeVar("Result")

_compilers = threading.BoundedSemaphore(COMPILERS)
_stack_size = threading.Lock()


class Grammars:
    """Forms compiled for one tokenizer. Any thread may call it.

    Args:
      vocabulary: tokens of the model. Ids that the tokenizer lacks are never allowed.
      end_ids: tokens that end an answer, one at least.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocabulary: int, end_ids: Sequence[int]):
        self._tokenizer, self.vocabulary, self.end_ids = tokenizer, vocabulary, tuple(end_ids)
        self._kept: collections.OrderedDict[Grammar, llguidance.LLMatcher] = collections.OrderedDict()  # the oldest first
        self._compiling: dict[Grammar, Future[tuple[llguidance.LLMatcher | None, str]]] = {}
        self._too_long: collections.deque[Grammar] = collections.deque(maxlen=KEPT)
        self._lock = threading.Lock()

    @property
    def words(self) -> int:
        """W, the words of a mask: the bit `id % 32` of word `id // 32`, counted from the lowest, says whether a token may come."""
        return -(-self.vocabulary // 32)

    def matcher(self, grammar: Grammar) -> Matcher:
        """For a new answer.

        Raises:
          UserError: the form cannot be compiled, no answer can have it, or llguidance is not installed.
        """
        return Matcher(self, grammar)

    def fill(self, rows: Sequence[tuple[Matcher, int, Sequence[int]]], masks_NW: np.ndarray) -> None:
        """Write what may come next; Python's lock is not held meanwhile.

        Args:
          rows: a matcher (each once), the row of its mask, and a draft that `Matcher.allowed` let pass, or (). The rows behind take
            what may come after each token of the draft. The matcher stays where it is.
          masks_NW: [N, W] uint32, contiguous. A form that leaves nothing to come gets the end tokens; `Matcher.accept` then
            says that this is no valid end.
        """
        assert (masks_NW.dtype, masks_NW.shape[1], masks_NW.flags.c_contiguous) == (np.uint32, self.words, True)
        if len(rows) >= TOGETHER:
            into = (masks_NW.ctypes.data, masks_NW.strides[0], len(masks_NW))
            if plain := [(matcher._followed, at) for matcher, at, draft in rows if not draft]:
                self._threads.unsafe_compute_mask_ptr(plain, *into)
            if drafted := [(matcher._followed, at, list(draft)) for matcher, at, draft in rows if draft]:
                self._threads.unsafe_compute_mask_ptr_with_draft_token(drafted, *into)
            rows = [row for row in rows if row[0]._followed.is_error()]
        for matcher, at, draft in rows:
            masks = masks_NW[at : at + 1 + len(draft)]
            try:
                if matcher._mended() or not matcher._fill(masks, draft):
                    matcher._fill(masks, draft)
            except UserError as error:
                matcher._trouble = error

    def compiled(self, grammar: Grammar, *, other_than: llguidance.LLMatcher | None = None) -> llguidance.LLMatcher:
        """The form at its beginning, to be copied: the one that is kept, or a new one.

        Raises:
          UserError: see `matcher`.
        """
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None and kept is not other_than:
                self._kept.move_to_end(grammar)
                return kept
        made, said = self._soon(grammar)
        if made is None or said:
            raise UserError(f"no answer can be held to this {grammar.kind} ({_reason(said)}): mend it.")
        with self._lock:
            self._kept[grammar] = made
            self._kept.move_to_end(grammar)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made

    def _soon(self, grammar: Grammar) -> tuple[llguidance.LLMatcher | None, str]:
        """What compiling it comes to. Whoever asks for a form that is being compiled waits with the others; one that took too long does
        so again."""
        with self._lock:
            if grammar in self._too_long:
                raise _too_long(grammar)
            result = self._compiling.get(grammar)
            mine = result is None
            if result is None:
                result = self._compiling[grammar] = Future()
        try:
            if mine:
                _with_room(lambda: self._compile(grammar), result)
            return result.result(COMPILING_S)
        except TimeoutError:
            with self._lock:
                self._too_long.append(grammar)
            raise _too_long(grammar) from None
        finally:
            with self._lock:
                if self._compiling.get(grammar) is result:
                    del self._compiling[grammar]

    def _compile(self, grammar: Grammar) -> tuple[llguidance.LLMatcher | None, str]:
        """The form, and what llguidance has against it."""
        library = _library()
        try:
            if grammar.kind in ("json_schema", "json_object"):
                source = library.LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": BLANK})
            else:
                source = library.grammar_from("regex" if grammar.kind == "regex" else "grammar", grammar.text)
        except ValueError as error:
            return None, str(error)
        limits = library.LLParserLimits(max_lexer_states=STATES, max_grammar_size=SYMBOLS, verbose_errors=False)
        made = library.LLMatcher(self._tokens, source, log_level=0, limits=limits)
        made.compute_bitmask()  # of a form that nothing can have, some say so only now
        if not (said := made.get_error()) and grammar.kind == "json_schema" and not can_end(json.loads(grammar.text)):
            said = "each answer would hold another"
        return made, said

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        library = _library()
        spelled = [self._tokenizer.spelling(id) for id in range(self.vocabulary)]
        special = [id for id in self._tokenizer.special.values() if id < self.vocabulary]
        described = library.TokenizerWrapper(_Description(self._tokenizer, self.end_ids[0], spelled, special))
        return library.LLTokenizer(described, eos_token=list(self.end_ids))

    @functools.cached_property
    def _threads(self) -> llguidance.LLExecutor:
        return _library().LLExecutor()


class Matcher:
    """One answer and its form. One thread at a time.

    Attributes:
      grammar: the form.
      grammars: which compiled it.
    """

    def __init__(self, grammars: Grammars, grammar: Grammar):
        self.grammar = grammar
        self.grammars = grammars
        self._accepted: list[int] = []
        self._trouble: UserError | None = None  # that came while a mask was made: for `accept` to tell
        self._origin = grammars.compiled(grammar)
        self._followed = self._origin.deep_copy()

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token could follow, or one has come."""
        return self._followed.is_stopped()

    def allowed(self, draft: Sequence[int]) -> list[int]:
        """The beginning of a draft that the form lets pass, end tokens not among it: nothing follows them."""
        end = next((i for i, token in enumerate(draft) if token in self.grammars.end_ids), len(draft))
        return list(draft[: self._followed.validate_tokens(list(draft[:end]))])

    def accept(self, token: int) -> None:
        """Follow the token that was chosen.

        Raises:
          UserError: the form does not let it come; with a mask, where it leaves nothing to come. The answer ends here.
        """
        if self._trouble is not None:
            raise self._trouble
        if not self._followed.consume_token(token):
            said = self._followed.get_error()
            if not (self._mended() and self._followed.consume_token(token)):
                raise UserError(
                    f"after {len(self._accepted)} tokens the {self.grammar.kind} lets no answer go on ({_reason(said)}): mend it."
                )
        self._accepted.append(token)

    def _fill(self, masks_NW: np.ndarray, draft: Sequence[int]) -> bool:
        """As `Grammars.fill`, and whether nothing failed; what the draft came to is forgotten."""
        for mask_W, token in zip(masks_NW, [None, *draft], strict=True):
            if token is not None:
                self._followed.consume_token(token)
            self._followed.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        if self._mended():
            return False
        self._followed.rollback(len(draft))
        return True

    def _mended(self) -> bool:
        """Whether it had failed, and is made again from what the answer has accepted, for after a failure it cannot be relied on. That
        may go better: all answers of a form share its automaton, which is bounded, and a new one holds what one of them needs."""
        if not self._followed.is_error():
            return False
        full = self._origin if "too many states" in self._followed.get_error() else None
        self._origin = self.grammars.compiled(self.grammar, other_than=full)
        self._followed = self._origin.deep_copy()
        self._followed.consume_tokens(self._accepted)
        return True


@dataclasses.dataclass(frozen=True)
class _Description:
    """A tokenizer as llguidance wants it described."""

    tokenizer: Tokenizer
    eos_token_id: int
    tokens: list[bytes]
    special_token_ids: list[int]
    bos_token_id: None = None

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.encode(text.decode())


def _too_long(grammar: Grammar) -> UserError:
    return UserError(f"this {grammar.kind} takes more than {COMPILING_S} seconds to compile: make it simpler.")


def _with_room(work: Callable[[], Result], result: Future[Result]) -> None:
    """Do work in a thread with a large stack.

    llguidance calls itself for each link of a chain of rules: with a usual stack, a thousand links end the process. And some forms,
    such as thirty patterns under one `allOf`, take it hours: they keep their thread, of which there are few.
    """

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # a panic of Rust is no Exception
            result.set_exception(error)
        finally:
            _compilers.release()

    if not _compilers.acquire(timeout=COMPILING_S):
        result.set_exception(UserError("the forms before this one take too long to compile: send it again later, or make those simpler."))
        return
    with _stack_size:
        usual = threading.stack_size(STACK)
        try:
            threading.Thread(target=run, name="compile a grammar", daemon=True).start()
        except RuntimeError as error:
            _compilers.release()
            result.set_exception(error)
        finally:
            threading.stack_size(usual)


def _library():
    try:
        import llguidance
    except ImportError as error:
        raise UserError(f"a form for the answer takes llguidance ({error}): pip install 'maverick-jax[grammar]'.") from error
    return llguidance


def _reason(said: str) -> str:
    """llguidance's words without those on its insides."""
    said = said.partition("<non-verbose/>")[0].partition("<backtrace>")[0].strip()
    return "nothing can come" if said == "NoExtensionBias" else said
