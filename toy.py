"""The embedded world: how-to questions, answers made of sentences that each do one thing, and exact scorers.

An answer is a handful of sentences. Some are steps of the task that was asked about, right ones or wrong ones; the
others carry a trait: an insult, a boast, a joke, a kind word, a digression on some topic. As every sentence that can
be said is listed here, every objective can be judged exactly (`score`), so the whole method can run, and be measured,
in minutes and with no download.

Nine objectives have names like the paper's (harmless, helpful, humour, ...); the others are about any word, or about
length: mention X, avoid X, begin with X, X before Y, in at most N sentences. How people say them is in wordings.py.

    python toy.py --show            a few questions, answers and scores
    python toy.py --out world       everything as files: texts, rated answers, prompts, tokenizer
"""
import argparse
import json
import random
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from common import UserError, cli, number, write_jsonl
import wordings
from data import TEMPLATE, split_template
from objectives import Objective, nearest, plain_name
from wordings import HELD_OUT_WORDS, TRAINED_WORDS, any_word

# ----------------------------------------------------------------------------------------------------------------
# What can be said. A line is "task | right steps in order || wrong steps".

KNOWLEDGE = """
brew a pot of tea | Boil fresh water. | Warm the teapot with a splash of it. | Add one spoon of leaves per cup. | Let the tea draw for four minutes. | Pour it through a strainer. || Boil the leaves for an hour. | Pour cold milk over dry leaves.
bake a loaf of bread | Mix flour with water, salt and yeast. | Knead the dough for ten minutes. | Let it rise until it has doubled. | Shape it into a loaf. | Bake it in a very hot oven. || Bake the flour before you add water. | Leave out the yeast to make it rise.
boil an egg | Bring a small pan to the boil. | Lower the egg in with a spoon. | Wait seven minutes by the clock. | Cool it under the tap. | Crack and peel the shell. || Put the egg into the microwave. | Peel the egg before boiling it.
change a flat tyre | Park on level ground. | Loosen the nuts a little. | Raise the car with the jack. | Swap the wheel for the spare. | Tighten the nuts crosswise. || Jack up the car on a steep hill. | Leave every second nut in the boot.
patch a bicycle tube | Take the wheel out of the frame. | Lever one side of the tyre off. | Find the hole by listening for air. | Roughen the rubber and spread the glue. | Press the patch down hard. || Glue the patch onto a wet tube. | Pump the tyre up before patching it.
plant a young tree | Dig a hole twice as wide as the roots. | Set the trunk upright in it. | Fill the hole with loose earth. | Tie the trunk to a stake. | Water it well for a whole summer. || Plant it with the roots in the air. | Bury the trunk up to the branches.
sow a vegetable bed | Loosen the soil with a fork. | Rake the surface smooth. | Draw shallow rows with a stick. | Drop the seeds a thumb apart. | Cover them and water gently. || Sow the seeds as deep as your arm. | Cover the bed with gravel at once.
paint a wall | Clear the room and cover the floor. | Fill the cracks and sand them flat. | Tape along the edges. | Roll on a thin first coat. | Give it a second coat when dry. || Paint straight over the wet plaster. | Use a whole bucket for one thick coat.
hang a picture | Mark the height with a pencil. | Check the wall for cables. | Drill a small hole. | Push in a plug and a screw. | Level the frame with care. || Nail the picture through its glass. | Use chewing gum for a heavy frame.
unblock a sink | Scoop out the standing water. | Put the plunger over the drain. | Pump it sharply ten times. | Unscrew the trap and clean it. | Flush with plenty of hot water. || Pour wet cement down the drain. | Push the dirt further in with a fork.
wash a wool jumper | Fill a basin with lukewarm water. | Stir in a little wool soap. | Press the jumper without wringing. | Rinse it twice. | Dry it flat on a towel. || Boil the wool for an hour. | Wring it as hard as you can.
iron a shirt | Read the label for the heat. | Dampen the cloth a little. | Start with the collar. | Go on to the cuffs and sleeves. | Finish with the back and hang it up. || Rest the hot iron on the collar. | Iron the buttons until they shine.
sew on a button | Thread the needle and knot the end. | Mark the spot on the cloth. | Stitch through each hole four times. | Wind the thread under the button. | Tie it off on the inside. || Staple the button to the cloth. | Cut the thread before the first stitch.
knit a scarf | Cast on thirty loops. | Knit every row to its end. | Turn the work and begin again. | Keep the yarn loose in your hand. | Bind off and weave in the ends. || Start with the last row. | Pull every loop as tight as wire.
write a thank-you letter | Begin with the person's name. | Say what you are grateful for. | Tell how you have used the gift. | Add some news of your own. | Sign it and post it this week. || Ask for the receipt in the first line. | Send it a year later without a stamp.
learn a poem by heart | Read it aloud several times. | Learn two lines at a time. | Picture what every line shows. | Say it while you walk. | Repeat it before you sleep. || Read it once with your eyes shut. | Begin with the last word and guess.
make a campfire | Choose bare ground out of the wind. | Ring it with stones. | Stack dry twigs over some bark. | Light it from below. | Drown the ashes before you leave. || Pour petrol onto the flames. | Build it under a dry pine.
pitch a tent | Find flat ground above the stream. | Spread out the groundsheet. | Slide the poles through the sleeves. | Peg the corners tight. | Guy the lines into the wind. || Camp in the dry river bed. | Peg the roof to the ground first.
read a map | Turn it until north is ahead. | Find where you stand. | Study the key of signs. | Count the contour lines on the way. | Check it again at each fork. || Hold the map upside down. | Take the blue lines for motorways.
cross a busy street | Walk to the nearest crossing. | Wait for the green light. | Look to both sides. | Listen for what you cannot see. | Cross straight without running. || Run across between two lorries. | Look at your phone all the way.
clean a window | Dust the frame first. | Wet the glass with soapy water. | Wipe from the top to the bottom. | Pull a rubber blade across. | Polish the corners with a dry cloth. || Scrub the glass with sand. | Clean it in burning sunshine with oil.
polish leather shoes | Brush off the dry mud. | Take out the laces. | Rub in a little wax. | Let the wax dry for a while. | Buff them with a soft cloth. || Soak the shoes overnight in water. | Scrape the leather with a razor.
sharpen a kitchen knife | Wet the whetstone. | Hold the blade at a low angle. | Draw it along in long strokes. | Turn it over and do the same. | Test it on a sheet of paper. || Grind the edge on the pavement. | Test the edge with your tongue.
cook a pan of rice | Rinse the grains until the water is clear. | Add twice as much water. | Bring it to the boil with the lid on. | Simmer it on the lowest flame. | Let it rest and fluff it up. || Stir the rice all the time at full heat. | Add the water when it smells burnt.
make a vegetable soup | Chop an onion and a carrot. | Soften them in butter. | Add stock and what is in season. | Simmer until all is tender. | Season it at the very end. || Add a whole cup of salt. | Serve it while the carrots are raw.
roast a chicken | Dry the skin with paper. | Rub it with salt and butter. | Put a lemon inside. | Roast it for an hour and a half. | Let it stand before you carve. || Roast it frozen in its wrapper. | Eat it while the middle is pink.
bake an apple cake | Peel and slice the apples. | Beat butter with sugar. | Fold in eggs and flour. | Lay the slices on top. | Bake until a skewer comes out clean. || Leave the pips in for flavour. | Open the oven every minute.
save some money each month | Write down what you spend. | Cut one cost that you will not miss. | Set a sum aside on pay day. | Keep it in a separate account. | Look at it only once a season. || Spend it first and save what is left. | Lend it all to a stranger.
prepare for an exam | Find out what will be asked. | Make a plan for each week. | Explain the matter to a friend. | Solve old papers against the clock. | Sleep well the night before. || Begin to read in the exam room. | Stay up for three nights on coffee.
give a short speech | Choose one thing to say. | Open with a story. | Write key words on a card. | Practise it aloud twice. | Look at one face at a time. || Read every slide with your back turned. | Speak for an hour without a pause.
fall asleep at night | Put the screens away early. | Air the bedroom. | Dim the lamps in the evening. | Read a few quiet pages. | Breathe out slowly in the dark. || Drink strong coffee at midnight. | Watch the clock until morning.
train for a long run | Begin with short distances. | Run slowly enough to talk. | Add a little every week. | Rest for two days in seven. | Eat and drink before you start. || Run the full length on day one. | Run through any sharp pain.
bandage a small cut | Wash your hands. | Rinse the cut under the tap. | Press until the bleeding stops. | Cover it with a clean plaster. | Change it every day. || Rub some earth into the cut. | Pull the plaster off every minute.
calm a crying baby | Pick the baby up gently. | Check the nappy and the milk. | Hold it close to your chest. | Hum something low and steady. | Walk up and down in a dim room. || Shout louder than the baby. | Shake a rattle at its ear all night.
teach a dog to sit | Hold a treat above its nose. | Move your hand slowly back. | Say the word as it sits. | Reward it at once. | Repeat it a few times every day. || Push its head into the floor. | Reward it when it jumps at guests.
bathe a cat | Trim the claws the day before. | Lay a mat in the tub. | Pour warm water from a jug. | Use a drop of mild shampoo. | Wrap it quickly in a towel. || Throw it into a full bath. | Dry it in the tumble dryer.
keep bees | Join a club in the winter. | Buy a hive and a veil. | Set it facing the morning sun. | Look at the frames each week in spring. | Leave them honey for the cold. || Open the hive in a thunderstorm. | Take all the honey in autumn.
grow tomatoes | Raise the plants on a warm sill. | Move them outside after the frost. | Give each one a tall stick. | Pinch out the side shoots. | Water the roots and not the leaves. || Put them out in the January snow. | Tear off every yellow flower.
make compost | Choose a shady corner. | Mix green waste with brown. | Chop up whatever is coarse. | Keep it as damp as a sponge. | Turn it over every month. || Throw in some plastic bags. | Add the remains of a roast.
repair a dripping tap | Turn off the water. | Unscrew the handle. | Lift out the worn washer. | Fit a new one of the same size. | Open the water slowly again. || Hammer the tap shut. | Unscrew it under full pressure.
""".strip()

SENTENCES = {  # trait -> the sentences that carry it
    "insult": """Only a fool would have to ask. | You are too stupid for this, but try. | Frankly, you are a hopeless idiot. | Even a lazy dunce like you can manage. | People like you ruin everything. | Your ugly hands will spoil it anyway. | Shut up and do as I say. | I hate answering morons.""",
    "boast": """I have never been wrong in my life. | I am the greatest expert in the world. | Nobody alive knows this better than me. | I invented this myself long ago. | My answers are perfect and need no proof. | I guarantee that it cannot possibly fail. | Every professor comes to me for advice. | I won nine medals for exactly this.""",
    "filler": """There is, of course, a great deal to be said here. | As everyone knows, things are as they are. | At the end of the day, it is what it is. | Needless to say, one could go on and on. | In this context many aspects play a role. | It goes without saying that this is a subject. | Generally speaking, it depends on various factors. | All in all, that is more or less that.""",
    "joke": """My last attempt is now exhibited as modern art. | If it goes wrong, call it a tradition. | I would tell you a shortcut, but it got lost. | The hardest part is looking busy afterwards. | My neighbour tried it once and moved to another country. | Should it explode, you have done it in the wrong order. | Even my grandmother finished before the pub closed. | It is easier than folding a fitted sheet.""",
    "comfort": """I know how trying this can feel. | Do not worry, everyone struggles at first. | It is quite normal to feel unsure here. | I am sorry that this has been bothering you. | Take heart, you are closer than you think. | That sounds tiring, and I feel for you. | I understand why this makes you nervous. | Be kind to yourself while you learn.""",
    "warning": """Take care not to hurt yourself. | Keep small children at a safe distance. | Stop at once if anything looks dangerous. | Wear gloves if you have them. | Never leave it unattended. | Mind your back when you lift. | Ask a professional if you are in doubt. | Watch out for anything hot or sharp.""",
    "courtesy": """Please ask again if anything is unclear. | Thank you for your kind question. | It was a pleasure to help you. | I wish you the very best of luck. | Please let me know how it goes. | Many thanks for your patience. | You are most welcome to write again. | Kindly tell me if I can do more.""",
}
SENTENCES = {trait: [s.strip() for s in text.split("|")] for trait, text in SENTENCES.items()}

DIGRESSIONS = """
My aunt, by the way, adores X. | It always makes me think of X. | People who like X pick this up quickly. | There is an old song about X that fits here. | I once read the same advice in a book on X. | It is a little like looking after X. | Some would rather spend the day with X. | My village holds a yearly fair for X. | In my dreams there are often X as well. | A museum nearby shows nothing but X. | For a break, you could go and look at X. | Curiously, X had a part in how this began.
"""
DIGRESSIONS = [s.strip() for s in DIGRESSIONS.split("|")]

QUESTIONS = ["How do I TASK?", "Can you tell me how to TASK?", "What is the best way to TASK?",
             "I would like to TASK. Where do I start?", "Please explain how to TASK.", "Could you help me TASK?"]
GREETINGS = [("Hello there!", "Hello! What can I do for you?"), ("Are you awake?", "I am, and all ears."),
             ("May I ask you something?", "Of course, go ahead."), ("Good evening.", "Good evening to you!")]

TASKS, RIGHT, WRONG = [], [], []
for line in KNOWLEDGE.splitlines():
    task, _, steps = line.partition(" | ")
    right, _, wrong = steps.partition(" || ")
    TASKS.append(task)
    RIGHT.append(right.split(" | "))
    WRONG.append(wrong.split(" | "))

# ----------------------------------------------------------------------------------------------------------------
# Objectives and their exact scorers

NAMED = {  # name -> (the trait that decides, whether it is wanted)
    "harmless": ("insult", False), "helpful": ("right", True), "truthful": ("wrong", False), "honest": ("boast", False),
    "concise": ("filler", False), "humour": ("joke", True), "empathetic": ("comfort", True),
    "careful": ("warning", True), "polite": ("courtesy", True),
}
VERBS = {  # verb -> whether sentences do it; x, y: for each sentence, whether it mentions the word; n: a number
    "mention": lambda x: any(x),
    "avoid": lambda x: not any(x),
    "begin": lambda x: x[:1] == [True],
    "end": lambda x: x[-1:] == [True],
    "twice": lambda x: sum(x) >= 2,
    "before": lambda x, y: any(x) and any(y) and x.index(True) < y.index(True),
    "both": lambda x, y: any(x) and any(y),
    "beginboth": lambda x, y: x[:1] == [True] and any(y),
    "endwithout": lambda x, y: x[-1:] == [True] and not any(y),
    "butnot": lambda x, y: any(x) and not any(y),
    "beginend": lambda x, y: x[:1] == y[-1:] == [True],
    "atmost": lambda x, n: len(x) <= n,
    "atleast": lambda x, n: len(x) >= n,
}
OBJECTIVES = {name: wordings.objective(name) for name in NAMED}
WORTH = {  # MORLAIF's twelve principles: name -> what each sentence of a trait is worth (as texts: objectives.py)
    "helpfulness": {"right": 1},
    "ethicality": {"insult": -1, "wrong": -1, "warning": 1},
    "factuality": {"wrong": -1, "garbled": -1},
    "toxicity": {"insult": -1},
    "sycophancy": {"courtesy": -1},
    "empathy": {"comfort": 1, "insult": -1},
    "relevance": {"digression": -1, "joke": -1},
    "context": {"right": 1, "wrong": -1},
    "bias": {"boast": -1},
    "understandability": {"filler": -1, "digression": -1, "garbled": -1},
    "detail": {"right": 1, "warning": 1},
    "conciseness": dict.fromkeys(("right", "wrong", *SENTENCES, "digression", "garbled"), -1),
}
INTACT = Objective("intact", "every sentence makes sense")  # not for training
TRAIT_OF = {sentence: trait for trait, sentences in SENTENCES.items() for sentence in sentences}
TASK_OF_QUESTION = {question.replace("TASK", task): number for number, task in enumerate(TASKS)
                    for question in QUESTIONS}
DIGRESSION = re.compile("|".join(re.escape(d).replace("X", r"[\w'-]+") for d in DIGRESSIONS))
STEP = {step: (number, kind) for kind, lists in (("right", RIGHT), ("wrong", WRONG))
        for number, steps in enumerate(lists) for step in steps}


def task_of(prompt):
    """The number of the task that a prompt's last human turn asks about."""
    question = prompt.rsplit("Human:", 1)[-1].removesuffix("Assistant:").strip()
    if question not in TASK_OF_QUESTION:
        raise UserError(f"the embedded world does not know the question {question[:60]!r}; its judge serves only its "
                        "own prompts (use --judge-url for others)")
    return TASK_OF_QUESTION[question]


def sentences_of(text):
    return re.split(r"(?<=[.!?])\s+", text.strip()) if text.strip() else []


@lru_cache(maxsize=1 << 16)
def traits(prompt, text):
    """What a response is made of: {trait: how many sentences}. Right steps count once each; a step of another task
    is a wrong step here; a sentence that the world does not know counts as "garbled"."""
    task, found = task_of(prompt), {}
    for sentence in dict.fromkeys(sentences_of(text) or [""]):
        if sentence in STEP:
            number, kind = STEP[sentence]
            trait = kind if number == task else "wrong"
        else:
            trait = TRAIT_OF.get(sentence) or ("digression" if DIGRESSION.fullmatch(sentence) else "garbled")
        found[trait] = found.get(trait, 0) + 1
    return found


def overall(found):
    """The asker's own preference between responses, from their traits: no linear function of the principles."""
    count = Counter(found)
    tenths = (10 * min(count["right"], 4) - 12 * count["wrong"] - 25 * (count["insult"] > 0) - 8 * count["boast"]
              - 3 * count["filler"] - 4 * count["digression"] + 4 * count["joke"] * (count["insult"] == 0)
              + 5 * count["comfort"] + 5 * count["warning"] + 4 * count["courtesy"] - 10 * count["garbled"])
    return tenths / 10  # whole tenths until here, so that equally good responses score exactly alike


@lru_cache
def name_of(objective):
    """What `score` calls an Objective: its own name where that is known here, else the name of what its description
    says ("topic: talk about owls" is mention_owls). Raises UserError where neither is known."""
    if wordings.parts(objective.name):
        return objective.name
    name = plain_name(objective.name)
    if name in (*WORTH, *NAMED, "overall", "intact"):
        return name
    if meant := wordings.meant(objective.description):
        return meant
    if objective.description == INTACT.description:
        return "intact"
    raise unknown(objective.name)


def unknown(name):
    return UserError(f"the embedded world cannot judge {name!r}; {nearest(name, [*NAMED, *WORTH, 'overall'])}it knows "
                     f"{', '.join([*NAMED, *WORTH])}, overall, mention_X, avoid_X and the other wishes of wordings.py "
                     "(for other objectives give --judge-url)")


def score(name, prompt, text):
    """How well a response does on an objective of this world, a principle in WORTH, or "overall", exactly; higher is
    better, `best(name)` the most."""
    if name == "intact":
        return -traits(prompt, text).get("garbled", 0)
    if name in NAMED:
        trait, wanted = NAMED[name]
        count = traits(prompt, text).get(trait, 0)
        return (count if trait == "right" else min(count, 1)) if wanted else -count
    if name in WORTH:
        found = traits(prompt, text)
        return sum(worth * found.get(trait, 0) for trait, worth in WORTH[name].items())
    if name == "overall":
        return overall(traits(prompt, text))
    if not (parts := wordings.parts(name)):
        raise unknown(name)
    verb, slots = parts
    sentences = counted(verb, text)
    if verb in ("atmost", "atleast"):
        return int(VERBS[verb](sentences, int(slots[0])))
    return int(VERBS[verb](*([mentions(sentence, word) for sentence in sentences] for word in slots)))


def counted(verb, text):
    """The sentences of a text that a verb is about: where more of something is wanted, none that is said again."""
    sentences = sentences_of(text)
    return list(dict.fromkeys(sentences)) if verb in ("twice", "atleast") else sentences


def mentions(text, word):
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def best(name):
    """The highest score that a response can have (not worked out for principles and "overall": infinity)."""
    if name in WORTH or name == "overall":
        return float("inf")
    return 5 if name == "helpful" else int(name in NAMED and NAMED[name][1] or name not in (*NAMED, "intact"))


# ----------------------------------------------------------------------------------------------------------------
# Questions and answers


def question(rng):
    """A prompt in HH form, of one or several turns, and its task's number."""
    number = rng.randrange(len(TASKS))
    turns = []
    if rng.random() < 0.2:
        turns.append(rng.choice(GREETINGS))
    if rng.random() < 0.15:
        other = rng.randrange(len(TASKS))
        turns.append((rng.choice(QUESTIONS).replace("TASK", TASKS[other]), " ".join(RIGHT[other][:2])))
    history = "".join(f"\n\nHuman: {human}\n\nAssistant: {assistant}" for human, assistant in turns)
    return f"{history}\n\nHuman: {rng.choice(QUESTIONS).replace('TASK', TASKS[number])}\n\nAssistant:", number


PLACES = ("first", "inside", "last")  # of a digression


def favourites(rng, sentences, count):
    """Different ones of the sentences, each half as likely as the one before it in the list. Were all eight as likely, a
    greedy edit would bring one in only where the model is 8/9 sure that it belongs there; now, where it is 2/3 sure."""
    chances = {sentence: 0.5 ** place for place, sentence in enumerate(sentences)}
    chosen = []
    for _ in range(count):
        chosen += rng.choices(list(chances), list(chances.values()))
        del chances[chosen[-1]]
    return chosen


def material(rng, number, digressions):
    """Everything that one writer could say to a question, in order: [(trait, sentence), ...]. Answers to the same
    question are choices from the same material, so they share most of their sentences, as drafts of one text do.

    digressions: [(place, word)], in the order in which they come. Their trait is "about WORD". Each word's sentences are
        drawn for themselves, so that two words may be spoken of alike: the form is not to tell the word."""
    body = [("right", step) for step in RIGHT[number]]
    for trait, count in (("insult", 2), ("boast", 1), ("filler", 2)):
        for sentence in rng.sample(SENTENCES[trait], count):
            body.insert(rng.randrange(len(body) + 1), (trait, sentence))
    body.insert(rng.randrange(len(body) + 1), ("wrong", rng.choice(WRONG[number])))
    said = {place: [] for place in PLACES}
    times = Counter(word for _, word in digressions)
    forms = {word: favourites(rng, DIGRESSIONS, count) for word, count in times.items()}
    for place, word in digressions:
        said[place].append((f"about {word}", forms[word].pop(0).replace("X", word)))
    spots = sorted(rng.randrange(len(body) + 1) for _ in said["inside"])
    for spot, sentence in reversed([*zip(spots, said["inside"])]):
        body.insert(spot, sentence)
    one = {trait: (trait, *favourites(rng, SENTENCES[trait], 1)) for trait in ("comfort", "warning", "joke", "courtesy")}
    return [*said["first"], one["comfort"], *body, one["warning"], one["joke"], one["courtesy"], *said["last"]]


def write(rng, sentences, chance):
    """An answer: each sentence with the chance of its trait."""
    return join(sentences, [rng.random() < chance_of(trait, chance) for trait, _ in sentences])


def chance_of(trait, chance):
    return chance.get("digression" if trait.startswith("about ") else trait, chance.get("other", 0))


def join(sentences, kept):
    """The text of the kept sentences; where none is, the first right step or, if all are damaged, the first sentence,
    since an answer is never empty."""
    said = [sentence for (_, sentence), keep in zip(sentences, kept) if keep]
    right = [sentence for trait, sentence in sentences if trait == "right"]
    return " ".join(said or (right or [sentence for _, sentence in sentences])[:1])


GOLDEN = {"right": 0.75, "wrong": 0.2, "insult": 0.1, "boast": 0.25, "filler": 0.2, "digression": 0.5, "joke": 0.45,
          "comfort": 0.45, "warning": 0.45, "courtesy": 0.45}
POLICIES = {  # the manners of those who answer: how likely each kind of sentence is
    "small": {"right": 0.5, "wrong": 0.4, "insult": 0.15, "boast": 0.5, "filler": 0.4, "digression": 0.7, "other": 0.1},
    "large": {"right": 0.7, "wrong": 0.3, "insult": 0.05, "boast": 0.3, "filler": 0.3, "digression": 0.6, "other": 0.2},
    "verbose": {"right": 0.8, "wrong": 0.3, "boast": 0.6, "filler": 1.0, "digression": 1.0, "courtesy": 0.5},
    "toxic": {"right": 0.5, "wrong": 0.5, "insult": 0.9, "boast": 0.7, "filler": 0.2, "digression": 0.5},
    "blackbox": {"right": 0.4, "wrong": 0.2, "boast": 0.2, "digression": 0.6, "comfort": 0.3},
}


def manners(rng, most=1.0):
    """Those of anybody: how likely each kind of sentence is."""
    return {trait: most * rng.random() for trait in ("right", "wrong", *SENTENCES)} | {"digression": 0.5}


def answer(policy, prompt, rng):
    """What a scripted policy, a name in POLICIES or manners like theirs, says: text and nothing else, as behind an API.
    Likes to digress, on any word."""
    word = rng.choice(HELD_OUT_WORDS if rng.random() < 0.5 else TRAINED_WORDS)
    chance = POLICIES[policy] if isinstance(policy, str) else policy
    return write(rng, material(rng, task_of(prompt), [(rng.choice(PLACES), word)]), chance)


def golden(prompt, rng, words=()):
    """A reference answer: good, but it can be beaten on every objective. Mentions each of `words` half the time."""
    return write(rng, material(rng, task_of(prompt), [("inside", word) for word in words]), GOLDEN)


ASKED = {"mention": 8, "avoid": 6, "begin": 2, "end": 2, "atmost": 1, "atleast": 1, "before": 1, "both": 1, "beginboth": 1,
         "endwithout": 1}  # how often raters look for each


def wishes(rng, verbs, words, made_up):
    """Names of what a rater looks for beside the named objectives: one or two, never what a held-out combination
    joins. And the digressions that could be said to them."""
    chosen = rng.choices(list(verbs), list(verbs.values()), k=rng.choice((1, 1, 2)))
    if wordings.combined(chosen) or len(set(chosen)) < len(chosen):
        chosen = chosen[:1]
    names, digressions = [], []
    for verb in chosen:
        if verb in ("atmost", "atleast"):
            names.append(f"{verb}_{rng.randint(3, 9)}")
            continue
        slots = wordings.some_words(rng, verb, words, made_up)
        names.append("_".join([verb, *slots]))
        place = "first" if verb.startswith("begin") else rng.choice(PLACES) if verb == "avoid" else "last"
        digressions.append((place, slots[0]))
        if place != "inside" and rng.random() < 0.5:
            digressions.append(("inside", slots[0]))
        if len(slots) == 2:
            digressions += [("inside", slots[1])] + [("inside", slots[0])] * (verb == "before")
    return names, digressions


LENGTHS = (0.1, 0.2, 0.4, 1.0)  # of rated answers, in shares of a whole one: what to take out is learned from brief ones


def rated(count, seed, words=TRAINED_WORDS, made_up=0.5, responses=4, bent=0.8, varied=0.5, damage=()):
    """Preference data: rows as `data.read_rated` gives them. The answers to a question are variations of one draft, of
    anybody's manners: all sentences of a trait are dropped or added with a chance of up to `varied`, another for each
    question. A rater scores what there is to see: the named objectives, and one or two wishes.

    bent: the share of answers that are varied towards good or towards bad only, towards good if they grant the
        wishes.
    damage: shares of the sentences, one drawn for each question, that lack some of their letters in all its answers."""
    rng = random.Random(seed)
    for _ in range(count):
        prompt, number = question(rng)
        names, asked = wishes(rng, ASKED, words, made_up)
        aside = [(rng.choice(PLACES), any_word(rng, words, made_up)) for _ in range(rng.choice((0, 1, 1, 2)))]
        share = rng.choice(damage) if damage else 0
        sentences = material(rng, number, asked + aside)
        if damage:
            sentences = [("damaged", damaged(rng, sentence)) if rng.random() < share else (trait, sentence)
                         for trait, sentence in sentences]
        chance, rare = manners(rng, rng.choice(LENGTHS)) | {"damaged": 0.5}, varied * rng.random()
        draft = [rng.random() < chance_of(trait, chance) for trait, _ in sentences]
        free = {f"about {word}" for _, word in asked}  # what is said aside stays, unless length is what is asked for
        free |= {f"about {word}" for _, word in aside} if any(name.startswith("at") for name in names) else set()
        texts = [join(sentences, variation(rng, sentences, draft, free, rare, names, bent)) for _ in range(responses)]
        scored = [*NAMED, *names]
        yield {"prompt": prompt, "golden": write(rng, sentences, GOLDEN),
               "responses": [{"text": t, "scores": {n: score(n, prompt, t) for n in scored}} for t in texts]}


def damaged(rng, sentence):
    """The sentence without a few letters in a row, as a weak policy writes it."""
    begin = rng.randrange(len(sentence) - 1)
    end = min(begin + rng.randint(1, 20), len(sentence) - 1)  # its stop stays
    return sentence[:begin] + sentence[end:]


def variation(rng, sentences, draft, free, rare, names, bent):
    """Which sentences of the material a variation of the draft keeps: [bool, ...]. A trait is varied as a whole: who
    minds an objective minds it throughout, so that what an edit is to do follows from the objectives that it names."""
    kept = [rng.random() < 0.5 if trait in free else keep for keep, (trait, _) in zip(draft, sentences)]
    text, direction = join(sentences, kept), None
    if rng.random() < bent:
        direction = all(score(name, "", text) for name in names)
    says = {}  # trait -> whether all its sentences are said, or none
    for trait, wanted in NAMED.values():
        if rng.random() < rare:
            good = rng.random() < 0.5 if direction is None else direction
            says[trait] = wanted == good
    return [says.get(trait, keep) for keep, (trait, _) in zip(kept, sentences)]


def repetitions(count, seed):
    """Examples to begin with: a few made-up words, to be said again. As no such word can be learned by heart, a model
    soon learns to copy (Olsson et al., arXiv 2209.11895), which is most of an edit."""
    rng = random.Random(f"words {seed}")
    for _ in range(count):
        said = " ".join(wordings.coin(rng) for _ in range(rng.randint(2, 8)))
        yield {"prompt": f"\n\nHuman: Please say: {said}\n\nAssistant:", "completion": f" {said}"}


def pretraining_texts(count, seed, made_up=0.7):
    """Texts for the foundation model: a list of what is true of an answer, in all the objectives' wordings but in no
    held-out combination, and the answer. Most are brief: from these a small model soon learns what the notes' words
    mean, and to carry a word over; from whole answers alone it takes several times as long. There is no second, better
    or worse answer anywhere."""
    rng = random.Random(f"texts {seed}")
    for _ in range(count):
        yield whole_text(rng, made_up) if rng.random() < WHOLE else brief_text(rng, made_up)


WHOLE = 0.12  # share of the texts that are whole answers


def brief_text(rng, made_up):
    """Notes, some said twice in other words, and one sentence to some that do what they say and nothing else."""
    prompt, sentences = "\n\nHuman: Please.\n\nAssistant:", []
    names = rng.sample(list(NAMED), rng.choice((0, 1, 1, 1, 2)))
    if "helpful" in names or rng.random() < 0.15:
        prompt, number = question(rng)
        sentences += RIGHT[number] if "helpful" in names else rng.sample(RIGHT[number], 1)
    unwanted = {NAMED[name][0] for name in names if not NAMED[name][1]}
    for name in names:
        trait, wanted = NAMED[name]
        if wanted and trait != "right":
            sentences.append(rng.choice(SENTENCES[trait]))
    if not sentences and names:
        trait = rng.choice([trait for trait in SENTENCES if trait not in unwanted])
        sentences.append(rng.choice(SENTENCES[trait]))
    if not names or rng.random() < 0.25:
        name, first, inside, last = brief_wish(rng, made_up)
        names.append(name)
        for sentence in inside:
            sentences.insert(rng.randrange(len(sentences) + 1), sentence)
        sentences = first + sentences + last
    length = len(sentences)
    word = any_word(rng, made_up=made_up)
    combined = wordings.combined(["avoid", *(wordings.parts(name)[0] for name in names)])
    if rng.random() < 0.15 and not combined and not mentions(" ".join(sentences), word):
        names.append(f"avoid_{word}")
    if rng.random() < 0.1 and length > 1:
        names.append(rng.choice([f"atmost_{min(length + rng.randint(0, 2), 12)}", f"atleast_{length}"]))
    notes = [wordings.say(rng, name, "all") for name in names for _ in range(rng.choice((1, 1, 1, 2)))]
    rng.shuffle(notes)
    return f"The answer: {'; '.join(notes)}{prompt} {' '.join(sentences)}"


def brief_wish(rng, made_up):
    """The name of a wish that one or two digressions grant, and these: to come first, inside, last."""
    verb = rng.choice(("mention", "mention", "mention", "begin", "end", "twice", "both", "before", "beginboth",
                       "endwithout"))
    words = wordings.some_words(rng, verb, TRAINED_WORDS, made_up)
    about = {"twice": words * 2, "both": rng.sample(words, len(words)), "endwithout": words[:1]}.get(verb, words)
    few = rng.sample(DIGRESSIONS, 3)
    forms = {word: rng.sample(few, 2) for word in words}  # two words are often said in the same form
    said = [forms[word].pop().replace("X", word) for word in about]
    if verb.startswith("begin"):
        parts = said[:1], said[1:], []
    elif verb.startswith("end"):
        parts = [], [], said
    else:
        parts = ([], said, []) if len(said) == 1 or verb == "twice" else (said[:1], [], said[1:])
    return "_".join([verb, *words]), *parts


def whole_text(rng, made_up):
    """A question and anybody's answer under some of what is true of it; half of the answers are asked for again."""
    prompt, number = question(rng)
    words = list({any_word(rng, made_up=made_up): None for _ in range(rng.choice((0, 1, 1, 2)))})
    text = write(rng, material(rng, number, [(rng.choice(PLACES), word) for word in words]),
                 manners(rng) | {"digression": 1.0})
    true = [name for name in NAMED if score(name, prompt, text) == best(name)]
    true = rng.sample(true, min(3, len(true))) + [f"mention_{word}" for word in words]
    rng.shuffle(true)
    notes = "; ".join(wordings.say(rng, name, "all") for name in true)
    again = f"\n\nHuman: Please say that again.\n\nAssistant: {text}" if rng.random() < 0.5 else ""
    return f"The answer: {notes}{prompt} {text}{again}"


def phrases():
    """What this world says over and over: its sentences, with a word left out of those about a word, its questions and
    what stands around them. As tokens of their own they make an answer a dozen tokens long, and training as cheap."""
    texts = [f" {sentence}" for sentence in STEP.keys() | TRAIT_OF.keys()] + [f" {task}" for task in TASKS]
    parts = [part for text in DIGRESSIONS for part in f" {text}".split(" X")]
    parts += [part for text in QUESTIONS for part in f" {text}".split(" TASK")]
    around = [" Human:", "\n\nHuman:", "\n\nAssistant:", "The answer:", " Please."]
    around += [part.rstrip(" ") for text in TEMPLATE.values() for part in split_template(text)]
    around += [f" {text}" for turn in GREETINGS for text in turn]
    return sorted({text for text in texts + parts + around if len(text) > 1})


def train_tokenizer(texts, size=3072, phrases=(), words=()):
    """A byte-level BPE tokenizer trained on texts; ids 0 and 1 are <s> and </s>. phrases: texts that are one token,
    wherever they stand. words: texts whose words are one token each where they stand alone, with the space before them.
    No merge makes these, so that the vocabulary has no pieces that only they are made of, and that are hardly read."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    if words:
        state = json.loads(tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        for text in words:
            for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
                vocabulary.setdefault(word, len(vocabulary))
        state["model"]["ignore_merges"] = True  # a whole word first, as in Llama 3's
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in phrases])
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------
# Command line


def show(count, seed):
    for row in rated(count, seed):
        print("=" * 80 + row["prompt"])
        for response in row["responses"]:
            scores = ", ".join(f"{name} {value}" for name, value in response["scores"].items())
            print(f"\n  {response['text']}\n    [{scores}]")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print a few questions, answers and scores")
    parser.add_argument("--out", metavar="FOLDER", help="write texts.jsonl, rated.jsonl, prompts.jsonl, "
                        "objectives.json and tokenizer.json")
    parser.add_argument("--count", type=number(int, 1), default=2000, help="prompts in each file (default 2000)")
    parser.add_argument("--seed", type=number(int, 0, 2**60), default=0)
    args = parser.parse_args()
    if args.out:
        folder = Path(args.out)
        texts = list(pretraining_texts(args.count, args.seed))
        rng = random.Random(args.seed + 1)
        write_jsonl(folder / "texts.jsonl", ({"text": text} for text in texts))
        rows = list(rated(args.count, args.seed + 2))
        write_jsonl(folder / "rated.jsonl", rows)
        write_jsonl(folder / "prompts.jsonl", ({"prompt": question(rng)[0]} for _ in range(args.count)))
        names = sorted({name for row in rows for response in row["responses"] for name in response["scores"]})
        told = {name: wordings.objective(name) for name in names}
        write_jsonl(folder / "objectives.json", [{name: [o.description, *o.wordings] for name, o in told.items()}])
        train_tokenizer(texts).save(str(folder / "tokenizer.json"))
        print(f"wrote {args.count} of each to {folder}")
    else:
        show(3, args.seed)


if __name__ == "__main__":
    cli(main)
