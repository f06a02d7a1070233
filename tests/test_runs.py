"""Runs side by side: folders made by hand, whose tables are worked out by hand, and a real run's."""
import json
import re
import math
import statistics
from types import SimpleNamespace

import pytest

import runs
import train
from conftest import refused, run, write
from report import over_seeds
from test_report import Page
from test_train import command, finished, metrics, world  # noqa: F401 (fixtures)

LOSSES = [4.0, 3.0, 2.5, 2.0, 1.5, 1.25, 1.0, 1.0, 0.75, 0.5]


def make(folder, seed=0, lr=0.003, shift=0.0, ended="now", more=None, data="abc", rows=LOSSES):
    """A run of one stage as train.py leaves it: 100 tokens a step, validations at both ends."""
    settings = {"lr": lr, "seed": seed, "batch": 32, "data": [[data, seed]], "model": f"m{seed}", **(more or {})}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": settings, "options": {**settings, "val_every": 10},
                                                 "ended": ended, "code": {"train": "1"}}))
    steps = [{"stage": "sft", "step": n, "loss": loss + shift, "tokens": 100 * n, "seconds": n / 2}
             for n, loss in enumerate(rows, 1)]
    write(folder / "metrics.jsonl", {"stage": "sft", "step": 0, "val_loss": 5.0}, *steps,
          {"stage": "sft", "step": 10, "val_loss": 0.8 + shift,
           "samples": [{"prompt": "Why?", "text": f"<b>So{seed}</b>"}]})
    return folder


def compared(monkeypatch, capsys, tmp_path, *words):
    """(what was printed, the page) of a command."""
    assert run(runs, monkeypatch, [*words, "--out", tmp_path / "page.html"]) == 0
    return capsys.readouterr().out, Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def table(printed, head="run"):
    """{first cell: {column: cell}} of the first printed table that begins with a head."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    columns = [column for column in lines[start].split("  ") if column.strip()]
    found = {}
    for line in lines[start + 1:]:
        if not line.strip():
            break
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        found[cells[0]] = dict(zip([column.strip() for column in columns[-len(cells) + 1:]], cells[1:]))
    return found


def test_a_run_that_was_killed_before_its_first_step_is_there(tmp_path, monkeypatch, capsys):
    killed = make(tmp_path / "killed", ended=None)
    (killed / "metrics.jsonl").write_text("")
    printed, page = compared(monkeypatch, capsys, tmp_path, make(tmp_path / "whole", lr=0.001), killed)
    assert table(printed) == {"whole": {"lr": "0.001", "state": "finished"},
                              "killed": {"lr": "0.003", "state": "unfinished"}}
    assert "\nsft\n" in printed


def test_figures_stand_by_themselves_and_joined(tmp_path, monkeypatch, capsys):
    """Student's t of two values is 12.71, and their deviation over the root of two is half their distance."""
    for seed, gain in ((0, 10.0), (1, 12.0)):
        write(make(tmp_path / f"s{seed}", seed=seed) / "results.json", {"summary": {"worth": {"mean": gain}}})
    printed, _ = compared(monkeypatch, capsys, tmp_path, tmp_path / "s0", tmp_path / "s1")
    assert "s0" in printed and re.search(r"\nworth +10\.00 +12\.00 +11\.00 \[-1\.71, 23\.71\]", printed)


def test_the_options_that_differ_are_columns_and_no_others(tmp_path, monkeypatch, capsys):
    folders = [make(tmp_path / f"lr-{lr}", lr=lr, shift=lr) for lr in (0.001, 0.003)]
    printed, page = compared(monkeypatch, capsys, tmp_path, *folders)
    found = table(printed)
    assert list(found) == ["lr-0.001", "lr-0.003"]
    assert found["lr-0.003"] == {"lr": "0.003", "state": "finished", "steps": "10", "tokens": "1k", "seconds": "5",
                                 "loss": "0.503", "validation at first": "5.000", "validation": "0.803"}
    assert "batch" not in printed and "seed" not in printed and "val_every" not in printed
    assert "svg" in page.tags and not page.tags & {"script", "img", "link", "b"}
    assert "Why?" in page.text and "lr-0.001: <b>So0</b>" in page.text


def test_several_seeds_are_joined_with_students_interval(tmp_path, monkeypatch, capsys):
    shifts = (0.0, 0.25, 0.125)
    folders = [make(tmp_path / f"{lr}-{seed}", seed, lr, shift) for lr in (0.001, 0.003)
               for seed, shift in enumerate(shifts)]
    folders.append(make(tmp_path / "stopped", 3, 0.003, ended=None))
    found = table(compared(monkeypatch, capsys, tmp_path, *folders)[0])
    half = 4.303 * statistics.stdev(shifts) / math.sqrt(3)
    for lr in (0.001, 0.003):
        joined = found[f"= lr {lr} (seeds 0, 1, 2)"]
        assert joined == {"loss": f"{0.5 + 0.125:.3f} ±{half:.3f}", "validation at first": "5.000 ±0.000",
                          "validation": f"{0.8 + 0.125:.3f} ±{half:.3f}"}
    assert found["stopped"]["state"] == "unfinished" and len(found) == 9


def test_a_figure_that_a_seed_lacks_is_not_told_of_all_seeds():
    figures = {"s0": {"net": (0, None), "kept": (50, (49, 51))}, "s1": {"net": (1, None)}}
    parts = [SimpleNamespace(name=name, figures=found) for name, found in figures.items()]
    head, rows, _ = runs.figure_table([("all", parts)], None)
    assert head == ["", "s0", "s1", "= all"]
    assert rows[0][:3] == ["net", "0.00", "1.00"] and rows[0][3].startswith("0.50 [")
    assert rows[1] == ["kept", "50.00 [49.00, 51.00]", "-", "-"]


def test_what_differs_in_more_than_the_seed_is_not_joined(tmp_path):
    parts = [runs.read_part(name, make(tmp_path / name, **more), {}) for name, more in {
        "a": {}, "b": dict(seed=1), "c": dict(seed=1, lr=1.0), "d": dict(seed=2, more={"beta": 1})}.items()]
    assert [[part.name for part in members] for _, members in runs.groups_of(parts)] == [["a", "b"], ["c"], ["d"]]
    twin = runs.read_part("e", make(tmp_path / "e", data="other"), {})  # the same seed again, of other data
    assert [[part.name for part in members] for _, members in runs.groups_of([*parts[:2], twin])] == [
        ["a"], ["b"], ["e"]]
    assert runs.differing(parts[:2]) == ["seed"] and runs.differing([parts[0], twin]) == ["data"]


def test_joined_lines_and_their_intervals_are_means_place_by_place():
    lines = [[(0, 1.0), (10, 4.0), (20, 9.0)], [(0, 3.0), (12, 8.0)]]
    points, interval = runs.mean_line(lines)
    assert points == [(0, 2.0), (11, 6.0)]  # as far as both go
    assert [(x, (low + high) / 2) for x, low, high in interval] == [pytest.approx(p) for p in points]
    assert [(high - low) / 2 for _, low, high in interval] == pytest.approx(
        [over_seeds([1, 3])[1], over_seeds([4, 8])[1]])
    assert runs.mean_line(lines[:1]) == (lines[0], []) and runs.mean_line([]) == ([], [])


@pytest.mark.parametrize("count", [1, 7, 60, 61, 600, 1003])
def test_a_training_is_shown_in_stretches_that_hold_every_step_once(count):
    found = runs.stretches([(x, x * x) for x in range(count)])
    assert len(found) == min(count, runs.STRETCHES)
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    if count % runs.STRETCHES == 0:
        assert statistics.mean(y for _, y in found) == pytest.approx(statistics.mean(x * x for x in range(count)))


def test_a_killed_runs_torn_line_is_left_out(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / "killed", ended=None)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "sft", "step": 11, "lo')
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text(json.dumps({"settings": {"lr": 0.5}, "ended": None}))
    (tmp_path / "begun" / "metrics.jsonl").touch()
    printed, _ = compared(monkeypatch, capsys, tmp_path, folder)
    assert table(printed)["killed"]["state"] == "unfinished" and table(printed)["killed"]["steps"] == "10"
    printed, _ = compared(monkeypatch, capsys, tmp_path, folder, tmp_path / "begun")
    assert "killed" in table(printed)
    printed, _ = compared(monkeypatch, capsys, tmp_path, tmp_path / "begun")
    assert table(printed)["begun"] == {"state": "unfinished"}


@pytest.mark.parametrize("spoil, said", [
    (lambda path: path.write_text('{"stage": "sft"}\n{"lo\n{}\n'), "metrics.jsonl:2: is broken"),
    (lambda path: path.write_text('[1]\n{}\n'), "metrics.jsonl:1: is broken"),
    (lambda path: path.write_bytes(b'\xff\xfe\n{}\n'), "metrics.jsonl:1: is broken"),
    (lambda path: path.write_text('{"stage": "sft", "step": 1, "loss": "x", "tokens": 1, "seconds": 1}\n'),
     "metrics.jsonl:1: 'loss' is no number"),
    (lambda path: path.write_text('{"stage": "sft", "step": 1, "loss": 2}\n'),
     "metrics.jsonl:1: 'tokens' is no number"),
    (lambda path: (path.parent / "run.json").write_text("{"), "run.json: cannot be read"),
    (lambda path: (path.parent / "run.json").write_text('{"files": [1]}'), "run.json: cannot be read"),
    (lambda path: (path.parent / "run.json").write_text('{"options": 3}'), "run.json: cannot be read"),
    (lambda path: (path.parent / "results.json").write_text("nothing"), "results.json: cannot be read")])
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys, spoil, said):
    folder = make(tmp_path / "run")
    spoil(folder / "metrics.jsonl")
    refused(runs, monkeypatch, capsys, [folder, "--out", tmp_path / "page.html"], said)
    assert not (tmp_path / "page.html").exists()


def test_folders_without_runs_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    words = ["--out", tmp_path / "page.html"]
    refused(runs, monkeypatch, capsys, [tmp_path / "empty", *words], "empty: holds no run", "metrics.jsonl")
    refused(runs, monkeypatch, capsys, [tmp_path / "none", *words], "none: no such folder")
    folder = make(tmp_path / "run")
    refused(runs, monkeypatch, capsys, [folder, "--out", folder / "metrics.jsonl"], "is an input too")


def a_story(folder, seed, net):
    make(folder / "aligner", seed, shift=seed / 4)
    make(folder / "small", seed)
    (folder / "run.json").write_text(json.dumps({"settings": {"seed": seed, "width": 64}, "ended": "now"}))
    summary = {"net, trained": {"mean": net}, "all: copy": {"net": {"mean": 1.0, "interval": [-1, 3], "n": 9}}}
    write(folder / "results.json", {"small": {"objectives": {"helpful": {"net": 5.0}}}, "summary": summary})
    return folder


def test_stories_are_compared_part_by_part_with_what_came_of_them(tmp_path, monkeypatch, capsys):
    one, two = (a_story(tmp_path / f"s{seed}", seed, net) for seed, net in ((0, 10.0), (1, 30.0)))
    printed, page = compared(monkeypatch, capsys, tmp_path, one, two)
    assert [line for line in printed.splitlines() if line.startswith("==")] == ["== s0 | s1", "== aligner", "== small"]
    half = over_seeds([10, 30])[1]
    assert f"20.00 [{20 - half:.2f}, {20 + half:.2f}]" in printed and "helpful" not in printed
    assert "= all (seeds 0, 1)" in printed and "(seeds 0, 1)" in page.text
    printed, _ = compared(monkeypatch, capsys, tmp_path, one)
    assert "1.00 [-1.00, 3.00]" in printed and "10.00" in printed
    printed, _ = compared(monkeypatch, capsys, tmp_path, one, "--figures", "copy")
    assert "1.00 [-1.00, 3.00]" in printed and "net, trained" not in printed


def test_stories_of_other_recipes_are_not_joined_in_their_parts(tmp_path):
    one, two = a_story(tmp_path / "s0", 0, 1.0), a_story(tmp_path / "s1", 1, 2.0)
    told = json.loads((two / "run.json").read_text())
    (two / "run.json").write_text(json.dumps({**told, "settings": {"seed": 1, "width": 128}}))
    parts = [runs.read_parts(folder, folder.name)["aligner"] for folder in (one, two)]
    assert len(runs.groups_of(parts)) == 2 and "width" in runs.differing(parts)


def test_stories_that_were_edited_otherwise_are_not_joined_but_in_their_parts(tmp_path):
    stories = [a_story(tmp_path / f"s{seed}", seed, float(seed)) for seed in (0, 1)]
    for folder, best_of in zip(stories, (1, 8)):
        told = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**told, "options": {"best_of": best_of}}))
    found = [runs.read_parts(folder, folder.name) for folder in stories]
    assert [len(runs.groups_of([parts[name] for parts in found])) for name in ("", "aligner")] == [2, 1]
    assert runs.differing([parts[""] for parts in found]) == ["seed", "best_of"]


def test_results_of_several_seeds_in_one_file_are_joined(tmp_path):
    """As compare.py writes them: gains, with their intervals over questions."""
    results = [{"table": {"dpo": {"gain": gain, "worst": 0, "interval": [0, 1]}}} for gain in (1.0, 2.0)]
    write(tmp_path / "results.json", results)
    mean, half = over_seeds([1.0, 2.0])
    assert runs.figures_of(tmp_path) == {"table, dpo, gain": (mean, [mean - half, mean + half])}
    write(tmp_path / "results.json", results[:1])
    assert runs.figures_of(tmp_path) == {"table, dpo, gain": (1.0, [0, 1])}
    write(tmp_path / "results.json", [*results, {"table": {"ipo": {"gain": 5.0}}}])
    assert not runs.figures_of(tmp_path), "one seed's figure is not that of three"


def test_ppos_rewards_stand_for_losses(tmp_path, monkeypatch, capsys):
    rows = [{"iteration": n, "reward": n / 10, "kl": 1.0, "tokens": 50 * n, "seconds": 1.0 * n} for n in range(1, 31)]
    write(tmp_path / "ppo" / "metrics.jsonl", *rows, {**rows[-1], "iteration": 31, "reward": math.nan})
    found = table(compared(monkeypatch, capsys, tmp_path, tmp_path / "ppo")[0])["ppo"]
    assert found["reward"] == f"{(2.8 + 2.9 + 3.0) / 3:.3f}" and found["state"] == "no run.json"


def test_a_real_run_is_read_as_it_was_written(finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    printed, page = compared(monkeypatch, capsys, tmp_path, finished)
    rows = [row for row in metrics(finished) if row["stage"] == "better"]
    losses, checks = ([row[key] for row in rows if key in row] for key in ("loss", "val_loss"))
    found = table(printed.partition("\nbetter\n")[2])["aligner"]
    assert found["loss"] == f"{losses[-1]:.3f}" and found["validation"] == f"{checks[-1]:.3f}"
    assert found["validation at first"] == f"{checks[0]:.3f}" and found["steps"] == "4"
    assert all(f"\n{stage}\nrun" in printed for stage in ("identity", "equal", "better"))
    assert "What was written at the last validation" in page.text and train.SAMPLE > 0


def test_different_code_is_said(tmp_path, monkeypatch, capsys):
    one, two = make(tmp_path / "a"), make(tmp_path / "b", 1)
    told = json.loads((two / "run.json").read_text())
    (two / "run.json").write_text(json.dumps({**told, "code": {"train": "2"}}))
    assert "made by different code: train" in compared(monkeypatch, capsys, tmp_path, one, two)[0]


def test_the_page_is_no_run_and_a_name_that_no_figure_has_is_told(tmp_path, monkeypatch, capsys):
    """`runs.py runs/*` finds the page that it wrote there before."""
    folder, page = make(tmp_path / "a"), tmp_path / "runs.html"
    (folder / "results.json").write_text(json.dumps({"gain of x": {"mean": 2.0, "interval": 5}}))
    for _ in range(2):
        assert run(runs, monkeypatch, [*sorted(tmp_path.iterdir()), "--out", page, "--figures", "kept"]) == 0
        assert "none of 1 figures has kept in its name" in capsys.readouterr().out
    refused(runs, monkeypatch, capsys, [page, "--out", page], "is the page")
