"""Objectives: what a response is judged by, in words that an aligner reads; those that ship, and those that users name.

An objective has one description, and may have more wordings: an aligner that has read many learns what is meant, one
that has read a single sentence learns the sentence.
"""
import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from files import kind, read_json, shorten, shown


@dataclass(frozen=True)
class Objective:
    """A name to report it under, the text that the aligner reads, and other texts that say the same."""
    name: str
    description: str
    wordings: tuple = ()

    def __str__(self):
        return f"{self.name}: {self.description}"

    def worded(self, rng):
        """The same objective, described by one of its texts, which rng (a random.Random) chooses."""
        if not self.wordings:
            return self
        return dataclasses.replace(self, description=rng.choice((self.description, *self.wordings)))


TEXTS = {  # name: the description first
    # the nine that the paper trains on: of HH-RLHF, UltraFeedback and IMHI
    "harmless": "The response should not hurt, insult or endanger anyone, nor help somebody to do so | do no harm | "
                "be safe and decent | nobody should come to harm by it",
    "helpful": "The response should give the user what they need to get their task done | be helpful | "
               "really answer the request | of use to the person who asked",
    "humour": "The response should be funny and make the user smile | be funny | make me laugh | "
              "with a sense of humour",
    "instruction_following": "The response should do all that the instruction asks, in the form asked for | "
                             "follow the instruction | do exactly what is asked | keep to the form that was asked for",
    "honest": "The response should say how sure it is and admit what it does not know | be honest | "
              "admit doubts | do not pretend to know",
    "truthful": "The response should state only things that are true and agree with the given text | be truthful | "
                "say nothing false | keep to the truth and to the given text",
    "correct": "The response should come to the right conclusion | be correct | get the answer right | "
               "the conclusion must be the right one",
    "informative": "The response should give the evidence and the reasons for its conclusion | be informative | "
                   "give reasons | show what the conclusion rests on",
    "professional": "The response should be consistent, well grounded and worded as an expert would | "
                    "be professional | in the words of an expert | sound and consistent",
    # the six that the paper's aligners meet only at test time
    "specific": "The response should speak of concrete details instead of generalities | be specific | "
                "name concrete things | no generalities",
    "factual": "The response should rest on facts that can be checked | be factual | stick to facts | "
               "what it says can be looked up",
    "readable": "The response should be well ordered and easy to read | be readable | put it in good order | "
                "make it easy to read",
    "fair": "The response should treat all people and groups alike, without prejudice | be fair | without prejudice | "
            "take no side against any group",
    "repetition": "The response should say nothing twice | do not repeat yourself | no repetitions | "
                  "say each thing once",
    "length": "The response should be as short as its content allows | be short | keep it brief | no more words than "
              "needed",
    # three that HelpSteer2 rates: what it calls coherence, complexity and verbosity
    "coherent": "The response should be clear, of one piece and nowhere at odds with itself | be coherent | "
                "hang together | do not contradict yourself",
    "complex": "The response should show the knowledge and the language of somebody who is versed in the matter | "
               "write for experts | go deep into the matter | with the terms that a specialist uses",
    "verbose": "The response should go into every detail, at length | be verbose | write at length | leave no detail "
               "unsaid",
}
# MORLAIF's twelve, in our words. Toxicity, sycophancy and bias are named after what is to be avoided.
PRINCIPLE_TEXTS = {
    "helpfulness": "The response should bring the person closer to what they want to get done | help with what is "
                   "to be done | be of practical use | help the person get on",
    "ethicality": "The response should do right by everyone it concerns, and lead nobody to harm | be ethical | "
                  "do right by everyone | lead nobody to harm",
    "factuality": "The response should state nothing that is untrue | keep the facts right | no false statements | "
                  "state nothing untrue",
    "toxicity": "The response should contain as little as possible that is rude, hateful or insulting | no insults | "
                "nothing rude or hateful | leave out whatever insults",
    "sycophancy": "The response should flatter and please for the sake of pleasing as little as possible | "
                  "do not flatter | no flattery | do not please for the sake of pleasing",
    "empathy": "The response should show that it understands how the person feels | show empathy | "
               "understand how the person feels | with feeling for the person",
    "relevance": "The response should keep to what was asked and wander off nowhere | be relevant | "
                 "keep to what was asked | do not wander off",
    "context": "The response should fit the situation and what was said before | fit the situation | "
               "heed what was said before | in keeping with the conversation",
    "bias": "The response should be as free as possible from prejudice and from taking sides without grounds | "
            "be unbiased | be free from prejudice | take no side without grounds",
    "understandability": "The response should be easy to follow for the person who asked | be easy to follow | "
                         "be easy to understand | put it so that the person can follow",
    "detail": "The response should go into particulars, as many as the question deserves | go into detail | "
              "give particulars | with the particulars that matter",
    "conciseness": "The response should say what it has to say in few words | be concise | say it in few words | "
                   "waste no words",
}
SEPARATOR = " | "


def make_objective(name, texts, where):
    """An Objective of a name and its texts, one after another in one text or in a list. Raises UserError."""
    texts = texts.split(SEPARATOR) if isinstance(texts, str) else texts
    parts = [name, *texts] if isinstance(texts, list) else [None]
    if not all(isinstance(text, str) and text.strip() for text in parts):
        raise UserError(f"{where}: an objective needs a name and a description, texts that are not empty")
    if ":" in name:
        raise UserError(f"{where}: the name {shown(name)} holds a colon, which ends a name; leave it out")
    if not texts:
        raise UserError(f"{where}: an objective needs a description; give a text, or a list of several")
    first, *others = (text.strip() for text in texts)
    return Objective(name.strip(), first, tuple(others))


PRINCIPLES = {name: make_objective(name, text, name) for name, text in PRINCIPLE_TEXTS.items()}
OVERALL = make_objective("overall", "The response should be the better one, all in all | be better all in all | "
                         "improve it as a whole | a better response in every way", "overall")
OBJECTIVES = {**{name: make_objective(name, texts, name) for name, texts in TEXTS.items()}, **PRINCIPLES,
              "overall": OVERALL}


def plain_name(name):
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def find_objectives(wanted, known=OBJECTIVES):
    """Objectives from what a user wrote: a list in that order, each once.

    wanted: texts, each a known name (case, "-", " " and "_" make no difference), "Name: description", "Name: one text |
    another that says the same", or the path of a JSON file {"name": "description" or [texts], ...} or [{"name": ...,
    "description": ...}, ...]. Raises UserError for anything else, naming the known objectives that are nearest."""
    by_name = {plain_name(name): objective for name, objective in known.items()}
    found = {}
    for item in wanted:
        if plain_name(item) in by_name:
            new = [by_name[plain_name(item)]]
        elif item.endswith(".json") and (":" not in item or Path(item).exists()):
            new = read_objectives(item)
        elif ":" in item:
            new = [make_objective(*item.split(":", 1), where=repr(item))]
        else:
            near = nearest(item, known) or f"known are {shorten(known, 400)}; "
            raise UserError(f'unknown objective {item!r}; {near}give a known name or "Name: what a response should do"')
        for objective in new:
            if found.setdefault(objective.name, objective) != objective:
                raise UserError(f"objective {objective.name!r} has two different descriptions; leave one out")
    return list(found.values())


def read_objectives(path):
    """The Objectives in a JSON file. Raises UserError."""
    content = read_json(path)
    if isinstance(content, dict):
        content = [{"name": name, "description": texts} for name, texts in content.items()]
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise UserError(f'{path}: not objectives; write {{"name": "description", ...}} into it')
    return [objective_of(item, f"{path}: objective {place}") for place, item in enumerate(content, 1)]


def objective_of(item, where):
    """The Objective of {"name", "description": a text or a list of texts, "wordings": more of them}."""
    if unknown := item.keys() - {"name", "description", "wordings"}:
        raise UserError(f"{where}: has {shorten(sorted(unknown))}; an objective has name, description and wordings")
    more = item.get("wordings", [])
    if not isinstance(more, list):
        raise UserError(f"{where}: 'wordings' is {kind(more)}; give a list of texts")
    own = make_objective(item.get("name"), item.get("description"), where)
    return make_objective(own.name, [own.description, *own.wordings, *more], where)


def nearest(name, known):
    by_name = {plain_name(key): key for key in known}
    close = difflib.get_close_matches(plain_name(name), by_name, n=3, cutoff=0.5)
    return f"the nearest known: {', '.join(by_name[key] for key in close)}; " if close else ""


def row_objectives(row):
    """The objectives for which a row was aligned, each once."""
    found = {}
    for text in row["objectives"]:
        name, _, description = text.partition(": ")
        found.setdefault(name, Objective(name, description))
    return list(found.values())
