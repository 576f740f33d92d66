"""A chat as the texts that a model reads and writes, by its tokenizer's chat template.

A turn of the assistant is rendered as it came about. The model read the template's generation prompt of the messages
before the turn; then it wrote a thought, an answer, tool calls, and the token that ends a turn. Where each prompt goes
on from the turns before it, the chat is one text. Where a template drops earlier thoughts, a later prompt does not:
the chat becomes several texts, each of which ends in a turn, and of each after the first only what follows the turn
before is learned, because the rest is in the texts before it, thoughts and all.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from tasks.corpus.chats import (
    ASSISTANT,
    CLOSE,
    OPEN,
    REASONING,
    TEMPLATE_ARGUMENTS,
    THINKING,
    Chat,
    Row,
    Unusable,
    functions,
    strings,
)
from tasks.corpus.template import NO_THINK, PRIVATE, Template, taken
from tasks.corpus.turns import (
    Turn,
    after_last_turn,
    calls_survive,
    closes_thought,
    fault_of,
    opens_thought,
    stands,
    without_thought,
)


@dataclass(frozen=True, slots=True)
class Text:
    """A rendered chat, or a part of one, with the spans that the model writes.

    What stands before the character `new` is in an earlier text of the chat, too. `characters`: no special token in it
    is one. `marker` stands after the first character of those that are none, where others are. `unthought` turns have
    no thought, were not said to have none, and are rendered with thinking turned off.
    """

    text: str
    written: tuple[tuple[int, int], ...] = ()
    new: int = 0
    marker: str = ""
    characters: bool = False
    unthought: int = 0

    def pieces(self, learn_all: bool) -> list[tuple[str, bool]]:
        """The text cut where the model begins and ends to write, as it meets it, and whether each piece is learned."""
        pieces, position = [(self.text[: self.new], False)], self.new
        for start, end in self.written:
            pieces += [(self.text[position:start], learn_all), (self.text[start:end], True)]
            position = end
        pieces.append((self.text[position:], learn_all))
        return [(piece, learned) for piece, learned in pieces if piece]


def render_chat(
    chat: Chat,
    template: Template,
    where: str,
    *,
    arguments: Mapping[str, Any],
    special_tokens: bool = False,
) -> list[Text]:
    """The texts of a chat. Unusable, with its place, where one of its texts, thoughts, calls or tools is lost.

    `arguments` are the template's, over which the row's own go. Unless `special_tokens`, a special token that the chat
    spells is marked, so that it can be told from the template's own.
    """
    rendering = _Rendering(chat, template, where, arguments, special_tokens)
    return rendering.in_one_go() or rendering.turn_by_turn()


def render_prompt(chat: Chat, template: Template, where: str, *, arguments: Mapping[str, Any]) -> Text:
    """What the model reads when it is to answer the chat."""
    rendering = _Rendering(chat, template, where, arguments, special_tokens=False)
    return rendering.prompt()


class _Rendering:
    """One chat on its way through the template."""

    def __init__(
        self, chat: Chat, template: Template, where: str, arguments: Mapping[str, Any], special_tokens: bool
    ) -> None:
        if not template.exists:
            raise Unusable(f"{where} holds messages but the tokenizer has no chat template; add one to it")
        self._template, self._where = template, where
        self._arguments = {**arguments, **chat.arguments}
        if given := taken() & self._arguments.keys():
            raise Unusable(f"{where}: {TEMPLATE_ARGUMENTS} gives {min(given)!r}, which is no template's own; remove it")
        self._marker = ""
        self._added = self._unthought = 0
        self._messages, self._tools = chat.messages, chat.tools
        self._turns = {i: self._parse(i, m) for i, m in enumerate(chat.messages) if m["role"] == ASSISTANT}
        self._said = "\0".join(strings([chat.messages, chat.tools]))
        if not special_tokens and template.special.search(self._said):
            self._mark()
        if self._arguments.get(THINKING) is False:
            self._switch_off()

    @cached_property
    def _private(self) -> list[str]:
        """Three characters that the chat does not hold."""
        held = set(self._said)
        return list(islice((character for character in map(chr, PRIVATE) if character not in held), 3))

    # --- the three ways to render ---

    def in_one_go(self) -> list[Text] | None:
        """The text of a chat without thoughts, calls and tools by a template without thoughts; None for any other."""
        frame = None if self._template.thinks else self._template.frame(json.dumps(self._arguments, default=str))
        if frame is None or self._tools or self._messages[-1]["role"] != ASSISTANT:
            return None
        if any(turn.thought or turn.calls for turn in self._turns.values()):
            return None
        before, after = frame
        text, position, written = self._render(self._messages, self._arguments, False), 0, []
        for message in self._messages:
            content = message.get("content")
            if not isinstance(content, str):
                return None
            answers = message["role"] == ASSISTANT
            sought = before + content + after if answers else content.strip()
            found = text.find(sought, position)
            if found < 0:
                return None
            position = found + len(sought)
            if answers:
                start = found + len(before)
                written.append((start, start + self._template.written_end(text[start:position])))
        return [Text(text, tuple(written), marker=self._marker)]

    def turn_by_turn(self) -> list[Text]:
        """The texts of any chat: every turn of the assistant as what it read and what it wrote."""
        texts: list[Text] = []
        read, before = list(self._messages), 0
        for i, turn in self._turns.items():
            prompt, completion, read[i] = self._turn(read[:i], turn)
            start = len(prompt)
            span = (start, start + self._template.written_end(completion))
            if texts and prompt.startswith(texts[-1].text):
                last = texts.pop()
                texts.append(replace(last, text=prompt + completion, written=(*last.written, span)))
            else:
                new = self._since(before, read[:i], prompt, texts[-1].text) if texts else 0
                texts.append(Text(prompt + completion, (span,), new, self._marker))
            before = i
        texts = self._ended(texts, read)
        return [replace(texts[0], unthought=self._unthought), *texts[1:]]

    def prompt(self) -> Text:
        """The generation prompt of the next turn."""
        prompt, lost = self._prompt(self._messages, self._arguments)
        if prompt is None:
            raise self._unusable(lost)
        return Text(prompt, marker=self._marker)

    def _since(self, place: int, before: list[Row], prompt: str, told: str) -> int:
        """Where a prompt goes on from the turn at `place`, after the token that ended the text of that turn, `told`.

        At the prompt's end where that cannot be told: then nothing of it is learned anew.
        """
        probe = {key: value for key, value in before[place].items() if key != REASONING} | {"content": self._private[0]}
        probed = self._render([*before[:place], probe, *before[place + 1 :]], self._arguments, False)
        after, end = probed.partition(self._private[0])[2], self._template.last_special(told)
        if end is None or end not in after or (start := prompt.rfind(after)) < 0:
            return len(prompt)
        return start + after.index(end) + len(end)

    # --- one turn ---

    def _turn(self, before: list[Row], turn: Turn) -> tuple[str, str, Row]:
        """What the model read, what it wrote, and the message in the form that the template renders so."""
        faults: list[str] = []
        for arguments in self._modes(turn):
            prompt, lost = self._prompt(before, arguments, after_last_turn(before))
            for form in turn.forms() if prompt is not None else []:
                try:
                    whole = self._render([*before, form], arguments, False)
                except Unusable as fault:
                    faults.append(str(fault))
                    continue
                fault_of_form = fault_of(prompt or "", whole, turn, form)
                if fault_of_form is None:
                    self._unthought += arguments is not self._arguments
                    return prompt or "", whole[len(prompt or "") :], form
            composed = self._composed(prompt, before, turn, arguments)
            if not isinstance(composed, str):
                self._unthought += arguments is not self._arguments
                return composed
            faults.append(self._line(len(before), lost or composed))
        raise Unusable(faults[0])

    def _modes(self, turn: Turn) -> list[Mapping[str, Any]]:
        """The template arguments to try: a turn without a thought is first asked for with thinking turned off."""
        if THINKING in self._arguments or turn.thought or THINKING not in self._template.source:
            return [self._arguments]
        return [{**self._arguments, THINKING: False}, self._arguments]

    def _prompt(self, before: list[Row], arguments: Mapping[str, Any], since: int = 0) -> tuple[str | None, str]:
        """The generation prompt after some messages; None, and what is lost, where it does not hold what they say."""
        prompt = self._render(before, arguments, True)
        lost = self._lost(before, prompt, arguments, since)
        return (None, lost) if lost else (prompt, "")

    def _composed(
        self, prompt: str | None, before: list[Row], turn: Turn, arguments: Mapping[str, Any]
    ) -> tuple[str, str, Row] | str:
        """Prompt, completion and form, put together of prompt, thought, answer and ending; or what is wrong.

        For templates that leave out the thought of the last turn too, or open one and expect the content to go on.
        """
        form, header, ending = self._around(before, turn, arguments)
        if ending is None:
            return "the chat template loses its tool calls" if turn.calls else "the chat template does not render it"
        if prompt is None:
            prompt = header
            if lost := self._lost(before, prompt, arguments, after_last_turn(before)):
                return lost
        elif without_thought(header) != without_thought(prompt):
            return "the chat template renders it otherwise than it asks for it"
        if closes_thought(prompt) and turn.thought:
            return "it holds a thought, but the chat template closes the thought before it; say `reasoning: on`"
        opened = opens_thought(prompt)
        if opened and not turn.thought and self._arguments.get(THINKING) is not False:
            return (
                "it has no thought, but the chat template opens one; add it as reasoning_content, or say "
                "`reasoning: off` in the row, or chat_template_kwargs: {enable_thinking: false} in the source"
            )
        said = turn.said_after(opened)
        if turn.calls and not turn.answer.strip():
            said = said.rstrip()
            ending = ending if said else ending.lstrip()
        return prompt, said + ending, form

    def _around(self, before: list[Row], turn: Turn, arguments: Mapping[str, Any]) -> tuple[Row, str, str | None]:
        """A form of the message, and what the template writes before and after its answer, its calls included."""
        answer = self._private[0]
        fault: Unusable | None = None
        for form in turn.forms():
            calling = {**{key: value for key, value in form.items() if key != REASONING}, "content": answer}
            try:
                header, found, ending = self._render([*before, calling], arguments, False).partition(answer)
            except Unusable as error:
                fault = error
                continue
            if not found or answer in ending:
                return form, header, None
            if turn.calls and not calls_survive(turn.calls, ending):
                return form, header, self._ending_with_calls(before, calling, arguments, ending)
            return form, header, ending
        assert fault is not None, "a turn has at least one form"
        raise fault

    def _ending_with_calls(
        self, before: list[Row], calling: Row, arguments: Mapping[str, Any], ending: str
    ) -> str | None:
        """What follows the answer where the template renders calls only if another message follows.

        That message is then taken off again: it is what follows the `ending` of a turn without calls.
        """
        answer, question = self._private[:2]
        reply = {"role": "user", "content": question}
        plain = {"role": ASSISTANT, "content": answer}
        _, _, replied = self._render([*before, plain, reply], arguments, False).partition(answer)
        _, _, called = self._render([*before, calling, reply], arguments, False).partition(answer)
        rest = replied.removeprefix(ending)
        if not rest or not called.endswith(rest):
            return None
        called = called.removesuffix(rest)
        complete = calls_survive(functions(calling["tool_calls"]), called) and question not in called
        return called if complete else None

    # --- the rest ---

    def _ended(self, texts: list[Text], read: list[Row]) -> list[Text]:
        """The texts with what follows the last turn of the assistant."""
        if texts and self._messages[-1]["role"] == ASSISTANT:
            return texts
        whole = self._render(read, self._arguments, False)
        if lost := self._lost(read, whole, self._arguments, after_last_turn(read)):
            raise self._unusable(lost)
        if not texts:
            return [Text(whole, marker=self._marker)]
        last = texts.pop()
        if not whole.startswith(last.text):
            raise self._unusable(
                f"it ends in a message of {read[-1]['role']}, with which the chat template drops the thought before; "
                "remove that message"
            )
        return [*texts, replace(last, text=whole)]

    def _lost(self, messages: list[Row], text: str, arguments: Mapping[str, Any], since: int = 0) -> str:
        """What of the messages from `since` on, and of the tools, does not stand in a text; "" where all does.

        The assistant's own turns are checked when they are rendered.
        """
        for place, message in enumerate(messages[since:], since):
            content = message.get("content")
            if message["role"] == ASSISTANT or not isinstance(content, str) or stands(content, text):
                continue
            if not self._reaches(place, messages, arguments):
                return f"the chat template loses message {place + 1 - self._added} ({message['role']})"
        for function in functions(self._tools) if since == 0 else []:
            if function["name"] not in text or repr(function) in text:
                return f"the chat template does not render the tool {function['name']!r}; use one that knows tools"
        return ""

    def _reaches(self, place: int, messages: list[Row], arguments: Mapping[str, Any]) -> bool:
        """Whether a template that changes a content renders that message at all."""
        probe = self._private[0]
        probed = [*messages[:place], {**messages[place], "content": probe}, *messages[place + 1 :]]
        return probe in self._render(probed, arguments, True)

    def _render(self, messages: Sequence[Row], arguments: Mapping[str, Any], prompt: bool) -> str:
        try:
            return self._template.render(messages, self._tools, arguments, prompt)
        except Exception as error:
            cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise Unusable(f"{self._where}: the chat template refuses it ({cause}); mend it") from error

    def _parse(self, place: int, message: Row) -> Turn:
        content, thought = message.get("content", ""), message.get(REASONING, "")
        if not isinstance(content, str):
            raise Unusable(self._line(place, "its content is not text; mend or remove it"))
        opened, closed = content.lstrip().startswith(OPEN), CLOSE in content
        # A content that goes on from an opened thought has its end alone; one that speaks of the marks has both inside.
        ended = opened or (content.count(CLOSE) == 1 and OPEN not in content)
        if not self._template.thinks and not thought and not opened:
            return Turn(message, "", content, "")
        if thought and opened:
            raise Unusable(self._line(place, "it has a thought in its content and one beside it; keep one"))
        if opened and not closed:
            raise Unusable(self._line(place, f"its thought has no {CLOSE}; mend or remove it"))
        if thought or not ended:
            return Turn(message, thought, content, "")
        inside, _, answer = content.partition(CLOSE)
        inside = inside.lstrip().removeprefix(OPEN)
        if not inside.strip():
            return Turn(message, "", answer.lstrip(), "")
        return Turn(message, inside, answer, f"{OPEN}{inside}{CLOSE}{answer}")

    def _mark(self) -> None:
        """Break the spelling of every special token in what the chat says, but not the marks of its thoughts."""
        marker = self._private[2]

        def guard(text: str) -> str:
            return self._template.special.sub(lambda m: m[0][0] + marker + m[0][1:], text)

        def guarded(turn: Turn) -> Turn:
            thought, answer = guard(turn.thought), guard(turn.answer)
            inline = f"{OPEN}{thought}{CLOSE}{answer}" if turn.inline else ""
            message = {**_mapped(guard, turn.message), "role": turn.message["role"]}
            return Turn(message, thought, answer, inline)

        self._marker = marker
        self._turns = {i: guarded(turn) for i, turn in self._turns.items()}
        self._tools = [_mapped(guard, tool) for tool in self._tools]
        self._messages = [
            self._turns[i].message if i in self._turns else {**_mapped(guard, message), "role": message["role"]}
            for i, message in enumerate(self._messages)
        ]

    def _switch_off(self) -> None:
        """Say /no_think where the template is told so by a word in the messages."""
        said = any(NO_THINK in text for message in self._messages for text in strings(message.get("content")))
        if said or not self._template.takes_no_switch(json.dumps(self._arguments, default=str)):
            return
        first = self._messages[0]
        if first["role"] == "system":
            self._messages = [
                {**first, "content": f"{first.get('content', '')} {NO_THINK}".strip()},
                *self._messages[1:],
            ]
        else:
            self._messages = [{"role": "system", "content": NO_THINK}, *self._messages]
            self._turns = {i + 1: turn for i, turn in self._turns.items()}
            self._added = 1

    def _unusable(self, fault: str) -> Unusable:
        return Unusable(f"{self._where}: {fault}")

    def _line(self, place: int, fault: str) -> str:
        return f"{self._where}: message {place + 1 - self._added} ({ASSISTANT}): {fault}"


def _mapped(change: Callable[[str], str], value: Any) -> Any:
    """A value with every text in it changed, keys left as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(change, inner) for key, inner in value.items()}
    return [_mapped(change, inner) for inner in value] if isinstance(value, list) else value
