"""Chat templates and stop ids against transformers, on the small tokenizers of tests/tokenizer_folders.py.

    python -m pytest tests/formats/test_chat_template.py
"""
from datetime import datetime
from pathlib import Path

import pytest
from tokenizer_folders import STRINGS, assert_same, copy_with, llama_oracle, write
from transformers import AutoTokenizer

from tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou"
    " are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {{- tools | tojson(indent=4) }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
  {% for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- if message.role == "assistant" and loop.index0 > ns.last_query_index %}
        {{- '<|im_start|>assistant\\n<think>\\n</think>\\n' + message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content }}{% endgeneration %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{{- {"html": "<&>'", "é": [1, none]} | tojson }}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA_2, "llama3": LLAMA_3, "mistral": MISTRAL, "qwen": QWEN}
TALK = [
    {"role": "system", "content": "Be  brief. "},
    {"role": "user", "content": " What is <b>2 & 3</b>?\n"},
    {"role": "assistant", "content": "\nFive — 五. "},
    {"role": "user", "content": "你好 👍 <|im_end|>"},
]
CHATS = [TALK, TALK[1:2], TALK[1:], TALK[:2]]


@pytest.mark.parametrize("form", ["jinja", "string", "list"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_as_transformers(byte_level: dict[str, Path], tmp_path: Path, name: str, form: str) -> None:
    """Fails if a template runs differently from transformers: trimmed blocks, bos_token, raise_exception, strftime_now,
    tojson without HTML escapes, break and continue, generation blocks, tools that are none. Fails too if bos comes
    twice."""
    config = {
        "jinja": {"chat_template": "not this one"},
        "string": {"chat_template": TEMPLATES[name]},
        "list": {"chat_template": [{"name": k, "template": v} for k, v in (("a", "no"), ("default", TEMPLATES[name]))]},
    }[form]
    folder = copy_with(byte_level["llama3"], tmp_path / "x", **config)
    if form == "jinja":
        write(folder / "chat_template.jinja", TEMPLATES[name])
    ours, oracle = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.has_chat_template
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert datetime.now().strftime("%Y") in ours.render(TALK) or name != "llama3"


def test_chat_on_sentencepiece(spm_folder: Path, tmp_path: Path) -> None:
    """Fails if the spaces around [INST], where sentencepiece and special tokens meet, are not those of transformers."""
    ours = Tokenizer(copy_with(spm_folder, tmp_path / "x", chat_template=LLAMA_2))
    oracle = llama_oracle(spm_folder, chat_template=LLAMA_2)
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_template_refuses(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """Fails if the template's own error message is lost: it says what is wrong with the conversation."""
    ours = Tokenizer(copy_with(byte_level["gpt2"], tmp_path / "x", chat_template=LLAMA_2))
    with pytest.raises(ValueError, match="chat template failed: Conversation roles must alternate"):
        ours.chat([TALK[1], TALK[1]])
    plain = Tokenizer(byte_level["gpt2"])
    assert not plain.has_chat_template and plain.dialogue(["a", "b", "c"]) == plain.encode("a\n\nb\n\nc")
    with pytest.raises(ValueError, match="no chat template"):
        plain.chat(TALK)


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.update(x=1) }}",
        "{% set x = messages.append({'role': 'user', 'content': ''}) %}",
        "{{ ('%s' | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}without end {% endfor %}{% endfor %}",
        "{{ 'x' * 10**8 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_is_sandboxed(byte_level: dict[str, Path], tmp_path: Path, template: str) -> None:
    """Fails if a template can run code or never ends. It comes with a download, and plain jinja2 would run any code."""
    ours = Tokenizer(copy_with(byte_level["gpt2"], tmp_path / "x", chat_template="." + template))
    with pytest.raises(ValueError, match="chat template failed"):
        ours.chat(TALK)


def test_stop_ids(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """Fails if one of the sources of stop ids is ignored. Without the last one, the chat template, Llama-3-Instruct
    never stops if it has no generation_config.json: its config.json names only <|end_of_text|>, and a turn ends with
    <|eot_id|>."""
    folder = copy_with(byte_level["gpt2"], tmp_path / "x", eos_token="<|endoftext|>")
    assert Tokenizer(folder).stop_ids == {0}
    for wrong in (2**40, 1.5, "7"):
        write(folder / "config.json", {"eos_token_id": wrong})
        with pytest.raises(ValueError, match="eos_token_id in config.json and generation_config.json must be ids"):
            Tokenizer(folder)
    write(folder / "config.json", {"eos_token_id": [7, 8]})
    assert Tokenizer(folder).stop_ids == {0, 7, 8}
    write(folder / "generation_config.json", {"eos_token_id": 9})
    assert Tokenizer(folder).stop_ids == {0, 7, 8, 9}
    end = {"chatml": 2, "qwen": 2, "mistral": 0, "llama2": 0}
    for name, token in end.items():
        write(folder / "chat_template.jinja", TEMPLATES[name])
        assert Tokenizer(folder).stop_ids == {0, 7, 8, 9, token}, name
    write(folder / "chat_template.jinja", "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}<|im_end|>")
    assert Tokenizer(folder).stop_ids == {0, 2, 7, 8, 9}
    write(folder / "chat_template.jinja", "<|im_start|>{{ messages[0].content }}")
    assert Tokenizer(folder).stop_ids == {0, 7, 8, 9}


def test_first_token(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a model whose tokenizer names no bos loses the one of config.json."""
    folder = copy_with(byte_level["gpt2"], tmp_path / "x", bos_token=None)
    write(folder / "config.json", {"bos_token_id": 5})
    assert Tokenizer(folder).bos_id == 5 and Tokenizer(byte_level["gpt2"]).bos_id == 0


def test_broken_template_matters_only_when_used(byte_level: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a template that does not compile stops a raw prompt, or is not named once it is needed."""
    ours = Tokenizer(copy_with(byte_level["gpt2"], tmp_path / "x", chat_template="{% do x %}"))
    assert ours.encode("Hi") == Tokenizer(byte_level["gpt2"]).encode("Hi") and ours.has_chat_template
    assert "tokenizer_config.json: broken chat template" in ours.template_error and "'do'" in ours.template_error
    for use in (ours.chat, ours.render):
        with pytest.raises(ValueError, match="broken chat template"):
            use(TALK)
    with pytest.raises(ValueError, match="broken chat template"):
        ours.dialogue(["Hi"])
    write(tmp_path / "good.jinja", CHATML)
    given = Tokenizer(tmp_path / "x", tmp_path / "good.jinja")
    assert given.template_error is None and given.chat(TALK[1:2])[0] == given.bpe.token_to_id("<|im_start|>")


# ----- The demo model ----------------------------------------------------------------------------------------------

DEMO = Path(__file__).parents[2] / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.is_dir(), reason="no demo checkpoint: run make demo")
def test_demo_checkpoint() -> None:
    """Fails if the tokenizer files that the converter wrote from a GGUF file give other ids, chats or stops than
    transformers."""
    ours, oracle = Tokenizer(DEMO), AutoTokenizer.from_pretrained(DEMO)
    assert_same(ours, oracle, STRINGS)
    for chat in CHATS:
        assert ours.chat(chat) == oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert oracle.eos_token_id in ours.stop_ids
