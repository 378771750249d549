"""Train the model that ships in `src/weftlora/assets/demo_model` from the corpus of `weftlora.data.demo`, from nothing.

    python scripts/make_demo_model.py                                  # what is in the package
    python scripts/make_demo_model.py --steps 20 --out demo-try       # a quick look

One seed gives one corpus and one start; the last bits of the weights also depend on the machine and its thread count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weftlora.data.demo import DEFAULT_TASK, Row, demo_rows, demo_words, pretraining_rows

SPECIALS = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PROMPT_WEIGHT = 0.1  # of a prompt token's loss: enough to place every word, little enough not to learn random letters
POOL = 8  # batches whose rows are sorted by length together, so that a batch is hardly padded


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes plus whole words: a word of the corpus is one token, anything else is spelled, so nothing is unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [form for word in demo_words() for form in (word, "Ġ" + word)]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet, *words, "Ġ->"])}
    # With no merges and `ignore_merges`, a token longer than a byte is used only where it is the whole word.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=SPECIALS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, row: Row, rng: Random) -> tuple[list[int], int]:
    """Token ids and the length of the prompt: as plain text, sometimes without <bos>, sometimes as a chat."""
    prompt, completion, form = row["prompt"], row["completion"] + "<eos>", rng.random()
    if form < 0.15:
        prompt, completion = f"<bos><|user|>{prompt}<|assistant|>", completion[rng.random() < 0.5 :]
    elif form < 0.9:
        prompt = "<bos>" + prompt
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    return prompt_ids + tokenizer.encode(completion, add_special_tokens=False), len(prompt_ids)


def batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (ids [B, T], mask [B, T], weight [B, T] of each token as a target), right-padded."""
    rows, rng = pretraining_rows(seed), Random(seed)
    while True:
        pool = [encode(tokenizer, row, rng) for row in itertools.islice(rows, POOL * size)]
        pool.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(pool), size))
        while starts:
            start = starts.pop(int(rng.random() * len(starts)))
            yield collate(pool[start : start + size], tokenizer.pad_token_id)


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    position = torch.arange(width)
    mask = position < torch.tensor([[len(row)] for row, _ in rows])
    answer = position >= torch.tensor([[prompt] for _, prompt in rows])
    return ids, mask.long(), torch.where(answer, 1.0, PROMPT_WEIGHT) * mask


def loss_of(model: LlamaForCausalLM, ids: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    return (nats * weight).sum() / weight.sum()


def optimisers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> float:
    """Train in place; the mean loss of the last hundred steps, in nats per weighted token."""
    device = model.device
    optimiser = optimisers(model, args.lr)
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / 100, 1.0, (args.steps - t) / (0.6 * args.steps)))
        for o in optimiser
    ]
    losses: list[float] = []
    begin = time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches(tokenizer, args.batch, args.seed), args.steps), start=1):
        loss = loss_of(model, *(tensor.to(device) for tensor in batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimiser, *schedule):
            part.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 0 or step == args.steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step:5d}  loss {mean:.4f}  {time.perf_counter() - begin:6.0f} s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Share of the rows whose greedy answer is the completion, in percent."""
    hits = 0
    for start in range(0, len(rows), 128):
        part = rows[start : start + 128]
        batch = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True).to(model.device)
        out = model.generate(**batch, max_new_tokens=20, do_sample=False)
        answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += sum(answer.strip() == row["completion"].strip() for answer, row in zip(answers, part, strict=True))
    return 100.0 * hits / len(rows)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Greedy exact match in percent: by domain of the corpus on fresh rows, and on the demo task it must not know."""
    by_domain: dict[str, list[Row]] = {}
    for row in itertools.islice(pretraining_rows(seed=1_000_003), 2048):
        by_domain.setdefault(row["domain"], []).append(row)
    known = {domain: exact_match(model, tokenizer, rows) for domain, rows in sorted(by_domain.items())}
    return known | {f"demo task {DEFAULT_TASK}": exact_match(model, tokenizer, demo_rows("test"))}


CARD = """# The demo model of weftlora

A Llama-type causal model of {parameters:,} parameters, trained from nothing on procedurally generated rows
(`weftlora.data.demo`); it knows no facts and speaks no language. Licence: Apache-2.0, as weftlora.

    {command}

| seed | steps | rows a step | loss (nats per weighted token) | seconds | device |
|---|---|---|---|---|---|
| {seed} | {steps} | {batch} | {loss:.4f} | {seconds:.0f} | {device} |

Greedy exact match on fresh rows of the corpus, and on the test split of the task that is left to fine-tuning:

| rows | exact match, % |
|---|---|
{measured}
"""


def readable_by_transformers_4(file: Path) -> None:
    """Give what transformers 5 writes the names that 4 reads, and 5 too."""
    text = file.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    file.write_text(text.replace('"extra_special_tokens"', '"additional_special_tokens"'), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_out = Path(__file__).parents[1] / "src" / "weftlora" / "assets" / "demo_model"
    parser.add_argument("--out", type=Path, default=default_out)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out)  # before its first use, which would write that call's padding into the file
    readable_by_transformers_4(args.out / "tokenizer_config.json")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(tokenizer, args.hidden, args.layers).to(device)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, on {device}")
    begin = time.perf_counter()
    loss = train(model, tokenizer, args)
    seconds = time.perf_counter() - begin
    measured = measure(model.eval(), tokenizer)
    print(json.dumps(measured, indent=1))
    model.generation_config.update(max_new_tokens=32, do_sample=False)
    model.save_pretrained(args.out)
    table = "\n".join(f"| {name} | {value:.1f} |" for name, value in measured.items())
    flags = [a for a in sys.argv[1:] if a not in ("--out", str(args.out))]
    command = " ".join(["python scripts/make_demo_model.py", *flags])
    card = CARD.format(
        parameters=model.num_parameters(), command=command, measured=table, loss=loss, seconds=seconds, device=device,
        seed=args.seed, steps=args.steps, batch=args.batch,
    )  # fmt: skip
    (args.out / "MODEL_CARD.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
