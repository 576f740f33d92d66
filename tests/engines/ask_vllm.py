"""Run by vLLM's own Python: loads one checkpoint after another and prints, as JSON by name, what vLLM makes of it.

stdin has `models` (directories by name), `prompts` (token ids), `chats` and `new_tokens`. Of each model, `scores` are
log-probabilities (prompt, position, token), each row of the token after that position; `answers` are token ids. With
`lends_experts` the models have experts that this vLLM does not run on a CPU: vllm_experts.py does. puzzle_config.py
reads the form of config.json that vLLM has no class for.
"""

import contextlib
import json
import sys

from puzzle_config import NemotronHPuzzleConfig
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm_experts import lend_experts


def main() -> None:
    asked = json.load(sys.stdin)
    AutoConfig.register(NemotronHPuzzleConfig.model_type, NemotronHPuzzleConfig)
    with contextlib.redirect_stdout(sys.stderr):  # vLLM's log
        refusals = lend_experts() if asked["lends_experts"] else None
        found = {name: ask(model, asked) for name, model in asked["models"].items()}
        assert refusals != [], "this vLLM runs such experts by itself: lend it none"
    json.dump(found, sys.stdout)


def ask(model: str, asked: dict) -> dict:
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,  # 0.32 on a CPU fails with it on prompts longer than a chunk of the scan
        max_model_len=512,
        max_num_seqs=4,
        max_logprobs=-1,
    )
    every = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, prompt_logprobs=-1)
    scored = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], every, use_tqdm=False)
    greedy = SamplingParams(temperature=0.0, max_tokens=asked["new_tokens"])
    answered = engine.chat(asked["chats"], greedy, use_tqdm=False)
    found = {
        "scores": [[row(after) for after in (*of.prompt_logprobs[1:], of.outputs[0].logprobs[0])] for of in scored],
        "answers": [list(of.outputs[0].token_ids) for of in answered],
    }
    del engine
    cleanup_dist_env_and_memory()
    return found


def row(after: dict) -> list[float]:
    return [after[token].logprob for token in range(len(after))]


if __name__ == "__main__":
    main()
