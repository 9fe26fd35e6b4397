"""Real tokenizers, trained on the spot: one of each family of decoders."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog says: hello there!",
    "naïve café, Straße, Ελληνικά, русский язык, العربية, עברית",
    "你好，世界。今日はいい天気ですね。안녕하세요",
    "emoji 🤖🎉 and families 👩‍👩‍👧‍👦 and flags 🇩🇪",
    "    indented code\n\tand\ttabs\r\n\n\n  trailing  ",
] * 5

SPECIAL = "<|end|>"
ADDED = "<tool_call>"


def byte_level() -> Tokenizer:
    """GPT-2's family: Llama 3, Qwen, GPT-OSS, DeepSeek."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_added(tokenizer)


def _byte_fallback(strip: bool) -> Tokenizer:
    vocabulary = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    pieces = ["▁", *"Thequickbrownfxjmpsvlazydg,:!ïéß今日は", "▁the", "▁dog", "he", "▁T", "qu"]
    for piece in dict.fromkeys(pieces):
        vocabulary[piece] = len(vocabulary)
    merges = [("h", "e"), ("▁", "T"), ("q", "u")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    steps = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if strip else []),
        ]
    )
    return _with_added(tokenizer)


def llama() -> Tokenizer:
    """SentencePiece as Llama 2 and Mistral have it: a space before the text, taken off again."""
    return _byte_fallback(strip=True)


def gemma() -> Tokenizer:
    """SentencePiece as Gemma has it: no space before the text."""
    return _byte_fallback(strip=False)


def metaspace() -> Tokenizer:
    """A unigram model whose decoder treats the beginning of a text differently."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_added(tokenizer)


def wordpiece() -> Tokenizer:
    """Words and their ends, joined and cleaned by the decoder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=[SPECIAL, "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_added(tokenizer)


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.add_tokens([AddedToken(ADDED, special=False)])
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}
