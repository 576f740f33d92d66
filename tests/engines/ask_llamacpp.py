"""Run by llama.cpp's own Python: loads one GGUF file after another and prints what `ask_vllm` prints of checkpoints.

`scores` have the last position of each prompt alone, the one that llama.cpp's server gives.
"""

import contextlib
import json
import sys

from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type


def main() -> None:
    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        found = {name: ask(model, asked) for name, model in asked["models"].items()}
    json.dump(found, sys.stdout)


def ask(model: str, asked: dict) -> dict:
    settings = CommonParams()
    settings.model.path = model
    settings.n_ctx = 512
    settings.n_parallel = 1
    settings.cache_type_k = settings.cache_type_v = ggml_type.GGML_TYPE_F32  # float16 unless told, and its flash
    settings.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # attention rounds to it too
    settings.cpuparams.n_threads = 1
    server = Server(settings)
    every = {"n_predict": 1, "n_probs": asked["vocab_size"], "temperature": 0.0, "cache_prompt": False}
    scored = [server.handle_completions({"prompt": ids, **every}) for ids in asked["prompts"]]
    greedy = {"max_tokens": asked["new_tokens"], "temperature": 0.0, "logprobs": True, "top_logprobs": 1}
    answered = [server.handle_chat_completions({"messages": chat, **greedy}) for chat in asked["chats"]]
    return {
        "scores": [[row(tokens(of)[0]["top_logprobs"])] for of in scored],
        "answers": [[token["id"] for token in tokens(of)] for of in answered],
    }


def tokens(answer: dict) -> list[dict]:
    (choice,) = answer["choices"]
    return choice["logprobs"]["content"]


def row(alternatives: list[dict]) -> list[float]:
    by_id = {token["id"]: token["logprob"] for token in alternatives}
    return [by_id[token] for token in range(len(by_id))]


if __name__ == "__main__":
    main()
