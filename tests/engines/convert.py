"""Run by llama.cpp's own Python: writes checkpoints as GGUF in float32, by llama.cpp's converter.

The converter knows a pre-tokenizer by a hash of what the whole vocabulary makes of a text, and so knows no vocabulary
that a recipe trained. Ours splits as SmolLM's does: single digits, then GPT-2's expression.
"""

import contextlib
import json
import sys


def main() -> None:
    asked = json.load(sys.stdin)
    sys.path[:0] = [asked["converter"], f"{asked['converter']}/gguf-py"]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    with contextlib.redirect_stdout(sys.stderr):
        for model in asked["models"]:
            sys.argv = ["convert", model["from"], "--outtype", "f32", "--outfile", model["to"]]
            convert_hf_to_gguf.main()
    json.dump({}, sys.stdout)


if __name__ == "__main__":
    main()
