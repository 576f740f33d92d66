"""Run by a Python with OpenAI's own client: prints, as JSON, what an endpoint answers to a stock use of it."""

import json
import sys

from openai import NotFoundError, OpenAI

CHAT = [{"role": "user", "content": "What is 3 + 4?"}]


def main() -> None:
    client = OpenAI(base_url=sys.argv[1], api_key="none")
    greedy = {"messages": CHAT, "temperature": 0.0, "max_tokens": 16}
    chatted = client.chat.completions.create(model="tiny-s", **greedy)
    streamed = list(client.chat.completions.create(model="tiny-s", stream=True, **greedy))
    pair = {**greedy, "model": "tiny?think=s&answer=l&thought_tokens=5"}
    composed = client.chat.completions.create(**pair)
    pieces = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **pair)]
    try:
        client.chat.completions.create(model="tiny-x", messages=CHAT)
        raise AssertionError("a model that is not there has answered")
    except NotFoundError as error:
        refused = error.body["message"]
    found = {
        "models": [model.id for model in client.models.list()],
        "chat": chatted.choices[0].message.content,
        "pieces": [chunk.choices[0].delta.content or "" for chunk in streamed],
        "thought": composed.choices[0].message.reasoning_content,
        "answer": composed.choices[0].message.content,
        "tokens": composed.usage.completion_tokens,
        "thought streamed": "".join(getattr(piece, "reasoning_content", "") for piece in pieces),
        "answer streamed": "".join(piece.content or "" for piece in pieces),
        "refused": refused,
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
