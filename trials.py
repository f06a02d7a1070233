"""What happens to runs: commands on a tiny world are killed, find no room on the disk, or an old result in their way.

`campaign.py` makes the trials that are described here, thousands of them, and tells how many the promises survived.
From top to bottom: a command in a fork of this process; the commands and their world; kills; disks; stale results.
"""
# A part is a function of a World that yields its trials, (subject, what, function): the function gives "" where the
# promise, the first line of the part's docstring, was kept, and else what went wrong. All that a trial draws is drawn
# from the seed and the trial's name.
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import common

import torch
import torch._dynamo  # noqa: F401  which the first optimizer imports: here it takes its second once, not in each fork

import align
import checkpoint
import data
import eval as evaluation
import feedback
import model
import ppo
import reward
import story
import toy
import train

SCRIPTS = {"align": align, "data": data, "eval": evaluation, "feedback": feedback, "ppo": ppo, "reward": reward,
           "story": story, "train": train}


# ----------------------------------------------------------------------------------------------------------------
# A command in a fork


def forked(work, seconds=60.0):
    """Run work() in a child process, as a script's main is run. Gives (status, output): its exit status, minus the
    signal that ended it, or None where it was killed because the seconds were over; and what it printed."""
    reading, writing = os.pipe()
    over, late, output = time.perf_counter() + seconds, False, b""
    child = os.fork()
    if not child:
        be_child(work, writing, seconds)
    os.close(writing)
    while True:
        if select.select([reading], [], [], max(over - time.perf_counter(), 0))[0]:
            part = os.read(reading, 1 << 20)
            if not part:
                break
            output = (output + part)[-(1 << 22):]
        elif late:
            raise RuntimeError(f"process {child} was killed and does not end")
        else:
            os.kill(child, signal.SIGKILL)
            late, over = True, time.perf_counter() + 60
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if late and status == -signal.SIGKILL else status, output.decode("utf-8", "replace")


def be_child(work, writing, seconds):
    """The child's side of `forked`: never returns."""
    status = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds + 10)  # in case that the parent is killed
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdin = open(os.devnull)
        sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)
        common.cli(work)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def command(words):
    """What `forked` is to run: a script's main with these words, the first of them its name."""
    def work():
        sys.argv = [f"{words[0]}.py", *words[1:]]
        SCRIPTS[words[0]].main()
    return work


def limit_memory(gigabytes=4):
    """Let this process take so much more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def complaint(result, *named):
    """"" if a command's result is success, or else one line of error that names what is given; else what is wrong."""
    status, output = result
    last = [line for line in ["nothing was printed", *re.split("[\r\n]", output)] if line.strip()][-1]
    if status is None:
        return "it was not done in time"
    if status not in (0, 2) or "Traceback" in output or "panicked" in output:
        return f"status {status}: {last[-300:]}"
    if status == 2 and not re.fullmatch(r"(\w+\.py( \w+)?: )?error: .{1,600}", last):
        return f"not one line of error, but {len(last)} characters: {last[:300]}"
    absent = [name for name in named if status == 2 and name not in last.replace("-", "_")]
    return f"the error does not name {', '.join(absent)}: {last[:300]}" if absent else ""


def failure(result):
    """"" if a command's result is success, else what it said."""
    return "" if result[0] == 0 else complaint(result) or result[1][-300:]


# ----------------------------------------------------------------------------------------------------------------
# The commands, and the tiny world that they work on

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
TRAINING = " --epochs 99 --batch 4 --val-share 0.3 --val-every 2 --lr 1e-2 --save-seconds 0 --device cpu"
WRITING = " --max-new-tokens 8 --batch 2 --device cpu"
JUDGE = " --judge-url {url} --judge-model m --concurrency 2"
SUBJECTS = {  # name: (the command, the words with which it goes on after a kill)
    "train sft": ("train sft --model {w}/base --data {w}/rated.jsonl --out {o}/out --max-steps 7" + TRAINING,
                  "--resume"),
    "train LoRA": ("train sft --model {w}/base --data {w}/rated.jsonl --out {o}/out --lora-rank 2 --max-steps 7"
                   + TRAINING, "--resume"),
    "train aligner": ("train aligner --model {w}/base --data {w}/pairs.jsonl --out {o}/out --max-steps 3" + TRAINING,
                      "--resume"),
    "reward train": ("reward train {w}/labels.jsonl --model {w}/base --out {o}/out --max-steps 4" + TRAINING, ""),
    "ppo": ("ppo --model {w}/base --data {w}/prompts.jsonl --reward toy:conciseness toy:detail --out {o}/out "
            "--iterations 4 --rollouts 4 --minibatch 2 --update-epochs 1 --max-new-tokens 8 --reference-count 4 "
            "--lr 1e-2 --save-seconds 0 --device cpu", "--resume"),
    "align": ("align --model {w}/base --data {w}/answers.jsonl --out {o}/out.jsonl" + WRITING, ""),
    "align, policy": ("align --model {w}/base --data {w}/prompts.jsonl --policy {w}/policy --out {o}/out.csv "
                      "--temperature 1" + WRITING, ""),
    "align, server": ("align --model {w}/base --data {w}/prompts.jsonl --policy {url} --out {o}/out.jsonl" + WRITING,
                      ""),
    "feedback answer": ("feedback answer {w}/prompts.jsonl --policy {w}/policy --out {o}/out.jsonl" + WRITING, ""),
    "feedback label": ("feedback label {w}/rated.jsonl --out {o}/out.jsonl", ""),
    "label, server": ("feedback label {w}/rated.jsonl --out {o}/out.jsonl --limit 8 --principles toxicity detail"
                      " --verdicts logprobs" + JUDGE, ""),
    "eval, server": ("eval {w}/aligned.jsonl --out {o}/out" + JUDGE, ""),
    "data reformulate": ("data reformulate {w}/rated.jsonl --out {o}/out.jsonl --objectives helpful harmless", ""),
    "story": ("story --out {o}/out --device cpu --layers 1 --width 64 --word-steps 2 --text-steps 2 --small-steps 2 "
              "--large-steps 2 --identity-steps 2 --equal-steps 0 --better-steps 2 --batch 4 --questions 80 "
              "--prompts 2", ""),
}


@dataclasses.dataclass
class World:
    """A scratch folder, the seed, and the address of the server (see campaign.serve); what is Known of subjects."""
    folder: Path
    seed: int
    server: str = ""
    known: dict = dataclasses.field(default_factory=dict)
    tags: object = dataclasses.field(default_factory=itertools.count)

    def rng(self, *name):
        return random.Random(f"{self.seed} {name}")

    def fresh(self, name="trial"):
        """An empty folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name


def make_world(folder):
    """Write models of a few thousand parameters, and small files of every kind of row."""
    tokenizer, another = (toy.train_tokenizer(list(toy.pretraining_texts(60, seed)), 400) for seed in (0, 1))
    common.write_text(folder / "another.json", another.to_str())
    for seed, name in enumerate(("base", "policy")):
        config = model.Config(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=600, bos_token_id=0,
                              eos_token_id=1, tie_word_embeddings=True, **SIZES)
        checkpoint.save(model.Llama(config, seed), folder / name)
        common.write_text(folder / name / "tokenizer.json", tokenizer.to_str())
    rated = list(toy.rated(8, 1))
    for response in (response for row in rated for response in row["responses"]):
        response["text"] = " ".join(response["text"].split(". ")[:3])
    pairs = [{"prompt": row["prompt"], "response_a": row["responses"][0]["text"], "response_b": row["golden"]}
             for row in rated]
    aligned = [{"prompt": pair["prompt"], "original": pair["response_a"], "aligned": f"Well. {pair['response_a']}",
                "golden": pair["response_b"], "objectives": list(map(str, toy.OBJECTIVES.values()))[:2]}
               for pair in pairs]
    for name, rows in (("rated", rated), ("answers", toy.rated(20, 2, responses=1)), ("aligned", aligned),
                       ("prompts", ({"prompt": row["prompt"]} for row in rated)),
                       ("pairs", data.reformulate(rated, toy.OBJECTIVES)),
                       ("labels", feedback.embedded_labels(pairs, ["toxicity", "detail"]))):
        common.write_jsonl(folder / f"{name}.jsonl", rows)


def words_of(world, subject, out, sickness="healthy", given=None):
    """(the words of a subject's command, the words with which it goes on, the tag of its questions to the server).
    given: the folder of its inputs, where that is not the world's."""
    tag, (said, more) = str(next(world.tags)), SUBJECTS[subject]
    filled = dict(w=given or world.folder / "world", o=out, url=f"{world.server}/{tag}/{sickness}")
    return [word.format(**filled) for word in said.split()], more.split(), tag


def asked(world, tag):
    """The keys of the questions that the server has been asked under a tag, in order."""
    path = world.folder / "asked" / tag
    return path.read_text().split() if path.exists() else []


def cached(content):
    """The entries {key: reply} of a cache's bytes, but for torn lines."""
    found = {}
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            found[entry["key"]] = entry["reply"]
        except (ValueError, KeyError, TypeError):
            continue
    return found


CIRCUMSTANCES = {"seconds", "began", "ended", "resumed", "command", "commit", "dirty", "base", "files",
                 "save_seconds", "base_model_name_or_path"}


def essence(path):
    """Of a file, what two runs have in common: not times, and not where something lies."""
    def without(value):
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in CIRCUMSTANCES}
        return value
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        return [without(json.loads(line)) for line in content.splitlines()]
    if path.name in ("run.json", "adapter_config.json"):
        return without(json.loads(content))
    return cached(content) if path.name.endswith("cache.jsonl") else content


def files_in(folder, read=essence):
    """{path in the folder: what `read` makes of it} of all its files."""
    return {str(path.relative_to(folder)): read(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def difference(found, wanted):
    """"" if two dicts of files are equal, or else the names that are not."""
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    return f"other bytes: {', '.join(names)}" if names else ""


@dataclasses.dataclass
class Known:
    """A subject that ran undisturbed: its files, how long it took, how many calls `ended_at` counted, and the size of
    its largest file."""
    files: dict
    seconds: float
    calls: int
    largest: int


def undisturbed(world, subject):
    """What is Known of a subject; its folder is kept as finished/SUBJECT."""
    if subject not in world.known:
        out, began = world.fresh(), time.perf_counter()
        words, more, _ = words_of(world, subject, out)
        result = forked(ended_at(command(words + more), "call", 0))
        if wrong := failure(result):
            raise common.UserError(f"{subject} fails undisturbed: {wrong}")
        seconds, calls = time.perf_counter() - began, int(re.findall(r"calls: (\d+)", result[1])[-1])
        shutil.copytree(out, world.folder / "finished" / subject)
        world.known[subject] = Known(files_in(out), seconds, calls, max(path.stat().st_size for path in out.rglob("*")))
    return world.known[subject]


# ----------------------------------------------------------------------------------------------------------------
# Kills


def ended_at(work, kind, number, when="before"):
    """work(), which the kernel ends as it writes byte `number` of a file ("byte"), or tells there that the disk is full
    ("full"); or which is killed "before", "after" or, with half of its file, at "half" of call `number` of those that
    put a file in place, remove one or sync one ("call"). Prints how many calls there were."""
    counter = itertools.count(1)

    def watched(function):
        def call(*args, **kwargs):
            here = next(counter) == number
            if here and when == "half" and len(args) == 2:
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            if here and when != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            done = function(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        return call

    def run():
        if kind == "call":
            os.replace, os.unlink, os.fsync = map(watched, (os.replace, os.unlink, os.fsync))
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "byte" else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        work()
        print(f"calls: {next(counter) - 1}")
    return run


def draw_end(rng, known):
    """A way to end a run: (kind, number, when)."""
    kind = rng.choice(("time", "time", "call", "call", "byte"))
    if kind == "time":
        return kind, rng.uniform(0, known.seconds), ""
    if kind == "call":
        return kind, rng.randint(1, known.calls), rng.choice(("before", "half", "after"))
    return kind, rng.choice((int(known.largest ** rng.random()), rng.randrange(4 * known.largest))), ""


def look(folder):
    """In a child: print {"half": [what cannot be read], "kept": {path: text}} of what a stopped run has left. What is
    kept must be there for good: whole lines of journals and caches, and metrics as far as the state knows of them."""
    half, kept = [], {}
    for name, content in files_in(folder, Path.read_bytes).items():
        path = folder / name
        try:
            if name.endswith((".part", "cache.jsonl")):
                whole = content[:content.rfind(b"\n") + 1]
                kept[name] = whole.decode() if whole.count(b"\n") > name.endswith(".part") else ""  # a header alone
            elif path.name == "state.pt":
                size, metrics = torch.load(path, weights_only=True)["metrics_bytes"], path.with_name("metrics.jsonl")
                kept[str(metrics.relative_to(folder))] = metrics.read_bytes()[:size].decode()
            elif name.endswith(".json"):
                json.loads(content)
            elif name.endswith(".jsonl") and path.name != "metrics.jsonl":
                [json.loads(line) for line in content.decode().splitlines()]
            if path.name in ("config.json", "adapter_config.json"):
                checkpoint.load(path.parent, scorer=b"SequenceClassification" in content or b"SEQ_CLS" in content)
        except Exception as error:
            half.append(f"{name}: {common.first_line(error)[:200]}")
    print(json.dumps({"half": half, "kept": kept}))


def left_behind(folder, kept):
    """After a run: what is wrong with the files that it left, or what of `kept` is lost; brings `kept` up to date."""
    result = forked(functools.partial(look, folder))
    found = {"half": [failure(result)], "kept": {}} if result[0] else json.loads(result[1])
    for name, text in kept.items():
        path = folder / name
        if path.exists() and not path.read_bytes().startswith(text.encode()):
            found["half"].append(f"{name} has lost what was reported done")
        if not path.exists() and not (name.endswith(".part") and path.with_suffix("").exists()):
            found["half"].append(f"{name} is gone")
    kept.clear()
    kept.update(found["kept"])
    return "; ".join(found["half"])


def whole_process(words):
    """The result of a command as a user runs it, with another order of Python's sets than in this process."""
    script = Path(__file__).parent / f"{words[0]}.py"
    done = subprocess.run([sys.executable, script, *words[1:]], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "1"})
    return done.returncode, done.stdout + done.stderr


def killed(world, subject, number):
    """One to four kills of a subject, then a run to the end, whose files are to be those of one that ran undisturbed.
    Number 1 is not killed, but a process of its own."""
    rng, known, out = world.rng("kills", subject, number), undisturbed(world, subject), world.fresh()
    words, more, tag = words_of(world, subject, out)
    kept, paid, before, told, wrong = {}, set(), 0, [], ""
    flying = 2 if "--concurrency" in words else 8  # questions at a time
    for _ in range(0 if number == 1 else rng.randint(1, 4)):
        kind, place, when = draw_end(rng, known)
        told.append(f"{kind} {place:.4g} {when}".strip())
        seldom = ["--save-seconds", "1000"] if "--save-seconds" in words and rng.random() < 0.3 else []  # no state
        work = command(words + more + seldom)
        result = forked(work, place) if kind == "time" else forked(ended_at(work, kind, place, when))
        if result[0] not in (None, 0, -signal.SIGKILL, -signal.SIGXFSZ):
            wrong = failure(result)
        wrong = wrong or left_behind(out, kept) or paid_twice(asked(world, tag), before, paid, len(told) * flying)
        if wrong:
            break
        paid = {key for name, text in kept.items() if "cache" in name for key in cached(text.encode())}
        before = len(asked(world, tag))
    if not wrong:
        result = whole_process(words + more) if number == 1 and subject != "story" else forked(command(words + more))
        wrong = (failure(result) or left_behind(out, kept) or difference(files_in(out), known.files)
                 or paid_twice(asked(world, tag), before, paid, len(told) * flying))
    return wrong and f"after {', '.join(told) or 'nothing'}: {wrong}"


def paid_twice(questions, before, paid, lost):
    """What is wrong with the questions that were asked: none that had been `paid`, with a reply in the cache, may be
    among those after the first `before`; and at most `lost` may have been on their way when a run was killed."""
    again = paid & set(questions[before:])
    twice = len(questions) - len(set(questions))
    return f"{len(again)} to {twice} questions were paid for twice" if again or twice > lost else ""


def kills(world):
    """A run killed at any moment loses nothing that it had reported done, and goes on to the same bytes."""
    for number in itertools.count():
        for subject in SUBJECTS:
            if subject != "story" or number % 8 == 0:  # it takes as long as ten others
                yield subject, number, functools.partial(killed, world, subject, number)


# ----------------------------------------------------------------------------------------------------------------
# Disks

PLACES = ["is of another kind", "is below a file", "is an input", "is a link to an input"]
PLACES += ["is in a folder that is read-only"] * (os.geteuid() != 0)  # to root, nothing is


def full_disk(world, subject, number):
    """A disk that is full after some bytes, and later has room."""
    known, out, kept = undisturbed(world, subject), world.fresh(), {}
    words, more, _ = words_of(world, subject, out)
    place = int(known.largest ** world.rng("disks", subject, number).uniform(0, 1))
    wrong = complaint(forked(ended_at(command(words + more), "full", place))) or left_behind(out, kept)
    wrong = (wrong or failure(forked(command(words + more))) or left_behind(out, kept)
             or difference(files_in(out), known.files))
    return wrong and f"full at byte {place}: {wrong}"


def misplaced(world, subject, how):
    """An output that cannot be put where it is wanted, or would take an input's place."""
    folder = world.fresh()
    shutil.copytree(world.folder / "world", folder / "w")
    words, more, _ = words_of(world, subject, folder, given=folder / "w")
    place = words.index("--out") + 1
    out = Path(words[place])
    alike = [word for word in words if word.startswith(f"{folder}/w/") and Path(word).is_dir() != bool(out.suffix)]
    source = Path((alike or [folder / "w" / "base"])[0])
    if how == "is of another kind":
        out.mkdir() if out.suffix else out.write_text("old\n")
    elif how == "is below a file":
        (folder / "file").write_text("old\n")
        words[place] = str(folder / "file" / "out.jsonl")
    elif how == "is an input":
        words[place] = str(source)
    elif how == "is a link to an input":
        out.symlink_to(source)
    else:
        folder.chmod(0o555)
    before = files_in(folder, Path.read_bytes)
    result = forked(command(words + more))
    folder.chmod(0o755)
    after = files_in(folder, Path.read_bytes)
    if result[0] == 0:  # it has found another place
        after = {name: content for name, content in after.items() if name in before}
    return complaint(result) or difference(after, before)


def disks(world):
    """Where nothing can be written, one line says so; what was there is still there, and the run can be made later."""
    for number in itertools.count():
        for subject in (subject for subject in SUBJECTS if subject != "story"):
            if number < len(PLACES):
                yield subject, PLACES[number], functools.partial(misplaced, world, subject, PLACES[number])
            yield subject, number, functools.partial(full_disk, world, subject, number)


# ----------------------------------------------------------------------------------------------------------------
# Stale results


def other_value(field, words):
    """The words that give an option another value than `words` do, or than its default; none for a text."""
    flag = common.flag_of(field.name)
    value = field.type(words[words.index(flag) + 1]) if flag in words else field.default
    if field.type is bool:
        return [flag.replace("--", "--no-", 1) if value else flag]
    if field.metadata["choices"]:
        return [flag, next(choice for choice in field.metadata["choices"] if choice != value)]
    return [] if field.type is str else [flag, str(value + 1 if field.type is int else value / 2 + 0.001)]


def change_rows(path, letter):
    """Change a letter of the first question in a file of rows, or else leave out the last row."""
    content = path.read_bytes()
    place = content.index(b"Human: ") + len("Human: ") if letter else content.rindex(b"\n", 0, -1)
    path.write_bytes(content[:place] + (b"Q" + content[place + 1:] if letter else b"\n"))


def change_weight(folder):
    """In a child: change one weight of a model."""
    llama = checkpoint.load(folder)
    with torch.no_grad():
        llama.model.norm.weight[0] += 0.5
    checkpoint.save(llama, folder)


def changes(subject, words):
    """{what is changed: (words to add, what to do to the folder of inputs, what an error must name)}."""
    Options = ppo.Options if subject == "ppo" else train.Options
    made = {field.name: (other_value(field, words), None, field.name) for field in dataclasses.fields(Options)
            if not field.metadata["free"] and other_value(field, words)}
    source = next(Path(word).name for word in words if word.endswith(".jsonl"))
    made["a row of the data"] = [], lambda folder: change_rows(folder / source, False), "data"
    made["a weight of the model"] = [], lambda folder: forked(lambda: change_weight(folder / "base")), "model"
    made["the tokenizer"] = [], lambda folder: shutil.copy(folder / "another.json", folder / "base/tokenizer.json"), \
        "tokenizer"
    if subject != "ppo":  # whose scorers know only some questions
        made["a letter of the data"] = [], lambda folder: change_rows(folder / source, True), "data"
    else:
        made["weights"] = ["--weights", "1", "2"], None, "weights"
        made["scalarization"] = ["--scalarization", "median"], None, "scalarization"
        made["a reward"] = ["--reward", "toy:detail", "toy:empathy"], None, "rewards"
    return made


def stop_half_way(world, subject):
    """Keep the folder of a subject that was killed with a state, as stopped/SUBJECT."""
    known = undisturbed(world, subject)
    for number in range(known.calls // 2, known.calls):
        out = world.fresh()
        words, more, _ = words_of(world, subject, out)
        forked(ended_at(command(words + more), "call", number))
        if list(out.rglob("state.pt")):
            shutil.copytree(out, world.folder / "stopped" / subject)
            return
    raise common.UserError(f"{subject}: leaves no state wherever it is killed")


def asked_again(world, subject, which, what):
    """A run that is finished, or stopped, and the same or another question to it."""
    known, old = undisturbed(world, subject), world.folder / which / subject
    if not old.exists():
        stop_half_way(world, subject)
    folder = world.fresh()
    shutil.copytree(old, folder / "o")
    shutil.copytree(world.folder / "world", folder / "w")
    words, more, _ = words_of(world, subject, folder / "o", given=folder / "w")
    before = files_in(folder / "o", Path.read_bytes)
    if what == "nothing":
        result = forked(command(words + more))
        if wrong := failure(result) or difference(files_in(folder / "o"), known.files):
            return wrong
        if which == "finished" and "finished already" not in result[1]:
            return "it does not say that it is finished already"
        return difference(files_in(folder / "o", Path.read_bytes), before) if which == "finished" else ""
    extra, change, name = changes(subject, words)[what]
    if change:
        change(folder / "w")
    for flags in ([], more):
        result = forked(command(words + extra + flags))
        if wrong := complaint(result, name) or difference(files_in(folder / "o", Path.read_bytes), before):
            return f"with {flags}: {wrong}"
        if result[0] == 0:
            return f"with {flags}: the old result is given: {result[1][-300:]}"
    anew = [word.replace(f"{folder}/o", f"{folder}/anew") for word in words]
    if forked(command(anew + extra))[0] != 0:  # nobody could want this
        return ""
    return failure(forked(command(words + extra + ["--overwrite"]))) or difference(files_in(folder / "o"),
                                                                                 files_in(folder / "anew"))


def stale(world):
    """An old result, or half of one, is never given for a new question; for the same question it is, as it stands."""
    cases = []
    for subject in ("train sft", "train LoRA", "train aligner", "reward train", "ppo"):
        words, _, _ = words_of(world, subject, world.folder)
        cases += [(subject, which, what) for which in ("finished", "stopped")
                  for what in ("nothing", *changes(subject, words))]
    world.rng("stale").shuffle(cases)
    for subject, which, what in cases:
        yield subject, f"{which}, {what}", functools.partial(asked_again, world, subject, which, what)
