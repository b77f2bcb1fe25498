"""Prompts put together from remembered parts are those that the tokenizer's template makes of the whole."""

from __future__ import annotations

from typing import Any

import pytest
from dspy.lm15 import Config, Message, Request
from local_tiny import TEMPLATE, byte_tokenizer

from asyndbt_dspy.lms.local.prompts import Prompt, PromptEncoder

TEMPLATES = {
    "as it is": TEMPLATE,
    "trimmed": TEMPLATE.replace("message['content']", "message['content'] | trim"),
    "escaped": TEMPLATE.replace("message['content']", "message['content'] | e"),
    "looks for tags": TEMPLATE.replace(
        "message['content']",
        "'(tool)' if message['content'].startswith('<tool_response>') else message['content']",
    ),
    "counts messages": "{{ messages | length }}" + TEMPLATE,
    "marks the last": TEMPLATE.replace("<|end|>", "{% if loop.last %}!{% endif %}<|end|>"),
    "no special token": TEMPLATE.replace("<|start|>", "*").replace("<|end|>", "/"),
    "ends bare": TEMPLATE.replace("<|end|>", ""),
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + TEMPLATE,
}
CONTENTS = ("plain", " \n spaces \n", "<tool_response>x", "a & <b>", "{{ braces }}", "", "<|end|>", "\ue000")


def request(content: str, turns: int = 1) -> Request:
    demos = [turn for n in range(turns) for turn in (Message.user(f"q{n}"), Message.assistant(f"a{n} "))]
    messages = (*demos, Message.user(content))
    return Request(model="local/tiny", system="Answer.", messages=messages, config=Config())


def whole(tokenizer: Any, content: str, turns: int = 1) -> list[int]:
    messages = [{"role": "system", "content": "Answer."}]
    for number in range(turns):
        messages += [
            {"role": "user", "content": f"q{number}"},
            {"role": "assistant", "content": f"a{number} "},
        ]
    messages.append({"role": "user", "content": content})
    if "no system" in tokenizer.chat_template:
        messages[:2] = [{"role": "user", "content": "Answer.\n\n" + messages[1]["content"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [0, 1, 3])
def test_every_prompt_is_that_of_the_template(name: str, turns: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    encoder = PromptEncoder(tokenizer, plain=False)
    for content in (*CONTENTS, *CONTENTS):
        assert encoder.encode(request(content, turns)).ids == whole(tokenizer, content, turns), repr(content)


def test_a_beginning_is_rendered_once_for_all_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    rendered: list[int] = []
    template = tokenizer.apply_chat_template

    def counted(messages: Any, **options: Any) -> Any:
        rendered.append(len(messages))
        return template(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    encoder = PromptEncoder(tokenizer, plain=False)
    prompts: list[Prompt] = [encoder.encode(request(f"question {number}", 3)) for number in range(20)]
    assert len(rendered) == 2
    assert len({tuple(prompt.ids[: prompt.last_turn]) for prompt in prompts}) == 1
    assert prompts[0].last_turn > 20
    encoder.encode(request("question", 2))
    assert len(rendered) == 4, "other demos are another beginning"
