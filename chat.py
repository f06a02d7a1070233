"""Chat templates: an instruct model is asked as its own folder says, in Jinja.

The template stands in chat_template.jinja, chat_template.json or tokenizer_config.json. jinja2, an optional extra,
renders it in a sandbox, as transformers does. `with_template` puts it in front of a tokenizer, and data.py's encode
functions ask through it. In a folder without one, a prompt is plain text after BOS.

A prompt becomes messages: a dialogue ("\\n\\nHuman: ...\\n\\nAssistant:") at its turn marks, neighbours of one speaker
joined; anything else, such as an aligner's prompt, is one message by the user. BOS is what the template writes, and an
answer ends with what the template ends it with.

Special tokens are those that the template writes: a "<|im_end|>" that somebody wrote stays text. So what was said is
rendered as private marks, and put in their places afterwards: it is known of each character whose it is. All is then
encoded at once, as transformers does. Only where that finds a special token in what was said, each piece is encoded by
itself, and no token reaches over the border between two pieces. (What tokenizer.json adds without calling it special
is found in any text, here as everywhere.)
"""
import importlib.metadata
import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from common import UserError, digest, first_line, option
from files import kind, lines, read_json, shown

TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # the files that may hold one
PLAIN = "or give --chat-template plain"

# What folders.py gives to models that came without a template, for others to use; here they are asked without. Chat
# messages become a policy's prompts: HH-RLHF's dialogues (what formats.dialogue_text writes and endpoint.chat_messages
# takes apart) where it was trained on these; else a message is the whole prompt.
DIALOGUE = """{{ bos_token }}{% for message in messages %}
{%- set speaker = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}[message.role] %}
{{- '\\n\\n' + speaker + ': ' + message.content }}{% endfor %}
{{- '\\n\\nAssistant:' if add_generation_prompt else eos_token }}"""
WHOLE = """{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}
{{- '' if add_generation_prompt else eos_token }}"""
OURS = (DIALOGUE, WHOLE)


def template_option():
    """The field chat_template of a dataclass of options."""
    return option("auto", "auto: ask a model by its own chat template, where its folder has one; plain: without",
                  choices=["auto", "plain"])


# ----------------------------------------------------------------------------------------------------------------
# A folder's template


@dataclass
class Source:
    """A template, and the special tokens that it may name: {"bos_token": "<s>", ...}."""
    folder: Path
    path: Path
    text: str
    tokens: dict

    @property
    def digest(self):
        return digest(self.text, self.tokens)


def read_object(path):
    """The object in a JSON file; {} where there is no file."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {kind(value)}, not an object; copy it again")
    return value


def find(folder, how="auto"):
    """The Source of a folder's chat template, or of its base's, where an adapter's has none. None where there is none,
    or one of OURS, where `how` is "plain", and where run.json says that the model was trained without. Raises
    UserError."""
    folder = Path(folder)
    trained = read_object(folder / "run.json").get("settings") if how == "auto" else {"chat_template": None}
    if isinstance(trained, dict) and trained.get("chat_template", "") is None:
        return None
    if (folder / "adapter_config.json").exists() and not template_in(folder):
        import checkpoint  # here, for it brings torch, which `data.py --help` can do without
        folder = checkpoint.base_of(folder)
    return template_in(folder)


def template_in(folder):
    """The Source of the template that a folder holds, but for OURS; or None."""
    named = read_object(folder / "special_tokens_map.json") | read_object(folder / "tokenizer_config.json")
    for path in (folder / name for name in TEMPLATES if (folder / name).exists()):
        text = "".join(line for _, line in lines(path)) if path.suffix == ".jinja" else \
            read_object(path).get("chat_template")
        if isinstance(text, list):  # of several
            named_so = [item for item in text if isinstance(item, dict) and item.get("name") == "default"]
            text = named_so[0].get("template") if named_so else text
        if text is not None and not isinstance(text, str):
            raise UserError(f"{path}: its chat_template is no text, and no list with a default one; mend it, {PLAIN}")
        if text and text not in OURS:
            tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
            return Source(folder, path, text, {key: value for key, value in tokens.items()
                                               if key.endswith("_token") and isinstance(value, str)})
    return None


def fingerprint(folder, how="auto"):
    """A checksum (text) of the chat template that a model in a folder is asked by; None: none."""
    source = find(folder, how)
    return source and source.digest


def stops_beside(folder, how="auto"):
    """What generation_config.json beside a model's chat template says that ends an answer: ids; None: nothing."""
    source = find(folder, how)
    return source and read_object(source.folder / "generation_config.json").get("eos_token_id")


def with_template(tokenizer, folder, config, how="auto", began=None):
    """The tokenizer with the folder's chat template before it, a Chat; or as it is, where `find` finds none. config is
    told what ends an answer, the template's stop token first. began: when the run began that a template which writes
    the date is used in (ISO 8601; None: now), so that it goes on with the same texts."""
    source = find(folder, how)
    if source is None:
        return tokenizer
    chat = Chat(tokenizer, source, config.stop_ids[0] if config.stop_ids else None, began)
    path = source.folder / "generation_config.json"
    stops = read_object(path).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    stops = [token for token in (chat.stop_id, *config.stop_ids, *stops) if token is not None]
    if wrong := [token for token in stops if type(token) is not int or not 0 <= token < config.vocab_size]:
        raise UserError(f"{path}: eos_token_id {shown(wrong[0])} is no token's id; mend it, or copy it again")
    if (stops := list(dict.fromkeys(stops))) != list(config.stop_ids):
        config.eos_token_id = stops
    return chat


def settings_of(tokenizer):
    """What of a tokenizer decides how texts are read: {name: value}."""
    return {"tokenizer": digest(tokenizer.to_str()),
            "chat_template": tokenizer.source.digest if isinstance(tokenizer, Chat) else None}


# ----------------------------------------------------------------------------------------------------------------
# Prompts as messages

ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}
MARK = re.compile(r"(?:\A\s*(?=System:)|(?:\A\s*|\n\n)(?=Human:|Assistant:))(\w+): ?")  # a system's turn comes first
BEGINNING = re.compile(r"\s*(Human:|System:.*?\n\nHuman:)", re.DOTALL)
HUMAN = "\n\nHuman: "
PIECE = re.compile(r"\S{1,20}")


def is_dialogue(prompt, context=None):
    """Whether a prompt's turn marks are turns: it begins with one, or ends with the assistant's. Where the context
    ([start, end] in the prompt) ends before the prompt does, a dialogue is what the prompt is about."""
    whole = context is None or context[1] == len(prompt)
    return whole and bool(BEGINNING.match(prompt) or prompt.rstrip().endswith("\n\nAssistant:"))


def messages_of(prompt, dialogue):
    """(messages [{"role", "content"}] of a prompt, how it begins the answer: usually "")."""
    before, *turns = MARK.split(prompt) if dialogue else [prompt]
    turns = list(zip(turns[::2], turns[1::2]))
    if before.strip() or not dialogue:  # what stands before the first mark is the person's, too: a condition
        turns.insert(0, ("Human", before))
    begun = turns.pop()[1] if turns[-1][0] == "Assistant" else ""
    messages = []
    for speaker, content in turns:
        if messages and messages[-1]["role"] == ROLES[speaker]:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": ROLES[speaker], "content": content})
    return messages, begun if begun.strip() else ""


def cuts(prompt, start, end):
    """Where prompt[start:end], a dialogue, may begin instead, after HUMAN: at a person's turns, then at the last one's
    words."""
    turns = [match.end() for match in MARK.finditer(prompt, start, end) if match[1] == "Human"]
    last, answer = max([start, *turns]), prompt.rfind("\n\nAssistant:", start, end)
    return turns + [match.start() for match in PIECE.finditer(prompt, last + 1, end if answer < last else answer)]


# ----------------------------------------------------------------------------------------------------------------
# Messages as ids


class Chat:
    """A `tokenizers` Tokenizer behind a chat template. end_id: what ends an answer (or None) where the template has no
    token for it. stop_id: what does end it. A piece is (text, whether it was said, and is not the template's)."""

    def __init__(self, tokenizer, source, end_id=None, began=None):
        self.tokenizer, self.source, self.end_id = tokenizer, source, end_id
        self.template = compiled(source, began)
        added = tokenizer.get_added_tokens_decoder()
        self.special = {number for number, token in added.items() if token.special}
        self.added = {token.content: number for number, token in added.items()}
        longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.token = re.compile("|".join(longest_first) or "(?!)")
        self.stop_id = self.added.get(self.answered(*self.asked("A question?", False), "An answer.")[1], end_id)

    def to_str(self):
        return self.tokenizer.to_str()

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def prompt_ids(self, prompt, dialogue):
        """The ids of a prompt, up to where the answer begins. dialogue: its turn marks are turns."""
        return self.ids(self.asked(prompt, dialogue)[2])

    def encode(self, prompt, completion, dialogue):
        """(ids of a prompt, ids of the answer to it and of what ends that)."""
        messages, begun, pieces = self.asked(prompt, dialogue)
        answer, stop = self.answered(messages, begun, pieces, completion)
        first, whole = self.ids(pieces), self.ids(pieces + answer)
        rest = whole[len(first):] if whole[:len(first)] == first else self.ids(answer)
        return first, rest + ([] if stop or self.end_id is None else [self.end_id])

    def asked(self, prompt, dialogue):
        """(messages of a prompt, how it begins the answer, the pieces before the answer)."""
        messages, begun = messages_of(prompt, dialogue)
        if not any(message["role"] == "user" for message in messages):
            raise UserError(f"{self.source.path}: its chat template asks what a Human says, but a dialogue has no such "
                            f"turn: {shown(prompt)}; mend the data, {PLAIN}")
        return messages, begun, self.render(messages, True) + [(begun, True)] * bool(begun)

    def answered(self, messages, begun, pieces, completion):
        """(the pieces of an answer, after those before it; the token that ends it, or "")."""
        *before, said, (after, _) = self.render([*messages, {"role": "assistant", "content": completion}], False)
        lead, stop = "", self.token.search(after)
        if not begun and before[-1][0].startswith(pieces[-1][0]):
            lead = before[-1][0][len(pieces[-1][0]):]
        said = (completion, True) if begun else said  # an answer that goes on may do so with a space
        return [(lead, False), said, (after[:stop.end()] if stop else "", False)], stop[0] if stop else ""

    def render(self, messages, ask):
        """Messages as pieces: the template's and what was said by turns, the template's first and last. ask: an answer
        is to follow; else, the last message is one. UserError where the template raises, or loses a message."""
        inner, marked = [message["content"].strip() for message in messages], []
        for number, message in enumerate(messages):  # whether the space around it stays, the template says
            content = message["content"].replace(inner[number], f"\ue000{number}\ue001", 1)
            marked.append({"role": message["role"], "content": content})
        about = f"{' '.join(message['role'] for message in messages)}, {shown(messages[0]['content'])}"
        try:
            text = self.template.render(messages=marked, tools=None, documents=None, add_generation_prompt=ask,
                                        **self.source.tokens)
        except Exception as error:  # whatever a stranger's code raises
            raise UserError(f"{self.source.path}: its chat template fails ({first_line(error)}) on a dialogue of "
                            f"{about}; mend one of them, {PLAIN}") from None
        parts = re.split("\ue000(\\d+)\ue001", text)
        found = list(map(int, parts[1::2]))
        if set(found) != set(range(len(messages))) if ask else found[-1:] != [len(messages) - 1]:
            raise UserError(f"{self.source.path}: its chat template leaves out or changes a turn of a dialogue of "
                            f"{about}; mend one of them, {PLAIN}")
        return [(inner[int(part)], True) if place % 2 else (part, False) for place, part in enumerate(parts)]

    def ids(self, pieces):
        """The ids of pieces; special tokens are those that the template wrote."""
        found, end, said = self.encoding("".join(text for text, _ in pieces), True), 0, []
        for text, own in pieces:
            said += [(end, end + len(text))] * own
            end += len(text)
        special = [span for token, span in zip(found.ids, found.offsets) if token in self.special]
        if any(start < last and first < end for start, end in special for first, last in said):
            return [token for text, own in pieces for token in self.encoding(text, not own).ids]
        return found.ids

    def encoding(self, text, special):
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = not special
        return self.tokenizer.encode(text, add_special_tokens=False)


def compiled(source, began):
    """The template's text as a jinja2 Template, with what transformers gives templates. UserError where it is none."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        if [*map(int, re.findall(r"\d+", importlib.metadata.version("jinja2")))] < [3, 1, 6]:
            raise ImportError("a template can break out of an older version's sandbox")
    except ImportError:
        raise UserError(f'{source.path}: holds a chat template; pip install "jinja2>=3.1.6" for it, {PLAIN}') from None
    try:
        day = datetime.fromisoformat(began).astimezone()
    except (TypeError, ValueError):
        day = datetime.now()

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return day.strftime(form)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    try:
        return environment.from_string(source.text)
    except TemplateError as error:
        raise UserError(f"{source.path}: line {getattr(error, 'lineno', 1)} of its chat template is no Jinja "
                        f"({first_line(error)}); mend it, {PLAIN}") from None
