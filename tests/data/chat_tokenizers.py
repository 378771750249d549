"""Tokenizers with chat templates for the tests: byte-level BPE, words with marks as SentencePiece has them, a slow one."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "The boat waits at the river. Who has the lamp? Mira has the lamp and Tomas has the rope.",
    "What is 17 + 25? It is 42. Say no more, please; count to ten: one two three four five six seven eight nine ten.",
    "user assistant system tool <|im_start|> <|im_end|> [INST] [/INST] ### Human: ### Assistant: Hello! How are you?\n\n",
]
MARKS = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (  # as Llama 2 and Mistral: no header of its own for the assistant, no system role, roles alternate
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (  # as Llama 3: contents are trimmed
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PLAIN = (  # no special token anywhere
    "{% for m in messages %}### {{ 'Human' if m.role == 'user' else 'Assistant' }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
FORGETS = (  # as Qwen 3: reasoning of answers before the last question is left out
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.index0 > ns.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (  # writes tools, calls and what comes of them
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "headers": HEADERS, "plain": PLAIN, "tools": TOOLS}


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


LINES_WHOLE = r"\s*[\r\n]+|\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How newer tokenizers cut a text into words: line breaks stay together, whatever follows them."""


def byte_level(template=CHATML, older=False):
    """As Llama 3 and Qwen; with `older` as GPT-2, where the last of several line breaks stands alone if a word follows."""
    bare = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(LINES_WHOLE), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=older)
    bare.pre_tokenizer = whole if older else pre_tokenizers.Sequence([cut, whole])
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bare.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return with_template(made, template)


def marked_words(template=CHATML):
    """As SentencePiece's: every word begins with a mark, the first of a text too, and unknown letters fall back to bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{number:02X}>": number + 3 for number in range(256)}}
    words = sorted({word for text in TEXTS for word in text.split()})
    for piece in ["▁", *sorted({c for text in TEXTS for c in text if c.strip()}), *[f"▁{word}" for word in words]]:
        vocab.setdefault(piece, len(vocab))
    merges, seen = [], set()
    for word in words:
        held = ["▁", *word]
        while len(held) > 1:
            pair = (held[0], held[1])
            if pair not in seen:
                seen.add(pair)
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            held = ["".join(pair), *held[2:]]
    bare = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": [AddedToken(mark, normalized=False) for mark in MARKS]})
    return with_template(made, template)


class Letters(PreTrainedTokenizer):
    """A slow tokenizer, a token a letter: it has no offsets."""

    def __init__(self, pairs=(), **kwargs):
        self.pairs = set(pairs)
        self.known = {chr(number): number for number in range(128)}
        for pair in pairs:
            self.known[pair] = len(self.known)
        super().__init__(eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.known)

    def get_vocab(self):
        return dict(self.known) | self._added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        out = []
        while text:
            size = 2 if text[:2] in self.pairs else 1
            out.append(text[:size])
            text = text[size:]
        return out

    def _convert_token_to_id(self, token):
        return self.known.get(token, 0)

    def _convert_id_to_token(self, index):
        return {number: token for token, number in self.known.items()}[index]


def slow(template=CHATML, pairs=()):
    made = Letters(pairs)
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return with_template(made, template)
