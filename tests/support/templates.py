"""Chat templates with the habits of those that people have, and byte-level tokenizers to go with them.

None is a copy of a published template; each does what its namesake does with thoughts, tools and ends of turns.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.corpus.tokenizer import CHAT_TEMPLATE

CHATML = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Tools stand in the system message as JSON, calls and what they return between special tokens.
HERMES = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}
{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if not (tools and loop.first and m.role == 'system') -%}
{{- '<|im_start|>' + m.role + '\\n' -}}{%- if m.content -%}{{- m.content -}}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>' + (call.function | default(call)) | tojson + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# A beginning, headers of their own, an end after every turn, and no white space after it.
LLAMA = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|head|>' + m.role + '<|/head|>\\n\\n' + m.content | trim + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|head|>assistant<|/head|>\\n\\n' -}}{%- endif -%}
"""

# Opens a thought before every answer, drops it from the turns before, loses the calls of the last turn, and is told
# not to think by a word in the messages.
NANO_2 = """\
{%- set ns = namespace(thinks=true, last='') -%}
{%- for m in messages -%}{%- if m.role in ['system', 'user'] -%}
{%- if '/no_think' in m.content -%}{%- set ns.thinks = false -%}
{%- elif '/think' in m.content -%}{%- set ns.thinks = true -%}{%- endif -%}
{%- endif -%}{%- endfor -%}
{{- '<SPECIAL_10>System\\n' -}}
{%- if messages[0].role == 'system' -%}
{{- messages[0].content.replace('/no_think', '').replace('/think', '').strip() -}}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}{{- '\\n\\n<AVAILABLE_TOOLS>[' -}}
{%- for tool in tools -%}
{{- (tool.function if tool.function is defined else tool) | tojson + ('' if loop.last else ', ') -}}
{%- endfor -%}{{- ']</AVAILABLE_TOOLS>' -}}{%- endif -%}
{{- '\\n' -}}
{%- if messages and messages[-1].role == 'assistant' -%}
{%- set ns.last = messages[-1].content.strip() -%}{%- set messages = messages[:-1] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- '<SPECIAL_11>User\\n' + m.content.replace('/no_think', '').replace('/think', '').strip() + '\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<SPECIAL_11>User\\n<TOOL_RESPONSE>[' + m.content + ']</TOOL_RESPONSE>\\n' -}}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content.split('</think>')[-1].strip() -%}
{{- '<SPECIAL_11>Assistant\\n' + content -}}
{%- if m.tool_calls -%}
{{- ('\\n\\n' if content else '') + '<TOOLCALL>[' -}}
{%- for call in m.tool_calls -%}
{%- set f = call.function if call.function is defined else call -%}
{{- '{"name": "' + f.name + '", "arguments": ' + (f.arguments if f.arguments is string else f.arguments | tojson) -}}
{{- '}' + ('' if loop.last else ', ') -}}
{%- endfor -%}{{- ']</TOOLCALL>' -}}
{%- endif -%}
{{- '\\n<SPECIAL_12>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt or ns.last -%}
{{- '<SPECIAL_11>Assistant\\n' + ('<think>\\n' if ns.thinks else '<think></think>') + ns.last -}}
{%- if not add_generation_prompt -%}{{- '\\n<SPECIAL_12>\\n' -}}{%- endif -%}
{%- endif -%}
"""

# Knows reasoning_content and enable_thinking, closes the thought in a turn that has none, and drops those before the
# last question.
NEMOTRON_3 = """\
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- set drops = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{- '<|im_start|>system\\n<tools>' -}}
{%- for tool in tools -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{{- '\\n<function>' + f.name + '</function>' -}}
{%- endfor -%}{{- '\\n</tools><|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.reasoning_content -%}
{%- set content = '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n' ~ (m.content | default('', true)) -%}
{%- elif '<think>' in m.content or '</think>' in m.content -%}{%- set content = m.content -%}
{%- else -%}{%- set content = '<think></think>' ~ m.content -%}{%- endif -%}
{%- if drops and loop.index0 < ns.last and '</think>' in content -%}
{%- set content = '<think></think>' ~ content.split('</think>')[-1].strip() -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' ~ content.strip() -}}
{%- for call in m.tool_calls or [] -%}
{{- '\\n<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' -}}
{%- for key, value in call.function.arguments | items -%}
{{- '<parameter=' ~ key ~ '>\\n' ~ (value if value is string else value | tojson) ~ '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if thinks else '<think></think>') -}}
{%- endif -%}
"""

# Opens no thought; writes one, be it empty, in the turns after the last question, and drops it in those before.
QWEN_3 = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set content = m.content -%}{%- set reasoning = '' -%}
{%- if m.reasoning_content is string -%}{%- set reasoning = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last -%}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""

# Opens a thought when it asks, and drops it wherever it stands.
DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}
{%- else -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1] -}}
{%- for call in m.tool_calls or [] -%}
{{- '<|call|>' + call.function.name + '\\n' + call.function.arguments + '<|/call|>' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}
"""

# Writes what it is given and asks for nothing: the model writes its own header.
BARE = "{%- for m in messages -%}{{- '<turn>' + m.role + '\\n' + m.content + '<end>' -}}{%- endfor -%}"

# No special token at all.
WORDS = """\
{%- for m in messages -%}{{- m.role.upper() + ': ' + m.content + '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT: ' -}}{%- endif -%}
"""

_IM = ("<|im_start|>", "<|im_end|>")
_NANO = ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")
# Each with its special tokens, the last of which is eos.
TEMPLATES = {
    "ours": (CHAT_TEMPLATE, ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "</s>")),
    "chatml": (CHATML, _IM),
    "hermes": (HERMES, ("<tool_call>", "</tool_call>", *_IM)),
    "llama": (LLAMA, ("<s>", "<|head|>", "<|/head|>", "<|eot|>")),
    "nano2": (NANO_2, ("<AVAILABLE_TOOLS>", "</AVAILABLE_TOOLS>", "<TOOLCALL>", "</TOOLCALL>", *_NANO)),
    "nemotron3": (NEMOTRON_3, ("<think>", "</think>", *_IM)),
    "qwen3": (QWEN_3, _IM),
    "r1": (DEEPSEEK_R1, ("<s>", "<|User|>", "<|Assistant|>", "<|call|>", "<|/call|>", "<|end|>")),
    "bare": (BARE, ("<turn>", "<end>")),
    "words": (WORDS, ("</s>",)),
}
NEWLINES = ("\u010a", "\u010a")  # as byte-level BPE spells "\n", twice


def write_tokenizer(directory: Path, name: str, eos: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with one merge, of two newlines, and the template of that name, saved to `directory`."""
    template, special = TEMPLATES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, "".join(NEWLINES)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[NEWLINES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos or special[-1],
        bos_token="<s>" if "<s>" in special else None,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer
