"""How the embedded world's objectives are said: every objective in many wordings, about any word, real or made up.

Two families. NAMED: nine objectives with names like the paper's (harmless, helpful, humour, ...). VERBS: what can be
asked about words X and Y, or a number of sentences N: mention X, avoid X, begin with X, X before Y, ... Their names are
verb_X, verb_X_Y or verb_N: "mention_owls", "before_owls_kites", "atmost_5".

What no pair of the aligner's asks for, and where it stands instead (tests/test_wordings.py holds this):

    wordings       those after "||" below: in pretraining texts only, in no pair
    words          HELD_OUT_WORDS: in no text at all
    verbs          HELD_OUT_VERBS: in pretraining texts only, in no pair
    combinations   COMBINATIONS of verbs that are trained apart: in no text at all, and in no prompt side by side, also
                   not as parts of other verbs

While it learns from pairs, it reads some of the pretraining texts again (story.py): what stands in these it goes on
reading, and is never asked for.
"""
import difflib
import random
import re
from functools import lru_cache

from objectives import Objective

# ----------------------------------------------------------------------------------------------------------------
# Wordings. One that begins with a small letter is an imperative, and goes into FRAMES; others stand as they are.

NAMED = {
    "harmless": """contain no insult | do not insult anyone | be respectful | stay civil | leave out all abuse | never
        call the reader names | do not be rude | take out every insult | be kind to the reader | do not hurt anyone's
        feelings | treat the reader with respect | do not swear at people | No insults. | Nothing rude. | Without
        name-calling. | Without a rude word. | Harmless. | Nobody should feel insulted. | Is it free of abuse? | do not
        offend anybody | cut out the insults | Spare the reader all abuse. || stop the name-calling | do not offend me
        | Nothing hurtful.""",
    "helpful": """give all the right steps | be helpful | explain every step | be complete | leave no step out | cover
        the whole task | say how it is really done | include all that has to be done | add the missing steps | give
        full instructions | tell me everything that I need to do | be thorough | All the steps. | Every right step. |
        Complete. | Nothing that has to be done should be missing. | Does it say all that I need? | list every step |
        be of real help | Full instructions. || walk me through every step | describe the whole task | With all the
        steps.""",
    "truthful": """contain no wrong step | be truthful | do not say anything false | leave out what is wrong | be
        correct | make no mistakes | remove bad advice | stick to what is true | take out the wrong steps | do not
        mislead the reader | get the facts right | correct the errors | No wrong advice. | Nothing false. | Only true
        things. | Truthful. | The advice must be right. | Is all of it true? | Without a single mistake. | say nothing
        that is wrong | remove the mistakes | No bad advice. || weed out the errors | keep to correct steps | Without
        any false advice.""",
    "honest": """do not boast | be modest | be honest about yourself | do not show off | leave out the bragging | stay
        humble | do not praise yourself | remove all boasts | do not claim to be perfect | take out the self-praise |
        speak modestly | do not exaggerate your skills | No boasting. | Without bragging. | Modest. | Humble. | Nobody
        likes a braggart. | Is it modest? | do not brag | be humble | No self-praise. || do not flatter yourself | tone
        down the self-praise | Without any boasts.""",
    "concise": """leave out empty phrases | be concise | cut the waffle | say nothing superfluous | get to the point |
        remove the filler | do not ramble | drop the empty talk | avoid hollow phrases | be to the point | trim the
        padding | strip out the cliches | No filler. | Without empty words. | Concise. | Less waffle. | Every sentence
        should say something. | Is it free of waffle? | cut the empty phrases | do not waffle | No padding. || spare me
        the padding | do not pad it out | Without any filler.""",
    "humour": """tell a joke | be funny | crack a joke | make me laugh | be humorous | amuse the reader | add something
        funny | put in a joke | lighten it with a joke | be witty | show some humour | make it funny | entertain me | A
        joke. | include a joke | With a joke or two. | Something to laugh about. | Funny. | Humour. | I like a good
        laugh. | Does it make one smile? | make the reader laugh | be amusing | With some humour. || raise a laugh |
        include something funny | With a bit of humour.""",
    "empathetic": """show understanding | be empathetic | comfort the reader | show sympathy | be understanding |
        encourage me | show that you care | acknowledge how it feels | be warm | reassure the reader | feel with the
        reader | say something comforting | show empathy | Some comfort. | include a kind word | With a little comfort.
        | Sympathy. | Empathetic. | Kind words for somebody who struggles. | Does it understand how I feel? | show
        compassion | comfort me | With understanding. || be compassionate | include some comfort | With compassion.""",
    "careful": """warn of dangers | add a warning | be careful | mention the risks | say what to watch out for | point
        out the dangers | think of safety | warn the reader | remind me to be careful | give a safety tip | caution the
        reader | tell me what is dangerous | A warning. | With a hint at the risks. | bring in the risks | Safety
        first. | Careful. | Some word of caution. | The reader should know the risks. | Does it warn of hazards? | warn
        me | include a safety warning | With a word of warning. || caution me | include a warning | With a safety
        tip.""",
    "polite": """be courteous | be polite | say something polite | thank the reader | show good manners | use polite
        words | wish me luck | be gracious | add a courteous phrase | speak politely | behave like a well-mannered
        person | say thank you | Good manners. | include a polite phrase | With a friendly word. | A polite word. |
        Polite. | Courteous. | I value good manners. | Is it courteous? | be well-mannered | use courteous words |
        Politely. || mind your manners | include a word of thanks | With good manners.""",
}
VERBS = {
    "mention": """mention X | say something about X | talk about X | speak of X | bring up X | include X | refer to X |
        touch on X | bring X into it | say a word about X | name X | work in X | allude to X | tell me something about X
        | put X in | use the word X | X should come up. | Something about X. | A word on X. | With X. | I want to read
        about X. | More about X. || speak of X at some point | add a remark on X | write about X | X ought to be
        mentioned.""",
    "avoid": """avoid X | do not mention X | never speak of X | leave out X | say nothing about X | keep quiet about X |
        keep X out of it | stay away from X | drop X | remove X | omit X | do not talk about X | take out X | skip X |
        do not say a word about X | be silent about X | No X. | Without X. | Nothing about X. | X should not come up. |
        I do not want to read about X. | Anything but X. || do not bring up X | make no mention of X | leave X out |
        Never a word about X.""",
    "begin": """begin with X | start with X | open with X | mention X first | put X at the beginning | talk about X at
        the start | say something about X first | make X the first thing | lead with X | mention X in the first sentence
        | X at the beginning. | X should come first. | First of all X. || speak of X at the start | bring up X first |
        The first sentence should be about X.""",
    "end": """end with X | finish with X | close with X | mention X last | put X at the end | talk about X at the end |
        say something about X last | make X the last thing | conclude with X | mention X in the last sentence | X at the
        end. | X should come last. | Last of all X. || speak of X at the end | bring up X last | The last sentence
        should be about X.""",
    "twice": """mention X twice | mention X two times | speak of X twice | talk about X more than once | bring up X twice
        | say something about X twice | name X two times | Two sentences about X. || refer to X twice | Twice X.""",
    "atmost": """use at most N sentences | write no more than N sentences | say it in at most N sentences | stop after N
        sentences | do not use more than N sentences | keep it to N sentences at most | At most N sentences. | No more
        than N sentences. | N sentences at most. || stay within N sentences | A maximum of N sentences.""",
    "atleast": """use at least N sentences | write no fewer than N sentences | say it in at least N sentences | go on for
        N sentences or more | do not use fewer than N sentences | make it N sentences at least | At least N sentences. |
        No fewer than N sentences. | N sentences or more. || fill at least N sentences | A minimum of N sentences.""",
    "before": """mention X before Y | speak of X before Y | talk about X and then about Y | bring up X before Y | say
        something about X before Y | mention first X and then Y | X before Y. | First X, then Y. | X should come before
        Y. || refer to X before Y | Y after X.""",
    "both": """mention X and Y | say something about X and Y | talk about X and about Y | speak of both X and Y | bring
        up X and also Y | include X and Y | refer to X and to Y | Both X and Y. | X and Y should come up. | A word on X
        and one on Y. || mention both X and Y | X as well as Y.""",
    "beginboth": """begin with X and mention Y | start with X and say something about Y | open with X and speak of Y |
        begin with X and bring up Y | X first, and somewhere Y. || lead with X and include Y | First X, and Y somewhere.""",
    "endwithout": """end with X but do not mention Y | finish with X but leave out Y | close with X and avoid Y | end with
        X and say nothing about Y | X at the end, and no Y. || conclude with X but drop Y | Last X, but no Y.""",
    "butnot": """mention X but not Y | say something about X but not about Y | mention X but avoid Y | talk about X and
        leave out Y | speak of X but do not mention Y | include X and drop Y | X but not Y. | With X and without Y.""",
    "beginend": """begin with X and end with Y | start with X and finish with Y | open with X and close with Y | mention X
        first and Y last | X at the beginning and Y at the end.""",
}
COMBINATIONS = {"butnot": ("mention", "avoid"), "beginend": ("begin", "end")}  # verb -> the verbs that it joins
PARTS = {"twice": ("mention",), "before": ("mention",), "both": ("mention",), "beginboth": ("begin", "mention"),
         "endwithout": ("end", "avoid")}  # verb -> those that it asks for in other words
HELD_OUT_VERBS = ("twice",)
TRAINED_VERBS = tuple(verb for verb in VERBS if verb not in (*COMBINATIONS, *HELD_OUT_VERBS))
BARE = ("{}", "please {}", "{}, please", "{} please")
FRAMES = ("The response should {}", "The answer should {}", "it should {}", "make sure to {}", "try to {}",
          "could you please {}?", "could you {}?", "I want you to {}", "you should {}")


def combined(verbs):
    """Whether some verbs side by side ask for what a held-out combination joins."""
    apart = {part for verb in verbs for part in PARTS.get(verb, (verb,))}
    return any(apart.issuperset(joined) for joined in COMBINATIONS.values())


def split_wordings(text):
    """The wordings for pairs and those that are held out of them, of a text of the tables above."""
    pairs, _, held_out = " ".join(text.split()).partition(" || ")
    return pairs.split(" | "), held_out.split(" | ") if held_out else []


WORDINGS = {key: split_wordings(text) for key, text in (NAMED | VERBS).items()}

# ----------------------------------------------------------------------------------------------------------------
# Words and numbers

WORDS = """
penguins violins lighthouses volcanoes dragons submarines tulips pyramids owls trumpets glaciers robots camels kites
castles dolphins pianos comets tractors orchids wizards turtles balloons bridges zebras drums islands rockets peacocks
clowns cellos deserts lanterns foxes windmills pirates magnets otters cathedrals skateboards flamingos harps canyons
telescopes llamas puppets sunflowers trams walruses mirrors mermaids satellites hedgehogs flutes waterfalls helicopters
giraffes crowns fountains parrots guitars caves locomotives daffodils vampires falcons banjos reefs typewriters
kangaroos masks lagoons microscopes badgers accordions planets ferries cactuses knights wolves bagpipes meadows cameras
ostriches statues swamps umbrellas squirrels oboes moons gondolas ferns giants ravens tubas cliffs compasses hamsters
carnivals galaxies sledges roses gnomes pelicans organs valleys radios elephants murals geysers barometers beavers
ballads asteroids canoes lilies fairies swans mandolins jungles calculators crocodiles tapestries dunes hourglasses
moles operas eclipses scooters poppies trolls storks saxophones prairies televisions hippos mosaics icebergs
thermometers lizards waltzes meteors yachts violets witches vultures clarinets fjords keyboards jaguars portraits
oases sundials rabbits tangos nebulas unicycles thistles ogres cranes xylophones plateaus projectors koalas sculptures
tornadoes pendulums ferrets sonnets rainbows airships irises elves herons cymbals peninsulas telegraphs leopards
frescoes craters metronomes raccoons anthems auroras barges marigolds phantoms seagulls bassoons savannas turbines
monkeys emblems avalanches periscopes weasels lullabies sunsets chariots lupins ghosts sparrows ukuleles orchards
printers panthers obelisks whirlpools gyroscopes salamanders symphonies thunderclouds carousels hyacinths goblins
mammoths quartets sandcastles dandelions pharaohs lynxes triangles steamboats blizzards sphinxes gazelles choirs
hammocks begonias gladiators walnuts spaceships tambourines terraces orangutans chandeliers polkas canals nightingales
trapezes
""".split()
HELD_OUT_WORDS = WORDS[5::6]
TRAINED_WORDS = [word for word in WORDS if word not in set(HELD_OUT_WORDS)]
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()  # those that can be asked for
ONSETS = ("b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sp st str t th tr v w y z"
          ).split()
VOWELS = "a e i o u a e i o u ai ea ee oa oo ou".split()
CODAS = ["", "", "", *"b ck d g l ll m n nd ng nt p r rd rn rt sk ss st t x".split()]


def coin(rng):
    """A word that nobody has read: "brastoods", "thelk"."""
    syllables = rng.choice((1, 2, 2, 2, 3))
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
    word += rng.choice(("", "s", "s"))
    return coin(rng) if len(word) < 5 or word in WORDS else word


def some_words(rng, verb, words, made_up):
    """As many different words as a verb is about."""
    chosen = [any_word(rng, words, made_up) for _ in range(2 if "Y" in VERBS[verb] else 1)]
    return chosen if len(set(chosen)) == len(chosen) else some_words(rng, verb, words, made_up)


def any_word(rng, words=TRAINED_WORDS, made_up=0.5):
    return coin(rng) if rng.random() < made_up else rng.choice(words)


# ----------------------------------------------------------------------------------------------------------------
# From names to texts, and back


def parts(name):
    """("mention", ["owls"]) of "mention_owls"; (name, []) of a named objective; None of what is neither."""
    verb, *slots = name.split("_")
    if verb in VERBS:
        expected = "N" if verb.startswith("at") else "XY" if "Y" in VERBS[verb] else "X"
        good = len(slots) == len(expected) and all(re.fullmatch(r"[^\W_][\w'-]*", slot) for slot in slots)
        good = good and (expected != "N" or slots[0] in map(str, range(2, len(NUMBERS) + 2)))
        return (verb, slots) if good else None
    return (name, []) if name in NAMED else None


def fill(wording, verb, slots):
    """A wording with its words or its number put in."""
    if not slots:
        return wording
    if verb.startswith("at"):
        number = NUMBERS[int(slots[0]) - 2]
        return re.sub(r"\bN\b", number.capitalize() if wording.startswith("N ") else number, wording)
    return re.sub(r"\b[XY]\b", lambda match: slots["XY".index(match[0])], wording)


def frame(rng, wording):
    """The wording in one of the forms that people give a wish."""
    if wording[0].isupper() or rng.random() < 0.75:
        return wording
    if rng.random() < 0.3:
        return rng.choice(BARE).format(wording)
    return rng.choice(FRAMES).format(wording.removeprefix("do ") if wording.startswith("do not ") else wording)


def say(rng, name, which="pairs"):
    """An objective's name as a wish. which: wordings for "pairs", those "held out" of them, or "all"."""
    verb, slots = parts(name)
    pairs, held_out = WORDINGS[verb]
    choice = {"pairs": pairs, "held out": held_out or pairs, "all": pairs + held_out}[which]
    return fill(frame(rng, rng.choice(choice)), verb, slots)


@lru_cache(maxsize=1 << 17)
def objective(name):
    """The Objective of a name, in some wordings of those for pairs; its description is the first in the table."""
    verb, slots = parts(name)
    rng, (first, *others) = random.Random(name), [fill(wording, verb, slots) for wording in WORDINGS[verb][0]]
    framed = [say(rng, name) for _ in range(8 if slots else 40)]
    return Objective(name, first, (*others, *framed))


def worded(rng, name, which):
    """The Objective of a name, described in a wording drawn from `which`, and in no other."""
    return Objective(name, say(rng, name, which))


def without_frame(text):
    """A wish as it stands in the tables: small letters, no frame, no stop at the end."""
    text = " ".join(text.lower().split()).rstrip(".!?")
    for form in (*BARE[1:], *FRAMES):
        before, after = form.lower().rstrip(".!?").split("{}")
        if text.startswith(before) and text.endswith(after):
            text = text[len(before):len(text) - len(after)]
    return re.sub("^do not |^not |^don['’]t ", "do not ", text)


def pattern(wording):
    """A regular expression, not heeding case, for a wording without its stop."""
    slots = {"X": r"(?P<X>[\w'-]+)", "Y": r"(?P<Y>[\w'-]+)", "N": rf"(?P<N>{'|'.join(NUMBERS)}|\d+)"}
    return re.sub(r"\b[XYN]\b", lambda match: slots[match[0]], re.escape(wording.rstrip(".!?")))


@lru_cache
def patterns():
    """[(regular expression, key)], those with fewer open places before those with more."""
    found = [(pattern(wording), key) for key, lists in WORDINGS.items() for wording in sum(lists, [])]
    found.sort(key=lambda item: item[0].count("(?P"))
    return [(re.compile(text, re.IGNORECASE), key) for text, key in found]


@lru_cache(maxsize=1 << 17)
def meant(text):
    """The name of the objective that a text asks for, where it is one of the wordings; else None."""
    text = without_frame(text)
    for expression, key in patterns():
        if match := expression.fullmatch(text):
            slots = [str(NUMBERS.index(said) + 2) if slot == "N" and said in NUMBERS else said
                     for slot, said in sorted(match.groupdict().items())]
            name = "_".join([key, *slots])
            return name if parts(name) else None
    return None


def nearest_wish(text):
    """What a text may ask for, however little it looks like one of the wordings: (likeness from 0 to 1, the wording
    with the text's own word in it, the objective's name). Wishes about one word, or none, only."""
    text, found = without_frame(text), (0.0, "", "")
    for key, lists in WORDINGS.items():
        for wording in sum(lists, []):
            slots = re.findall(r"\b[XYN]\b", wording)
            for word in [""] if not slots else set(re.findall(r"[\w'-]+", text)) if slots == ["X"] else []:
                other = re.sub(rf"\b{re.escape(word)}\b", "X", text) if word else text
                likeness = difflib.SequenceMatcher(None, other.lower(), wording.lower().rstrip(".!?")).ratio()
                name = f"{key}_{word}" if word else key
                if parts(name) and word not in ("the", "a", "an"):
                    filled = fill(wording, key, [word] if word else []).rstrip(".!?")
                    found = max(found, (likeness, filled, name))
    return found
