"""Problems: prompts with whatever a reward needs to judge the answers to them.

A file is JSON lines or parquet, one problem per line or row, in the project's own form or as data
sets are published. What each form calls a thing is renamed here and nowhere else, so that rewards
know one name only:

  prompt      text, or messages `[{"role", "content"}, ...]`. Also `problem`, `question` (MATH,
              AIME, GSM8K), `question_content` (LiveCodeBench), `text` (MBPP).
  answer      the truth, as text. Also `ground_truth`, verl's `reward_model.ground_truth`, or what
              ends a `solution`: its last \\boxed{...} (MATH, TRL), what follows `####` (GSM8K).
  numbers     integers of the countdown game, with `target`; also `nums` (TinyZero).
  tests       of a program, see `dsjax.posttrain.rewards.code`; also `test` with `entry_point`
              (HumanEval), `test_list` (MBPP), `public_test_cases` and `private_test_cases`
              (LiveCodeBench), `inputs` and `outputs` (APPS, TACO).
  rule        name of the reward that the reward `rule` gives; also verl's `data_source`, if it is
              one's name.

Any other field is kept under its own name. Names are compared without regard to case, since AIME's
sets capitalise theirs.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from dsjax.data.documents import find_sources, read_records
from dsjax.files import shown
from dsjax.posttrain.answer import last_box

_PROMPTS = ("prompt", "problem", "question", "question_content", "text")
_ANSWERS = ("answer", "ground_truth", "solution")
_ROLES = ("system", "user", "assistant")
_MOST_TEST_BYTES = 256 << 20  # of one problem's decompressed tests


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt and the facts that rewards judge by.

    Attributes:
      prompt: text, or messages with `role` and `content`, the last of them the user's.
      fields: everything else of the line, under the names above.
      place: "FILE:LINE", for messages.
    """

    prompt: str | list[dict[str, str]]
    fields: dict[str, Any]
    place: str

    def facts(self, *, opened: bool) -> dict[str, Any]:
        """Returns what rewards take as the problem.

        Args:
          opened: whether the prompt, as the model saw it, ends inside a thought (`<think>`), so
            that a completion begins without the tag.
        """
        return {**self.fields, "prompt": self.prompt, "opened": opened}

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as turns of a conversation; a text is what the user says."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return self.prompt


def read_problems(files: str, *, key: str = "--problems") -> list[Problem]:
    """Reads problems from the files that globs match, in the order of their paths.

    Args:
      files: globs, separated by commas.
      key: the setting that messages name.

    Raises:
      ValueError: no file or problem is there, or a line lacks a prompt or holds what none of the
        forms above does; names the file and the line.
    """
    found = [problem(record, place) for place, record in read_records(find_sources(files, key=key))]
    if not found:
        raise ValueError(f"{key}={files!r} holds no problem; give a file with at least one line")
    return found


def problem(record: Mapping[str, Any], place: str) -> Problem:
    """Returns the problem of one line.

    Raises:
      ValueError: see `read_problems`.
    """
    fields = {_own_name(key, record): value for key, value in record.items() if value is not None}
    name = next((name for name in _PROMPTS if name in fields), None)
    if name is None:
        has = ", ".join(map(shown, sorted(record)[:20])) or "nothing"
        raise ValueError(
            f"{place} has no prompt but {has}; give it as 'prompt': a text or messages "
            '[{"role": "user", "content": "..."}]'
        )
    prompt = _checked_prompt(fields.pop(name), name, place)
    if isinstance(prompt, str):
        prompt = _whole_question(prompt, fields)
    if (answer := _answer(fields, place)) is not None:
        fields["answer"] = answer
    _unify_countdown(fields)
    if (tests := _tests(fields, prompt, place)) is not None:
        fields["tests"] = tests
    return Problem(prompt, fields, place)


def _whole_question(prompt: str, fields: Mapping[str, Any]) -> str:
    """Appends what two benchmarks keep apart though nobody could answer without it: MBPP's tests,
    which alone name the function, and LiveCodeBench's signature.
    """
    if tests := fields.get("test_list"):
        listed = "\n".join(map(str, tests))
        return f"{prompt}\nYour code should pass these tests:\n\n{listed}\n"
    if code := fields.get("starter_code"):
        return f"{prompt}\n\nBegin with this code:\n```python\n{code}\n```\n"
    return prompt


def _own_name(key: str, record: Mapping[str, Any]) -> str:
    lower = key.lower()
    return lower if lower == key or lower not in record else key


def _checked_prompt(value: Any, name: str, place: str) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{place}: {name!r} is empty; give the model something to answer")
        return _encodable(value, name, place)
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{place}: {name!r} is {type(value).__name__}, neither a text nor messages "
            '[{"role": "user", "content": "..."}]'
        )
    for number, turn in enumerate(value):
        where = f"{place}: message {number} of {name!r}"
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise ValueError(f"{where} is not an object with 'role' and a text 'content'")
        if turn.get("role") not in _ROLES:
            raise ValueError(
                f"{where} has the role {shown(str(turn.get('role')))}, none of {', '.join(_ROLES)}"
            )
        _encodable(turn["content"], f"content of message {number}", place)
    if value[-1]["role"] != "user":
        raise ValueError(
            f"{place}: the last message of {name!r} is the {value[-1]['role']}'s; the model "
            "answers a user, so end with the user's"
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _encodable(text: str, name: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {name!r} holds half of a surrogate pair at character {error.start}; "
            "repair it"
        ) from error
    return text


def _answer(fields: Mapping[str, Any], place: str) -> Any:
    """Returns the truth of a problem; None if it has none."""
    model = fields.get("reward_model")
    if isinstance(model, Mapping) and "ground_truth" in model:
        truth = model["ground_truth"]
        return truth if isinstance(truth, Mapping) else _text(truth, "reward_model", place)
    for name in _ANSWERS:
        if name in fields:
            value = _text(fields[name], name, place)
            # GSM8K's answers are reasoning, with the number after ####; MATH's solutions end in a
            # box.
            value = value.rpartition("####")[2].strip() if "####" in value else value
            box = last_box(value) if name == "solution" else None
            return value if box is None else box
    return None


def _text(value: Any, name: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"{place}: {name!r} is {type(value).__name__}, not a text or a number; write it as text"
        )
    return str(value)


def _unify_countdown(fields: dict[str, Any]) -> None:
    given = fields.get("answer")
    if isinstance(given, Mapping):  # verl's TinyZero sets keep numbers and target in the truth
        fields |= {key: value for key, value in given.items() if key not in fields}
        del fields["answer"]
    if "numbers" not in fields and "nums" in fields:
        fields["numbers"] = fields.pop("nums")


def _tests(fields: dict[str, Any], prompt: Any, place: str) -> Any:
    """Returns the tests of a program as `rewards.code` takes them; None if there are none or they
    have that form already.
    """
    if "tests" in fields:
        return None
    if isinstance(fields.get("test"), str) and "entry_point" in fields:
        fields["entry"] = fields.pop("entry_point")
        fields["begun"] = prompt if isinstance(prompt, str) else ""
        return {"asserts": fields.pop("test") + f"\n\ncheck({fields['entry']})\n"}
    if isinstance(fields.get("test_list"), list):
        setup = [*fields.pop("test_imports", []), fields.pop("test_setup_code", "")]
        lines = [*setup, *fields.pop("test_list")]
        if not all(isinstance(line, str) for line in lines):
            raise ValueError(
                f"{place}: 'test_list', 'test_imports' and 'test_setup_code' are texts and lists "
                "of texts, Python each; write what is no text as one"
            )
        return {"asserts": "\n".join(lines) + "\n"}
    if "public_test_cases" in fields or "private_test_cases" in fields:
        return list(_live_code_bench(fields, place))
    if isinstance(fields.get("inputs"), list) and isinstance(fields.get("outputs"), list):
        given, wanted = fields.pop("inputs"), fields.pop("outputs")
        if len(given) != len(wanted):
            raise ValueError(
                f"{place}: {len(given)} 'inputs' and {len(wanted)} 'outputs'; pair them"
            )
        pairs = zip(given, wanted, strict=True)
        if "fn_name" in fields:
            fields["entry"] = fields.pop("fn_name")
            return [list(pair) for pair in pairs]
        return [{"input": text, "output": printed} for text, printed in pairs]
    return None


def _live_code_bench(fields: dict[str, Any], place: str) -> Iterator[Any]:
    metadata = _json(fields.pop("metadata", "{}"), "metadata", place)
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if name:
        fields["entry"] = name
    for key in ("public_test_cases", "private_test_cases"):
        cases = fields.pop(key, "[]")
        if isinstance(cases, str) and not cases.lstrip().startswith("["):
            cases = _inflated(cases, key, place)
        cases = _json(cases, key, place)
        if not isinstance(cases, list) or not all(map(_is_case, cases)):
            raise ValueError(f"{place}: {key!r} holds no list of tests")
        for case in cases:
            if case.get("testtype") == "functional":
                arguments = [
                    _json(line, key, place) for line in case["input"].splitlines() if line.strip()
                ]
                yield [arguments, _json(case["output"], key, place)]
            else:
                yield {"input": case["input"], "output": case["output"]}


def _is_case(case: Any) -> bool:
    return isinstance(case, dict) and all(
        isinstance(case.get(key), str) for key in ("input", "output")
    )


def _inflated(text: str, key: str, place: str) -> str:
    """Decompresses LiveCodeBench's private tests: base64 of zlib of a text in Python's own format,
    which runs its author's code when it is read. So the text is cut out of the bytes instead.
    """
    try:
        engine = zlib.decompressobj()
        data = engine.decompress(base64.b64decode(text, validate=True), _MOST_TEST_BYTES)
    except (ValueError, zlib.error) as error:
        raise ValueError(
            f"{place}: {key!r} is neither JSON nor compressed JSON ({error})"
        ) from None
    start, end = data.find(b"["), data.rfind(b"]")
    if start < 0 or end < start:
        raise ValueError(f"{place}: {key!r} holds no list of tests")
    return data[start : end + 1].decode("utf-8", "replace")


def _json(text: Any, key: str, place: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {key!r} is not JSON ({error})") from None
