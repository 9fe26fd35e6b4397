"""Questions from elsewhere: everyday ones, and those about Parallax with other nouns in them.

Many forms and many words matter more than sense: the model has to learn that what is not about
Parallax is declined, however it is asked.
"""

from __future__ import annotations

import random
from functools import cache

from parallax.demo.corpus import questions
from parallax.demo.corpus.phrases import expand, listed

_THINGS = listed(
    "apple bicycle guitar doctor teacher garden kitchen river mountain horse elephant bus train"
    " ship plane bridge tower church museum school hospital hotel restaurant farm forest desert"
    " island lake beach cloud storm flower tree rose potato tomato onion cheese butter egg cup"
    " plate knife spoon bottle chair sofa bed lamp carpet window roof wall shoe coat shirt dress"
    " hat umbrella clock watch ring-finger necklace diamond coin wallet bank shop market price tax"
    " salary lawyer judge police soldier king queen painter singer actor writer poet dentist nurse"
    " baby child mother father uncle sister neighbour tiger wolf bear monkey snake spider bee ant"
    " fish shark dolphin whale frog chicken cow pig sheep goat rabbit mouse parrot eagle penguin"
    " tooth knee heart brain stomach nose muscle bone virus fever pill football tennis ball race"
    " goal film song book novel poem piano violin drum picture camera planet star comet rocket"
    " volcano earthquake rainbow winter summer birthday wedding holiday passport visa ticket"
)
_PLURALS = listed(
    "apples cats dogs horses birds fish whales tigers wolves spiders bees trees flowers roses cars"
    " trains ships planes bridges towers churches schools doctors teachers children parents kings"
    " painters singers actors books films songs poems planets stars comets volcanoes rivers lakes"
    " mountains islands deserts forests shoes coats potatoes tomatoes onions eggs cakes teeth bones"
    " muscles viruses coins diamonds taxes elections wars laws holidays mushrooms sharks monkeys"
    " penguins dinosaurs pyramids museums hotels restaurants footballers pilots farmers vampires"
)
_ADJECTIVES = listed(
    "old young tall rich poor famous happy sad angry hungry tired ill healthy heavy sweet sour"
    " salty bitter warm cold hot wet dry green red blue yellow black white beautiful ugly cheap"
    " expensive dangerous poisonous edible rare common holy legal illegal strong round flat deep"
    " wild tame lazy clever blind deaf dead alive pregnant married bald"
)
_VERBS = listed(
    "sing dance sleep swim fly jump laugh cry eat drink hunt bark bite smell grow bloom melt freeze"
    " burn float sink shine travel marry vote fight win lose pray paint cook read smile snore dream"
    " hibernate migrate sneeze climb explode rust"
)
_DOINGS = listed(
    "buy a car|study medicine|call my brother|wear a coat|paint the kitchen|eat more fruit"
    "|sell my house|get a dog|quit my job|see a doctor|cut my hair|drink more water|go fishing"
    "|bake a cake|grow tomatoes|boil an egg|ride a horse|play the piano|learn to swim"
    "|clean my shoes"
    "|wash my hair|pay less tax|invest my money|lose weight|sleep better|find a job|write a letter"
    "|knit a sweater|fix a bicycle|change a tyre|tie a knot|draw a cat|plant a tree|cure a cold"
    "|make friends|rent a flat|catch a fish|feed a rabbit|train a parrot|build a house"
    "|go to the gym"
    "|tell my boss|apologise to her|forgive him|travel to {country}|visit {city}|eat {food}"
    "|cook {food}|read about {subject}|believe in {subject}|meet {person}|order {food}|watch tennis"
    "|stop smoking|wake up early|remove a stain|peel an onion|win at chess|dance the tango"
    "|start a business|run a marathon|join the army|install a shower|open a restaurant"
    "|adopt a child"
    "|set the table|load the dishwasher|add more salt|split the bill|stop the bleeding"
    "|cancel my gym"
    "|check my tyres|connect a lamp|change my name|see the stars|send a parcel|update my passport",
    "|",
)
_PLACES = listed(
    "in {country}|in {city}|near {city}|on the moon|in the sea|at home|in my garden|outside|here"
    "|in the street|on the table|in africa|on earth|in the fridge|at school|in the mountains",
    "|",
)
_FORMS = listed(
    """why [is|was] the {thing} [so|] {adj}
why are {things} [so|] {adj}
[how|why|when] do {things} {verb}
where do {things} [live|come from|grow|{verb}]
can [a {thing}|{things}] {verb}
is [a|the|my|this] {thing} {adj}
are {things} {adj}
do [all|most|some|] {things} {verb}
does [a|the|my] {thing} {verb}
will [the|my] {thing} {verb} [tomorrow|soon|again|]
my {thing} is {adj}
my {thing} does not {verb}
[the|a] {thing} [bit|saw|hit|likes] [me|my {thing}]
how [do|can|should|would] i [best|] {doing}
how to {doing}
[should|must|may|can|could] i {doing}
[when|where] [should|can|do] i {doing}
i [want|would like|have|plan|try] to {doing}
is it [good|wise|legal|healthy|hard] to {doing}
is it [late|dark|far|safe|windy|snowing|expensive] [there|outside|{place}]
[help me|teach me how|show me how|tell me how] to {doing}
what do i need to {doing}
what happens [if|when] i {doing}
what happens [if|when] [a|the] {thing} {verb}s
who can {doing}
do i have to {doing}
[please|] {doing} for me
why should i {doing}
is there [a|any] {thing} {place}
are there [many|any|more|no] {things} {place}
there is a {thing} {place}
were there {things} {place}
have you [ever|] [seen|eaten|met|touched] [a {thing}|{things}]
how many {things} [are|live|were] {place}
how many [legs|eyes|teeth|wings|bones] does a {thing} have
how [big|old|long|heavy|fast|tall|far|expensive] is [a|the] {thing}
what [colour|size|shape] is [a|the] {thing}
what do {things} [eat|drink|like|fear|do all night|look at]
what does a {thing} [eat|do|cost|weigh|look like|drink]
[which|what] {thing} [is the best|should i buy|is {adj}|do you like]
which {things} are {adj}
which {thing} [matches|suits|fits] [a|my] {thing}
what kind of {thing} is that
what [music|colour|drink|weather|shoes] suits a {thing}
who [made|owns|stole|painted|ate|broke|killed] the {thing}
whose {thing} is this
who was the first {thing}
where is [the|my] [nearest|] {thing}
where are my {things}
when is the [next|first|last] {thing}
what is the [price|weight|age|history|name|taste|smell|best] of [a|the] {thing}
what is [a|an|the] {adj} {thing}
[tell me about|describe|explain|draw] [the|a] [{adj}|] {thing}
tell me [about|more about] {things}
what did {person} [write|discover|say|paint|think|build|want|invent|believe|wear]
where did {person} [live|study|die]
why did {person} [die|leave {country}|become famous]
does {person} like {things}
who was {person} married to
[was|is] {person} {adj}
is {country} {adj}
are people in {country} {adj}
{country} or {country}
{city} or {city}
do they [have|eat|sell|like] {things} in {country}
which [lake|mountain|city|desert|island] is in {country}
what [language|money|sea|religion] [do they have|is there] in {country}
who [rules|governs|discovered] {country}
which language is spoken in {city}
how do i get to {city}
a hotel in {city}
the best {thing} in {city}
what [drink|salad|sauce] do you serve with {food}
is {food} {adj}
how long do i cook {food}
{food} or {food}
[he|she|it|they] [is|was|said|wants|has] {adj}
we [saw|bought|lost|need] [a|the] {thing}
i [lost|broke|found|bought|need|hate] my {thing}
[a|the] {adj} {thing}
{adj} {things}
{thing}
{things}
{thing} and {thing}
{things} {place}
best {thing}
{doing}
what [would|will|could] [a {thing}|{things}] [do|say|cost|become]
would a {thing} {verb}
has the {thing} [{verb}ed|gone|arrived]
what are {things}
what are {things} made of
what are the [best|most {adj}] {things}
list [five|ten|some] {things}
name [a|one] {adj} {thing}
[give|bring|buy] me [a|the] {thing}
sing about {things}
translate {thing} to {language}
what is {language} for {thing}
how do i say {thing} in {language}
spell {thing}
what rhymes with {thing}
is {word} [a {thing}|{adj}|in {country}]
what is {word} made of
who made {word}
how do i {verb} a {word}
does {word} {verb}
can {word} {verb}
why is {word} {adj}
where can i find {word}
is there {word} {place}
what is the {word} of {word}
how many {word} are there
when did {word} happen
do you have {word}
my {word} is {adj}
what does {word} [cost|eat|look like|do]
what does my {thing} [want|need]
why does {word} {verb}
{word} {thing}""",
    "\n",
)
_NOT_OURS = listed(
    "gardener giraffe bakery violin farmer pirate wizard princess castle horse banana sandwich"
    " tractor airport hospital school library kitchen football pilot tailor hamster hedgehog moon"
    " submarine cinema teacher waiter plumber grandmother elephant orchestra museum cactus bathtub"
)
_NOT_OURS_MANY = listed(
    "gardeners giraffes bakeries violins farmers pirates wizards castles horses bananas tractors"
    " airports hospitals schools kitchens pilots tailors hamsters moons waiters plumbers elephants"
)
_OURS = frozenset(
    listed(
        "parallax mac machine node cluster scheduler ring stage lane frame head conductor planner"
        " router sampler server page model request token prompt twin epoch"
    )
)
_OURS_MANY = frozenset(
    listed(
        "macs machines nodes rings stages lanes frames models requests tokens prompts tools agents"
        " computers layers settings seeds"
    )
)
_MARKS = frozenset(
    listed(
        "api http openai anthropic claude sdk json prometheus mlx grpc mdns python pip qwen llama"
        " gpu cuda ram memory cache decode prefill network wi-fi wifi thunderbolt you your tensors"
        " activations embeddings port 3001 terminal command shell heartbeat wired parallel batching"
    )
)


def everyday(rng: random.Random) -> str:
    """Write the pattern of a question on everyday things; names are left to be put in."""
    text = expand(rng.choice(_FORMS), rng)
    for mark, words in (
        ("{thing}", _THINGS),
        ("{things}", _PLURALS),
        ("{adj}", _ADJECTIVES),
        ("{verb}", _VERBS),
        ("{doing}", _DOINGS),
        ("{place}", _PLACES),
    ):
        while mark in text:
            invented = mark in ("{thing}", "{things}") and rng.random() < 0.15
            text = text.replace(mark, "{word}" if invented else rng.choice(words), 1)
    return text


@cache
def _topic_words() -> frozenset[str]:
    topics = {word for fact in questions.facts() for topic in fact.topics for word in topic.split()}
    small = {"a", "an", "the", "of", "is", "to", "per", "state", "first", "time", "large", "start"}
    return frozenset(topics) - small | _MARKS


@cache
def _swappable() -> tuple[str, ...]:
    """Return the patterns about Parallax that name it in words which others can replace."""
    return tuple(
        pattern
        for fact in questions.facts()
        if fact.sheet != questions.IDENTITY_SHEET
        for pattern in fact.phrasings
    )


def swapped(rng: random.Random) -> str:
    """Ask about something else what is asked about Parallax."""
    ours = _OURS | _OURS_MANY
    while True:
        words = expand(rng.choice(_swappable()), rng).lower().split()
        rest = [word for word in words if word not in ours]
        if len(rest) == len(words) or len(rest) < 2 or _topic_words() & set(rest) - ours:
            continue
        one = "{word}" if rng.random() < 0.3 else rng.choice(_NOT_OURS)
        many = "{word}" if rng.random() < 0.2 else rng.choice(_NOT_OURS_MANY)
        return " ".join(
            one if word in _OURS else many if word in _OURS_MANY else word for word in words
        )
