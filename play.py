"""Play with the aligner that `make train` has trained: your question, a policy's answer, your wishes, the edit.

    python play.py                          the world's questions by number or in your words
    python play.py --policy toxic           another policy's answers: verbose, toxic, blackbox, small, large

The edit is shown as a word diff, and below it the exact judge's verdicts, on what you asked for and on what you did
not ask for.
"""
import difflib
import sys
from pathlib import Path

from common import UserError, cli, make_parser, note, number

import story
import toy
import wordings
from align import align
from choose import Choice
from objectives import Objective
from report import ansi_diff, in_common, visible, word_diff
from writers import Writer

MOST = 100  # letters of a wish that is compared with the known wordings
ALIKE = 0.75, 0.8  # a wish this much like a known wording, without or with a word of its own, is judged as that one


def ask(what):
    """A line from the terminal; None at its end, and for "quit" and "exit"."""
    print(f"{what}: ", end="", flush=True, file=sys.stderr)
    line = sys.stdin.readline()
    return line.strip() if line and line.strip().lower() not in ("quit", "exit") else None


def task_meant(text):
    """The number of the task that a number from 1 or any words mean, None where there is none near."""
    if text.isdecimal() and len(text) < 10:
        return int(text) - 1 if 1 <= int(text) <= len(toy.TASKS) else None
    plain = {task.lower(): place for place, task in enumerate(toy.TASKS)}
    words = set(text.lower().replace("?", " ").split()) - {"a", "the", "i", "do", "how", "to", "can", "you"}

    def likeness(task):
        shared = sum(any(word.rstrip("s") == other.rstrip("s") for other in task.split()) for word in words)
        return shared + difflib.SequenceMatcher(None, text.lower(), task).ratio()
    best = max(plain, key=likeness)
    return plain[best] if likeness(best) >= 1 else None


def understood(text):
    """A wish as an Objective, and the name by which the judge knows it (None: not at all), and what to say of that."""
    if name := wordings.meant(text):
        return Objective(name, text), name, ""
    if len(text) > MOST:
        return Objective(text, text), None, "longer than any known wording, so nobody can judge it"
    likeness, wording, name = wordings.nearest_wish(text)
    if likeness >= ALIKE["_" in name]:
        return Objective(name, text), name, f"judged as {wording!r}"
    return Objective(text, text), None, f"no known wording is near (the nearest: {wording!r}), so nobody can judge it"


def verdicts(prompt, before, after, names):
    """{name: "better", "worse" or "same", and whether it cannot be better} of an edit."""
    found = {}
    for name in names:
        old, new = (toy.score(name, prompt, text) for text in (before, after))
        word = "better" if new > old else "worse" if new < old else "same"
        found[name] = f"{word}, as good as can be" if new >= toy.best(name) else word
    return found


def show(prompt, before, after, wishes):
    """Print an edit and what the judges say of it. wishes: of `understood`."""
    if sys.stdout.isatty():
        print(ansi_diff(before, after))
    else:
        marks = {" ": "{}", "-": "[-{}-]", "+": "[+{}+]"}
        print("".join(marks[op].format(visible(text)) for op, text in word_diff(before, after)))
    if before == after:
        print("(left as it was)")
    known = [name for _, name, _ in wishes if name]
    told = verdicts(prompt, before, after, known)
    for objective, name, said in wishes:
        print(f"  asked      {objective.description}: {told.get(name, said)}" + (f" ({said})" if name and said else ""))
    moved = {name: verdict for name, verdict in verdicts(prompt, before, after, toy.NAMED).items()
             if name not in known and not verdict.startswith("same")}
    for name, verdict in moved.items():
        print(f"  not asked  {name}: {verdict}")
    print(f"  not asked  {'the other' if moved else 'all'} named objectives: same")
    old, new = toy.sentences_of(before), toy.sentences_of(after)
    print(f"  kept       {in_common(old, new)} of {len(old)} sentences, {len(new)} in all")


def play(run, policy, seed, best_of, device):
    aligner, turn = Writer(Path(run) / "aligner", device), 0
    for place, task in enumerate(toy.TASKS, 1):
        print(f"{place:>3} {task:<32}", end="\n" if place % 3 == 0 else "")
    print()
    while (text := ask("how do I ... (a number or words; empty ends)")):
        place = task_meant(text)
        if place is None:
            note(f"no question is near {text!r}; take a number from 1 to {len(toy.TASKS)}, or words of the list")
            continue
        prompt = f"\n\nHuman: {toy.QUESTIONS[0].replace('TASK', toy.TASKS[place])}\n\nAssistant:"
        answer = story.ask_policy(policy, [prompt], Path(run), seed + turn, device)[0]
        print(f"\n{toy.QUESTIONS[0].replace('TASK', toy.TASKS[place])}\n{policy}: {visible(answer)}\n")
        while said := ask("your wishes, with ; between them (empty: another question)"):
            wishes = [understood(wish.strip()) for wish in said.split(";") if wish.strip()]
            if not wishes:
                continue
            item = {"index": turn, "prompt": prompt, "original": answer, "objectives": [wish[0] for wish in wishes]}
            edited = next(align(aligner, [item], None, max_new_tokens=256, seed=seed, choice=Choice(best_of)))
            show(prompt, answer, edited["aligned"], wishes)
        if said is None:  # "quit"
            return
        turn += 1


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--run", default="runs/story", metavar="FOLDER", help="what `make train` has made (default runs/story)")
    add("--policy", default="verbose", choices=list(toy.POLICIES), help="who answers (default verbose)")
    add("--seed", type=number(int, 0, 2**40), default=0, help="of the answers and the edits (default 0)")
    add("--best-of", type=number(int, 1, 1000), default=8, metavar="N", help="of so many edits, the one asked for "
        "most is shown (default 8; 1: the likeliest)")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args()
    if not (Path(args.run) / "aligner").is_dir():
        raise UserError(f"{args.run}: holds no aligner; run `make train` first, or give --run FOLDER (QUICK=1 "
                        "makes runs/quick)")
    play(args.run, args.policy, args.seed, args.best_of, args.device)


if __name__ == "__main__":
    cli(main)
