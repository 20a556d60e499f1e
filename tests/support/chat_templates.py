"""Chat templates in the manner of well-known model families, short, for tests of their translation."""

from __future__ import annotations

CHATML_TURNS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# name: (template, begin token, end token)
LIKE: dict[str, tuple[str, str | None, str]] = {
    "smollm2-like": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helper named Small.<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_start|>",
        "<|im_end|>",
    ),
    "qwen2.5-like": (
        "{%- if tools %}{{- '<|im_start|>system\\n' }}{{- '# Tools' }}{{- '<|im_end|>\\n' }}{%- else %}"
        "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
        "{%- else %}{{- '<|im_start|>system\\nYou are Q, made by A. You help.<|im_end|>\\n' }}{%- endif %}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or "
        "(message.role == 'assistant' and not message.tool_calls) %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        None,
        "<|im_end|>",
    ),
    "qwen3-like": (
        "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
        "{%- endif %}{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages[::-1] %}"
        "{%- set index = (messages|length - 1) - loop.index0 %}"
        "{%- if message.role == 'user' and ns.last == messages|length - 1 %}"
        "{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}"
        "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
        "{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
        "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{%- endif %}",
        None,
        "<|im_end|>",
    ),
    "gemma2-like": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
        "<bos>",
        "<end_of_turn>",
    ),
    "gemma3-like": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\\n\\n' -%}"
        "{%- set turns = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set turns = messages -%}{%- endif -%}"
        "{%- for message in turns -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('Roles must alternate') }}{%- endif -%}"
        "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}{{ message['content'] | trim }}"
        "{{ '<end_of_turn>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}",
        "<bos>",
        "<end_of_turn>",
    ),
    "phi3-like": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<s>",
        "<|endoftext|>",
    ),
    "mistral-like": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
    ),
    "deepseek-like": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
}
# What no Ollama template can say: (template, words of the reason).
REFUSED: dict[str, tuple[str, str]] = {
    "today's date": (
        "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + CHATML_TURNS,
        "it writes today's date into the prompt",
    ),
    "upper case": (
        "{% for m in messages %}{{ m.role + ': ' + (m.content | upper) + '\\n' }}{% endfor %}",
        "it leaves contents out, repeats or rewrites them",
    ),
    "the last answer marked": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ ' #' ~ loop.index ~ '\\n' }}{% endfor %}",
        "it writes a turn differently in another place of the conversation",
    ),
    "counted words": (
        "{% for m in messages %}{{ m.role + ' (' ~ (m.content | length) ~ '): ' + m.content + '\\n' }}{% endfor %}",
        "it changes what it writes around contents with their white space",
    ),
    "only the last turn": (
        "{{ 'user: ' + messages[-1].content + '\\nassistant: ' }}",
        "it leaves contents out, repeats or rewrites them",
    ),
    "newest first": (
        "{% for m in messages | reverse %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}",
        "it puts contents in another order",
    ),
    "quotation marks replaced": (
        "{% for m in messages %}{{ m.role + ': ' + m.content | replace('\"', \"'\") + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "with odd Unicode and markup, it has",
    ),
    "an empty message left out": (
        "{% for m in messages if m.content %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "with an empty system message, it has",
    ),
}
