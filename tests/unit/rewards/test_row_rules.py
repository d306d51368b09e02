"""Built-in rules for choices and instructions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from roll_r3.rewards.final_answer import final_answer
from roll_r3.rewards.ifeval import instruction_checks as checks
from roll_r3.rewards.ifeval import instructions
from roll_r3.rewards.ifeval.ifeval_rule import ifeval, knows_instructions
from roll_r3.rewards.ifeval.instructions import instructions_of
from roll_r3.rewards.multiple_choice import is_letter, multiple_choice
from roll_r3.rewards.texts import after_thought, code_of, last_boxed, repetition

BOXED, SAID, ANYWHERE = r"I think A. \boxed{\text{B}}", "the Answer is b or B", "B, not C"


@pytest.mark.parametrize(
    "read",
    [
        lambda: checks.json_format("```" + "\n" * 50_000 + "x"),
        lambda: checks.title("<<" * 50_000),
        lambda: checks.bullet_points("\n" * 200_000, 1),
        lambda: last_boxed(r"\boxed{" * 50_000),
        lambda: code_of("```" + "\n" * 50_000 + "x"),
        lambda: final_answer(r"\boxed{" * 50_000),
    ],
)
def test_a_long_repetition_takes_no_time(read: Callable[[], object]) -> None:
    """A policy may loop; past the time of a rule a response has no score."""
    began = time.process_time()
    read()
    assert time.process_time() - began < 1


def test_parts_of_a_response() -> None:
    assert after_thought("<think>a</think>b</think>\n\nc\n") == "c\n"
    assert after_thought("\nno thought") == "\nno thought"
    assert last_boxed(r"\boxed{A} \boxed{ C }") == " C "
    assert (last_boxed("A"), last_boxed(r"\boxed{}"), last_boxed(r"\boxed{A")) == (None, None, None)
    assert code_of("print(1)") == "print(1)"
    assert code_of("```python\nx = 1\n```\n```\ndef f(): pass\n```") == "def f(): pass\n"
    assert code_of("<|begin_of_solution|>```c++\nx\n```") == "x\n"
    assert code_of("```python\nx = 1") == ""


def test_the_share_of_repeated_3_grams() -> None:
    assert (repetition(""), repetition("a b"), repetition("a b c d")) == (0, 0, 0)
    assert repetition("a A a a") == 0.5
    assert repetition("a b c a b c") == 0.25


@pytest.mark.parametrize(
    ("reward_type", "scores"),
    [
        ("boxed", (1, 0, 0, 0, 0)),
        ("correct", (1, 1, 1, 0, 0)),
        ("loose", (1, 1, 1, -1, -1)),
        ("soft", (1, 0.5, 0.5, -0.5, -1)),
        ("strict", (1, -1, -1, -1, -1)),
    ],
)
def test_rewards_of_a_choice(reward_type: str, scores: tuple[float, ...]) -> None:
    texts = (BOXED, SAID, ANYWHERE, r"B \boxed{A}", "The answer is B. The answer is C")
    assert tuple(multiple_choice(text, "B", 9, reward_type=reward_type) for text in texts) == scores


def test_a_choice_is_read_behind_the_thought() -> None:
    assert multiple_choice(r"<think>\boxed{A}</think>\boxed{B}", "B) two", 9) == 1
    assert multiple_choice("<think>The</think>so B", "B", 9, reward_type="correct") == 1
    assert multiple_choice("", "B", 9, reward_type="strict") == -1


def test_penalties_of_a_choice() -> None:
    text = r"a a a a \boxed{B}"
    assert multiple_choice(text, "B", 9, repetition_penalty=0.5) == pytest.approx(1 - 0.5 / 3)
    lengths = {1: -0.5, 100: -0.5, 250: -0.25, 400: 0.0, 9000: 0.0}
    for number, term in lengths.items():
        assert multiple_choice(text, "B", number, response_length_penalty_coef=2.0) == 1 + 2 * term


def test_a_choice_begins_with_a_capital_letter() -> None:
    assert is_letter("B") == is_letter("C) three") == 1
    for bad in ("", "b", "3"):
        with pytest.raises(ValueError, match="capital letter"):
            is_letter(bad)


LINES = "One.\nTwo *bold* words?\n- a\n* b\n**wide part**"
KEPT: dict[str, tuple[dict[str, Any], str, str]] = {  # arguments, a text that keeps it, a text that does not
    "verify_keywords": ({"keyword_list": ["tea", "Milk"]}, "Teas, milk", "tea"),
    "verify_keyword_frequency": ({"word": "tea", "N": 2}, "Tea tea teapot", "tea pot"),
    "validate_forbidden_words": ({"forbidden_words": ["in"]}, "inside", "In it"),
    "verify_letter_frequency": ({"letter": "a", "N": 2}, "Aaa", "aaa"),
    "verify_paragraph_count": ({"N": 2}, "a\n* * *\nb", "a\n* * *\n"),
    "validate_word_constraint": ({"N": 20, "quantifier": "around"}, "a " * 22, "a " * 23),
    "verify_sentence_constraint": ({"N": 2, "quantifier": "at most"}, "Dr. No came. Why?", "A. B is. C! D."),
    "validate_paragraphs": ({"N": 2, "first_word": "Second", "i": 2}, "a\n\nsecond b", "Second\n\nb"),
    "verify_postscript": ({"postscript_marker": "P.S."}, "a P.S. b", "a P.S. "),
    "validate_placeholders": ({"N": 2}, "[a] and [b c]", "[a] []"),
    "verify_bullet_points": ({"N": 2}, LINES, "* a"),
    "validate_title": ({}, "<<a>>\nb", "<<>>"),
    "validate_choice": ({"options": ["yes", "no"]}, " Yes.", "ye"),
    "validate_highlighted_sections": ({"N": 2}, LINES, "** ** *a*"),
    "validate_sections": ({"N": 2, "section_splitter": "SECTION"}, "x SECTION 1 SECTION 2", "SECTION 1"),
    "validate_json_format": ({}, '```json\n{"a": 1}\n```', "{a}"),
    "validate_repeat_prompt": ({"original_prompt": "Say it "}, "Say it and more", "it"),
    "validate_two_responses": ({}, "a ****** b", "a ****** a"),
    "validate_uppercase": ({}, "A 1", "A b"),
    "validate_lowercase": ({}, "a 1", "A b"),
    "validate_frequency_capital_words": ({"N": 2, "quantifier": "at least"}, "AB C d", "AB c"),
    "validate_end": ({"end_phrase": "the end."}, 'It is. "The END."', "the end. Or not"),
    "validate_quotation": ({}, '"a"', '"'),
    "validate_no_commas": ({}, "a", "a, b"),
}


@pytest.mark.parametrize("name", KEPT)
def test_instructions_of_rolls_data(name: str) -> None:
    arguments, kept, broken = KEPT[name]
    truth = json.dumps({"func_name": name, **arguments, "other": None})
    assert (ifeval(kept, truth, {}), ifeval(broken, truth, {})) == (1, 0)
    assert ifeval("", truth, {}) == 0, "an empty response keeps nothing"
    assert knows_instructions(truth, {}) == 1


def test_every_instruction_of_rolls_data_is_tested() -> None:
    assert set(KEPT) | {"validate_response_language"} == set(instructions._FUNCTIONS)


IDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["tea"]}, "Tea", "coffee"),
    "keywords:frequency": ({"keyword": "tea", "frequency": 2, "relation": "less than"}, "tea", "tea tea"),
    "keywords:forbidden_words": ({"forbidden_words": ["a"]}, "b", "a"),
    "keywords:letter_frequency": ({"letter": "A", "let_frequency": 2, "let_relation": "at least"}, "aA", "a"),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "at least"}, "A b. C d.", "A b."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a"),
    "length_constraints:number_words": ({"num_words": 2, "relation": "less than"}, "a", "a b"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"}, "A b", "b"
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "[a]", "a"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "P.S. a", "a"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 1.0}, "* a", "a"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "maybe"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "*a*", "a"),
    "detectable_format:multiple_sections": (
        {"num_sections": 1, "section_spliter": "Part"}, "Part 1 Part 2", "a"
    ),
    "detectable_format:json_format": ({}, "[1]", "1,"),
    "detectable_format:title": ({}, "<<a>>", "a"),
    "combination:two_responses": ({}, "a ****** b", "a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Go"}, "go on", "on"),
    "startend:end_checker": ({"end_phrase": "Bye"}, "so bye", "bye so"),
    "startend:quotation": ({}, '"a"', "a"),
    "change_case:capital_word_frequency": ({"capital_frequency": 1, "capital_relation": "less than"}, "a", "A"),
    "change_case:english_capital": ({}, "A", "a"),
    "change_case:english_lowercase": ({}, "a", "A"),
    "punctuation:no_comma": ({}, "a", ","),
}  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_instructions_of_ifevals_data(name: str) -> None:
    arguments, kept, broken = IDS[name]
    row = {"instruction_id_list": [name], "kwargs": json.dumps([{"unused": None, **arguments}])}
    assert (ifeval(kept, "", row), ifeval(broken, "", row)) == (1, 0)


def test_every_instruction_of_ifevals_data_is_tested() -> None:
    assert set(IDS) | {"language:response_language"} == set(instructions._IDS)


def test_several_instructions_and_the_thought() -> None:
    row = {"instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, None]}
    assert [ifeval("A", "", row, reward_type=kind) for kind in ("strict", "loose", "soft")] == [0, 0, 0.5]
    assert ifeval("<think>A, B</think>\n a b \n", "", row) == 1
    assert ifeval("Sure, here it is:\na b", "", row) == 0
    assert ifeval("Sure, here it is:\na b", "", row, reward_type="loose") == 1
    assert ifeval("a a a a", "", row, repetition_penalty=0.5) == 0.75
    both = json.dumps([{"func_name": "validate_no_commas"}, {"func_name": "validate_uppercase"}])
    assert ifeval("a", both, {}, reward_type="soft") == 0.5


def test_the_language_is_detected_by_langdetect(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLettersError(Exception):
        pass

    def detect(text: str) -> str:
        if text == "1":
            raise NoLettersError
        return "de" if "ist" in text else "en"

    factory = SimpleNamespace(seed=None)
    fake = SimpleNamespace(DetectorFactory=factory, LangDetectException=NoLettersError, detect=detect)
    monkeypatch.setitem(sys.modules, "langdetect", fake)
    monkeypatch.setattr(instructions, "find_spec", lambda name: name)
    row = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}
    assert [ifeval(text, "", row) for text in ("das ist es", "that", "1")] == [1, 0, 0]
    assert factory.seed == 0
    monkeypatch.setattr(instructions, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package langdetect: pip install langdetect"):
        knows_instructions("", row)


@pytest.mark.parametrize(
    ("truth", "row", "why"),
    [
        ("", {}, "the ground truth must be JSON"),
        ("3", {}, "must be JSON with func_name"),
        ("[]", {}, "the row has no instruction"),
        ('{"func_name": "validate_x"}', {}, "unknown instruction 'validate_x'; known are verify_keywords, "),
        ('{"func_name": "validate_end"}', {}, "instruction validate_end needs end_phrase"),
        ('{"func_name": "validate_placeholders", "N": "two"}', {}, "instruction validate_placeholders: could not"),
        ('{"func_name": "validate_word_constraint", "N": 2, "quantifier": "above"}', {}, "unknown relation 'above'"),
        ("", {"instruction_id_list": ["a"]}, "must be lists of one length"),
        ("", {"instruction_id_list": ["a"], "kwargs": [{}, {}]}, "must be lists of one length"),
        ("", {"instruction_id_list": "[a"}, "column instruction_id_list must be JSON"),
    ],
)
def test_a_row_without_known_instructions_is_refused(truth: str, row: dict[str, Any], why: str) -> None:
    for found in (instructions_of, knows_instructions):
        with pytest.raises(ValueError, match=why):
            found(truth, row)


def test_arguments_of_another_type_are_refused_at_the_start() -> None:
    with pytest.raises((TypeError, AttributeError)):
        knows_instructions('{"func_name": "verify_keywords", "keyword_list": [3]}', {})
