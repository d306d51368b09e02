"""Built-in rule `multiple_choice`: the chosen letter, with the rewards of ROLL's workers for such questions."""

from __future__ import annotations

from roll_r3.rewards.texts import after_thought, last_boxed, repetition

_SCORES = {  # right and boxed, right, wrong but boxed, wrong
    "boxed": (1.0, 0.0, 0.0, 0.0),
    "correct": (1.0, 1.0, 0.0, 0.0),
    "loose": (1.0, 1.0, -1.0, -1.0),
    "soft": (1.0, 0.5, -0.5, -1.0),
    "strict": (1.0, -1.0, -1.0, -1.0),
}
_ANNOUNCED = "answer is"
_SHORT, _LONG, _SHORTEST_REWARD = 100, 400, -0.5
"""Lengths in tokens, where the length reward begins to rise and reaches 0; its least value."""


def multiple_choice(
    response: str,
    ground_truth: str,
    num_response_tokens: int,
    *,
    reward_type: str = "boxed",
    repetition_penalty: float = 0.0,
    response_length_penalty_coef: float = 0.0,
) -> float:
    r"""Return the score of the chosen letter, minus repetition_penalty x share of repeated 3-grams, plus a length term.

    The answer stands in the last `\boxed{}` behind the thought, else behind the last "answer is", else anywhere. Its
    first capital letter is the choice; the ground truth begins with the right one.

    Args:
        reward_type: key of `_SCORES`.
        response_length_penalty_coef: factor of the length term: -0.5 below 100 tokens, rising to 0 at 400.
    """
    text = after_thought(response)
    boxed = last_boxed(text)
    is_right = _letter(_announced(text) if boxed is None else boxed) == ground_truth[:1] != ""
    score = _SCORES[reward_type][2 * (not is_right) + (boxed is None)]
    length = _SHORTEST_REWARD * min(1.0, max(0.0, (_LONG - num_response_tokens) / (_LONG - _SHORT)))
    return score - repetition_penalty * repetition(response) + response_length_penalty_coef * length


def is_letter(ground_truth: str, **_: object) -> float:
    """Return 1 if a ground truth can be chosen: it begins with a capital letter.

    Raises:
        ValueError: it does not.
    """
    if not ground_truth[:1].isupper():
        raise ValueError("a choice must begin with a capital letter")
    return 1.0


def _announced(text: str) -> str:
    place = text.lower().rfind(_ANNOUNCED)
    return text if place < 0 else text[place + len(_ANNOUNCED) :]


def _letter(answer: str) -> str:
    return next((character for character in answer if character.isupper()), "")
