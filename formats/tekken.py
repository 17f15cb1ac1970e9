"""Mistral's tekken.json as a byte-level BPE: the only tokenizer file in some of its folders (Devstral, Magistral).

Special tokens have the first ids; the file may list fewer of them than there are. The vocabulary follows, of which only
so many tokens count that default_vocab_size is reached. (mistral-common, Tekkenizer; transformers,
integrations/mistral/tokenizer.py.)
"""
import base64

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPE

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def from_tekken(raw: dict, char_of: dict[int, str]) -> BPE:
    """The BPE of a parsed tekken.json. char_of: how a byte is written as a character. Raises ValueError if the ranks of
    special tokens have gaps, KeyError for what is missing: the first files of 2024 did not list special tokens."""
    config = raw["config"]
    special = [token["token_str"] for token in sorted(raw["special_tokens"], key=lambda token: token["rank"])]
    if sorted(token["rank"] for token in raw["special_tokens"]) != [*range(len(special))]:
        raise ValueError("the ranks of special_tokens are not 0, 1, 2 and so on")
    count = config.get("default_num_special_tokens") or len(special)
    special += [f"<SPECIAL_{i}>" for i in range(len(special), count)]
    pieces = [base64.b64decode(token["token_bytes"]) for token in raw["vocab"]]
    if size := config.get("default_vocab_size"):
        pieces = pieces[:size - count]
    written = ["".join(map(char_of.get, piece)) for piece in pieces]
    rank_of = {piece: rank for rank, piece in enumerate(written)}
    merges = []
    for piece in written:  # in the order of the ranks, which is that of merging
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [(left, right) for left, right in cuts if left in rank_of and right in rank_of]
        merges += sorted(known, key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
    vocab = {token: i for i, token in enumerate(special)} | {piece: count + rank for piece, rank in rank_of.items()}
    bpe = BPE(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    return bpe
