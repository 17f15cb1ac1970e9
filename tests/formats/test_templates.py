"""Forty chat templates in the styles that models are published with, against transformers; and where their turns end.

    python -m pytest tests/formats/test_templates.py
"""
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from formats.tokenizer_files import CHAR_OF, find_turn_ends, load_template
from tokenizer import Tokenizer

MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>", "<|EOT|>", "[INST]",
         "[/INST]", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>", "<|end_of_text|>", "<|START_OF_TURN_TOKEN|>",
         "<|END_OF_TURN_TOKEN|>", "    "]

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
TURN = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END
START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATE = ("{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
             "{% endif %}")
SYSTEM_APART = ("{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = "
                "messages[1:] %}{% else %}{% set system = '' %}{% endif %}")


def two_roles(user: str, assistant: str, before: str = "", after: str = "") -> str:
    """A template with one text for a user's message and one for any other."""
    return f"{before}{LOOP}{{% if m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}{END}{after}"


def qa(answer_end: str = "", **more: str) -> str:
    return two_roles("### Question:\n{{ m.content }}\n", "### Answer:\n{{ m.content }}" + answer_end, **more)


# name: (the template, the tokens that end an answer)
TEMPLATES = {
    # ChatML and its relatives
    "chatml": (TURN + START, "<|im_end|>"),
    "chatml, default system": ("{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% "
                               "endif %}"
                               + TURN + START, "<|im_end|>"),
    "chatml, prompt always": (TURN + "<|im_start|>assistant\n", "<|im_end|>"),
    "chatml, trimmed": (LOOP + "{{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' "
                        "-}}" + END + START,
                        "<|im_end|>"),
    "chatml, system needed": ("{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') "
                              "}}{% endif %}"
                              + TURN + START, "<|im_end|>"),
    "chatml, empty turns refused": (LOOP + "{% if not m.content %}{{ raise_exception('an empty turn') }}{% endif %}"
                                    + END + TURN + START, "<|im_end|>"),
    "chatml, the user last": ("{% if messages[-1].role != 'user' %}{{ raise_exception('a question last') }}{% endif %}"
                              + TURN + START, "<|im_end|>"),
    "chatml, upper": (TURN.replace("m.content", "m.content | upper") + START, "<|im_end|>"),
    "chatml, replaced": (TURN.replace("m.content", "m.content.replace('A', 'b') | replace('n', '') | "
                         "capitalize") + START,
                         "<|im_end|>"),
    "chatml, as JSON": (TURN.replace("m.content", "m.content | tojson") + START, "<|im_end|>"),
    "chatml, generation block": (LOOP + "<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>"
                                 "{% endgeneration %}\n" + END + START, "<|im_end|>"),
    "chatml, generation-": (LOOP + "<|im_start|>{{ m.role }}\n{%- generation -%} {{ m.content }}<|im_end|>"
                            "{%- endgeneration -%}\n" + END + START, "<|im_end|>"),
    "chatml, Answer in the system text": ("<|im_start|>system\nAnswer every Question. Hi!<|im_end|>\n" + TURN + START,
                                          "<|im_end|>"),
    "chatml, two tokens": (TURN.replace("<|im_end|>", "<|im_end|><|end_of_text|>") + START, "<|im_end|>"),
    "chatml, a line before the end": (TURN.replace("<|im_end|>", "\n    <|im_end|>") + START, "<|im_end|>"),
    "chatml, words before the end": (TURN.replace("<|im_end|>", " (end of answer) <|im_end|>") + START, "<|im_end|>"),
    "qwen with tools": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n# Tools' }}\n    {%- for tool in tools %}\n        {{- tool "
        "| tojson }}\n"
        "    {%- endfor %}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
        "        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n{%- "
        "endif %}\n"
        "{%- for m in messages %}\n    {%- if (m.role == 'user') or (m.role == 'system' and not loop.first) or "
        "(m.role == 'assistant' and not m.tool_calls) %}\n"
        "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- "
        "endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n", "<|im_end|>"),
    "qwen3 with a thought": (
        "{%- set ns = namespace(last=messages|length - 1) %}\n{%- for m in messages[::-1] %}\n"
        "    {%- if m.role == 'user' %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}\n"
        "{%- endfor %}\n{%- for m in messages %}\n    {%- if m.role == 'assistant' and loop.index0 > ns.last %}\n"
        "        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + "
        "m.content.split('</think>')[-1].lstrip('\\n') }}\n"
        "    {%- else %}\n        {{- '<|im_start|>' + m.role + '\\n' + m.content }}\n    {%- endif %}\n"
        "    {{- '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}", "<|im_end|>"),
    # Llama
    "llama 2": (SYSTEM_APART + LOOP + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\\n' "
                "+ system "
                "+ '\\n<</SYS>>\\n\\n' if loop.first and system else '') + m.content.strip() + ' [/INST]' }}{% else %}"
                "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}" + END, "</s>"),
    "llama 3": ("{% set ns = namespace(first=true) %}" + LOOP + "{% set text = '<|start_header_id|>' + m['role'] + "
                "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
                "{% set text = bos_token + text %}{% endif %}{{ text }}" + END +
                "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}", "<|eot_id|>"),
    "llama 3.1 with a date": ("{{ bos_token }}{{ strftime_now('%Y') if strftime_now is defined else '2024' }}"
                              "{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}" + LOOP +
                              "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>" + END,
                              "<|eot_id|>"),
    # Mistral
    "mistral v1": (two_roles("[INST] {{ m.content }} [/INST]", "{{ m.content + eos_token }} ", "{{ bos_token "
                   "}}"), "</s>"),
    "mistral v3": (SYSTEM_APART + "{{ bos_token }}" + LOOP + ALTERNATE + "{% if m.role == 'user' %}[INST] "
                   "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% elif "
                   "m.role == "
                   "'assistant' %} {{ m.content | trim }}{{ eos_token }}{% else %}{{ raise_exception('no such role') }}"
                   "{% endif %}" + END, "</s>"),
    "mistral, no system": (LOOP + ALTERNATE + END + two_roles("[INST]{{ m.content }}[/INST]", "{{ m.content "
                           "}}</s>"), "</s>"),
    # Others with tokens
    "zephyr": (LOOP + "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n" + END
               + "{% if add_generation_prompt %}<|assistant|>{% endif %}", "</s>"),
    "phi 3": (LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + END + "{% if add_generation_prompt "
              "%}<|assistant|>\n"
              "{% else %}{{ eos_token }}{% endif %}", "<|end|>"),
    "gemma": ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') "
              "}}{% endif %}"
              + LOOP + ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
              "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}" + END +
              "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}", "<end_of_turn>"),
    "deepseek": ("{{ bos_token }}" + two_roles("<|User|>{{ m.content }}", "<|Assistant|>{{ m.content "
                 "}}<|end_of_sentence|>",
                 after="{% if add_generation_prompt %}<|Assistant|>{% endif %}"), "<|end_of_sentence|>"),
    "deepseek coder": ("{{ bos_token }}You are an AI programming assistant.\n" + two_roles(
        "### Instruction:\n{{ m.content }}\n", "### Response:\n{{ m.content }}\n<|EOT|>\n", after="### Response:\n"),
        "<|EOT|>"),
    "command r": (LOOP + "<|START_OF_TURN_TOKEN|>{{ m.role | upper }}{{ m.content.strip() "
                  "}}<|END_OF_TURN_TOKEN|>" + END,
                  "<|END_OF_TURN_TOKEN|>"),
    "glm: the next question ends it": (two_roles("<|user|>\n{{ m.content }}", "<|assistant|>\n{{ m.content }}",
                                       after="{% if add_generation_prompt %}<|assistant|>{% endif %}"), "<|user|>"),
    "eos at the end alone": (LOOP + "{{ m.role }} {{ m.content }}\n" + END + "{% if not add_generation_prompt "
                             "%}</s>{% endif %}",
                             "</s>"),
    # With words
    "vicuna": (SYSTEM_APART + "{{ system or 'A chat between a user and an assistant.' }} " + two_roles(
        "USER: {{ m.content }} ", "ASSISTANT: {{ m.content }}</s>", after="ASSISTANT:"), "</s>"),
    "alpaca": (qa().replace("Question", "Instruction").replace("Answer", "Response"), ""),
    "question and answer": (qa("<|im_end|>\n", after="{% if add_generation_prompt %}### Answer:\n{% endif "
                            "%}"), "<|im_end|>"),
    "question and answer, eos": (qa("{{ eos_token }}\n", before="Hi. Answer the Question.\n"), "</s>"),
    "words end it": (two_roles("User: {{ m.content }}\n", "Bot: {{ m.content }}\n"), ""),
    # Jinja
    "macro and filter": ("{% macro turn(role, text) %}<|im_start|>{{ role }}: {{ caller() if caller else text "
                         "}}<|im_end|>"
                         "{% endmacro %}" + LOOP + "{{ turn(m.role, m.content) | trim }}\n" + END, "<|im_end|>"),
    "whitespace": ("  {% for m in messages %}  \n    {%- if m.role != 'system' %}\n  {{ m.role }}:\t{{ m.content }} "
                   "<|end|>\n"
                   "    {%- else -%}\n{% continue %}\n    {% endif %}\n  {% endfor %}\n\n", "<|end|>"),
    "one turn": ("{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}<|user|>"
                 "{{ messages[0].content }}<|end|>", ""),
}
TALKS = [
    [{"role": "user", "content": " Two  plus 2?\n"}],
    [{"role": "user", "content": "你好 👍 Answer me"}, {"role": "assistant", "content": "\n<b>\"Five\" & 6 "},
     {"role": "user", "content": "ANSWER\n\nnow"}],
    [{"role": "system", "content": "Be  brief. "}, {"role": "user", "content": "Question?"},
     {"role": "assistant", "content": "An Answer "}, {"role": "user", "content": "<|im_end|> é"}],
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte, and MARKS."""
    folder = tmp_path_factory.mktemp("templates")
    bpe = BPE(models.BPE({CHAR_OF[i]: i for i in range(256)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    bpe.add_special_tokens(MARKS)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def oracle(ours: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=ours.bpe, bos_token="<s>", eos_token="</s>")


def test_as_transformers(ours: Tokenizer, oracle: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Fails if a template writes another text than with transformers, or is refused by one of the two alone."""
    assert len(TEMPLATES) >= 40
    refused = 0
    for name, (template, _) in TEMPLATES.items():
        ours.template = load_template(tmp_path, template)
        for talk in TALKS:
            for prompt in (True, False):
                try:
                    expected = oracle.apply_chat_template(talk, chat_template=template, tokenize=False,
                                                          add_generation_prompt=prompt)
                except Exception:
                    refused += 1
                    with pytest.raises(ValueError, match="the chat template failed: "):
                        ours.render(talk, prompt)
                else:
                    assert ours.render(talk, prompt) == expected, name
    assert refused >= 10


def test_turn_ends(ours: Tokenizer, tmp_path: Path) -> None:
    """Fails if the token that ends an answer is missed, or another one is taken for it: by a word of the template that
    looks like the answer, by a changed text, by a refused conversation, or by what stands before the token."""
    for name, (template, end) in TEMPLATES.items():
        ours.template = load_template(tmp_path, template)
        found, line = find_turn_ends(ours.bpe, ours.render)
        expected = {end} if end else set()
        assert {ours.bpe.id_to_token(i) for i in found} - {"<|assistant|>"} == expected, name
        words = {"alpaca": "### Instruction:", "words end it": "User:", "one turn": ""}
        assert end or line == words[name]


def test_old_formats_of_the_docs(ours: Tokenizer, tmp_path: Path) -> None:
    """Fails if the templates in docs/usage.md do not write what the models were trained on (FastChat's vicuna_v1.1, and
    Meta's Llama-2 code), or not from a saved file."""
    page = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    vicuna, llama_2 = re.findall(r"^```jinja\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    talk = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there."},
            {"role": "user", "content": "Why?"}]
    system = [{"role": "system", "content": "Be brief."}]
    default = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
               "detailed, and polite answers to the user's questions.")
    file = tmp_path / "saved.jinja"
    for template, before, texts in (
            (vicuna, f"<s>{default} ", "USER: Hello! ASSISTANT: Hi there.</s>USER: Why? ASSISTANT:"),
            (llama_2, "<s>", "[INST] Hello! [/INST] Hi there. </s><s>[INST] Why? [/INST]")):
        file.write_bytes(b"\xef\xbb\xbf" + template.encode())  # as some editors save it
        ours.template = load_template(tmp_path, "not this one", file)
        assert ours.render(talk) == before + texts
        assert ours.render(talk[:1]) == before + texts.partition(" Hi")[0]
        assert {ours.bpe.id_to_token(i) for i in find_turn_ends(ours.bpe, ours.render)[0]} == {"</s>"}
        with_system = "Be brief. USER" if template == vicuna else "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello! [/"
        assert ours.render(system + talk).startswith("<s>" + with_system)
