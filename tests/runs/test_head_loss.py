"""The loss on answer tokens, computed without the other logits, is the model's own: its value, its gradients, its refusals."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import weftlora
from weftlora.runs.head_loss import CHUNK, answer_loss, head_of, is_the_models_own
from weftlora.settings import IGNORE

VOCABULARY = 9000


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(settings).requires_grad_(False)


def batch(rows: int = 3, length: int = CHUNK) -> dict[str, torch.Tensor]:
    """Rows with prompts of different lengths, and padding; more learnt tokens than fit into one piece."""
    ids = torch.randint(0, VOCABULARY, (rows, length))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : 10 + 20 * row] = IGNORE
        labels[row, length - 5 * row :] = IGNORE
        mask[row, length - 5 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_loss_and_gradients_are_those_of_the_model() -> None:
    model = get_peft_model(llama(), weftlora.PlainLoraConfig(r=4))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.02)  # B, which starts at zero
        assert parameter.requires_grad == ("weft_" in name)
    given = batch()
    expected = model(**given).loss
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    head = head_of(model.get_base_model())
    assert head is not None
    total, count, output = answer_loss(model, head, given)
    (total / count).backward()
    assert count == int((given["labels"][:, 1:] != IGNORE).sum()) > CHUNK
    assert output.logits is None
    torch.testing.assert_close(total / count, expected, rtol=1e-6, atol=0)
    assert grads
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-7)
    assert model(**given).logits.shape[-1] == VOCABULARY, "the output layer is as it was"


def test_the_largest_tensor_of_a_step_is_a_piece_of_the_logits() -> None:
    model, given = llama(), batch()
    model.get_input_embeddings().weight.requires_grad_(False)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, torch.Tensor) and out.is_floating_point() else [])
            return out

    head = head_of(model)
    with Sizes(), torch.no_grad():
        answer_loss(model, head, given)
    assert max(sizes) == CHUNK * VOCABULARY < given["input_ids"].numel() * VOCABULARY


@pytest.mark.parametrize("why", ["trained", "adapted", "small", "watched"])
def test_another_output_layer_is_left_to_the_model(why: str) -> None:
    model = llama()
    if why == "trained":
        model.lm_head.weight.requires_grad_(True)
    if why == "small":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)).requires_grad_(False)
    if why == "watched":
        model.lm_head.register_forward_hook(lambda *given: None)
    if why == "adapted":
        config = weftlora.PlainLoraConfig(r=2, target_modules=["q_proj", "lm_head"])
        model = get_peft_model(model, config).get_base_model()
    assert head_of(model) is None


def test_a_model_that_does_more_to_its_logits_computes_its_own_loss() -> None:
    model = llama()
    head = head_of(model)
    assert is_the_models_own(model, head)
    plain = model.forward

    def bounded(*given, labels=None, **more):
        out = plain(*given, **more)
        out["logits"] = 2 * torch.tanh(out.logits / 2)
        if labels is not None:
            out["loss"] = model.loss_function(out.logits, labels, vocab_size=VOCABULARY)
        return out

    torch.nn.init.normal_(head.weight, std=0.3)
    assert is_the_models_own(model, head)
    model.forward = bounded
    assert not is_the_models_own(model, head)
