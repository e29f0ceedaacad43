"""Templates render as in transformers; a forbidden operation is an error of one line."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llama_jax.text.chat_template import find_chat_template, render_chat

CHATML = (
    "{% for message in messages %}\n"
    "    {%- if loop.first and message['role'] != 'system' %}{{ bos_token }}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
TEMPLATES = {
    "chatml": CHATML,
    "tojson": "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}\n"
    "{% generation %}\n{{ m.content }}{{ eos_token }}\n{% endgeneration %}\n"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}\n"
    "{% endfor %}{{ ns.n }}{{ tools is none }}{{ strftime_now('%Y') | length }}",
}
MESSAGES = [
    {"role": "user", "content": " Hi <there> & co. "},
    {"role": "assistant", "content": "Grüße 🙂"},
    {"role": "user", "content": "And?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_matches_transformers(name, prompted):
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **TOKENS)
    want = tokenizer.apply_chat_template(
        MESSAGES,
        chat_template=TEMPLATES[name],
        add_generation_prompt=prompted,
        tokenize=False,
    )
    ours = render_chat(
        TEMPLATES[name], MESSAGES, add_generation_prompt=prompted, special_tokens=TOKENS
    )
    assert ours == want


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{% if %}", "chat template: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ messages.absent.absent }}", "no attribute 'absent'"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_bad_template(template, message):
    with pytest.raises(ValueError) as error:
        render_chat(template, MESSAGES)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    ],
)
def test_an_endless_template(template, monkeypatch):
    monkeypatch.setattr("llama_jax.text.chat_template.SECONDS", 0.5)
    with pytest.raises(ValueError, match="stopped, because it needs more than"):
        render_chat(template, MESSAGES)


def test_find_chat_template(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        find_chat_template(tmp_path)
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_chat_template(tmp_path) == ("d", TOKENS)
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert find_chat_template(tmp_path)[0] == "own file"
