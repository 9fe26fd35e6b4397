"""Ways to ask about a noun, whatever it is: of what Parallax has, of the world, or made up.

The same frames go around the topics of the fact sheets and around nouns that the model cannot
know, so that it has to read the noun.
"""

from __future__ import annotations

import random

from parallax.demo.corpus.phrases import expand, listed
from parallax.demo.corpus.words import made_up_word

_LEADS = listed(
    "|||please |can you |could you |would you |will you |i want you to |i would like you to "
    "|kindly "
    "|you should |just |i need you to |hi, |now |once more, |try to |be so kind and "
    "|would you please "
    "|can you please |for my notes, |quickly ",
    "|",
)
_VERBS = listed(
    "explain|describe|define|clarify|outline|sketch|introduce|present|summarise|tell me about"
    "|say something about|tell us about|talk about|speak about|teach me about|go over|explain to us"
    "|tell me more about|say what you know about|tell me all about|characterise|show me"
    "|give me a description of|give me the meaning of|give a definition of|inform me about",
    "|",
)
_ASKS = listed(
    "what is|what's|what might be|what could be|what is this|what is that|what would be|whats"
    "|what is the meaning of|what is the definition of|what is the idea of|what is the purpose of"
    "|what is meant with|what is behind|what about|what is it with|what's up with|how about"
    "|what do people mean by|what do we call|what is the point of|what is the story of"
    "|what should i know about|what can you tell me about|what do you know about|anything on"
    "|how do you explain|how would you describe|how should i understand|how do you define"
    "|how do i picture|how can i understand|any idea about|who can explain|who knows about"
    "|do you know|have you heard of|are you familiar with|i want to learn about|some words on"
    "|i would like to hear about|i want an explanation of|i am curious about|i read about"
    "|i have a question about|i have questions on|i need information on|i am reading about"
    "|someone mentioned|my colleague speaks of|the docs speak of|meaning of|definition of"
    "|description of|explanation of|introduction to|help with|notes on|basics of|more on|regarding"
    "|i do not get|i am confused by|i cannot follow|i must learn|i have no idea of",
    "|",
)
_AROUND = listed(
    "{} is what|{} means what|{}, what is that|{}, what does it mean|{} meaning|{} explained|and {}"
    "|{} definition|{} please|i forgot what {} is|i am not sure what {} is|any idea what {} is"
    "|do you know what {} is|can you say what {} is|nobody told me what {} is|who knows what {} is"
    "|i wonder what {} is|i have no idea what {} is|what {} is|what is {} for|what is {} about"
    "|what kind of thing is {}|what sort of thing is {}|what is {} good for|what is {} used for"
    "|what does one mean when one says {}|what does the word {} stand for|the word {}"
    "|the meaning of the word {}|where do i read about {}|why would i care about {}|why {}"
    "|i saw the word {} somewhere|people talk of {} here, why|{} again|so {}|ok, {}|{} in parallax"
    "|in one sentence, what is {}|in two words, what is {}|in plain words, {}"
    "|simply put, what is {}"
    "|how is {} defined|how is {} explained|when do people say {}|what can {} be|is {} a thing"
    "|tell me, {}|i keep reading {}|what on earth is {}|what the heck is {}|{} for dummies"
    "|what role does {} play|what do i have to know about {}|let us talk about {}|teach me {}"
    "|i am new, what is {}|for a newcomer, what is {}|first, what is {}|then what is {}",
    "|",
)
_TAILS = listed(
    "||||| to me| for me| briefly| in one sentence| in simple words| in plain english| in short"
    "| to a newcomer| for someone new| to my friend| quickly| in detail| once more| step by step"
    "| in your own words| for my colleague| as if i were five| for a novice| to a child| for us"
    "| in a few words| so that i understand| to somebody new| for people like me| for a talk"
    "| in a line or two| a bit| for my mother| to a layman| for a new user| to the team",
    "|",
)
_LISTENERS = listed(
    "gardener friend teacher child parent colleague visitor student boss painter farmer guest"
    " pupil doctor engineer layman stranger brother sister king robot neighbour newbie schoolboy"
    " manager customer tourist learner apprentice grandfather outsider expert professor artist"
)
_PLAIN_TAILS = listed("||||||| then| exactly| here| again| please| in short| really| actually", "|")


def frame(rng: random.Random) -> str:
    """Draw a frame, a text with one ``{}`` for the noun."""
    kind = rng.random()
    if kind < 0.4:
        tail = rng.choice(_TAILS)
        if rng.random() < 0.25:
            listener = rng.choice(_LISTENERS) if rng.random() < 0.6 else made_up_word(rng)
            tail = (
                f" {rng.choice(('for', 'to'))} {rng.choice(('a', 'my', 'the', 'any'))} {listener}"
            )
        return rng.choice(_LEADS) + rng.choice(_VERBS) + " {}" + tail
    if kind < 0.7:
        return rng.choice(_ASKS) + " {}" + rng.choice(_PLAIN_TAILS)
    return rng.choice(_AROUND)


def about(noun: str, rng: random.Random) -> str:
    """Ask about a noun in some way."""
    return expand(frame(rng), rng).format(noun)
