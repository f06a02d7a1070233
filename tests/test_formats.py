"""formats.py: the readers of every format, on small files and on real ones, and what broken files do."""
import gzip
import json
import random
from collections import Counter

import pytest
from conftest import response, write, write_csv

import common
import data
import formats
import methods
import train
from common import UserError
from objectives import Objective, row_objectives


# ----------------------------------------------------------------------------------------------------------------
# Small files


DIALOGUE = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why?\n\nAssistant:"


def test_hh_rlhf_is_split_at_the_last_turn_and_knows_its_objective(tmp_path):
    pair = {"chosen": DIALOGUE + " Because. ", "rejected": DIALOGUE + " No."}
    answers = [response("Because.", harmless=1), response("No.", harmless=0)]
    expected = [{"prompt": DIALOGUE, "responses": answers}]
    assert list(formats.read_rated(write(tmp_path / "harmless-base" / "test.jsonl", pair))) == expected
    assert list(formats.read_rated(write(tmp_path / "harmless-base.test.jsonl", pair))) == expected
    path = write(tmp_path / "helpful-online" / "x.jsonl", pair)
    assert next(formats.read_rated(path))["responses"][0]["scores"] == {"helpful": 1}
    assert next(formats.read_rated(path, objective="honest"))["responses"][0]["scores"] == {"honest": 1}
    with pytest.raises(UserError, match="--objective"):
        next(formats.read_rated(write(tmp_path / "helpfulness.jsonl", pair)))


def test_hh_rlhf_pairs_with_different_dialogues_are_skipped_and_counted(tmp_path):
    other = DIALOGUE.replace("why", "how")
    path = write(tmp_path / "x.jsonl", {"chosen": DIALOGUE + " a", "rejected": other + " b"},
                 {"chosen": "no turn", "rejected": "no turn"},
                 {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"})
    skipped = Counter()
    assert len(list(formats.read_rated(path, "helpful", skipped=skipped))) == 1
    assert list(skipped.values()) == [2]


def test_ultrafeedback_leaves_out_only_the_ratings_that_are_missing(tmp_path):
    def completion(text, *ratings):
        names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
        return {"model": "m", "response": text, "overall_score": 7.5, "annotations": {
            name: {"Rating": rating, "Rationale": "because"} for name, rating in zip(names, ratings)}}
    row = {"instruction": "say hi", "models": ["m"], "source": "s", "completions": [
        completion("hi", "4", "N/A", "3", "5"), completion("hello", "5", "5", "5", "1"),
        completion("ho", "1", "1", "1", "1")]}
    read = list(formats.read_rated(write(tmp_path / "uf.jsonl", row)))
    assert read == [{"prompt": "say hi", "golden": "hello", "responses": [
        response("hi", instruction_following=4, truthful=3, helpful=5),
        response("hello", instruction_following=5, honest=5, truthful=5, helpful=1),
        response("ho", instruction_following=1, honest=1, truthful=1, helpful=1)]}]
    assert all(name in data.OBJECTIVES for name in read[0]["responses"][1]["scores"])


def test_trl_pairs_as_texts_and_as_messages(tmp_path):
    user, yes, no = ({"role": role, "content": text} for role, text in
                     (("user", "why?"), ("assistant", "yes\n\nAssistant: x"), ("assistant", "no")))
    rows = [{"prompt": "why?", "chosen": "yes\n\nAssistant: x", "rejected": "no"},
            {"prompt": [user], "chosen": [yes], "rejected": [no]},
            {"prompt": "why?", "chosen": [user, yes], "rejected": [user, no]}]
    read = list(formats.read_rated(write(tmp_path / "p.jsonl", *rows), objective="honest"))
    assert [row["prompt"] for row in read] == ["why?", "\n\nHuman: why?\n\nAssistant:", "why?"]
    answers = [response("yes\n\nAssistant: x", honest=1), response("no", honest=0)]
    assert all(row["responses"] == answers for row in read)
    whole = write(tmp_path / "w.jsonl", {"chosen": [user, no, user, no],
                                         "rejected": [user, no, user, user, no]})
    assert not list(formats.read_rated(whole, objective="honest"))  # two different dialogues
    whole = write(tmp_path / "w.jsonl", {"chosen": [user, yes, user, no], "rejected": [user, yes, user, no]})
    assert next(formats.read_rated(whole, objective="honest"))["responses"][0]["text"] == "no"


def test_earlier_messages_are_the_prompt(tmp_path):
    user, yes, no, more = ({"role": role, "content": text} for role, text in
                           (("user", "why?"), ("assistant", "yes"), ("assistant", "no"), ("user", "really?")))
    rows = [{"prompt": "why?", "chosen": [user, yes, more, yes], "rejected": [user, yes, more, no]},
            {"prompt": [user, yes, more], "chosen": [user, yes, more, yes], "rejected": [user, yes, more, no]},
            {"prompt": "why?", "chosen": [user, yes, more, yes], "rejected": [user, no, more, no]}]
    skipped = Counter()
    read = list(formats.read_rated(write(tmp_path / "p.jsonl", *rows), "honest", skipped=skipped))
    whole = "\n\nHuman: why?\n\nAssistant: yes\n\nHuman: really?\n\nAssistant:"
    assert [row["prompt"] for row in read] == [whole] * 2 and sum(skipped.values()) == 1
    assert [[answer["text"] for answer in row["responses"]] for row in read] == [["yes", "no"]] * 2
    for row in ({"prompt": "how?", "chosen": [user, yes, more, yes], "rejected": [user, yes, more, no]},
                {"prompt": "why?", "chosen": [user, yes, more], "rejected": [user, no, more]},
                {"chosen": [user, yes, more], "rejected": [user, no, more]}):
        with pytest.raises(UserError, match="p.jsonl:1: .*(do not repeat the 'prompt'|should end with one message by)"):
            list(formats.read_rated(write(tmp_path / "p.jsonl", row), "honest"))
    with pytest.raises(UserError, match="'completion' should be one message by the assistant"):
        list(formats.read_pairs(write(tmp_path / "p.jsonl", {"prompt": "why?", "completion": [yes, more, no]})))


def test_chat_messages_are_learned_to_their_end(tmp_path):
    user, yes = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "yes"}
    rows = {"prompt": "why?", "messages": [user, yes, user, yes]}, {"messages": [user, yes]}
    path = write(tmp_path / "m.jsonl", *rows)
    once = "\n\nHuman: why?\n\nAssistant:"
    assert list(formats.read_completions(path)) == [{"prompt": f"{once} yes{once}", "completion": "yes"},
                                                    {"prompt": once, "completion": "yes"}]
    with pytest.raises(UserError, match="m.jsonl:1: 'messages' should end with"):
        list(formats.read_completions(write(tmp_path / "m.jsonl", {"messages": [user, yes, user]})))


@pytest.mark.parametrize("messages", [
    [], ["hi"], [{"role": "bot", "content": "x"}], [{"role": "user"}], 5, None])
def test_wrong_messages_are_refused(tmp_path, messages):
    path = write(tmp_path / "p.jsonl", {"prompt": messages, "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="p.jsonl:1: '(prompt|role|content)' should"):
        list(formats.read_rated(path, objective="honest"))


def test_rated_rows_keep_golden_and_objectives_and_drop_missing_scores(tmp_path):
    row = {"prompt": "q", "golden": "g", "objectives": ["helpful"], "other": 1,
           "responses": [{"text": "x", "scores": {"a": 1, "b": None, "c": float("nan")}}, {"text": "y"}]}
    assert list(formats.read_rated(write(tmp_path / "r.jsonl", row))) == [
        {"prompt": "q", "golden": "g", "objectives": ["helpful"],
         "responses": [response("x", a=1), response("y")]}]


def rated(prompt, *responses, **more):
    return {"prompt": prompt, "responses": [*responses], **more}


def test_alpacas_input_stands_below_the_instruction_and_its_output_is_learned(tmp_path):
    rows = [("Add.", "2, 3", "5"), ("Sing.", " ", "La"), ("Sum up.", None, " ")]
    rows = [dict(zip(("instruction", "input", "output"), row)) for row in rows]
    path, skipped = write(tmp_path / "a.jsonl", *rows), Counter()
    expected = [("Add.\n\n2, 3", "5"), ("Sing.", "La"), ("Sum up.", " ")]
    assert list(formats.read_rated(path)) == [rated(prompt, response(text)) for prompt, text in expected]
    assert [(row["prompt"], row["completion"]) for row in formats.read_completions(path, skipped)] == expected[:2]
    assert skipped == {"the best response is empty": 1}
    outputs, skipped = write(tmp_path / "m.jsonl", *[{**row, "generator": "m"} for row in rows]), Counter()
    assert not list(formats.read_completions(outputs, skipped))  # what some model said is no example to follow
    assert skipped == {"no response has a score": 3}


def test_kto_rows_are_rated_by_their_label_and_only_the_good_ones_are_learned(tmp_path):
    rows = [("q", "x", True), ("q", "y", False), ([{"role": "user", "content": "r"}], "z", False), ("q", "v", True)]
    path = write(tmp_path / "kto.jsonl", *[dict(zip(("prompt", "completion", "label"), row)) for row in rows])
    expected = [rated("q", response("x", kind=1), response("y", kind=0)),
                rated("\n\nHuman: r\n\nAssistant:", response("z", kind=0)), rated("q", response("v", kind=1))]
    assert list(formats.read_rated(path, "kind")) == expected
    with pytest.raises(UserError, match="--objective"):
        next(formats.read_rated(path))
    skipped = Counter()
    assert [row["completion"] for row in formats.read_completions(path, skipped)] == ["x", "v"]
    assert skipped == {"their label is false": 2}
    assert list(formats.read_preferences(path, "kind")) == [formats.preference("q", "x", "y", "kind", 1.0)]


def test_helpsteer_rows_of_a_prompt_are_one_row_with_known_objectives(tmp_path):
    def row(prompt, text, *ratings):
        names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        return {"prompt": prompt, "response": text, **dict(zip(names, ratings))}
    path = write(tmp_path / "h.jsonl", row("q", "x", 4, 3, 4, 2, 1), row("q", "y", 1, 3, None, 2, 2), row("r", "z", 0))
    read = list(formats.read_rated(path))
    assert read == [rated("q", response("x", helpful=4, correct=3, coherent=4, complex=2, verbose=1),
                          response("y", helpful=1, correct=3, complex=2, verbose=2)),
                    rated("r", response("z", helpful=0))]
    assert set(read[0]["responses"][0]["scores"]) <= set(data.OBJECTIVES)
    found = {row["principle"]: row["p_a"] for row in formats.read_preferences(path)}
    assert found == {"helpful": 1.0, "correct": 0.5, "complex": 0.5, "verbose": 0.0}


SAFE = {"prompt": "q", "response_0": "x", "response_1": "y", "is_response_0_safe": True, "is_response_1_safe": False,
        "better_response_id": 1, "safer_response_id": 0, "response_0_severity_level": 0}


def test_safe_rlhf_pairs_of_a_prompt_stay_apart(tmp_path):
    """What is better is said within a pair: a loser of one pair may be better than the winner of another."""
    path = write(tmp_path / "s.jsonl", SAFE, {**SAFE, "response_0": "v", "better_response_id": 0})
    assert list(formats.read_rated(path)) == [
        rated("q", response("x", helpful=0, harmless=1), response("y", helpful=1, harmless=0)),
        rated("q", response("v", helpful=1, harmless=1), response("y", helpful=0, harmless=0))]
    assert [row["p_a"] for row in formats.read_preferences(path, "helpful")] == [0.0, 1.0]


LABEL = {"prompt": "q", "response_a": "x", "response_b": "y", "principle": "detail", "p_a": 0.25}


def test_labels_of_a_pair_are_one_rated_row(tmp_path):
    other = {**LABEL, "response_b": "z"}
    path = write(tmp_path / "l.jsonl", LABEL, {**LABEL, "principle": "tone", "p_a": 1}, other, {**LABEL, "p_a": 0.5})
    assert list(formats.read_rated(path)) == [
        rated("q", response("x", detail=0.25, tone=1), response("y", detail=0.75, tone=0), margin=0.2),
        rated("q", response("x", detail=0.25), response("z", detail=0.75), margin=0.2),
        rated("q", response("x", detail=0.5), response("y", detail=0.5), margin=0.2)]
    twice = write(tmp_path / "t.jsonl", LABEL, LABEL, {**LABEL, "p_a": 0.5})
    with pytest.raises(UserError, match="t.jsonl:3: scores the pair of the row before anew"):
        list(formats.read_rated(twice))


def test_scored_pairs_are_compared_by_the_models_scores(tmp_path):
    scored = {**LABEL, "scores": {"detail": [1.5, -2], "tone": [3, None]}}
    path = write(tmp_path / "s.jsonl", scored, {**scored, "principle": "tone"})
    assert list(formats.read_rated(path)) == [
        rated("q", response("x", detail=1.5, tone=3), response("y", detail=-2), margin=0.4)]
    assert list(formats.read_preferences(path)) == [formats.preference("q", "x", "y", "detail", 1.0)]


def test_what_align_writes_is_an_answer_to_align(tmp_path):
    row = {"prompt": "p", "original": "o", "aligned": "a", "objectives": ["x: be x", "y: be y"], "golden": "g"}
    expected = rated("p", response("a"), objectives=row["objectives"], golden="g")
    assert list(formats.read_rated(write(tmp_path / "a.jsonl", row))) == [expected]
    cells = ["p", "o", "a", " | ".join(row["objectives"])]
    path = write_csv(tmp_path / "a.csv", [[*row], [*cells, "g"], [*cells, ""]], True)
    expected = [expected, {key: value for key, value in expected.items() if key != "golden"}]
    assert list(formats.read_rated(path)) == expected


@pytest.mark.parametrize("key, value", [
    ("response", "x"), ("Response 2", "x"), ("model_output", "x"), ("best_answer", ["x"]), ("generated_text", "x"),
    ("completions", [{"text": "x"}]), ("modelReply", "x"), ("chosen", "x"), ("aligned", "x"), ("answer", 4),
    ("response_text", "x")])
def test_no_answer_hides_in_a_file_of_prompts(tmp_path, key, value):
    path = write(tmp_path / "p.jsonl", {"prompt": "p", key: None}, {"prompt": "p", key: value})
    with pytest.raises(UserError, match=f"p.jsonl:2: '{key}' looks like an answer.*KTO"):
        list(formats.read_rated(path, "helpful"))
    path = write(tmp_path / "q.jsonl", {"query": "p"}, {"query": "p", key: value})
    with pytest.raises(UserError, match=f"q.jsonl:2: '{key}'"):
        list(formats.read_rated(path))


@pytest.mark.parametrize("more", [
    {"prompt_id": "x"}, {"response_format": "json"}, {"num_responses": 4}, {"max_output_tokens": 9},
    {"completion_id": "x"}, {"answerable": True}, {"generated_at": "x"}, {"output": ""}, {"reply_to": "x"},
    {"generation_model": "x"}])
def test_other_keys_of_prompts_are_no_answers(tmp_path, more):
    path = write(tmp_path / "p.jsonl", {"prompt": "p", **more, "goldens": "g"})
    assert list(formats.read_rated(path)) == [rated("p", golden="g")]


def ultrafeedback(rating):
    return {"instruction": "i", "completions": [{"response": "r", "annotations": {"fair": {"Rating": rating}}}]}


BAD_ROWS = {  # a row, and what is said of it
    "golden an object": (rated("p", golden={}), "'golden' should be a text"),
    "golden a number": ({"prompt": "p", "golden": 0}, "'golden' should be a text"),
    "goldens a list": ({"query": "p", "generated_text": "t", "goldens": ["g"]}, "'golden' should be a text"),
    "objectives an object": (rated("p", objectives={}), '"objectives" should be a list'),
    "objectives numbers": ({"prompt": "p", "objectives": [1]}, '"objectives" should be a list'),
    "label a number": ({"prompt": "p", "completion": "c", "label": 1}, "'label' should be true or false"),
    "label a text": ({"prompt": "p", "completion": "c", "label": "true"}, "'label' should be true or false"),
    "no label": ({"prompt": "p", "completion": "c", "label": None}, "'label' should be true or false"),
    "label of Auto-J true": ({"prompt": "p", "response 1": "x", "response 2": "y", "label": True}, "'label' is True"),
    "id 2": ({**SAFE, "better_response_id": 2}, "more helpful response is 2, not 0 or 1"),
    "id true": ({**SAFE, "safer_response_id": True}, "more harmless response is True"),
    "no id": ({**SAFE, "safer_response_id": None}, "more harmless response is None"),
    "rating a text": ({"prompt": "p", "response": "r", "helpfulness": "4"}, "the score 'helpful' is '4'"),
    "rating true": (ultrafeedback(True), "the score 'fair' is True"),
    "rating a list": (ultrafeedback(["4"]), "the score 'fair' is a list"),
    "rating of 401 digits": (ultrafeedback(10**400), "the score 'fair' is 1000"),
    "rating of 400 digits in quotes": (ultrafeedback("1" * 400), "the score 'fair' is inf"),
    "rating of many letters": (ultrafeedback("B" * 3000), "the rating 'BBB"),
    "score true": (rated("p", response("r", fair=True)), "the score 'fair' is True"),
    "score a list": (rated("p", response("r", fair=[[1] * 900])), "the score 'fair' is a list"),
    "score with a long name": (rated("p", response("r", **{"a" * 3000: "x"})), "the score 'aaaa"),
    "p_a missing": ({key: value for key, value in LABEL.items() if key != "p_a"}, "'p_a' is None"),
    "p_a long": ({**LABEL, "p_a": "x" * 3000}, "'p_a' is 'xxx"),
    "principle a list": ({**LABEL, "principle": ["tone"]}, "'principle' should be a text"),
    "one score of a pair": ({**LABEL, "scores": {"tone": 3}}, "the scores 'tone' are 3"),
    "a score of a pair a text": ({**LABEL, "scores": {"tone": [3, "4"]}}, "the score 'tone' is '4'"),
    "no input": ({"instruction": "i", "input": 3, "output": "o"}, "'input' should be a text"),
    "a key of two lines": ({"a\nb": 1}, "no known format has a b;"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_one_short_line(tmp_path, case):
    row, said = BAD_ROWS[case]
    path = write(tmp_path / "r.jsonl", row)
    with pytest.raises(UserError) as refused:
        list(formats.read_rated(path, "helpful"))
    message = str(refused.value)
    assert f"r.jsonl:1: {said}" in message or f"r.jsonl:1: the id of the {said}" in message, message
    assert len(message.splitlines()) == 1 and len(message) < 500


def test_any_odd_value_anywhere_is_read_or_refused_in_a_line(tmp_path, capsys):
    """Every place of a row of every format, replaced by every one of many odd values, through every reader."""
    odd = [None, True, 0, -1, 1e301, 10**400, float("nan"), "", "\0", "\ud800", "x" * 3000, [], {}, [{}], ["x"], [0, 1],
           {"text": "x"}, [{"role": ["user"], "content": "x"}], json.loads("[" * 300 + "]" * 300)]
    rows = [rated("p", response("r", fair=1), golden="g", objectives=["fair"]), SAFE, LABEL,
            {**LABEL, "scores": {"tone": [1, 2]}}, {"prompt": "p", "completion": "c", "label": True},
            {"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1], "answer": [0, 1]},
            {"prompt": "p", "response": "r", "helpfulness": 4}, {"prompt": "p", "chosen": "a", "rejected": "b"},
            ultrafeedback("4"), {"instruction": "i", "input": "", "output": "o"},
            {"query": "q", "generated_text": "t", "goldens": "g"},
            {"prompt": "p", "response 1": "x", "response 2": "y", "label": 1}, {"prompt": "p"}, {"text": "t"},
            {"prompt": "p", "original": "o", "aligned": "a", "objectives": ["x: y"], "golden": "g"},
            {"prompt": "p", "reference": "r", "responses": {"m": {"text": "t", "gpt4_preference_over_reference": 0.5}}}]
    readers = [lambda path: list(formats.read_rated(path, "fair")), lambda path: list(formats.read_completions(path)),
               lambda path: list(formats.read_pairs(path)), lambda path: list(formats.read_texts(path)),
               lambda path: list(map(row_objectives, formats.read_aligned(path))),
               lambda path: list(formats.read_preferences(path)), lambda path: data.run_show(path)]
    draw, refusals, path = random.Random(0), 0, tmp_path / "r.jsonl"

    def places(value):
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            yield value, key
            yield from places(inner)
    for row in rows:
        text = json.dumps(row)
        for place, _ in enumerate(places(row)):
            for value in draw.sample(odd, 4):
                changed = json.loads(text)
                holder, key = list(places(changed))[place]
                holder[key] = value
                write(path, row, changed)
                for read in readers:
                    try:
                        read(path)
                    except UserError as error:
                        refusals += 1
                        assert len(str(error)) < 500 and len(str(error).splitlines()) == 1, error
    assert refusals > 500


def test_files_without_scores(tmp_path):
    outputs = tmp_path / "model_outputs.json"
    output = {"instruction": "q", "output": "a", "generator": "m", "dataset": "d"}
    outputs.write_text(json.dumps([output] * 2, indent=1))
    assert list(formats.read_rated(outputs)) == [{"prompt": "q", "responses": [response("a")]}] * 2
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "q"})
    assert list(formats.read_rated(prompts)) == [{"prompt": "q", "responses": []}]


def test_csv_without_queries_is_joined_to_them_row_by_row(tmp_path):
    rows = [["goldens", "generated_text"], ["g1", "t1"], ["g2", "t2"]]
    answers = write_csv(tmp_path / "m.DR.csv", rows, True)
    queries = [["query", "other"], ["q1", "-"], ["q2", "-"]]
    write_csv(tmp_path / "queries.SWMH.csv", [["query"], ["wrong"], ["wrong"]], True)
    write_csv(tmp_path / "queries.csv", [["query"], ["wrong"], ["wrong"]], True)
    given = write_csv(tmp_path / "given.csv", queries[:2], True)
    write_csv(tmp_path / "queries.DR.csv", queries, True)
    expected = [{"prompt": f"q{n}", "golden": f"g{n}", "responses": [response(f"t{n}")]} for n in (1, 2)]
    assert list(formats.read_rated(answers)) == expected
    with pytest.raises(UserError, match="m.DR.csv: has 2 rows, but .*given.csv has 1"):
        next(formats.read_rated(answers, queries=given))
    with pytest.raises(UserError, match="--queries"):
        next(formats.read_rated(write_csv(tmp_path / "sub.txt", [["generated_text"], ["t"]], True)))


def test_pairs_texts_and_completions(tmp_path):
    message = [{"role": "user", "content": "p"}]
    pairs = write(tmp_path / "p.jsonl",
                  {"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1]},
                  {"prompt": message, "completion": [{"role": "assistant", "content": "c"}]})
    assert list(formats.read_pairs(pairs)) == [
        {"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1]},
        {"prompt": "\n\nHuman: p\n\nAssistant:", "completion": "c"}]
    assert list(formats.read_completions(pairs)) == list(formats.read_pairs(pairs))
    rated = write(tmp_path / "r.jsonl", {"prompt": "q", "responses": [
        response("x", a=1, b=1), response("y", a=0, b=3), response("z")]},
        {"prompt": "p", "responses": [response("n")]})
    assert list(formats.read_completions(rated)) == [{"prompt": "q", "completion": "y"}]
    texts = write(tmp_path / "t.jsonl", {"text": "a\n\nb"}, {"text": "c"})
    assert list(formats.read_texts(texts)) == ["a\n\nb", "c"]
    (tmp_path / "t.txt").write_text("\none\ntwo\n\n \nthree")
    assert list(formats.read_texts(tmp_path / "t.txt")) == ["one\ntwo", "three"]


@pytest.mark.parametrize("row, message", [
    ({"prompt": "p", "completion": "c", "relation": "beter"}, "'relation' is 'beter', not 'better', 'equal' or 'keep'"),
    ({"prompt": "p", "completion": "c", "relation": ["equal"]}, "'relation' is a list"),
    ({"prompt": "p", "completion": "c", "label": "false"}, "'label' should be true or false"),
    ({"chosen": "a", "rejected": "b"}, "reformulate"), ({"prompt": "p", "completion": 1}, "'completion'"),
    ({"prompt": "p", "completion": "c", "context": [0, 2]}, "'context'"),
    ({"prompt": "p", "completion": "c", "answer": [0.0, 1]}, "'answer'")])
def test_read_pairs_refuses(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "p", "completion": "c"}, row)
    with pytest.raises(UserError, match=f"p.jsonl:2: .*{message}"):
        list(formats.read_pairs(path))


def test_what_align_writes_is_read_from_json_lines_and_csv(tmp_path):
    row = {"prompt": "p", "original": "o", "aligned": "a", "objectives": ["x: be x", "y: be y"], "golden": "g"}
    path = write(tmp_path / "a.jsonl", row, row, row)
    assert formats.read_aligned(path) == [row] * 3 and formats.read_aligned(path, limit=2) == [row] * 2
    cells = [*row.values()]
    cells[3] = " | ".join(row["objectives"])
    path = write_csv(tmp_path / "a.csv", [[*row], cells, [*cells[:4], ""]], True)
    assert formats.read_aligned(path) == [row, {**row, "golden": None}]
    path = write(tmp_path / "b.jsonl", {**row, "golden": None}, {**row, "golden": ""})
    assert [row["golden"] for row in formats.read_aligned(path)] == [None, ""]
    assert row_objectives(row) == [Objective("x", "be x"), Objective("y", "be y")]


@pytest.mark.parametrize("change, said", [
    ({"original": None}, "no original; .*align.py first"), ({"objectives": []}, "objectives"),
    ({"objectives": ""}, "objectives"), ({"objectives": {"x": "y"}}, "objectives"),
    ({"aligned": 3}, "'aligned' should be a text"), ({"golden": 3}, "'golden' should be a text"),
    ({"golden": 0}, "'golden' should be a text"), ({"golden": False}, "'golden' should be a text"),
    ({"golden": []}, "'golden' should be a text"), ({"objectives": ["x", 3]}, "objectives"),
    ({"golden": 0, "objectives": "x: be x"}, "'golden' should be a text")])
def test_read_aligned_refuses(tmp_path, change, said):
    row = {"prompt": "p", "original": "o", "aligned": "a", "objectives": ["x: be x"]}
    path = write(tmp_path / "a.jsonl", row, {**row, **change})
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{said}"):
        formats.read_aligned(path)


# ----------------------------------------------------------------------------------------------------------------
# Preferences


def test_preferences_are_read_from_labels_with_their_principle(tmp_path):
    rows = [formats.preference("q", "x", "y", "helpfulness", 0.7), formats.preference("q", "x", "y", "detail", 0.2)]
    path = tmp_path / "labels.jsonl"
    common.write_jsonl(path, rows)
    assert list(formats.read_preferences(path)) == rows
    assert list(formats.read_preferences(path, "detail")) == rows[1:]


def test_rated_responses_become_preferences_by_their_scores(tmp_path):
    path = tmp_path / "rated.jsonl"
    responses = [{"text": text, "scores": {"helpful": score}} for text, score in (("a", 1), ("b", 3), ("c", 1))]
    common.write_jsonl(path, [{"prompt": "q", "responses": responses}])
    found = [(row["response_a"], row["response_b"], row["p_a"]) for row in formats.read_preferences(path, "helpful")]
    assert found == [("a", "b", 0.0), ("a", "c", 0.5), ("b", "c", 1.0)]


def test_chosen_and_rejected_are_a_preference(tmp_path):
    path = tmp_path / "pairs.jsonl"
    common.write_jsonl(path, [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    assert list(formats.read_preferences(path)) == [formats.preference("q", "good", "bad", "overall", 1.0)]


def test_what_the_data_functions_leave_out_is_told_by_file_and_reason(tmp_path, capsys):
    pair, options = {"prompt": "p", "completion": "c"}, train.Options(principle="fair")
    one = write(tmp_path / "1.jsonl", pair, {**pair, "relation": "equal"}, pair, {**pair, "relation": "better"})
    kto = write(tmp_path / "2.jsonl", {**pair, "label": False}, {**pair, "label": True, "relation": "better"})
    best = write(tmp_path / "3.jsonl", rated("q", response("x", fair=1), response("y", fair=0)),
                 rated("q", response("x")))
    hh = write(tmp_path / "4.jsonl", {"chosen": DIALOGUE + " a", "rejected": DIALOGUE.replace("why", "how") + " b"},
               {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"})
    unsaid = "no 'relation' says whether the completion is better than the answer or equal"
    for rows, paths, count, *told in (
            (methods.equal_rows, [one], 1, f"1.jsonl: left out: 2 rows, {unsaid}"),
            (methods.better_rows, [one, kto], 2, f"1.jsonl: left out: 2 rows, {unsaid}",
             "2.jsonl: left out: 1 rows, their label is false"),
            (methods.sft_rows, [one, kto], 5, "2.jsonl: left out: 1 rows, their label is false"),
            (methods.sft_rows, [best], 1, "3.jsonl: left out: 1 rows, no response has a score"),
            (methods.preference_rows, [best, hh], 2,
             "3.jsonl: left out: 1 rows, no two responses are scored on the same principle",
             "4.jsonl: left out: 1 rows, the two dialogues differ before the last answer")):
        read = rows(paths, options)
        wanted = [row for row in read if rows is methods.sft_rows or row.get("relation", "") in rows.__name__]
        assert len(read) == len(wanted) == count
        assert [line.replace(f"{tmp_path}/", "") for line in capsys.readouterr().out.splitlines()] == told


def test_an_unknown_principle_is_named_with_those_there_are(tmp_path):
    path = write(tmp_path / "l.jsonl", LABEL, {**LABEL, "principle": "tone"})
    with pytest.raises(UserError, match="l.jsonl: compares no responses on 'nosuch', but on detail, tone; choose"):
        methods.preference_rows([path], train.Options(principle="nosuch"))


def test_preferences_on_several_scores_come_in_the_order_of_the_file(tmp_path):
    """Not in that of a set, which differs from run to run."""
    names = [f"score {number}" for number in range(20)]
    rows = [{"text": text, "scores": dict.fromkeys(names, value)} for text, value in (("a", 1), ("b", 0))]
    path = write(tmp_path / "rated.jsonl", {"prompt": "q", "responses": rows})
    assert [row["principle"] for row in formats.read_preferences(path)] == names


@pytest.mark.parametrize("row, said", [
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1.5}, "p_a"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": "1"}, "p_a"),
    ({"prompt": "q", "response_a": "x", "response_b": 3, "p_a": 1}, "response_b"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1, "principle": ["detail"]}, "principle"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1, "principle": 3}, "principle"),
    ({"prompt": "q", "response 1": "x", "response 2": "y", "label": 3}, "label"),
    ({"prompt": "q", "reference": "x", "responses": {"m": {"text": "y"}}}, "gpt4_preference"),
    ({"prompt": "q", "reference": "x", "responses": ["y"]}, "responses"),
    ({"prompt": "q", "reference": "x", "responses": {"m": {"gpt4_preference_over_reference": 1}}}, "response_a"),
])
def test_broken_preferences_are_named_with_their_line(tmp_path, row, said):
    path = tmp_path / "labels.jsonl"
    good = {key: (0 if key == "label" else 0.5 if key == "p_a" else {} if key == "responses" else "t") for key in row}
    common.write_jsonl(path, [good, row])
    with pytest.raises(UserError, match=rf"labels\.jsonl:2: .*{said}"):
        list(formats.read_preferences(path))


@pytest.mark.parametrize("good, missing", [
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1}, "p_a"),
    ({"prompt": "q", "response 1": "x", "response 2": "y", "label": 2.0}, "label"),
    ({"prompt": "q", "reference": "x", "responses": {"m": {"text": "y", "gpt4_preference_over_reference": 1}}},
     "prompt")])
def test_a_later_row_without_a_key_is_named_too(tmp_path, good, missing):
    path = write(tmp_path / "labels.jsonl", good, {key: value for key, value in good.items() if key != missing})
    rows = formats.read_preferences(path)
    assert next(rows)["prompt"] == "q"
    with pytest.raises(UserError, match=rf"labels\.jsonl:2: .*{missing}"):
        next(rows)


# ----------------------------------------------------------------------------------------------------------------
# Real files


def test_real_hh_rlhf(shared):
    skipped = Counter()
    rows = list(formats.read_rated(shared / "data/hh-rlhf/harmless-base.test.jsonl.gz", skipped=skipped))
    assert len(rows) == 2307 and sum(skipped.values()) == 5
    with gzip.open(shared / "data/hh-rlhf/harmless-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        whole = {json.loads(line)["chosen"].rstrip() for line in file}
    for row in rows:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        text = row["responses"][0]["text"]
        assert any(row["prompt"] + space + text in whole for space in (" ", "  ", "", "   ")) or not text
    examples = list(data.reformulate(rows, data.OBJECTIVES))
    assert len(examples) == 2303  # four chosen ones are empty
    assert {row["relation"] for row in examples} == {"better"}


def test_real_imhi_outputs_find_their_queries(shared):
    rows = list(formats.read_rated(shared / "data/outputs/imhi/vicuna_7B.DR.csv"))
    assert len(rows) == 405 and all(row["prompt"].startswith("Consider this post") for row in rows)
    # The same post is meant: the golden answer of the first row speaks of the site that its query names.
    assert "Ancestry.com" in rows[0]["prompt"] and "Ancestry.com" in rows[0]["golden"]


def test_real_preferences(shared):
    """AlpacaEval's 12 responses to 805 prompts; Auto-J's published counts of labels."""
    rows = list(formats.read_preferences(shared / "data/alpaca_eval/rated.jsonl.gz"))
    assert len({row["prompt"] for row in rows}) == 805 and len(rows) == 805 * 12 - 4  # four are missing
    assert all(0 <= row["p_a"] <= 1 for row in rows)
    rows = list(formats.read_preferences(shared / "data/auto-j/human-pairwise.jsonl.gz"))
    assert len(rows) == 1392 and {row["p_a"] for row in rows} == {0.0, 0.5, 1.0}


def test_rows_that_are_no_pairs_are_told_by_their_keys(tmp_path):
    path = write(tmp_path / "hh.jsonl", {"chosen": "a", "rejected": "b", "score": None})
    with pytest.raises(UserError, match="no prompt and completion, but chosen, rejected; make"):
        list(formats.read_pairs(path))
