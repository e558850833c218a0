"""Verdicts that a judge does not give, and reference answers: counted, said, and no reason to stop."""

from __future__ import annotations

import json
import warnings

import pytest

from fusion.__main__ import main
from fusion.errors import CheckpointError, FusionError, RecipeError
from fusion.evaluate import by_judge, rubric, with_pasted_references, with_references
from fusion.progress import finish
from tests.test_evaluate_judge import MODELS, PIVOT, QUESTIONS, endpoint, questions, serving, short  # noqa: F401


def reply(content, finish_reason="stop", **message):
    """A whole reply of a server."""
    said = {"role": "assistant", "content": content, **message}
    return 200, {}, json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason, "message": said}]})


def hard(body) -> bool:
    return "Norway" in body["messages"][1]["content"] and "Italy" not in body["messages"][1]["content"]


@pytest.mark.parametrize("said", [
    "<think>A first guess would be [[10]], but 2 + 2 is not 5, so", "<think>A looks better: [[A]]? But wait, B has",
    "[[7]] [[A]] <thinking>or rather [[8]] [[B]]", "<|channel|>analysis<|message|>maybe [[9]] or [[C]]", "[THINK][[3]] [[A]]"])
def test_what_is_only_considered_is_no_verdict(said):
    assert rubric.grade(said) is None and rubric.winner(said) is None


@pytest.mark.parametrize("said", [
    "<think>[[2]] [[B]]</think>[[7]] [[A]]", "Perhaps [[2]] [[B]]\n</think>\n[[7]] [[A]]", "[THINK][[2]][/THINK] [[7]] [[A]]",
    "<think>a</think>[[1]] [[B]]<think>[[3]]</think> no: [[7]] [[A]]"])
def test_a_verdict_after_the_thoughts_is_read(said):
    assert rubric.grade(said) == 7 and rubric.winner(said) == "A"


@pytest.mark.parametrize(("answer", "reason"), [
    (reply(None, "length", reasoning_content="…"), "1 cut off at 2,048 tokens. Let the judge write longer replies."),
    (reply("On a scale from [[1]] to [[10]], 10 is best. The", "length"), "1 cut off at 2,048 tokens."),
    (reply("<think>maybe [[3]], maybe", "length"), "1 cut off"), (reply(""), "1 empty."), (reply(" \n"), "1 empty."),
    (reply(None, "content_filter"), "1 empty."), (reply(None, "tool_calls", tool_calls=[]), "1 empty."),
    (reply([{"type": "thinking", "thinking": [{"type": "text", "text": "[[3]]"}]}], "length"), "1 cut off"),
    ((400, {}, "The maximum context length is 4096 tokens, max_tokens is too large"), "1 refused by the server (HTTP 400).")])
def test_one_that_will_not_pass_is_asked_once_and_the_run_goes_on(questions, tmp_path, short, answer, reason):  # noqa: F811
    with serving(lambda body: answer if hard(body) else reply("Fine. [[7]]")) as server:
        done = finish(by_judge({"pivot": PIVOT}, questions, endpoint(server), tmp_path / "out"))
        assert len(server.requests) == 4 and all(body["max_tokens"] == 2048 for _, body in server.requests)
    (row,) = done.table.rows
    assert row.missing == 1 and row.cells[-1].value == 7
    assert any(f"1 of 4 verdicts are missing and count nowhere: {reason}" in note for note in done.table.notes)
    assert "missing" in done.table.text() and "missing" in (tmp_path / "out" / "table.md").read_text()


def test_parts_of_a_reply_are_joined_without_thoughts():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "[[3]]"}]}, {"type": "text", "text": "Grade: "},
             {"type": "text", "text": "[[7]]"}]
    with serving(lambda body: reply(parts)) as server:
        assert endpoint(server).ask([]) == "Grade: [[7]]"


def test_nothing_but_missing_verdicts_is_a_result_too(questions, tmp_path, short):  # noqa: F811
    for pairwise in (False, True):
        with serving(lambda body: reply(None, "length")) as server, warnings.catch_warnings():
            warnings.simplefilter("error")
            done = finish(by_judge(MODELS, questions, endpoint(server), tmp_path / f"out-{pairwise}", pairwise=pairwise,
                                   baseline="pivot"))
        assert all(row.missing == 4 for row in done.table.rows) and "8 of 8 verdicts are missing" in done.table.markdown()
        assert "NaN" not in (tmp_path / f"out-{pairwise}" / "results.json").read_text()


def test_a_pair_with_one_verdict_missing_counts_nowhere(questions, tmp_path, short):  # noqa: F811
    def said(body):
        first = body["messages"][1]["content"].split("What assistant B")[0]
        return reply("<think>[[A]]", "length") if hard(body) and "qwen" in first else reply("[[A]]" if "qwen" in first else "[[B]]")
    with serving(said) as server:
        done = finish(by_judge(MODELS, questions, endpoint(server), tmp_path / "out", pairwise=True, baseline="pivot"))
    (row,) = done.table.rows
    assert row.missing == 1 and row.cells[-1].value == 100 and done.details["position_bias"]["judged"] == 3


def test_a_server_that_takes_no_request_at_all_is_an_error(questions, tmp_path, short):  # noqa: F811
    with serving(lambda body: (400, {}, "no such model")) as server, pytest.raises(FusionError, match="no such model"):
        finish(by_judge({"pivot": PIVOT}, questions, endpoint(server), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_limit_has_another_name_for_some_models():
    def said(body):
        return (400, {}, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.") if "max_tokens" in body \
            else reply("fine")
    with serving(said) as server:
        asked = endpoint(server, max_tokens=77)
        assert asked.ask([]) == "fine" and server.requests[-1][1]["max_completion_tokens"] == 77


def test_lengths_and_references_are_options_of_the_command(tmp_path, capsys):
    file, folder = tmp_path / "question.jsonl", tmp_path / "reference_answer"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    folder.mkdir()
    (folder / "gpt-4.jsonl").write_text(json.dumps({"question_id": 81, "choices": [{"index": 0, "turns": ["Oslo it is", "Rome"]}]}))
    with serving(lambda body: "[[6]]") as server:
        words = ["evaluate", PIVOT, "--judge", str(file), "--endpoint", server.url, "--judge-model", "m", "--out"]
        assert main([*words, str(tmp_path / "out"), "--max-new-tokens", "3", "--judge-max-tokens", "99", "--references",
                     str(folder)]) == 0
    asked = {body["messages"][1]["content"] for _, body in server.requests}
    assert {body["max_tokens"] for _, body in server.requests} == {99}
    assert any("<reference>\nOslo it is" in text for text in asked) and any("<reference>\n18" in text for text in asked)
    for option in (["--judge-max-tokens", "9"], ["--references", str(folder)]):
        assert main(["evaluate", PIVOT, *option]) == 2 and option[0] in capsys.readouterr().err


LINES = [{"question_id": 111, "answer_id": "x", "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["", "eighteen"]}]},
         {"question_id": "81", "reference": ["Oslo\u2028!"]}, {"question_id": 999, "reference": ["of no question"]}]


def test_references_come_from_a_file_a_folder_or_pasted_lines(questions, tmp_path):  # noqa: F811
    text = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in LINES)
    folder = tmp_path / "reference_answer"
    folder.mkdir()
    (folder / "gpt-4.jsonl").write_bytes(text.encode())
    wanted = [("Oslo\u2028!",), ("32", "eighteen")]  # what the file lacks stays the question's own
    for found in (with_references(questions, folder / "gpt-4.jsonl"), with_references(questions, folder),
                  with_references(questions, tmp_path), with_pasted_references(questions, text.removeprefix("\ufeff"))):
        assert [its.references for its in found] == wanted
    (folder / "judge-2.jsonl").write_text('{"question_id": 81, "reference": "Bergen"}')
    with pytest.raises(RecipeError, match="two reference answers"):
        with_references(questions, tmp_path)
    assert with_references(questions, folder, "judge-2")[0].references == ("Bergen",)


@pytest.mark.parametrize(("text", "said"), [
    ("{", "line 1: not valid JSON|not valid JSON"), ('{"question_id": 81}', "are missing"), ('{"turns": ["x"]}', "are missing"),
    ('{"question_id": 81, "turns": []}', "are missing"), ('{"question_id": 5, "reference": ["x"]}', "belongs to one"),
    ('{"question_id": 81, "turns": ["x"]}', "are missing")])
def test_references_are_checked(questions, tmp_path, text, said):  # noqa: F811
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(RecipeError, match=said):
        with_references(questions, tmp_path / "r.jsonl")
    with pytest.raises(CheckpointError):
        with_references(questions, tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.jsonl"):
        with_references(questions, tmp_path / "empty")
