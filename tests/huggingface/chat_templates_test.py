"""Chat templates: the text that transformers makes of messages, in a sandbox."""

import codecs
import json
import pathlib
import re
from typing import Any

import jinja2
import pytest
import tokenizers
from tokenizers import models

from salt_jax.errors import InputError
from salt_jax.huggingface.chat_templates import ChatTemplate, load_chat_template

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}"
        "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- set ns = namespace(system="") %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content | trim %}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message.content is string %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {{- message['content'] | tojson(indent=2) }}
    {%- endif %}
{%- endfor %}
{%- if ns.system and tools is none %}
    {{- ns.system + date_string }}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    "marked answers": """{% for message in messages %}
    {% set tag = message.role | upper %}
  <{{ tag }}>
    {% generation %}
{{ message.content }}{{ {"é": "<&>"} | tojson }}{{ dict(a=1) }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}ANSWER:{% endif %}
""",
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Is salt <white>? é ☃ 水\n"}],
    "several": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello", "name": None},
        {"role": "assistant", "content": "Hi {{ bos_token }}"},
        {"role": "user", "content": "Bye\n\n"},
    ],
    "wrong order": [{"role": "assistant", "content": "Hi"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "<a> é"}]}],
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def _theirs(folder: pathlib.Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def _save(folder: pathlib.Path, **settings: Any) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_written_as_transformers_writes_them(
    name: str, chat: str, answer: bool, tmp_path: pathlib.Path
) -> None:
    _save(tmp_path, chat_template=TEMPLATES[name])
    ours, theirs = load_chat_template(tmp_path), _theirs(tmp_path)
    assert ours is not None

    text = reason = ""
    try:
        text = theirs.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=answer)
    except (jinja2.TemplateError, TypeError) as error:
        reason = str(error)
    if reason:
        with pytest.raises(InputError, match=re.escape(f"rejects them ({reason}).")):
            ours(CHATS[chat], answer)
    else:
        assert ours(CHATS[chat], answer) == text


@pytest.mark.parametrize("form", ["text", "named", "file", "special tokens of their own file"])
def test_where_a_template_stands(form: str, tmp_path: pathlib.Path) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    if form == "named":
        _save(tmp_path, chat_template=named)
    elif form == "file":
        _save(tmp_path, chat_template="not this one")
        (tmp_path / "chat_template.jinja").write_text(source)
    else:
        _save(tmp_path, chat_template=source)
    if form.startswith("special"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
        mapped = {"bos_token": {"content": "<s>", "lstrip": False}, "additional": []}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    ours = load_chat_template(tmp_path)
    assert ours is not None
    assert ours(CHATS["one"]) == "<s>" + CHATS["one"][0]["content"]
    assert ours(CHATS["one"]) == _theirs(tmp_path).apply_chat_template(
        CHATS["one"], tokenize=False, add_generation_prompt=True
    )


def test_no_template(tmp_path: pathlib.Path) -> None:
    assert load_chat_template(tmp_path) is None
    _save(tmp_path, chat_template=[{"name": "tool_use", "template": "x"}])
    assert load_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].missing.other }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_what_a_template_may_not_do_is_one_sentence(source: str) -> None:
    with pytest.raises(InputError, match="the model's chat template rejects them") as error:
        ChatTemplate(source)(CHATS["one"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", [[], "text", [1], [{"content": "a"}], [{"role": 1}], None])
def test_what_is_no_conversation(messages: Any) -> None:
    with pytest.raises(InputError, match="messages must be a list of objects like"):
        ChatTemplate("a")(messages)


def test_the_file_of_a_template_is_utf_8_with_or_without_a_byte_order_mark(
    tmp_path: pathlib.Path,
) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(codecs.BOM_UTF8 + b"{{ messages[0].content }}")
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template([{"role": "user", "content": "Salt"}]) == "Salt"
    file.write_bytes(b"\xff{{ messages[0].content }}")
    with pytest.raises(InputError, match=r"is not UTF-8 .*: convert the file"):
        load_chat_template(tmp_path)
