"""A model's tokenizer: chats to token ids, token ids to text."""

from __future__ import annotations

import asyncio
import contextlib
import string
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

from parallax.fabric.errors import InvalidRequest, ModelBroken
from parallax.fabric.model_files import read_json
from parallax.scheduler.text.budget import TooMuch
from parallax.scheduler.text.detokenizer import Detokenizer, WindowDetokenizer, detokenizers
from parallax.scheduler.text.plain_folder import plain_folder
from parallax.scheduler.text.recommended import recommended
from parallax.scheduler.text.template import FAILURES, ChatTemplate

if TYPE_CHECKING:
    from parallax.scheduler.generation import ServedModel

Message = Mapping[str, Any]

_INLINE_CHARACTERS = 2000  # about a millisecond of encoding: not worth a thread
_INLINE_MESSAGES = 40  # each of which a template may look at from each other one
_INLINE_TEXT = 16_000  # of the chat with all that its template adds
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "spiece.model")
MOST_END_TOKENS = 256
# Of the processor's time, in the thread that does it: what else the machine does is not held
# against a tokenizer.
SLOW_S = 0.02  # what takes this long for a short chat is done in threads from then on
SLOW_CHARACTER_S = 20e-6  # for each character of a text: some ten times what any known one takes
SLOW_PROBE_S = 0.004  # for some hundred characters; known tokenizers take a twentieth of it
ABSURD_PROBE_S = 0.1  # a prompt of some length would take hours
_PROOF = 2  # chats that have to be quick in a thread before one is done in the event loop
_PROOF_AFTER = 100  # the same after one that was slow, and ten times as many after the next
_MOST_PROOF = 1_000_000
_IMPORTING = threading.Lock()
_PROBE = 100  # of each of these characters, in a row: where a pattern that backtracks is slow
_PROBED = string.printable + "\0\u00a0\u00e9\u0301\u4f60\u0436\U0001f916"
_KEPT_MODELS = 2  # while the model is switched, both are asked for


class ChatTokenizer:
    """Tokenizer, chat template, end-of-turn ids and sampling values of one model folder.

    Raises:
        ModelBroken: there is no tokenizer, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owed = _PROOF  # chats that have to be quick in a thread, from now on
        self._after_slow = _PROOF_AFTER
        self._learning = threading.Lock()
        self._tokenizer = _load(folder)
        self.end_tokens = _end_tokens(folder, self._tokenizer.eos_token_id)
        self.recommended = recommended(read_json(folder / "generation_config.json"))
        self.declared_vocabulary = _vocabulary(folder)
        self.vocabulary = self.declared_vocabulary or len(self._tokenizer)
        self._template = self._compiled()
        try:
            self._detokenizers = self._plan_detokenizers()
            # The first call may change the tokenizer's settings; those in threads do not.
            self.encode("a")
            self._probe()
        except (InvalidRequest, ValueError, TypeError, LookupError, AttributeError) as error:
            why = error.why if isinstance(error, InvalidRequest) else _first_line(error)
            raise ModelBroken(
                f"The tokenizer of {folder.name!r} does not work", why, path=folder
            ) from error

    @property
    def quick(self) -> bool:
        """Whether short chats have been quick for long enough to be done in the event loop."""
        return self._owed <= 0

    def proved(self, took_s: float, characters: int) -> None:
        """Learns how long a chat took that became so many characters of text."""
        with self._learning:  # the event loop's thread does so, and others
            if took_s <= max(SLOW_S, SLOW_CHARACTER_S * characters):
                self._owed = max(0, self._owed - 1)
            else:
                self._owed = self._after_slow
                self._after_slow = min(10 * self._after_slow, _MOST_PROOF)

    def _probe(self) -> None:
        """Tries texts that a pattern which backtracks is slow with, before anybody sends one."""
        for character in _PROBED:
            text = _PROBE * character + ("b" if character == "a" else "a")
            took_s = self._seconds(text)
            for _ in range(2):  # for what shares the core with it may have slowed it
                if SLOW_PROBE_S < took_s < 10 * ABSURD_PROBE_S:
                    took_s = min(took_s, self._seconds(text))
            if took_s > ABSURD_PROBE_S:
                raise ValueError(f"It takes {took_s:.1f} s to read {len(text)} characters")
            if took_s > SLOW_PROBE_S:
                self._owed = self._after_slow = _MOST_PROOF

    def _seconds(self, text: str) -> float:
        began = time.thread_time()
        with contextlib.suppress(InvalidRequest):
            self.encode(text)
        return time.thread_time() - began

    def detokenizer(self) -> Detokenizer:
        """A detokeniser for one answer."""
        return self._detokenizers()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of all these tokens, special ones left out."""
        known = len(self._tokenizer)  # a model may have more ids than its tokenizer
        text = self._tokenizer.decode(
            [token for token in tokens if token < known],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of this text; special tokens written in it count as such."""
        try:
            encoded = self._tokenizer(
                text,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        except BaseException as error:
            if not _foreign(error):
                raise
            raise InvalidRequest(
                "The model's tokenizer cannot read this text", _first_line(error), field="messages"
            ) from None
        return tuple(encoded["input_ids"])

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as the model was trained to read it, ready for the assistant's turn.

        Raises:
            InvalidRequest: the template refuses these messages.
            ModelBroken: the model has no chat template, or a broken one.
        """
        if not isinstance(self._template, ChatTemplate):
            what, why, fix = self._template
            raise ModelBroken(what, why, fix, path=self.folder)
        try:
            return self._template.render(messages, self._tokenizer.special_tokens_map)
        except FAILURES as error:
            raise InvalidRequest(
                "The model's chat template refuses these messages",
                str(error)[:500],
                "Send fewer or shorter messages"
                if isinstance(error, TooMuch)
                else "Change the order or the roles of the messages",
                field="messages",
            ) from error

    def _compiled(self) -> ChatTemplate | tuple[str, str, str]:
        """The chat template, or else what to tell of it whenever a chat asks for it."""
        import jinja2

        try:
            source = self._tokenizer.get_chat_template()
        except (ValueError, TypeError, LookupError, AttributeError):
            source = None
        if not source or not isinstance(source, str):
            return (
                f"The model in {self.folder.name!r} has no chat template",
                "It is a base model, or chat_template.jinja is missing",
                "Choose a chat (instruct) model",
            )
        try:
            return ChatTemplate(source)
        except jinja2.TemplateSyntaxError as error:
            why = str(error.message or "")[:500]
            return f"The chat template of {self.folder.name!r} is broken", why, ""

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a chat, up to where the assistant begins to answer.

        Raises:
            InvalidRequest, ModelBroken: as :meth:`render`.
        """
        return self.encode(self.render(messages))

    def _plan_detokenizers(self) -> Callable[[], Detokenizer]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer in plain Python
            return lambda: WindowDetokenizer(self.decode)
        return detokenizers(backend)


class Tokenizers:
    """The tokenizers of the models in use, each loaded once and in a thread."""

    def __init__(self) -> None:
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="text")
        # Each model has its own, so that one whose texts take for ever stops no other.
        self._threads: WeakKeyDictionary[ChatTokenizer, ThreadPoolExecutor] = WeakKeyDictionary()
        self._loading: dict[tuple[str, Path], asyncio.Future[ChatTokenizer]] = {}

    async def of(self, model: ServedModel) -> ChatTokenizer:
        """The tokenizer of this model.

        Raises:
            ModelBroken: there is none, or it cannot be read.
        """
        return await asyncio.shield(self._start(model))

    def warm(self, model: ServedModel) -> None:
        """Begin to load, so that the first chat need not wait; failures show there."""
        self._start(model)

    def loaded(self, model: ServedModel) -> bool:
        """Whether this model's tokenizer is ready."""
        loading = self._loading.get((model.name, model.folder))
        return loading is not None and loading.done() and loading.exception() is None

    def _start(self, model: ServedModel) -> asyncio.Future[ChatTokenizer]:
        key = (model.name, model.folder)
        loading = self._loading.get(key)
        if loading is None or (loading.done() and not self.loaded(model)):
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(self._loaders, ChatTokenizer, model.folder)
            # Asked for here, so that a failure nobody waits for is not reported as lost.
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._loading[key] = loading
            while len(self._loading) > _KEPT_MODELS:
                self._loading.pop(next(iter(self._loading)))
        return loading

    async def prompt(
        self, tokenizer: ChatTokenizer, messages: Sequence[Message]
    ) -> tuple[int, ...]:
        """Token ids of a chat; a long one is encoded in a thread, so that the loop goes on.

        Raises:
            InvalidRequest, ModelBroken: as :meth:`ChatTokenizer.render`.
        """
        loop = asyncio.get_running_loop()
        short = len(messages) <= _INLINE_MESSAGES and _characters(messages) <= _INLINE_CHARACTERS
        if not (tokenizer.quick and short):
            return await loop.run_in_executor(self._of(tokenizer), _timed, tokenizer, messages)
        began = time.thread_time()
        text = ""
        try:
            text = tokenizer.render(messages)
            if len(text) <= _INLINE_TEXT:
                return tokenizer.encode(text)
        finally:
            tokenizer.proved(time.thread_time() - began, len(text))
        return await loop.run_in_executor(self._of(tokenizer), tokenizer.encode, text)

    def close(self) -> None:
        """Let the threads go."""
        for threads in (self._loaders, *self._threads.values()):
            threads.shutdown(wait=False, cancel_futures=True)

    def _of(self, tokenizer: ChatTokenizer) -> ThreadPoolExecutor:
        threads = self._threads.get(tokenizer)
        if threads is None:
            threads = ThreadPoolExecutor(2, thread_name_prefix="text")
            self._threads[tokenizer] = threads  # they end with the tokenizer
        return threads


def _timed(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    began = time.thread_time()
    text = ""
    try:
        text = tokenizer.render(messages)
        return tokenizer.encode(text)
    finally:
        tokenizer.proved(time.thread_time() - began, len(text))


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(str(value)) for message in messages for value in message.values())


def _load(folder: Path) -> Any:
    # Here, not above: the import takes half a second, and only a served model needs it. One
    # after the other: while it goes on, transformers has nothing for a second thread.
    with _IMPORTING:
        from transformers import AutoTokenizer

    if not any(next(folder.glob(name), None) for name in _VOCABULARIES):
        if (folder / "tiktoken.model").exists():  # Kimi's
            raise ModelBroken(
                f"The model in {str(folder)!r} has no tokenizer that can be read",
                "It has tiktoken.model alone, which says too little without the model's own code, "
                "and that is never run",
                "Take a copy of the model that has a tokenizer.json",
                path=folder,
            )
        # transformers would make an empty one for a known model type.
        raise ModelBroken(
            f"The model in {str(folder)!r} has no tokenizer",
            f"None of {', '.join(_VOCABULARIES)} is there",
            "Copy the whole model folder, not its weights alone",
            path=folder,
        )
    try:
        with plain_folder(folder) as plain:
            return AutoTokenizer.from_pretrained(
                plain, trust_remote_code=False, local_files_only=True
            )
    except ModelBroken:
        raise
    except BaseException as error:
        # transformers lets anything through here: OSError, ValueError, KeyError, tokenizers' own.
        if not _foreign(error):
            raise
        raise ModelBroken(
            f"The model in {str(folder)!r} has no tokenizer that can be read",
            _first_line(error),
            "The folder must hold tokenizer.json and tokenizer_config.json",
            path=folder,
        ) from error


def _foreign(error: BaseException) -> bool:
    """Whether a library failed; a panic in Rust is no ``Exception``, though it is nothing more."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


def _end_tokens(folder: Path, of_tokenizer: object) -> frozenset[int]:
    """End-of-turn ids of generation_config.json, config.json and the tokenizer together."""
    config = read_json(folder / "config.json")
    places = (read_json(folder / "generation_config.json"), config, config.get("text_config"))
    found = [of_tokenizer]
    for place in places:
        ids = place.get("eos_token_id") if isinstance(place, dict) else None
        found += ids[:MOST_END_TOKENS] if isinstance(ids, list) else [ids]
    return frozenset(i for i in found if _is_id(i))


def _vocabulary(folder: Path) -> int | None:
    """How many ids the model knows, which may be more than its tokenizer has."""
    config = read_json(folder / "config.json")
    for place in (config, config.get("text_config")):
        size = place.get("vocab_size") if isinstance(place, dict) else None
        if _is_id(size) and size > 0:
            return size
    return None


def _is_id(value: object) -> TypeGuard[int]:
    """As ids cross the wire: 32 bits."""
    return type(value) is int and 0 <= value < 1 << 32
