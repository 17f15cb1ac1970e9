"""Text <-> token ids, chat templates, stop ids, and decoding as tokens come, for a checkpoint folder.

The ids are those of transformers' AutoTokenizer. Text is decoded through bytes: a token stands for the same bytes
wherever it is, so a stream needs to remember only the unfinished UTF-8 character at its end. How the files are read:
formats/tokenizer_files.py.

    python -c "from tokenizer import Tokenizer; print(Tokenizer('checkpoints/ORG/NAME').encode('Hello'))"
"""
import codecs
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Template
from tokenizers import decoders

from formats.tokenizer_files import BYTE_OF, clear_error, find_turn_ends, load_bpe, load_template, read_json, read_model

MAX_CHARACTERS = 10**7  # that a chat template may write: more than any model reads


class Tokenizer:
    """The tokenizer of a checkpoint folder. ValueError or OSError names the file that is missing or broken.

    vocab_size: the largest id + 1; the model may have fewer ids. stop_ids: the ids that end a text: every eos of
    tokenizer_config.json, config.json and generation_config.json, and `turn_ends`, the added tokens that the chat
    template writes after an answer (<|im_end|>); without ids that the model lacks. after_answer: the first line that
    the template writes there, "" if none.

    chat_template: a file with another template than the folder's. A broken one raises `template_error` when it is used.
    """

    def __init__(self, folder: Path, chat_template: Path | None = None) -> None:
        folder = Path(folder)
        model = read_model(folder)
        generation = read_json(folder / "generation_config.json")
        self.bpe, config = load_bpe(folder, model)
        self.named = {key: name for key, name in config.items() if key.endswith("_token") and isinstance(name, str)}
        self.template: Template | None = None
        self.template_error: str | None = None
        try:
            self.template = load_template(folder, config.get("chat_template"), chat_template)
        except ValueError as error:
            self.template_error = str(error)
        self.has_chat_template = bool(self.template or self.template_error)
        self.added = self.bpe.get_added_tokens_decoder()
        size = model.get("vocab_size")
        self.model_ids = range(size if isinstance(size, int) else 2**31)  # the ids that the model has
        bos, eos = (self.bpe.token_to_id(self.named.get(key, "")) for key in ("bos_token", "eos_token"))
        self.bos_id: int | None = model.get("bos_token_id") if bos is None else bos
        with clear_error(f"{folder / 'tokenizer.json'} is broken, copy it again"):
            self.turn_ends, self.after_answer = find_turn_ends(self.bpe, self.render)
        stops = [eos, *self.turn_ends]
        for ids in (model.get("eos_token_id"), generation.get("eos_token_id")):
            stops += ids if isinstance(ids, list) else [ids]
        stops = [i for i in stops if i is not None]
        if not all(isinstance(i, int) and abs(i) < 2**31 for i in stops):
            raise ValueError(f"{folder}: eos_token_id in config.json and generation_config.json must be ids")
        self.stop_ids = frozenset(i for i in stops if i in self.model_ids)

    @property
    def vocab_size(self) -> int:
        return 1 + max(self.bpe.get_vocab().values())

    # ----- Text to ids ---------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with bos and eos as the files say. A special token typed in the text becomes its id.
        ValueError for a token that the model does not have."""
        try:
            with clear_error("tokenizer.json is broken, copy it again"):
                ids = self.bpe.encode(text, add_special_tokens=add_special_tokens).ids
        except ValueError as error:
            if isinstance(error.__cause__, TypeError):
                raise ValueError("the text is not valid UTF-8: it has a lone surrogate") from error
            raise
        beyond = max(ids, default=0)
        if beyond not in self.model_ids:
            raise ValueError(f"the model has {len(self.model_ids)} tokens (vocab_size), and the text has "
                             f"{self.bpe.id_to_token(beyond)!r}, which is token {beyond}: leave it out")
        return ids

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the next answer starts. ValueError if the template refuses it."""
        return self.encode(self.render(messages), add_special_tokens=False)

    def dialogue(self, texts: list[str]) -> list[int]:
        """`chat` for texts of user and assistant in turn, user first. No template: encode them, blank lines between."""
        if not self.has_chat_template:
            return self.encode("\n\n".join(texts))
        return self.chat([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. ValueError if there is no chat template, or if it refuses or fails."""
        if self.template is None:
            raise ValueError(self.template_error or "no chat template in chat_template.jinja or tokenizer_config.json: "
                             "give a raw prompt, or a template with --chat_template FILE")
        values = {**self.named, "messages": messages, "tools": None, "documents": None}
        pieces = []
        size = 0
        with clear_error("the chat template failed"):
            for piece in self.template.generate(values, add_generation_prompt=add_generation_prompt):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise ValueError("it writes more than any model can read")
        return "".join(pieces)

    # ----- Ids to text ---------------------------------------------------------------------------------------------

    def decode(self, ids: list[int], stops: Sequence[str] = ()) -> str:
        """The text of ids, without special tokens, up to the first of `stops`. Broken UTF-8 becomes U+FFFD."""
        stream = self.stream(stops)
        return stream.push(ids) + stream.flush()

    def stream(self, stops: Sequence[str] = ()) -> "TextStream":
        return StoppingStream(self, stops) if stops else TextStream(self)

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for one that is special or ends a text, or without a token."""
        token = self.bpe.id_to_token(i)
        if token is None or i in self.stop_ids or (i in self.added and self.added[i].special):
            return b""
        if isinstance(self.bpe.decoder, decoders.ByteLevel):
            if BYTE_OF.keys() >= set(token):
                return bytes(map(BYTE_OF.get, token))
            return token.encode()  # an added token, written as plain text
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


class TextStream:
    """Decodes ids as they come: push() gives the text that no later id can change, flush() the rest. Together they
    give what decode() gives.

    A broken UTF-8 sequence becomes U+FFFD as soon as it is known to be broken, the way each format does it: byte-level
    BPE writes one for the sequence, sentencepiece one for each byte. (With sentencepiece, transformers replaces a whole
    run of byte tokens for one stray byte in it, so that no character is certain before the run ends; sentencepiece
    itself does not.)
    """
    stopped = False  # only a StoppingStream stops

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.token_bytes = tokenizer.token_bytes
        decoder = tokenizer.bpe.decoder
        self.strip = b"Strip" in decoder.__getstate__()  # drop the space that sentencepiece puts before a text
        errors = "replace" if isinstance(decoder, decoders.ByteLevel) else "surrogateescape"
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, ids: list[int], final: bool = False) -> str:
        text = self.utf8.decode(b"".join(map(self.token_bytes, ids)), final)
        if text and self.strip:
            text = text.removeprefix(" ")
            self.strip = False
        return re.sub("[\udc80-\udcff]", "\ufffd", text)

    def flush(self) -> str:
        return self.push([], final=True)


class StoppingStream(TextStream):
    """Ends the text before the stop string that is complete first; if two end at the same character, before the longer
    one. Text that may be the start of a stop string is held back.

    `tokens` counts the ids up to the one that completes a stop. Ids are processed one by one, so text and count do not
    depend on how many are pushed at once."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        super().__init__(tokenizer)
        self.stops = stops
        self.held = ""
        self.tokens = 0

    def push(self, ids: list[int], final: bool = False) -> str:
        shown = ""
        for new in [[i] for i in ids] + [[]] * final:
            if self.stopped:
                break
            at_end = final and not new
            self.held += super().push(new, at_end)
            self.tokens += len(new)
            found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
            self.stopped = bool(found)
            if found:
                sure = min(found)[1]
            else:
                sure = len(self.held) if at_end else self.sure()
            shown += self.held[:sure]
            self.held = self.held[sure:]
        return shown

    def sure(self) -> int:
        """How many of the characters held cannot be the beginning of a stop."""
        begun = [n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])]
        return len(self.held) - max(begun, default=0)
