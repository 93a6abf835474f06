"""Answers: against sums by hand and against a Hugging Face model, and what is no question is refused by its line."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mixloader.answers import Answers
from mixloader.errors import ProbeError

V = 7


class Bigram(nn.Module):
    """Knows the probabilities of a token after another: row `before`, column `after`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.arange(float(V * V)).view(V, V).sin() * 2)
        self.drop = nn.Dropout(0.5)
        self.shapes = []

    def forward(self, input_ids):
        self.shapes.append(tuple(input_ids.shape))
        return self.drop(self.table[input_ids])

    def nats(self, *tokens):
        """Log-likelihood of all tokens after the first."""
        chances = self.table.detach().double().log_softmax(dim=1)
        return [float(chances[a, b]) for a, b in pairwise(tokens)]


def write(folder, *lines, name="probe.jsonl"):
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def ids(prompt, answer, *choices):
    return {"prompt_ids": prompt, "answer_ids": answer} | ({"choice_ids": list(choices)} if choices else {})


def test_the_score_is_that_of_the_sums_by_hand(tmp_path):
    model = Bigram()
    path = write(tmp_path, ids([1, 2], [3, 4]), "", ids([5], [6]), ids([0, 0, 0], [1, 2, 3]))
    model.train()
    score = Answers(path, 8, vocab_size=V).score(model, batch_size=2)
    assert model.training, "dropout was off meanwhile, and is on again"
    each = [-sum(model.nats(2, 3, 4)) / 2, -sum(model.nats(5, 6)), -sum(model.nats(0, 1, 2, 3)) / 3]
    mean = sum(each) / 3
    assert score.loss == pytest.approx(mean, rel=1e-6)
    assert score.standard_error == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in each) / 2 / 3), rel=1e-5)
    assert (score.answers, score.tokens, score.choices) == (3, 6, 0)
    assert math.isnan(score.accuracy)
    one = Answers(write(tmp_path, ids([5], [6])), 8).score(model)
    assert math.isnan(one.standard_error)


def test_accuracy_goes_by_the_likelihood_of_the_whole_answer(tmp_path):
    model = Bigram()
    options = [(3,), (3, 4), (5,), (6, 1)]
    likelihood = {option: sum(model.nats(2, *option)) for option in options}
    ranked = sorted(options, key=likelihood.get, reverse=True)
    right = ids([2], ranked[0], *options)
    wrong = ids([2], ranked[1], *options)
    score = Answers(write(tmp_path, right, wrong, right, ids([1], [1])), 8).score(model)
    assert (score.accuracy, score.choices, score.answers) == (2 / 3, 3, 4)
    assert sum(rows for rows, _ in model.shapes) == 5, "what is asked twice is computed once"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_does_not_matter(tmp_path, batch_size):
    lines = [ids([i % V] * (1 + i % 5), [(i + j) % V for j in range(1 + i % 3)]) for i in range(11)]
    answers = Answers(write(tmp_path, *lines), 16)
    alone = answers.score(Bigram(), batch_size=1)
    assert answers.score(Bigram(), batch_size=batch_size).loss == pytest.approx(alone.loss, rel=1e-6)


def test_prompts_are_cut_at_their_beginning(tmp_path):
    class Far(Bigram):
        """The first token of the input decides all."""

        def forward(self, input_ids):
            self.shapes.append(tuple(input_ids.shape))
            return self.table[input_ids[:, :1]].expand(-1, input_ids.shape[1], -1)

    model = Far()
    score = Answers(write(tmp_path, ids([1, 2, 3, 4], [5, 6])), 4).score(model)
    assert model.shapes == [(1, 4)]
    assert score.loss == pytest.approx(-(model.nats(2, 5)[0] + model.nats(2, 6)[0]) / 2, rel=1e-6)


def test_an_empty_prompt_begins_with_the_end_of_text(tmp_path):
    model, path = Bigram(), write(tmp_path, ids([], [3]))
    assert Answers(path, 4, eot=6).score(model).loss == pytest.approx(-model.nats(6, 3)[0], rel=1e-6)
    with pytest.raises(ProbeError, match=r"probe.jsonl, line 1 has an empty prompt; give one, or `eot`"):
        Answers(path, 4)


def test_text_is_tokenized(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'mixloader[hf]')")
    vocab = {token: i for i, token in enumerate(["two", "and", "is", "four", "five", "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = {"prompt": "two and two is", "answer": " four", "choices": [" five", " four"]}
    path = write(tmp_path, text, ids([0, 1, 0, 2], [3], [4], [3]))
    first, second = Answers(path, 8, tokenizer=tokenizer, vocab_size=V).probes
    assert (first.prompt, first.answer, first.choices) == (second.prompt, second.answer, second.choices)
    with pytest.raises(ProbeError, match=r"line 1 has text, but no tokenizer was given"):
        Answers(path, 8)


def test_a_hugging_face_model_says_the_same(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install 'mixloader[hf]')"
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(1)

    def random_ids(longest):
        n = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(50, (n,), generator=generator).tolist()

    questions = [ids(random_ids(20), random_ids(6)) for _ in range(9)]
    score = Answers(write(tmp_path, *questions), 32, vocab_size=50).score(model, batch_size=4)
    model.eval()
    losses = []
    for question in questions:
        prompt, answer = question["prompt_ids"], question["answer_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(float(model(torch.tensor([prompt + answer]), labels=labels).loss))
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ([1], r"line 2 is \[1\]; expected an object"),
        ({"prompt_ids": [1]}, "has both or neither of 'answer' and 'answer_ids'"),
        ({"prompt_ids": [1], "prompt": "a", "answer_ids": [1]}, "has both or neither of 'prompt' and 'prompt_ids'"),
        (ids([1], []), "line 2 has an empty answer or choice"),
        (ids([1], [2], [2], []), "line 2 has an empty answer or choice"),
        (ids([1], [V]), "line 2 has token 7; expected ids of at least 0 and below 7"),
        (ids([-1], [1]), "line 2 has token -1; expected ids of at least 0 and below 7"),
        (ids([1], [1.5]), r"line 2 has ids \[1\.5\]; expected a list of whole numbers"),
        (ids([1], "12"), "line 2 has ids '12'; expected a list of whole numbers"),
        (ids([1], [2], [3], [4]), "line 2: its answer is none of its choices"),
        (ids([1], [2], [2], [3], [3]), "line 2: its answer is none of its choices, or two are the same"),
        (ids([1], [2], [2]), r"line 2 has choice_ids \[\[2\]\]; expected a list of two or more"),
        (ids([1], [2] * 5), "line 2 has an answer of 5 tokens, which do not fit into seq_len = 4"),
        ({"prompt": 3, "answer": "a"}, "line 2 has a prompt that is no text: 3"),
    ],
)
def test_what_is_no_question_is_refused_with_its_line(tmp_path, line, message):
    with pytest.raises(ProbeError, match=message):
        Answers(write(tmp_path, ids([1], [2]), line), 4, vocab_size=V)


def test_files_without_questions_are_refused(tmp_path):
    with pytest.raises(ProbeError, match="holds no question"):
        Answers(write(tmp_path, ""), 4)
    with pytest.raises(ProbeError, match="cannot read the probe file"):
        Answers(tmp_path / "missing.jsonl", 4)
