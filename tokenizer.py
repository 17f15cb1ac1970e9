"""Text <-> token ids, chat templates, stop ids and incremental decoding for a checkpoint folder.

The ids are those of transformers' AutoTokenizer. Text comes back through bytes: a token stands for the same bytes
wherever it is, so a stream remembers nothing but the unfinished UTF-8 character at its end.

    python -c "from tokenizer import Tokenizer; print(Tokenizer('checkpoints/ORG/NAME').encode('Hello'))"
"""
import codecs
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import decoders

from formats.tokenizer_files import BYTE_OF, clear_error, load_bpe, load_template, read_json


class Tokenizer:
    """The tokenizer of a checkpoint folder; ValueError or OSError names the file that is missing or broken.

    vocab_size: largest id + 1. stop_ids: every id that a file calls eos, and the added token that the chat template
    writes right after an assistant's text (<|eot_id|>, <|im_end|>).
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        model, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        self.bpe, config = load_bpe(folder, model)
        self.named = {key: name for key, name in config.items() if key.endswith("_token") and isinstance(name, str)}
        self.template = load_template(folder, config.get("chat_template"))
        self.has_chat_template = self.template is not None
        self.added = self.bpe.get_added_tokens_decoder()
        self.vocab_size = 1 + max(self.bpe.get_vocab().values())
        bos, eos = (self.bpe.token_to_id(self.named.get(key, "")) for key in ("bos_token", "eos_token"))
        self.bos_id: int | None = model.get("bos_token_id") if bos is None else bos
        stops = [eos, self.end_of_turn()]
        for ids in (model.get("eos_token_id"), generation.get("eos_token_id")):
            stops += ids if isinstance(ids, list) else [ids]
        stops = [i for i in stops if i is not None]
        if not all(isinstance(i, int) and abs(i) < 2**31 for i in stops):
            raise ValueError(f"{folder}: eos_token_id in config.json and generation_config.json must be ids")
        self.stop_ids = frozenset(stops)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of text, with bos and eos as the files say; a special token typed in the text becomes its id."""
        try:
            return self.bpe.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise ValueError("the text is not valid UTF-8: it has a lone surrogate") from error

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer starts; ValueError if the template refuses it."""
        return self.encode(self.render(messages), add_special_tokens=False)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; ValueError if there is no chat template, or if it refuses or fails."""
        if self.template is None:
            raise ValueError("no chat template in chat_template.jinja or tokenizer_config.json: give a raw prompt")
        values = {**self.named, "messages": messages, "tools": None, "documents": None}
        text, size = [], 0
        with clear_error("the chat template failed"):
            for piece in self.template.generate(values, add_generation_prompt=add_generation_prompt):
                text.append(piece)
                size += len(piece)
                if size > 10**7:
                    raise ValueError("it writes more than any model can read")
        return "".join(text)

    def end_of_turn(self) -> int | None:
        """The added token that the chat template writes right after an assistant's text, if it does."""
        try:
            text = self.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Answer"}], False)
        except ValueError:
            return None
        after = self.encode(text.partition("Answer")[2].strip(), add_special_tokens=False)
        return after[0] if after and after[0] in self.added else None

    def stream(self, stops: Sequence[str] = ()) -> "TextStream":
        return StoppingStream(self, stops) if stops else TextStream(self)

    def decode(self, ids: list[int], stops: Sequence[str] = ()) -> str:
        """Text of ids, without special tokens, up to the first of `stops`; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(stops)
        return stream.push(ids) + stream.flush()

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for a special token and for an id without a token."""
        token = self.bpe.id_to_token(i)
        if token is None or (i in self.added and self.added[i].special):
            return b""
        if isinstance(self.bpe.decoder, decoders.ByteLevel):  # outside the alphabet: an added token, in plain text
            return bytes(map(BYTE_OF.get, token)) if BYTE_OF.keys() >= set(token) else token.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


class TextStream:
    """Incremental decoding: push() gives the text that no later id can change, flush() the rest; together decode().

    A broken UTF-8 sequence becomes U+FFFD as soon as it is known to be broken, as each format does it: byte-level BPE
    writes one for the sequence, sentencepiece one for each byte. (With sentencepiece, transformers gives up a whole run
    of byte tokens for one stray byte in it, so no character in the run is sure before its end; sentencepiece does not.)
    """

    stopped, held = False, ""  # whether the text has ended, and characters that may yet be a stop: see StoppingStream

    def __init__(self, tokenizer: Tokenizer):
        self.token_bytes, decoder = tokenizer.token_bytes, tokenizer.bpe.decoder
        self.strip = b"Strip" in decoder.__getstate__()  # the space that sentencepiece puts before a text
        errors = "replace" if isinstance(decoder, decoders.ByteLevel) else "surrogateescape"
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, ids: list[int], final: bool = False) -> str:
        text = self.utf8.decode(b"".join(map(self.token_bytes, ids)), final)
        if text and self.strip:
            text, self.strip = text.removeprefix(" "), False
        return re.sub("[\udc80-\udcff]", "\ufffd", text)

    def flush(self) -> str:
        return self.push([], final=True)


class StoppingStream(TextStream):
    """Text that ends before the first of `stops`: of several, that which is complete first, and if two are, the longer
    one. What may yet become one of them is held back. Goes token by token, so that text and `tokens`, the number of ids
    up to where a stop is complete, do not depend on how many are pushed at once."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        super().__init__(tokenizer)
        self.stops, self.held, self.tokens = stops, "", 0

    def push(self, ids: list[int], final: bool = False) -> str:
        shown = ""
        for new in [[i] for i in ids] + [[]] * final:
            if self.stopped:
                break
            self.held += super().push(new, final and not new)
            self.tokens += len(new)
            found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
            self.stopped = bool(found)
            sure = min(found)[1] if found else len(self.held) if final and not new else self.sure()
            shown, self.held = shown + self.held[:sure], self.held[sure:]
        return shown

    def sure(self) -> int:
        """How many of the characters held cannot be the beginning of a stop."""
        begun = [n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])]
        return len(self.held) - max(begun, default=0)
