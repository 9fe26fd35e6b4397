"""Train the tokenizer: byte-level BPE (Sennrich and others, 2016) on the generated text.

Digits stay single, so that numbers can be copied and added digit by digit. The text is split
as Qwen's tokenizer does. Run ``python -m parallax.demo.train_tokenizer``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from parallax.demo import model_path
from parallax.demo.corpus import mixture
from parallax.demo.corpus.document import TEMPLATE_PATH, render

VOCABULARY = 2_048
SEED = 1
DOCUMENTS = 24_000
CONTEXT_TOKENS = 4_096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train() -> Tokenizer:
    """Train a tokenizer on a small run of the mixture."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (_untagged(render(document)) for document in mixture.stream(SEED, DOCUMENTS))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


def _untagged(text: str) -> str:
    for tag in (*SPECIAL, *TAGS):
        text = text.replace(tag, "\n")
    return text


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer, its settings and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    template = TEMPLATE_PATH.read_text(encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=model_path())
    folder = parser.parse_args().out
    tokenizer = train()
    save(tokenizer, folder)
    print(f"{tokenizer.get_vocab_size()} tokens -> {folder}")


if __name__ == "__main__":
    main()
