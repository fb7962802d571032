"""Chat templates as three texts: equal to what the template writes, or refused."""

import json

import pytest

from bytecap.errors import ArtifactError
from bytecap.pipeline.chat_form import chat_form
from bytecap.pipeline.chat_templates import conversations

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def files(tokenizer_json):
    """Function: side files of a model with a template."""
    tokenizer = json.loads(tokenizer_json)
    tokenizer["added_tokens"].append({
        "id": 5, "content": "<|im_end|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False,
    })  # fmt: skip
    about = {"bos_token": "<s>", "eos_token": {"content": "<end>"}}

    def get(template):
        found = {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(about).encode()}
        return found if template is None else found | {"chat_template.jinja": template.encode()}

    return get


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("template", [CHATML, BRACKETS])
def test_it_writes_what_the_template_does(files, template):
    form = chat_form(files(template), "m")
    talk = [
        {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(["Hi", "<b>Ho</b>", "So?", "x", "y"])
    ]
    talks = [talk[:1], talk[:3], talk]
    assert [form.text(t) for t in talks] == conversations(files(template), "m", talks)
    assert set(form.control) >= {"<end>", "<s>"}
    assert ("<|im_end|>" in form.control) == (template == CHATML)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ '-' * m.content | length }}{{ m.content }}{% endfor %}",
        "{{ '-' * 30000 }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ nothing.there.at.all }}",
    ],
)
def test_other_templates_are_refused(files, template):
    with pytest.raises(ArtifactError, match=r"does more than join texts|cannot be rendered"):
        chat_form(files(template), "m")


def test_without_a_template_there_is_no_form(files):
    assert chat_form(files(None), "m") is None
    assert chat_form({"chat_template.jinja": CHATML.encode()}, "m") is None
