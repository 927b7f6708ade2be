"""A tokenizer of every kind whose tokens may be parts of characters."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from statewright.models.tokenizers import byte_tokenizer

END = "<|endoftext|>"
SAMPLE = "The number is 42, caffè “crème” – 中文字 🙂🙃 " * 20


def byte_level() -> PreTrainedTokenizerBase:
    """GPT-2's kind: merges of bytes, some of which end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return _with_end(tokenizer)


def byte_fallback() -> PreTrainedTokenizerBase:
    """Llama's kind: words begin with a mark, and what has no token is bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names += ["▁", *sorted(set(SAMPLE) - set(" 文🙂🙃")), "▁T", "▁Th", "▁The", "er"]
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("e", "r")]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return _with_end(tokenizer)


def earlier_bytes() -> PreTrainedTokenizerBase:
    """What `byte_tokenizer` saved before its tokens were named as in GPT-2's vocabulary."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _with_end(tokenizer)


def _with_end(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END
    )


KINDS = {
    "bytes": byte_tokenizer(),
    "earlier bytes": earlier_bytes(),
    "byte-level": byte_level(),
    "byte-fallback": byte_fallback(),
}
