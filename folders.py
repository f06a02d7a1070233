"""What others need beside a model, so that what is trained here is a whole Hugging Face folder: how transformers, TRL,
peft and vLLM make token ids of a text, and begin and end an answer; chat messages as prompts; a model card.

`complete` writes it, before checkpoint.save puts the configuration there, without which a folder is no model. A model
that came from elsewhere keeps the files that it came with; for one that began here they are made, so that AutoTokenizer
gives the very ids that training used. None of it changes what our own code computes.
"""
import json
import re
from pathlib import Path

from common import in_short, write_whole

import chat
import checkpoint
from data import TEMPLATE, split_template
from resume import read_metrics

TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
GENERATION, CHAT = "generation_config.json", "chat_template.jinja"
SIDE = (*TOKEN_FILES, GENERATION, CHAT, "chat_template.json", "added_tokens.json", "tokenizer.model", "vocab.json",
        "merges.txt")
MADE_HERE = {"made_by": "nanoalign"}  # in the tokenizer_config.json of a model that did not come with one
CARD = "tags:\n- nanoalign\n"         # in a README.md of ours; any other is somebody else's


def complete(folder, llama, tokenizer, about):
    """Write into a folder what others need beside the Llama that is about to be saved there: tokenizer.json, those of
    SIDE that it has, and README.md, unless somebody else wrote one. What a former model has left of SIDE goes.

    about: what run.json tells of the model. Of that, "base" is the folder that it was trained from, maybe an adapter's,
    and "prompt" a text that it was trained to go on from, "" where there is none."""
    base, template = about.get("base"), isinstance(tokenizer, chat.Chat)
    if template:
        base, tokenizer = base or tokenizer.source.folder, tokenizer.tokenizer
    folder, config, roles = Path(folder).resolve(), llama.config, token_roles(llama.config, tokenizer)
    files, words = from_base(base, tokenizer)
    told = parsed(files.get(TOKEN_FILES[0]))
    ours = MADE_HERE.items() <= told.items()
    if ours or not told:
        words = with_ends(words, config, tokenizer, roles)
        files.update(made_here(config, roles))
    elif config.num_labels:  # padded with what ends a text, as by many, a score would be read at the wrong place
        files.update({name: {**parsed(files[name]), "pad_token": roles.get("pad_token")} for name in TOKEN_FILES
                      if name in files})
    if ours or GENERATION not in files:
        files[GENERATION] = generation(config)
    if config.num_labels:
        files[GENERATION] = None
    files[CHAT] = chat_template(files, told, config, about.get("prompt"))
    files["tokenizer.json"], readme = words, folder / "README.md"
    if not readme.exists() or CARD in readme.read_text(encoding="utf-8", errors="replace"):
        files["README.md"] = card(folder, llama, about, template)
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted({*SIDE, *files}):
        put(folder / name, files.get(name))


def from_base(base, tokenizer):
    """({name: bytes} of SIDE in the folder that a model was trained from, or in that of an adapter's base; the bytes of
    its tokenizer.json). Without a base, and where that has another tokenizer now: ({}, the tokenizer's bytes)."""
    words = tokenizer.to_str()
    if base is None or not (Path(base) / "tokenizer.json").exists():
        return {}, words.encode()
    there = checkpoint.load_tokenizer(base)
    there.no_truncation()  # as data.text_ids does
    if there.to_str() != words:
        return {}, words.encode()
    places = [checkpoint.base_of(base), Path(base)] if checkpoint.is_adapter(base) else [Path(base)]
    files = {name: (place / name).read_bytes() for place in places for name in SIDE if (place / name).exists()}
    return files, (Path(base) / "tokenizer.json").read_bytes()


def put(path, content):
    """Write bytes, a text or an object as a whole file; None: remove it."""
    if content is None:
        path.unlink(missing_ok=True)
        return
    if isinstance(content, dict):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    content = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    write_whole(path, lambda aside: aside.write_bytes(content))


def parsed(content):
    """The object in a file of a base; {} where there is none, for no training is to be lost by it."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


# ----------------------------------------------------------------------------------------------------------------
# A text's ids, and the end of an answer


def token_roles(config, tokenizer):
    """{"bos_token": text, ...} of the tokens that have a role, and are there."""
    stop = config.stop_ids[0] if config.stop_ids else None
    pad = checkpoint.padding_id(config) if config.num_labels else stop  # BOS would be taken for padding by `generate`
    ids = {"bos_token": config.bos_token_id, "eos_token": stop, "pad_token": pad}
    roles = {name: tokenizer.id_to_token(number) for name, number in ids.items() if number is not None}
    roles["unk_token"] = json.loads(tokenizer.to_str())["model"].get("unk_token")
    return {name: text for name, text in roles.items() if text is not None}


def with_ends(words, config, tokenizer, roles):
    """A tokenizer.json (bytes) that begins a text with BOS and ends it, where it is to be scored, with EOS. Of a prompt
    and its answer, given as a pair, it makes the ids that data.encode_documents does."""
    texts = [roles.get("bos_token"), roles.get("eos_token") if config.num_labels else None]
    before, after = ([{"SpecialToken": {"id": text, "type_id": 0}}] if text else [] for text in texts)
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {text: {"id": text, "ids": [tokenizer.token_to_id(text)], "tokens": [text]} for text in texts if text}
    processor = {"type": "TemplateProcessing", "single": [*before, first, *after],
                 "pair": [*before, first, second, *after], "special_tokens": special} if special else None
    content = json.loads(words)
    if content.get("post_processor") == processor:
        return words
    return json.dumps({**content, "post_processor": processor}, indent=2, ensure_ascii=False).encode()


def made_here(config, roles):
    """{name: content} of TOKEN_FILES, of a model that did not come with them."""
    return {TOKEN_FILES[1]: roles, TOKEN_FILES[0]: {
        "tokenizer_class": "PreTrainedTokenizerFast", **roles, "model_max_length": config.max_position_embeddings,
        "padding_side": "right" if config.num_labels else "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], **MADE_HERE}}


def generation(config):
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
           "pad_token_id": config.stop_ids[0] if config.stop_ids else None}
    return {**{name: number for name, number in ids.items() if number is not None},
            "max_length": config.max_position_embeddings}


def chat_template(files, told, config, prompt):
    """The chat template (text or bytes) of a language model: its base's, unless that is none or one of ours. None for
    one that was trained on texts without prompts."""
    there = files.get(CHAT)
    ours = there is None or there.decode("utf-8", "replace") in chat.OURS
    if not ours or prompt is None and not config.num_labels:
        return there
    if config.num_labels or not prompt or "chat_template" in told or "chat_template.json" in files:
        return None
    return chat.DIALOGUE if prompt.rstrip().endswith("\n\nAssistant:") else chat.WHOLE


# ----------------------------------------------------------------------------------------------------------------
# The model card

LOADING = {  # (an adapter, a scorer)
    (False, False): 'AutoModelForCausalLM.from_pretrained("{folder}")',
    (False, True): 'AutoModelForSequenceClassification.from_pretrained("{folder}")',
    (True, False): 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")',
    (True, True): 'AutoModelForSequenceClassification.from_pretrained(\n'
                  '    "{base}", num_labels=1, pad_token_id=tokenizer.pad_token_id)\n'
                  'model = PeftModel.from_pretrained(model, "{folder}")',
}
WRITING = """ids = torch.tensor([{bos} + tokenizer(prompt, add_special_tokens=False).input_ids])
answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, ids.size(1):]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
SCORING = """def ids(text):
    return tokenizer(text, add_special_tokens=False).input_ids
texts = [{bos} + ids(prompt) + ids(answer) + {eos} for prompt, answer in pairs]
print(model(**tokenizer.pad({{"input_ids": texts}}, return_tensors="pt")).logits[:, 0])"""
# The same of a model that is asked by its chat template. A score is read where the template ends an answer.
WRITING_CHAT = """messages = [{{"role": "user", "content": prompt}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs)[0, inputs["input_ids"].size(1):]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
SCORING_CHAT = """def ids(prompt, answer):
    messages = [{{"role": "user", "content": prompt}}, {{"role": "assistant", "content": answer}}]
    found = tokenizer.apply_chat_template(messages, return_dict=False)
    return found[:len(found) - found[::-1].index({stop})]
texts = [ids(prompt, answer) for prompt, answer in pairs]
print(model(**tokenizer.pad({{"input_ids": texts}}, return_tensors="pt")).logits[:, 0])"""
TOLD = ("step", "iteration", "tokens", "loss", "val_loss", "reward", "kl")  # of the last rows of metrics


def card(folder, llama, about, template=False):
    """README.md (text): what the model is, as far as `about` and metrics.jsonl tell, and how to load it. template: it
    was trained behind its chat template."""
    config, base, method = llama.config, about.get("base"), about.get("method", [])
    adapter, scorer = bool(llama.adapter) and not about.get("options", {}).get("merge"), bool(config.num_labels)
    edits = bool({"identity", "partner", "equal", "better", "contrast"} & {*method})
    kind = "text-classification" if scorer else "text-generation"
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", f"pipeline_tag: {kind}",
            *[f"base_model: {name}" for name in [hub_name(base)] if name],
            CARD + "".join(f"- {tag}\n" for tag in [*method, *["lora"] * adapter]) + "---", f"# {folder.name}", ""]
    rows = [f"| {what} | {value} |" for what, value in facts(folder, about) if value]
    begin = "[]" if config.bos_token_id is None else f"[{config.bos_token_id}]"
    end = f"[{config.stop_ids[0]}]" if config.stop_ids else "[]"
    names = {"folder": folder.name, "base": base, "bos": begin, "eos": end, "stop": end[1:-1]}
    example = {(False, False): WRITING, (False, True): WRITING_CHAT, (True, False): SCORING,
               (True, True): SCORING_CHAT}[scorer, template]
    loader = "AutoModelForSequenceClassification" if scorer else "AutoModelForCausalLM"
    code = ["import torch", f"from transformers import {loader}, AutoTokenizer",
            *["from peft import PeftModel"] * adapter, "",
            f'tokenizer = AutoTokenizer.from_pretrained("{folder.name}")',
            "model = " + LOADING[adapter, scorer].format(**names), example.format(**names)]
    use = (f"reward.py score pairs.jsonl --models {folder.name}" if scorer else
           f"align.py --model {folder.name} --data answers.jsonl --out aligned.jsonl" if edits else
           f"feedback.py answer prompts.jsonl --policy {folder.name} --out answers.jsonl")
    return "\n".join([*head, "| | |", "|---|---|", *rows, "", "## Use", "", "```python", *code, "```", "",
                      f"With nanoalign: `python {use}`.", *asked(about.get("prompt") or "", edits, template)]) + "\n"


def facts(folder, about):
    """(what, value) pairs of a card's table."""
    def code(text):
        return "`" + in_short(" ".join(str(text).replace("`", "'").replace("|", "/").split()), 300) + "`"
    last = {}
    for row in read_metrics(folder) if (folder / "metrics.jsonl").exists() else []:
        last.setdefault(row.get("stage", ""), {}).update(row)
    yield "method", ", ".join(about.get("method", []))
    yield "principle", about.get("principle") and code(about["principle"])
    yield "trained from", about.get("base") and code(about["base"])
    yield "data", ", ".join(f"{code(path)} ({digest[:12]})" for path, digest in about.get("files", {}).items())
    yield "options", ", ".join(f"{name} {code(value)}" for name, value in about.get("changed", {}).items())
    for stage, row in last.items():
        figures = [f"{name} {row[name]:{',' if isinstance(row[name], int) else '.5g'}}" for name in TOLD if name in row]
        yield f"last figures {stage}", ", ".join(figures)


def hub_name(base):
    """The name on the hub of the model in a folder, where its path in the hub's cache or its card tells; else None."""
    if in_cache := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", str(base)):
        return "/".join(in_cache.groups())
    there = Path(base or ".") / "README.md"
    told = there.read_text(encoding="utf-8", errors="replace") if base and there.exists() else ""
    on_card = re.search(r"^base_model: (\S+)$", told, re.MULTILINE) if CARD in told else None
    return on_card and on_card[1]


def asked(prompt, edits, template):
    """The lines of a card that tell an aligner's prompt, which a chat template's words may stand before."""
    if not edits:
        return []
    begins = [split_template(text)[0] for text in TEMPLATE.values()]
    if not any(text in prompt if template else prompt.startswith(text) for text in begins):
        return ["", "Its prompts are those of the template with which its pairs were made (`data.py --template`)."]
    return ["", "Its prompt, with the objectives' descriptions joined by \"; \":", "", "```", TEMPLATE["better"], "```"]
