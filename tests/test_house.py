"""What README says of the files: which rooms there are, how large they may be, and that imports run one way."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
BOOK = ["model", "generate", "data", "losses", "train", "align", "eval"]
FLOORS = ["common losses peers", "endpoint files lora model resume",
          "checkpoint compiled formats generate objectives parallel", "answers chat optimizers wordings", "data",
          "folders methods report scorers toy writers", "blackbox runs train", "choose eval", "align",
          "feedback measure reward",
          "combine ppo story", "ablate play rivals timed", "bench compare morlaif trials", "campaign"]


def imported(text):
    """The names of the project's own files that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & FILES.keys()


def test_imports_run_from_the_top_floor_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
    assert floor.keys() == FILES.keys()
    upward = [(name, other) for name, text in FILES.items() for other in imported(text) if floor[other] >= floor[name]]
    assert not upward
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(r"without circles: (.*?)\.\n", readme, re.DOTALL)[1]
    assert re.findall(r"`(\w+)`|(;)", said) == [(name, "") if name != ";" else ("", ";") for name in
                                                " ; ".join(FLOORS).split()]


@pytest.mark.parametrize("name", [name for name, text in FILES.items() if "\n    cli(main)\n" in text])
def test_a_script_imports_common_before_anything_that_takes_time(name):
    """So that Ctrl-C in the first seconds is one line."""
    others = "|".join([*(FILES.keys() - {"common"}), "torch", "numpy", "tqdm"])
    slow = re.search(rf"^(?:import|from) (?:{others})\b", FILES[name], re.MULTILINE)
    assert FILES[name].index("\nfrom common import") < slow.start()


def test_the_map_names_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)\.py`", readme[readme.index("## The map"):readme.index("## How to change it")])
    assert set(named) == FILES.keys() and [name for name in named if name in BOOK][:len(BOOK)] == BOOK


@pytest.mark.parametrize("name", FILES)
def test_no_room_is_too_large(name):
    lines = {stem: text.count("\n") for stem, text in FILES.items()}
    assert lines[name] <= {"model": 480, "generate": 350}.get(name, 600)
    assert sum(lines[stem] for stem in BOOK) <= 2700
    for node in ast.walk(ast.parse(FILES[name])):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
