"""Instructions of a row: their names and arguments in the data, and their checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from roll_r3.rewards.ifeval import instruction_checks as checks

_Check = Callable[..., bool]


@dataclass(frozen=True)
class _Form:
    """Form of an instruction in the data."""

    check: _Check
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Name in the data -> parameter of the check."""
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a row."""

    name: str
    check: _Check
    arguments: Mapping[str, Any]

    def kept_by(self, text: str) -> bool:
        return self.check(text, **self.arguments)


_N, _WORD_N = {"N": "count"}, {"N": "count", "quantifier": "relation"}
_FUNCTIONS = {
    "verify_keywords": _Form(checks.keywords, {"keyword_list": "words"}),
    "verify_keyword_frequency": _Form(checks.keyword_frequency, {"word": "word"} | _N),
    "validate_forbidden_words": _Form(checks.forbidden_words, {"forbidden_words": "words"}),
    "verify_letter_frequency": _Form(checks.letter_frequency, {"letter": "letter"} | _N),
    "validate_response_language": _Form(checks.response_language, {"language": "language"}),
    "verify_paragraph_count": _Form(checks.marked_paragraphs, _N),
    "validate_word_constraint": _Form(checks.number_words, _WORD_N),
    "verify_sentence_constraint": _Form(checks.number_sentences, _WORD_N),
    "validate_paragraphs": _Form(checks.paragraph_begins, _N | {"first_word": "word", "i": "index"}),
    "verify_postscript": _Form(checks.postscript, {"postscript_marker": "marker"}),
    "validate_placeholders": _Form(checks.placeholders, _N),
    "verify_bullet_points": _Form(checks.bullet_points, _N),
    "validate_title": _Form(checks.title),
    "validate_choice": _Form(checks.one_of, {"options": "options"}),
    "validate_highlighted_sections": _Form(checks.highlighted_sections, _N),
    "validate_sections": _Form(checks.sections, _N | {"section_splitter": "marker"}),
    "validate_json_format": _Form(checks.json_format),
    "validate_repeat_prompt": _Form(checks.repeats_prompt, {"original_prompt": "prompt"}),
    "validate_two_responses": _Form(checks.two_responses),
    "validate_uppercase": _Form(checks.uppercase),
    "validate_lowercase": _Form(checks.lowercase),
    "validate_frequency_capital_words": _Form(checks.capital_words, _WORD_N),
    "validate_end": _Form(checks.ends_with, {"end_phrase": "phrase"}),
    "validate_quotation": _Form(checks.quotation),
    "validate_no_commas": _Form(checks.no_comma),
}
"""`func_name` of RLVR-IFeval and ROLL -> form."""
_IDS = {
    "keywords:existence": _Form(checks.keywords, {"keywords": "words"}),
    "keywords:frequency": _Form(
        checks.keyword_frequency, {"keyword": "word", "frequency": "count", "relation": "relation"}
    ),
    "keywords:forbidden_words": _Form(checks.forbidden_words, {"forbidden_words": "words"}),
    "keywords:letter_frequency": _Form(
        checks.letter_frequency,
        {"letter": "letter", "let_frequency": "count", "let_relation": "relation"},
        {"any_case": True},
    ),
    "language:response_language": _Form(checks.response_language, {"language": "language"}),
    "length_constraints:number_sentences": _Form(
        checks.number_sentences, {"num_sentences": "count", "relation": "relation"}
    ),
    "length_constraints:number_paragraphs": _Form(
        checks.marked_paragraphs, {"num_paragraphs": "count"}, {"mark": "***"}
    ),
    "length_constraints:number_words": _Form(checks.number_words, {"num_words": "count", "relation": "relation"}),
    "length_constraints:nth_paragraph_first_word": _Form(
        checks.paragraph_begins, {"num_paragraphs": "count", "nth_paragraph": "index", "first_word": "word"}
    ),
    "detectable_content:number_placeholders": _Form(checks.placeholders, {"num_placeholders": "count"}),
    "detectable_content:postscript": _Form(checks.postscript, {"postscript_marker": "marker"}),
    "detectable_format:number_bullet_lists": _Form(checks.bullet_points, {"num_bullets": "count"}),
    "detectable_format:constrained_response": _Form(checks.constrained_response),
    "detectable_format:number_highlighted_sections": _Form(checks.highlighted_sections, {"num_highlights": "count"}),
    "detectable_format:multiple_sections": _Form(
        checks.sections, {"num_sections": "count", "section_spliter": "marker"}, {"relation": "at least"}
    ),
    "detectable_format:json_format": _Form(checks.json_format),
    "detectable_format:title": _Form(checks.title),
    "combination:two_responses": _Form(checks.two_responses),
    "combination:repeat_prompt": _Form(checks.repeats_prompt, {"prompt_to_repeat": "prompt"}),
    "startend:end_checker": _Form(checks.ends_with, {"end_phrase": "phrase"}),
    "startend:quotation": _Form(checks.quotation),
    "change_case:capital_word_frequency": _Form(
        checks.capital_words, {"capital_frequency": "count", "capital_relation": "relation"}
    ),
    "change_case:english_capital": _Form(checks.uppercase),
    "change_case:english_lowercase": _Form(checks.lowercase),
    "punctuation:no_comma": _Form(checks.no_comma),
}
"""`instruction_id_list` of IFEval -> form."""
_WHOLE = ("count", "index")
"""Parameters held as 3.0 or "3" by some data."""


def instructions_of(ground_truth: str, row: Mapping[str, Any]) -> list[Instruction]:
    """Return the instructions of a row.

    They stand in the columns `instruction_id_list` and `kwargs`, as in IFEval, or else in the ground truth: JSON
    {func_name, arguments...}, or a list of such.

    Raises:
        ValueError: they cannot be read, are unknown, or need a missing package.
    """
    names = _decoded(row.get("instruction_id_list"), "column instruction_id_list")
    if names is not None:
        arguments = _decoded(row.get("kwargs"), "column kwargs")
        if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
            raise ValueError("columns instruction_id_list and kwargs must be lists of one length")
        found = [_instruction(_IDS, str(name), each or {}) for name, each in zip(names, arguments, strict=True)]
    else:
        value = _decoded(ground_truth, "the ground truth")
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, dict) and "func_name" in entry for entry in entries):
            raise ValueError("the ground truth must be JSON with func_name, or a list of such")
        found = [_instruction(_FUNCTIONS, str(entry["func_name"]), entry) for entry in entries]
    if not found:
        raise ValueError("the row has no instruction")
    return found


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return list(value) if isinstance(value, Sequence) else value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{where} must be JSON: {error}") from error


def _instruction(forms: Mapping[str, _Form], name: str, given: Mapping[str, Any]) -> Instruction:
    form = forms.get(name)
    if form is None:
        raise ValueError(f"unknown instruction {name!r}; known are {', '.join(forms)}")
    if missing := [key for key in form.arguments if given.get(key) is None]:
        raise ValueError(f"instruction {name} needs {', '.join(missing)}")
    arguments = {parameter: given[key] for key, parameter in form.arguments.items()}
    try:
        arguments |= {key: int(float(arguments[key])) for key in _WHOLE if key in arguments}
    except (TypeError, ValueError) as error:
        raise ValueError(f"instruction {name}: {error}") from error
    if "relation" in arguments:
        checks.holds(0, arguments["relation"], 0)
    if form.check is checks.response_language and find_spec("langdetect") is None:
        raise ValueError(f"instruction {name} needs the package langdetect: pip install langdetect")
    return Instruction(name, form.check, {**arguments, **form.fixed})
