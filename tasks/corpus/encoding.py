"""Documents as token ids: what a document says is characters, what its chat template adds are special tokens."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from elastic_core.recipe import DataSource
from tasks.corpus.chats import Chat, Unusable
from tasks.corpus.documents import Document, Empty, Tally
from tasks.corpus.rendering import Text, render_chat
from tasks.corpus.template import Template
from tasks.corpus.token_file import Sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# The tokenizer's threads are all at work on two batches: one alone ends with a long document on one of them.
AHEAD = 2
BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 2_000_000
MOST_CHARACTERS = 2 * AHEAD * BATCH_CHARACTERS  # at once; a longer document is alone

# A document with its texts, what is wrong with a row, or what ends the reading.
Rendered = tuple[Document, list[Text]] | Exception


class Encoder:
    """A tokenizer that encodes documents, a batch at a time.

    `ends` are the tokens after which a document needs no eos, because they end a text already.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", ends: Collection[int]) -> None:
        self.template = Template(tokenizer)
        self._tokenizer = tokenizer
        self._eos = int(tokenizer.eos_token_id)
        self._ends = {self._eos, *ends}
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False

    def samples(
        self, found: Iterable[Document | Unusable], source: DataSource, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        """Up to `max_documents` documents as what is trained on; `tally` counts the rows between them, in their order.

        A document is one sample; a chat whose earlier thoughts are dropped is several.
        """
        for batch, encoded in self._encoded(_batches(self._rendered(found, source)), source):
            for one in batch:
                if isinstance(one, Unusable):
                    tally.add(one)
                elif isinstance(one, Exception):
                    raise one
                else:
                    document, texts = one
                    tally.unthought += texts[0].unthought
                    yield document, [next(encoded) for _ in texts]

    def encode(self, pieces: Sequence[tuple[str, Text]]) -> list[list[int]]:
        """The ids of pieces of texts, each encoded by itself."""
        parts = [self._parts(piece, text) for piece, text in pieces]
        ids = {
            as_characters: self._ids(
                [part for of_piece in parts for part, kind in of_piece if kind == as_characters], as_characters
            )
            for as_characters in (True, False)
        }
        return [list(chain.from_iterable(next(ids[kind]) for _, kind in of_piece)) for of_piece in parts]

    def _encoded(
        self, batches: Iterable[list[Rendered]], source: DataSource
    ) -> Iterator[tuple[list[Rendered], Iterator[Sample]]]:
        """Each batch with the samples of its texts, while those after it are being encoded."""
        threads, waiting = ThreadPoolExecutor(AHEAD), deque[tuple[list[Rendered], Future[list[Sample]]]]()
        try:
            for batch in batches:
                waiting.append((batch, threads.submit(self._batch, batch, source)))
                while len(waiting) > AHEAD or sum(_characters(each) for each, _ in waiting) > MOST_CHARACTERS:
                    first, samples = waiting.popleft()
                    yield first, iter(samples.result())
            for rest, samples in waiting:
                yield rest, iter(samples.result())
        finally:
            threads.shutdown(cancel_futures=True)

    def _batch(self, batch: list[Rendered], source: DataSource) -> list[Sample]:
        """The samples of a batch's texts, encoded together."""
        texts = _texts_of(batch)
        cut = [(text, self._pieces(text, source)) for text in texts]
        encoded = iter(self.encode([(piece, text) for text, pieces in cut for piece, _ in pieces]))
        return [self._sample(text, pieces, encoded) for text, pieces in cut]

    def _pieces(self, text: Text, source: DataSource) -> list[tuple[str, bool]]:
        """The pieces of a text to be encoded by themselves, each learned or not. After a special token is no cut."""
        pieces: list[tuple[str, bool]] = []
        for piece, learned in text.pieces(source.train_on == "all"):
            if pieces and pieces[-1][1] == learned and self.template.special_end(pieces[-1][0]) is not None:
                pieces[-1] = pieces[-1][0] + piece, learned
            else:
                pieces.append((piece, learned))
        return pieces

    def _parts(self, piece: str, text: Text) -> list[tuple[str, bool]]:
        """The piece, or what stands between the template's special tokens and these; and whether it is characters."""
        if not text.marker or text.marker not in piece:
            return [(piece, text.characters)]
        parts, position = [], 0
        for found in self.template.special.finditer(piece):
            parts += [(piece[position : found.start()], True), (found[0], False)]
            position = found.end()
        parts.append((piece[position:], True))
        return [(part.replace(text.marker, ""), characters) for part, characters in parts if part]

    def _ids(self, texts: list[str], as_characters: bool) -> Iterator[list[int]]:
        backend = self._of_characters if as_characters else self._backend
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    @cached_property
    def _of_characters(self) -> "Tokenizer":
        """The tokenizer that knows no special tokens. Another one: none can be changed while a thread encodes."""
        backend = deepcopy(self._backend)
        backend.encode_special_tokens = True
        return backend

    def _sample(self, text: Text, pieces: list[tuple[str, bool]], encoded: Iterator[list[int]]) -> Sample:
        """The pieces of one text joined, with an eos where the text does not end in a token that ends it."""
        ids, mask = [], bytearray()
        learned = True
        for _, learned in pieces:
            of_piece = next(encoded)
            ids += of_piece
            mask += bytes([learned]) * len(of_piece)
        if not self._ends_itself(text):
            ids.append(self._eos)
            mask.append(learned)
        return Sample(ids, bytes(mask) if 0 in mask else None)

    def _ends_itself(self, text: Text) -> bool:
        if text.characters:
            return False
        last = self.template.last_special(text.text)
        return last is not None and self._tokenizer.convert_tokens_to_ids(last) in self._ends

    def _rendered(self, found: Iterable[Document | Unusable], source: DataSource) -> Iterator[Rendered]:
        """Documents, faults and a last error in the order of reading, up to where `samples` is sure to end."""
        documents = faults = 0
        try:
            for one in found:
                rendered = one if isinstance(one, Unusable) else self._rendered_one(one, source)
                yield rendered
                documents += not isinstance(rendered, Unusable)
                faults += isinstance(rendered, Unusable) and not isinstance(rendered, Empty)
                if documents == source.max_documents or faults > source.max_skipped:
                    return
        except Exception as error:  # noqa: BLE001 - whoever takes the documents raises it
            yield error

    def _rendered_one(self, document: Document, source: DataSource) -> Rendered:
        try:
            return document, self._texts(document, source)
        except Unusable as fault:
            return Unusable(str(fault))  # without its traceback, which holds the chat

    def _texts(self, document: Document, source: DataSource) -> list[Text]:
        as_tokens = source.special_tokens == "tokens"
        if not isinstance(document.content, Chat):
            return [Text(document.content, ((0, len(document.content)),), characters=not as_tokens)]
        texts = render_chat(
            document.content,
            self.template,
            document.where,
            arguments=source.chat_template_kwargs,
            special_tokens=as_tokens,
        )
        if source.train_on == "assistant" and not texts[0].written:
            raise Unusable(f"{document.where} holds no message of the assistant, of which train_on: assistant learns")
        return texts


def _batches(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    characters = 0
    for one in rendered:
        batch.append(one)
        characters += _characters([one])
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts_of(batch: Iterable[Rendered]) -> list[Text]:
    return [text for one in batch if not isinstance(one, Exception) for text in one[1]]


def _characters(batch: Iterable[Rendered]) -> int:
    return sum(len(text.text) for text in _texts_of(batch))
