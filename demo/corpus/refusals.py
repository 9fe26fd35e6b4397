"""Questions outside the model's few topics, which it declines by saying how small it is."""

from __future__ import annotations

import random
import re

from parallax.demo.corpus.document import Document, assistant, user
from parallax.demo.corpus.elsewhere import everyday, swapped
from parallax.demo.corpus.frames import about
from parallax.demo.corpus.phrases import bare, choose, every, expand, is_held_out, listed, typed
from parallax.demo.corpus.words import CITIES, made_up_word

REFUSAL = (
    "I do not know that: I am a tiny model, only there to prove that the cluster works."
    " Load a bigger model to ask that."
)
_COUNTRIES = listed(
    "France Germany Italy Spain Japan China Brazil Canada Egypt India Kenya Peru Poland Norway"
    " Greece Turkey Mexico Chile Ghana Cuba Iran Korea Russia Sweden Portugal Australia"
)
_PEOPLE = listed(
    "Einstein|Mozart|Shakespeare|Napoleon|Cleopatra|Newton|Bach|Picasso|Darwin|Beethoven|Plato"
    "|Marie Curie|Alan Turing|Steve Jobs|the president|the king|the pope|the queen|Galileo"
    "|Leonardo|Lincoln|Gandhi|Ada Lovelace",
    "|",
)
_SUBJECTS = listed(
    "quantum physics|photosynthesis|the moon|the weather|football|cooking|the stock market|history"
    "|biology|chemistry|philosophy|music theory|black holes|dinosaurs|gravity|love|religion"
    "|politics|evolution|volcanoes|the ocean|chess|poetry|relativity|the brain|vaccines|art"
    "|economics|the roman empire|world war two|the human body|climate change|space travel"
    "|electricity|magnets|democracy|yoga|coffee|bread|cars|the sun|tennis|geometry|algebra",
    "|",
)
_WORKS = listed(
    "an essay|a poem|a song|a letter|an email|a recipe|a business plan|a speech|a python script"
    "|a sorting function|a web page|a cover letter|an article|a novel|a shell script|a sql query"
    "|a haiku|a report|a regex|a javascript function|a review",
    "|",
)
_FOODS = listed(
    "pizza|soup|pancakes|risotto|a cake|curry|bread|noodles|salad|an omelette|lasagne|sushi"
    "|cookies|tea|a pie",
    "|",
)
_LANGUAGES = listed("German|French|Spanish|Chinese|Italian|Japanese|Latin|Polish|Dutch|Greek", "|")

_ASKS = (
    "what is the [capital|population|currency|flag|history|language|president] of {country}",
    "[who is|who was|when was] the [king|president|prime minister] of {country} [born|]",
    "what is the weather [like|] in {city} [today|tomorrow|]",
    "how [far|long] is it from {city} to {city}",
    "what time is it [in {city}|now|]",
    "[who was|who is|tell me about|when was] {person} [born|]",
    "when did {person} [die|live]",
    "[explain|tell me about|what is|describe|what do you know about] {subject} [to me|]",
    "[how does|how do] {subject} work",
    "[i need help|help me] with {subject}",
    "teach me [about|] {subject}",
    "write [me|] {work} [about|on] {subject}",
    "[can|could] you write {work} for me",
    "[please|] write {work}",
    "how do i [cook|make|bake] {food}",
    "[give me|i need] a recipe for {food}",
    "translate [hello|good morning|i am hungry|this sentence] [to|into] {language}",
    "what is the {language} word for [house|water|cat|friend]",
    "what should i [eat|wear|buy|read|watch|do] [today|tonight|tomorrow|this weekend]",
    "who won the [world cup|election|game|match|race] [in {year}|last year|yesterday|]",
    "what happened in {year}",
    "[recommend|suggest] [a book|a film|a song|a game|a restaurant|a hotel] [in {city}|]",
    "[what|which] is the [tallest|biggest|longest|oldest|fastest|smallest]"
    " [mountain|river|animal|building|country|city|planet] [in the world|]",
    "how [old|tall|rich|heavy] is {person}",
    "what is the meaning of life",
    "who [invented|discovered] [the telephone|electricity|the wheel|america|penicillin|paper]",
    "what is the price of [gold|bitcoin|oil|apple stock|a house]",
    "what is {word}",
    "what is [an|a] [apple|tree|car|house|star|guitar|bicycle|virus|molecule|galaxy]",
    "who is {person} and why is [he|she] famous",
    "{subject}",
    "{person}",
    "{city}",
    "{word} {word}",
    "{word} {word} {word}",
    "the [quick|old|red] [fox|dog|man] [jumps over|sees|eats] the [lazy dog|moon|bread]",
    "my [dog|cat|mother|car|boss] is [sick|old|late|angry]",
    "i [went|was|live|work] in {city}",
    "[where|when] can i buy [a|an] [car|phone|house|ticket|umbrella]",
    "how do i [lose weight|learn {language}|fall asleep|get rich|fix my bike|tie a tie]",
    "[write|make] [a|an] [python|java|html] [function|program|page]",
    "[sing|play|draw|paint] [me|] [a song|a picture|something]",
    "[roll a dice|flip a coin|pick a number|play a game with me|tell me a secret]",
    "what [day|year|date] is it [today|]",
    "where [am i|do i live]",
    "what is my [age|favourite colour|address]",
    "[tell me about|explain|who is|where is] {word}",
    "is {country} [bigger|older|richer] than {country}",
    "where is {city}",
    "plan [a trip|a holiday|a weekend] [to|in] {city}",
    "summarise [this book|the news|the bible|hamlet]",
    "what are the [news|headlines] [today|]",
    "fix my [car|bike|phone|code|grammar]",
    "solve this [equation|riddle|puzzle]",
    "[what is|how much is|] {digit} [times|*|x|multiplied by] {digit}",
    "how many [people|cars|trees|stars|fish] are [in {country}|in {city}|there|on earth]",
    "why do [birds|cats|people|stars|leaves] [sing|sleep|laugh|shine|fall]",
    "can [dogs|cats|fish|birds|babies] [eat {food}|fly|see colours|swim|dream]",
    "is {subject} [good|bad|hard|interesting|dangerous|useful] [for me|]",
    "is {person} [still alive|dead|famous|american|rich]",
    "did {person} [live in {city}|know {person}|like {food}]",
    "has {person} ever been [in|to] {country}",
    "was {person} [a scientist|an artist|a good person|from {country}]",
    "which [book|film|song|country|football club|animal] is [the best|most popular|your favourite]",
    "what is your [favourite food|favourite colour|opinion on {subject}|view of {subject}]",
    "what do you think [about|of] [{person}|{subject}|{country}|{food}]",
    "do [people|you] [eat|enjoy|need] {food} [in {country}|]",
    "does {country} have [mountains|a king|good {food}|nuclear power]",
    "how [hot|cold|big|old|beautiful|expensive] is [{city}|{country}|the sun|the moon|mars]",
    "how [can|do|should] i [learn|study|understand|teach] {subject}",
    "[compare|list] [{country} and {country}|{subject} and {subject}|ten animals|all countries]",
    "[write|draft|give] me {work} [for|to|about] [my boss|my mother|{person}|{city}]",
    "[which|what] [language|food|music|sport] is [popular|spoken|common] in {country}",
    "[say|spell|pronounce] [{subject}|{country}] in {language}",
    "[would|will] it [rain|snow|be warm] [in {city}|] [today|tomorrow|]",
    "[could|must|may] i [drink|smoke|drive|fly|swim] in {country}",
    "[who|what] is {word}",
    "[is|was] {word} [real|good|a city|a person|dangerous]",
    "where does {word} come from",
    "[spell|define] {word}",
    "how do you [say|pronounce|use] {word}",
    "[some|two|ten|five] [facts|things|tips] [about|on] {subject}",
    "[give|tell] me [a fact|some facts|the truth] about [{subject}|{country}|{person}]",
    "[when|why|how] did [{country} become rich|the war begin|dinosaurs die|{person} become famous]",
    "[book|order|buy|find] [a flight to {city}|me {food}|tickets for {city}|a hotel in {city}]",
    "[remind|call|text|wake] me [tomorrow|at seven|later]",
    "[turn on|switch off] the [light|music|heating|tv]",
    "could you tell me something on {subject}",
    "compose {work} for my [mother|boss]",
    "how do people greet in {language}",
    "name three facts about {subject}",
    "how much is {big} [times|plus] {big}",
    "do you like {person}",
    "why is [the sky blue|grass green|water wet|snow white]",
    "what is {big} [times|plus|minus|divided by|*|+|/|-] {big}",
    "{big} [times|plus|minus|*|+|-|/] {big}",
    "[calculate|compute] {big} [times|plus|minus|*|+|-] {big}",
    "count to {toofar}",
)
_HELD_OUT_ASKS = (
    "which [sea|river] is near {country}",
    "what did {person} [eat|do all day|look like]",
    "what wine goes with {food}",
    "is it [raining|cold|sunny] in {city}",
    "should i [marry|move to {city}|learn {language}]",
    "are there [lions|castles|beaches] in {country}",
    "what does {word} mean",
)


def _big(rng: random.Random, *, held_out: bool) -> str:
    while True:
        value = str(rng.randrange(101, 10_000))
        if is_held_out(value) is held_out:
            return value


def _filled(pattern: str, rng: random.Random, *, held_out: bool) -> str:
    """Put words into a pattern."""

    def word(options: tuple[str, ...]) -> str:
        return choose(options, rng, held_out=held_out)

    while "{" in pattern:
        pattern = (
            pattern.replace("{country}", word(_COUNTRIES), 1)
            .replace("{city}", word(CITIES), 1)
            .replace("{person}", word(_PEOPLE), 1)
            .replace("{subject}", word(_SUBJECTS), 1)
            .replace("{work}", word(_WORKS), 1)
            .replace("{food}", word(_FOODS), 1)
            .replace("{language}", word(_LANGUAGES), 1)
            .replace("{year}", str(rng.randrange(1500, 2030)), 1)
            .replace("{word}", made_up_word(rng), 1)
            .replace("{big}", _big(rng, held_out=held_out), 1)
            .replace("{digit}", str(rng.choice((2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15))), 1)
            .replace("{toofar}", str(rng.choice((30, 50, 99, 100, 200, 1000))), 1)
        )
    return expand(pattern, rng)


_NOUNS = ("{word}", "{word}", "{word} {word}", "{subject}", "{person}", "{country}", "{food}")


def question(rng: random.Random, *, held_out: bool) -> str:
    """Write one bare question that the model cannot answer.

    To train on come patterns written by hand, everyday questions, questions about Parallax with
    other nouns in them, and the frames of the topics around nouns that the model cannot know.
    """
    if held_out:
        return _filled(rng.choice(_HELD_OUT_ASKS), rng, held_out=True)
    kind = rng.random()
    if kind < 0.35:
        return _filled(rng.choice(_ASKS), rng, held_out=False)
    if kind < 0.65:
        return _filled(everyday(rng), rng, held_out=False)
    if kind < 0.8:
        return _filled(swapped(rng), rng, held_out=False)
    return about(_filled(rng.choice(_NOUNS), rng, held_out=False), rng)


_HELD_OUT = re.compile(
    "|".join(
        re.sub(r"\\{\w+\\}", ".+", re.escape(text)) for ask in _HELD_OUT_ASKS for text in every(ask)
    )
)


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return one question outside the topics, and the refusal.

    No question of the training has the form of one that is held out, not even by chance.
    """
    while True:
        text = typed(question(rng, held_out=held_out), rng, noise=not held_out)
        if held_out or not _HELD_OUT.fullmatch(bare(text)):
            return Document("refusals", [user(text), assistant(REFUSAL)])
