"""What a killed run leaves behind, and how it goes on: a training run's state and metrics, and a journal of rows.

A `Run` is a folder in training: run.json tells what it was asked for, from its beginning, and what came of it, when it
has ended; metrics.jsonl has a row per step; state.pt has all that is needed to go on, until there is a model. A
`Journal` is an output file in the making, a line per finished row. Both are written so that a kill at any moment loses
nothing that was reported done, and both compare what is there with what is asked for: an old result is never given for
a new question.
"""
import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import zipfile
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path

import torch

from common import UserError, code_of, digest, first_line, in_short, locked, write_text, write_whole

MODEL = ("config.json", "adapter_config.json")  # of which a folder with a model has one
MADE = ("run.json", "state.pt", "principle.json", *MODEL, "model.safetensors", "adapter_model.safetensors",
        "context.json")  # what a run makes, and must not outlive it
TABLES = ("settings", "code", "options", "files", "parts")  # the objects in run.json


def read_metrics(out):
    """The rows of OUT/metrics.jsonl. UserError where it is not there, or not rows."""
    path = Path(out) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as metrics ({first_line(error)}); delete run.json beside it to start "
                        "again") from error
    return rows


# ----------------------------------------------------------------------------------------------------------------
# run.json: what was asked for, by whom it was made, and what came of it


def read_run(out):
    """What OUT/run.json says, {} where there is none. UserError for one that is broken."""
    path = Path(out) / "run.json"
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict) or not all(isinstance(run.get(key, {}), dict) for key in TABLES):
            raise ValueError("it does not describe a run")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); delete it, or give another --out") from error
    return run


def write_run(out, run):
    write_text(Path(out) / "run.json", json.dumps(run, indent=1) + "\n")


def circumstances():
    """By which command, when, of which commit and with which packages: what run.json tells and nothing compares."""
    def git(*words):
        try:
            done = subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None
        except OSError:  # no git here
            return None
    changes = git("status", "--porcelain", "--untracked-files=no")
    packages = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"command": shlex.join(sys.argv), "began": now(), "commit": git("rev-parse", "HEAD"),
            "dirty": None if changes is None else bool(changes),
            "versions": {"python": platform.python_version(), **packages}}


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def for_card(methods, prompt, options):
    """What a run was to do, for its model card: names of methods, a prompt that it saw, options."""
    changed = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
               if getattr(options, field.name) != field.default}
    return {"method": methods, "prompt": in_short(prompt), "options": vars(options), "changed": changed}


def plan(stages):
    """What is trained on, as a checksum per pool of examples: a resumed run must find the same."""
    def checksum(pool):
        found = zlib.crc32(repr([(example.label, example.gap, example.rewards) for example in pool]).encode())
        for document in (document for example in pool for document in example.documents):
            found = zlib.crc32(bytes(document.ids), zlib.crc32(b"%d" % document.start, found))
        return found
    return [[stage.name, stage.replay_share if stage.replay else 0.0,
             *map(checksum, (stage.examples, stage.held_out, stage.replay))] for stage in stages]


@contextlib.contextmanager
def whole_run(out, settings, script, options=None):
    """Within it, a command makes a folder of several parts, and no other process does. run.json tells of it as of a
    training run. UserError where the folder holds a run with other settings. options: those that may be others in the
    next call, which makes anew what hangs on them; they are told."""
    options = options or {}
    with locked(Path(out) / ".lock"):
        there = read_run(out)
        before = {name: value for name, value in there.get("settings", settings).items() if name not in options}
        if other := differences(before, settings):
            raise UserError(f"{out}: holds a run with other {', '.join(other)}; give another --out, or delete it")
        write_run(out, {**circumstances(), "parts": there.get("parts", {}), "settings": settings,
                        "options": options, "code": code_of(script), "ended": None})
        yield
        write_run(out, {**read_run(out), "ended": now()})


def kept(folder, name, made_of, make):
    """Call make() for the file `name` in a folder, unless run.json there says that it was made of the same: of values
    that JSON can hold, code_of(...) among them."""
    run, key, path = read_run(folder), digest(made_of), Path(folder) / name
    if path.exists() and run.get("parts", {}).get(name) == key:
        return
    if path.exists():
        print(f"{path}: was made of other code or data; made anew")
    make()
    run = read_run(folder)  # make() may have kept parts of its own
    write_run(folder, {**circumstances(), **run, "parts": {**run.get("parts", {}), name: key}})


def changed(there, asked):
    """The names whose values are not the same in two dicts."""
    return [name for name in sorted({*there, *asked}) if there.get(name) != asked.get(name)]


def differences(there, asked):
    """The same with the values, where these are short."""
    def told(name):
        values = [json.dumps(found.get(name)) for found in (there, asked)]
        return f"{name} ({values[0]}, now {values[1]})" if max(map(len, values)) < 30 else name
    return [told(name) for name in changed(there, asked)]


# ----------------------------------------------------------------------------------------------------------------
# Training runs


def check_log(name):
    """UserError where --log's wandb or tensorboard is not installed."""
    try:
        importlib.import_module({"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}.get(name, "json"))
    except ImportError as error:
        raise UserError(f"--log {name}: cannot be imported ({first_line(error)}); pip install {name}, or leave --log "
                        "out") from error


def logger(name, out):
    """What takes a row of metrics to --log's wandb or tensorboard too; None where name is ""."""
    if name == "wandb":
        import wandb
        send = wandb.init(dir=str(out), name=Path(out).name, reinit=True).log  # a run for each Run
    elif name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(out))
    else:
        return None

    def log(row):
        flat = {**row, **{f"score/{key}": value for key, value in row.get("score", {}).items()}}
        step, stage = row.get("step", row.get("iteration")), row.get("stage", "ppo")
        numbers = {f"{stage}/{key}": value for key, value in flat.items() if isinstance(value, (int, float))}
        if name == "wandb":
            send(numbers)
        else:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()
    return log


class Run:
    """A training run in the folder `out`.

    settings: {name: value}, all that decides what comes out, of values that JSON can hold; script: the name of the
    script whose code does so too. about: what else run.json is to tell. log: as of `logger`. A folder that holds a run
    already:

                                       same settings                      other settings, or finished by other code
        neither                        finished: that is it; else an      an error, which names them
                                       error, if there is a state
        resume                         finished: that is it; else go on   an error, which names them
        overwrite                      begin again                        begin again
        resume and overwrite           as resume                          begin again, and say so

    `state` is what `save` last kept, or None where the run begins at the beginning. `finished`: there is nothing left
    to do."""

    def __init__(self, out, settings, script="train", resume=False, overwrite=False, about=None,
                 log=""):
        self.out, self.settings, self.code = Path(out), json.loads(json.dumps(settings)), code_of(script)
        check_log(log)
        self.out.mkdir(parents=True, exist_ok=True)
        self.path, self.state = self.out / "state.pt", None
        what, told = self.compare(resume, overwrite)
        if what != "finished":  # whose folder may be one that nobody can write to
            self.metrics = locked(self.out / "metrics.jsonl")
            what, told = self.compare(resume, overwrite)  # another process may have ended in between
        if told:
            print(f"{self.out}: {told}")
        self.finished = what == "finished"
        if self.finished:
            self.forget_state()  # of a run that was killed as it ended
            return
        self.log = logger(log, self.out)
        self.about = {**circumstances(), **(about or {}), "settings": self.settings, "code": self.code, "ended": None}
        if what == "go on":
            self.state, there = self.read(), read_run(self.out)
            self.about = {**there, "code": self.code, "resumed": [*there.get("resumed", []), circumstances()]}
        else:
            for name in MADE:
                (self.out / name).unlink(missing_ok=True)
            self.forget_state()
        self.metrics.truncate(self.state["metrics_bytes"] if self.state else 0)  # cut back to what the state knows of
        write_run(self.out, self.about)

    def compare(self, resume, overwrite):
        """What to do about what the folder holds: ("begin", "go on" or "finished", what to tell). UserError as above.
        """
        model, metrics = any((self.out / name).exists() for name in MODEL), self.out / "metrics.jsonl"
        try:
            run = read_run(self.out)
            if run.get("ended") and model and "parts" not in run:
                read_metrics(self.out)
        except UserError:
            if not overwrite:
                raise
            return "begin", ""
        if not run and not (metrics.exists() and metrics.stat().st_size) and self.foreign():
            raise UserError(f"{self.out}: holds a model but no metrics.jsonl, so no run made it; choose another --out")
        if "parts" in run:
            raise UserError(f"{self.out}: holds a run of several parts ({run.get('command')}); choose another --out")
        if overwrite and not (resume and run):
            return "begin", ""
        if not run and (model or self.path.exists()):
            raise UserError(f"{self.out}: holds a run without run.json, so nobody can tell what it was asked for; give "
                            "another --out, or --overwrite to start again")
        ended = bool(run.get("ended")) and model
        if not ended and not self.path.exists():
            return "begin", ""  # nothing is there that could be lost
        other = differences(run.get("settings", {}), self.settings)
        code = ", ".join(f"{name}.py" for name in changed(run.get("code", {}), self.code))
        if code and (ended or overwrite):
            other.append(f"code ({code})")
        other = in_short(", ".join(other), 300)
        if other and not overwrite:
            raise UserError(f"{self.out}: holds {'a finished' if ended else 'an unfinished'} run with other {other}; "
                            "give another --out, or --overwrite to start again")
        if other:
            return "begin", f"was made with other {other}; made anew"
        if ended:
            return "finished", "finished already, with these settings"
        if not resume:
            raise UserError(f"{self.out}: holds an unfinished run with these settings; --resume goes on with it, "
                            "--overwrite starts again")
        return "go on", code and f"goes on, though {code} changed since it began"

    def foreign(self):
        """Whether the folder holds what only a model's folder does."""
        return any(path.suffix in (".safetensors", ".bin") or path.name in MADE for path in self.out.iterdir())

    def read(self):
        """What the last `save` kept. The checksums in the file are looked at: a flipped bit is no number to go on from.
        """
        try:
            with zipfile.ZipFile(self.path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{self.path}: cannot be read ({first_line(error)}); delete it to start again") from error
        if not isinstance(state, dict) or state.get("run") != digest(self.settings):
            raise UserError(f"{self.path}: belongs to another run than run.json tells of; delete it to start again")
        metrics = self.out / "metrics.jsonl"
        if metrics.stat().st_size < state["metrics_bytes"]:
            raise UserError(f"{metrics}: is shorter than {self.path.name} says; delete {self.path.name} to start again")
        return state

    @contextlib.contextmanager
    def loading(self):
        """What fails in here is a state that does not fit."""
        try:
            yield self.state
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{self.path}: does not fit this run ({first_line(error)}); delete it to start "
                            "again") from error

    def write(self, row):
        """Add a row to the metrics, at once."""
        self.metrics.write((json.dumps(row) + "\n").encode())
        self.metrics.flush()
        if self.log:
            self.log(row)

    def save(self, **parts):
        """Keep what a resumed run finds in `state`."""
        size = os.fstat(self.metrics.fileno()).st_size
        state = {**parts, "run": digest(self.settings), "metrics_bytes": size}

        def write(aside):
            try:
                torch.save(state, aside)
            except RuntimeError as error:  # how PyTorch reports a full disk
                raise UserError(f"{self.path}: cannot be written ({first_line(error)}); is the disk full?") from error
        write_whole(self.path, write)

    def finish(self):
        """After the model has been saved: run.json tells what came of it, and nothing is left to resume. Gives the rows
        of metrics."""
        rows, last = read_metrics(self.out), {}
        for row in rows:
            last.update({name: value for name, value in row.items() if name != "samples"})  # each figure's last value
        write_run(self.out, {**self.about, "ended": now(), "last": last})
        self.forget_state()
        self.metrics.close()
        return rows

    def forget_state(self):
        for left in sorted(self.out.glob("state.pt*")):  # state.pt; then what it names (see parallel.save), or what a
            shutil.rmtree(left) if left.is_dir() else left.unlink()  # run was killed while it saved


# ----------------------------------------------------------------------------------------------------------------
# Output files in the making


class Finished(Mapping):
    """{index: row} of a journal's rows. They stay in its file, and are read there when they are asked for: memory holds
    only where each one stands, 8 bytes."""

    def __init__(self, file):
        self.file, self.places = file, array("q")  # -1: not finished

    def put(self, index, place):
        if index < 0:
            raise IndexError(index)
        self.places.extend([-1] * (index + 1 - len(self.places)))
        self.places[index] = place

    def __getitem__(self, index):
        if not 0 <= index < len(self.places) or self.places[index] < 0:
            raise KeyError(index)
        self.file.seek(self.places[index])
        return json.loads(self.file.readline())

    def __iter__(self):
        return (index for index, place in enumerate(self.places) if place >= 0)

    def __len__(self):
        return sum(place >= 0 for place in self.places)


class Journal:
    """OUT.part: a line per finished row, {"index", ...}, behind a first line that tells what run it belongs to.

    `rows` {index: row} is what is finished; of one index, the last line counts. No other process may write it
    meanwhile."""

    def __init__(self, path, run):
        self.path = Path(f"{path}.part")
        self.file = locked(self.path)
        self.rows = Finished(self.file)
        if not self.recover(run):
            self.file.truncate(0)
            self.write({"run": run})

    def recover(self, run):
        """Find what a killed run had finished; its last line may be torn and is then cut off. False where it had
        finished nothing."""
        self.file.seek(0)
        head, line, mark = self.file.readline(), self.file.readline(), b'{"run": '
        if not line.endswith(b"\n") and (head.startswith(mark) or mark.startswith(head)):
            return False
        place = len(head)
        try:
            same = json.loads(head)["run"] == run
            while same and line.endswith(b"\n"):
                self.rows.put(json.loads(line)["index"], place)
                place += len(line)
                line = self.file.readline()
        except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"{self.path}: is not the unfinished output of this program; move it, or give another "
                            "--out") from error
        if not same:
            raise UserError(f"{self.path}: is the unfinished output of a run with other settings; delete it, or give "
                            "those settings again, or another --out")
        self.file.truncate(place)
        return True

    def write(self, row):
        """Gives the place of the row's line in the file."""
        place = self.file.seek(0, os.SEEK_END)
        self.file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self.file.flush()
        return place

    def add(self, row):
        """A row, or more of one, is finished."""
        index = row["index"]
        self.rows.put(index, self.write({**self.rows.get(index, {}), **row}))

    def finish(self):
        """The output has been put in place: remove the journal."""
        self.path.unlink()
        self.file.close()
