"""Phrasings: a small pattern language, how people vary what they type, and what is held out."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SPACES = re.compile(r" {2,}")


def listed(text: str, mark: str | None = None) -> tuple[str, ...]:
    """Return the items of a list that is written as one text."""
    return tuple(text.split(mark))


_QUESTION_WORDS = frozenset(
    listed(
        "what what's which who who's whose where when why how can could do does did is are will"
        " would should has have may must am"
    )
)
_DROPPABLE = frozenset(listed("the a an do does is are of to can could i my me please"))

_PREFIXES = listed(
    "please: |please tell me, |i want to know, |i wonder, |a question: |can you tell me: "
    "|for my notes: |i am new here, |my friend asks: |hi, |hello! |quick question: |so, |ok, |hey, "
    "|one more thing: |sorry, |and |well, |tell me, |please say, |just curious: |by the way, "
    "|one question: |excuse me, |now, |next question: |my boss asks, |somebody asked me: |again: "
    "|i keep wondering, |could you tell me, |do you know, |i have a question. |question: |thanks. "
    "|great. |i see. |hm, |um, |actually, |look, |say, |another thing: |but ",
    "|",
)
_SUFFIXES = listed(
    " please| thanks| thank you| exactly| then| here| again| in parallax| in short"
    "| in simple words| for me| now| actually| in this cluster| please tell me| i wonder"
    "| do you know| if i may ask| by the way| today| anyway| in general| normally| with parallax"
    "| right now| in practice|, i am curious|, any idea|, please|, right| at all| on my side",
    "|",
)
_FILLERS = listed(
    "actually really just exactly now then maybe please also even simply still ever always"
    " usually perhaps kindly basically again only right here there so all this that"
)


def _alike(text: str) -> dict[str, tuple[str, ...]]:
    """Return, for each word of each group of words, the others of its group."""
    found: dict[str, tuple[str, ...]] = {}
    for group in listed(text, "|"):
        words = listed(group)
        for word in words:
            found[word] = (*found.get(word, ()), *(other for other in words if other != word))
    return found


_SYNONYMS = _alike(
    "mac machine computer box laptop|macs machines computers boxes laptops|answer reply response"
    "|answers replies responses|request call query|requests calls queries|use employ utilise take"
    "|show display list print|start begin launch boot|stop end halt quit finish"
    "|happens occurs goes|does will can|can could may|explain describe clarify define"
    "|big large huge|bigger larger|biggest largest|fast quick speedy rapid|faster quicker"
    "|which what|i we one|my our the|model llm network|find discover locate detect"
    "|need require want must|command verb instruction|the a this one|see view watch observe"
    "|get obtain receive fetch|send pass hand submit|make build create produce"
    "|made built created produced generated|keep hold store save|kept held stored saved"
    "|holds keeps stores has|change alter modify switch|split cut divide shard partition"
    "|chosen picked selected|choose pick select|decides chooses determines|do perform"
    "|job task role duty purpose|dies fails crashes breaks|died failed crashed broke"
    "|lost gone missing|connect link attach join|connected linked attached joined"
    "|talk speak communicate chat|work function operate run|works functions operates runs"
    "|wrong broken bad faulty|slow sluggish|slower weaker|small tiny little|folder directory"
    "|settings options configuration|set configure adjust|name title|page site website"
    "|safe secure protected|allowed permitted|many several multiple|several many some"
    "|people users persons|user person client|program app script code|write compose"
    "|limit cap maximum|maximum limit most|memory ram|error failure problem fault"
    "|problem trouble issue|wait queue|quickly fast soon|tell inform|know understand|like want"
    "|good fine ok useful|same equal identical|together jointly|others other|give provide hand"
    "|gives provides offers|contains holds has includes|contain hold include|inside in within"
    "|between among|before until|after once|if when|near by|at on|how why|with by using"
    "|add attach include|added attached|remove detach drop|open reach|network lan wifi"
    "|remember recall|learn study|learned trained|pieces parts shares|part piece component share"
    "|part component|every each all|first initial|last final|next following|long lengthy"
    "|short brief|new fresh|old aged|alive living|terminal shell console|browser safari firefox"
    "|prompt text input|text words|word term|number count amount|machine's mac's|ask question"
    "|asked requested|says reports prints|mean signify imply|means stands|difference contrast"
    "|free available|shut turn|restart reboot|sleep doze|look see|watch follow monitor",
)


def expand(pattern: str, rng: random.Random) -> str:
    """Replace each ``[a|b|]`` of a pattern by one of its alternatives."""
    text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), pattern)
    return _SPACES.sub(" ", text).strip()


def every(pattern: str) -> list[str]:
    """Return all the phrasings that a pattern stands for."""
    match = _CHOICE.search(pattern)
    if match is None:
        return [_SPACES.sub(" ", pattern).strip()]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for option in match.group(1).split("|") for text in every(head + option + tail)]


def sentence(text: str, rng: random.Random) -> str:
    """Give a bare phrasing a capital and a closing mark, most of the time."""
    words = text.split()
    question = words[0].lower() in _QUESTION_WORDS if words else False
    if text[-1:] not in "?.!":
        closing = "?" if question else "."
        text += closing if rng.random() < (0.8 if question else 0.5) else ""
    if rng.random() < 0.7:
        text = text[:1].upper() + text[1:]
    return text


def bare(text: str) -> str:
    """Return a question without what does not matter: capitals and the mark at its end."""
    return text.lower().rstrip("?.!")


def _misspell(text: str, rng: random.Random) -> str:
    """Swap, drop or double one letter."""
    places = [i for i in range(1, len(text) - 2) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    if kind == 1:
        return text[:i] + text[i + 1 :]
    return text[:i] + text[i] + text[i:]


def _reworded(text: str, rng: random.Random) -> str:
    """Drop, add, replace or move a word."""
    words = text.split()
    place = rng.randrange(len(words))
    kind = rng.randrange(4)
    if kind == 0 and len(words) > 3:
        del words[place]
    elif kind == 1:
        words.insert(place, rng.choice(_FILLERS))
    elif kind == 2 and len(words) > 4:
        words.insert(rng.randrange(len(words)), words.pop(place))
    else:
        words = [
            rng.choice(_SYNONYMS[word]) if word in _SYNONYMS and rng.random() < 0.4 else word
            for word in words
        ]
    return " ".join(words)


def _thinned(text: str, rng: random.Random) -> str:
    """Lose some words, so that no single one decides what is meant."""
    words = text.split()
    kept = [word for word in words if rng.random() > 0.15]
    return " ".join(kept) if len(kept) >= 3 else text


def _keywords(text: str, rng: random.Random) -> str:
    """Keep the words that matter, as in a search box, sometimes in another order."""
    kept = [word for word in text.split() if word.lower() not in _DROPPABLE]
    if rng.random() < 0.3:
        rng.shuffle(kept)
    return " ".join(kept) if len(kept) >= 2 else text


def dressed(text: str, rng: random.Random, *, noise: bool = True) -> str:
    """Write a bare request with a polite prefix at times, and nothing else changed."""
    if noise and rng.random() < 0.12:
        text = rng.choice(_PREFIXES) + text
    return sentence(text, rng)


_PROPER = {
    word.lower(): word
    for word in listed(
        "Parallax Mac Macs I API HTTP KV mDNS gRPC MLX OpenAI Anthropic JSON TPS TTFT TLS SDK CPU"
        " GPU LLM URL Linux Wi-Fi Thunderbolt Qwen ReAct Python"
    )
}


def proper(text: str) -> str:
    """Write names and abbreviations as they are written with care."""
    return " ".join(_PROPER.get(word, word) for word in text.split(" "))


def typed(text: str, rng: random.Random, *, noise: bool = True) -> str:
    """Write a bare phrasing as somebody would type it.

    With ``noise`` it may also be reworded, cut to its keywords, dressed with a polite prefix or
    suffix, or misspelt; held-out phrasings are written without.
    """
    if noise:
        if rng.random() < 0.1:
            text = _keywords(text, rng)
        if rng.random() < 0.15:
            text = _thinned(text, rng)
        while rng.random() < 0.4:
            text = _reworded(text, rng)
        if rng.random() < 0.14:
            text = rng.choice(_PREFIXES) + text
        if rng.random() < 0.1 and text[-1:] not in "?.!":
            text += rng.choice(_SUFFIXES)
        if rng.random() < 0.06:
            text = _misspell(text, rng)
    return sentence(proper(text) if rng.random() < 0.5 else text, rng)


def is_held_out(value: str, *, one_in: int = 10) -> bool:
    """Say whether a value (a sum, an expression, a name) is kept for the evaluation only."""
    return zlib.crc32(value.encode()) % one_in == 0


def choose(options: Sequence[str], rng: random.Random, *, held_out: bool, share: int = 8) -> str:
    """Draw from a word list, of which every ``share``-th word is held out."""
    pool = [word for word in options if is_held_out(word, one_in=share) is held_out]
    return rng.choice(pool or list(options))
