"""Run by a Python with transformers 4: prints, as JSON, what a checkpoint's tokenizer makes of texts and of chats."""

import json
import sys

import transformers
from transformers import AutoTokenizer


def main() -> None:
    asked = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    found = {
        "version": transformers.__version__,
        "texts": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "chats": [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in asked["chats"]],
        "batch": tokenizer(asked["texts"], padding=True)["input_ids"],
        "special": tokenizer.all_special_tokens,
        "longest": tokenizer.model_max_length,
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
