"""Perplexity over response tokens."""

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prosocial_ext.evaluation import document_losses, perplexity, perplexity_of


class Bigram(torch.nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def batch(ids: list[list[int]], labels: list[list[int]], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **more}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, bos_token_id=1, eos_token_id=2, **sizes)).double().eval()


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = Bigram(torch.zeros(50, 50))
    assert perplexity(model, [batch([[1, 2, 3]], [[-100, 2, 3]])]) == pytest.approx(50)


def test_known_probabilities_give_their_geometric_mean() -> None:
    table = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]).log()
    # 0 -> 1 (.25), 1 -> 1 (.8), 1 -> 2 (.1)
    assert perplexity(Bigram(table), [batch([[0, 1, 1, 2]], [[0, 1, 1, 2]])]) == pytest.approx(
        (0.25 * 0.8 * 0.1) ** (-1 / 3)
    )


def test_tokens_labelled_minus_100_do_not_count() -> None:
    table = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]).log()
    assert perplexity(Bigram(table), [batch([[0, 1, 1, 2]], [[-100, -100, 1, -100]])]) == pytest.approx(1 / 0.8)


def test_every_token_weighs_the_same_however_it_is_batched(llama: Any) -> None:
    ids = torch.randint(3, 30, (4, 9))
    labels = ids.clone()
    for row, prompt in enumerate((2, 3, 5, 8)):
        labels[row, :prompt] = -100
    together = perplexity(llama, [{"input_ids": ids, "labels": labels}])
    apart = perplexity(llama, ({"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(4)))
    assert apart == pytest.approx(together, rel=1e-6)
    with torch.no_grad():
        logits = llama(input_ids=ids).logits
    mean = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])  # leaves -100 out, too
    assert together == pytest.approx(math.exp(mean), rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(llama: Any, side: str) -> None:
    ids, labels = [1, 5, 6, 7, 8], [-100, -100, 6, 7, 8]
    padding, ignored, zeros = [0] * 3, [-100] * 3, [0] * 3
    if side == "left":
        padded = batch([padding + ids], [ignored + labels], attention_mask=torch.tensor([zeros + [1] * 5]))
    else:
        padded = batch([ids + padding], [labels + ignored], attention_mask=torch.tensor([[1] * 5 + zeros]))
    assert perplexity(llama, [padded]) == pytest.approx(perplexity(llama, [batch([ids], [labels])]), rel=1e-6)


def test_an_impossible_token_is_infinite() -> None:
    table = torch.zeros(3, 3)
    table[0, 1] = -math.inf
    assert perplexity(Bigram(table), [batch([[0, 1]], [[-100, 1]])]) == math.inf


def test_dropout_is_off_and_training_mode_comes_back() -> None:
    class Dropping(Bigram):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.nn.functional.dropout(self.table[input_ids], 0.5, self.training))

    model = Dropping(torch.eye(8) * 9).train()
    expected = perplexity(Bigram(torch.eye(8) * 9), [batch([[1, 1, 1]], [[1, 1, 1]])])
    assert perplexity(model, [batch([[1, 1, 1]], [[1, 1, 1]])]) == expected
    assert model.training


@pytest.mark.parametrize("batches", [[], [batch([[1, 2]], [[1, -100]])]], ids=["no_batch", "first_column_alone"])
def test_nothing_to_score_is_refused(batches: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="batches must hold at least one response token, got none"):
        perplexity(Bigram(torch.zeros(3, 3)), batches)


@pytest.mark.parametrize("missing", ["input_ids", "labels"])
def test_a_batch_without_its_keys_is_refused(missing: str) -> None:
    given = batch([[1, 2]], [[1, 2]])
    del given[missing]
    with pytest.raises(ValueError, match="batch 0 must hold input_ids and labels"):
        perplexity(Bigram(torch.zeros(3, 3)), [given])


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("batch 1 must hold input_ids [B, T] and labels of their shape")):
        perplexity(Bigram(torch.zeros(3, 3)), [batch([[1, 2]], [[1, 2]]), batch([[1, 2]], [[1]])])


def test_a_document_s_loss_is_its_own_however_it_is_batched(llama: Any) -> None:
    ids = torch.randint(3, 30, (3, 7))
    labels = ids.clone()
    for row, prompt in enumerate((2, 3, 6)):
        labels[row, :prompt] = -100
    losses = document_losses(llama, [{"input_ids": ids, "labels": labels}])
    assert losses[:, 1].tolist() == [5, 4, 1]
    for row in range(3):
        alone = perplexity(llama, [{"input_ids": ids[row : row + 1], "labels": labels[row : row + 1]}])
        assert perplexity_of(losses[row : row + 1]) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0])
def test_a_guided_likelihood_is_that_of_the_product(guidance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, arm = torch.randn(5, 5, generator=generator), torch.randn(5, 7, generator=generator)  # a padded head
    (loss, tokens), *_ = document_losses(Bigram(base), [batch([[0, 3, 2]], [[-100, 3, 2]])], arm=Bigram(arm),
                                         guidance=guidance).tolist()  # fmt: skip
    product = (base.softmax(1) * arm[:, :5].softmax(1) ** guidance).double()
    product /= product.sum(1, keepdim=True)
    assert (loss, tokens) == (pytest.approx(-math.log(product[0, 3] * product[3, 2]), rel=1e-5), 2)
