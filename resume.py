"""What a killed run leaves behind, and how it goes on: a training run's state and metrics, and a journal of rows.

A `Run` is a folder in training: metrics.jsonl with a row per step, and state.pt with all that is needed to go on; when
it is finished, there is a model and no state. A `Journal` is an output file in the making, a line per finished row.
Both are written so that a kill at any moment loses nothing that was reported done.
"""
import json
import os
from pathlib import Path

import torch

from common import UserError, first_line, write_whole

FINISHED = ("config.json", "adapter_config.json")  # the last file that a finished run writes


def read_metrics(out):
    """The rows of OUT/metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Run:
    """A training run in the folder `out`.

    settings: {name: value}, all that decides what comes out; a run that is resumed must be given the same. `state` is
    what `save` last kept of it, or None where it begins at the beginning. `finished`: there is nothing left to do."""

    def __init__(self, out, settings, resume=False):
        self.out, self.settings = Path(out), settings
        self.out.mkdir(parents=True, exist_ok=True)
        self.path, self.state = self.out / "state.pt", None
        model = any((self.out / name).exists() for name in FINISHED)
        metrics = (self.out / "metrics.jsonl").exists()
        self.finished = resume and model and metrics and not self.path.exists()
        if self.finished:
            return
        if resume and self.path.exists():
            self.state = self.read()
        elif model and not metrics:  # which a later --resume would take for what this run has made
            raise UserError(f"{self.out}: holds a model but no metrics.jsonl, so no run made it; choose another --out")
        else:
            self.forget()
        self.metrics = open(self.out / "metrics.jsonl", "ab")
        self.metrics.truncate(self.state["metrics_bytes"] if self.state else 0)  # cut back to what the state knows of

    def read(self):
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{self.path}: cannot be read ({first_line(error)}); delete it to start again") from error
        made = state.get("settings") if isinstance(state, dict) else None
        made = made if isinstance(made, dict) and isinstance(state.get("metrics_bytes"), int) else {}
        changed = [name for name, value in self.settings.items() if name not in made or made[name] != value]
        if changed:
            raise UserError(f"{self.path}: was made with other settings of {', '.join(changed)}; give the same to "
                            "--resume, or leave --resume out to start again")
        metrics = self.out / "metrics.jsonl"
        if not metrics.exists() or metrics.stat().st_size < state["metrics_bytes"]:
            raise UserError(f"{metrics}: is shorter than {self.path.name} says; leave --resume out to start again")
        return state

    def forget(self):
        """Remove what an earlier run into the same folder would make a later --resume believe."""
        for name in (self.path.name, *FINISHED):
            (self.out / name).unlink(missing_ok=True)

    def write(self, row):
        """Add a row to the metrics, at once."""
        self.metrics.write((json.dumps(row) + "\n").encode())
        self.metrics.flush()

    def save(self, **parts):
        """Keep what a resumed run finds in `state`."""
        state = {**parts, "settings": self.settings, "metrics_bytes": os.fstat(self.metrics.fileno()).st_size}

        def write(aside):
            try:
                torch.save(state, aside)
            except RuntimeError as error:  # how PyTorch reports a full disk
                raise UserError(f"{self.path}: cannot be written ({first_line(error)}); is the disk full?") from error
        write_whole(self.path, write)

    def finish(self):
        """After the model has been saved: nothing is left to resume. Gives the rows of metrics."""
        self.metrics.close()
        for name in ("state.pt", "state.pt.tmp"):  # the latter from a run that was killed while it saved
            (self.out / name).unlink(missing_ok=True)
        return read_metrics(self.out)


class Journal:
    """OUT.part: a line per finished row, {"index", ...}, behind a first line that tells what run it belongs to.

    `rows` {index: row} is what is finished; lines of one index are joined."""

    def __init__(self, path, run):
        self.path, self.rows = Path(f"{path}.part"), {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.recover(run):
            self.path.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
        self.file = open(self.path, "a", encoding="utf-8", errors="replace")

    def recover(self, run):
        """Read what a killed run had finished; its last line may be torn and is then cut off. False where it had
        finished nothing."""
        whole = self.path.read_bytes()
        *lines, torn = whole.split(b"\n")  # not splitlines(), which would also cut at U+2028 inside an answer
        if not whole or len(lines) < 2 and whole.startswith(b'{"run": '):
            return False
        try:
            same = json.loads(lines[0])["run"] == run
            rows = [json.loads(line) for line in lines[1:]] if same else []
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"{self.path}: is not the unfinished output of this program; move it, or give another "
                            "--out") from error
        if not same:
            raise UserError(f"{self.path}: is the unfinished output of a run with other settings; delete it, or give "
                            "those settings again, or another --out")
        os.truncate(self.path, len(whole) - len(torn))
        for row in rows:
            self.keep(row)
        return True

    def keep(self, row):
        self.rows[row["index"]] = {**self.rows.get(row["index"], {}), **row}

    def add(self, row):
        """A row, or more of one, is finished."""
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        self.keep(row)

    def finish(self):
        """The output has been put in place: remove the journal."""
        self.file.close()
        self.path.unlink()
