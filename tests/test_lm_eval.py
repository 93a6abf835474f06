"""Results of lm-evaluation-harness as losses, and the evaluator of held-out text at a cadence."""

import json
import math

import pytest
import torch
from mixing import Told, train
from tiny_run import FIELDS, VOCAB_SIZE, tiny_data

from mixloader import Answers, MixLoader
from mixloader.errors import ConfigError, FeedbackError
from mixloader.evaluate import HeldOutFeedback, held_out_loss
from mixloader.lm_eval import lm_eval_feedback
from mixloader.mixer import Mixer

RESULTS = {
    "results": {
        "wikitext": {
            "alias": "wikitext", "word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A",
            "byte_perplexity,none": 1.7, "bits_per_byte,none": math.log2(1.7),
        },
        "lambada_openai": {"perplexity,none": 8.0, "perplexity_stderr,none": 0.3, "acc,none": 0.5},
        "hellaswag": {"acc,none": 0.4, "acc_stderr,none": 0.005, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.005},
        "gsm8k": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.1},
        "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01},
        "odd": {"brier_score,none": 0.3, "acc,none": float("nan"), "f1,none": 30.0, "em,none": 0.0},
    },
    "group_subtasks": {"mmlu": ["mmlu_law", "mmlu_art"], "wikitext": []},
    "higher_is_better": {"odd": {"brier_score": False}},
    "n-samples": {
        "wikitext": {"original": 62, "effective": 62}, "hellaswag": {"original": 10042, "effective": 9},
        "gsm8k": {"original": 1319, "effective": 99}, "mmlu_law": {"effective": 3}, "mmlu_art": {"effective": 4},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "asked", "loss"),
    [
        ("wikitext", "source", math.log(1.7)),
        ("wikitext", ("source", "word_perplexity"), math.log(20)),
        ("lambada_openai", "source", math.log(8)),
        ("lambada_openai", ("source", "acc,none"), -math.log(0.5)),
        ("hellaswag", "source", -math.log(5 / 10)),
        ("hellaswag", ("source", "acc"), -math.log((0.4 * 9 + 0.5) / 10)),
        ("gsm8k", "source", -math.log(0.5 / 100)),
        ("gsm8k", ("source", "exact_match,flexible-extract"), -math.log((9.9 + 0.5) / 100)),
        ("mmlu", "source", -math.log((0.25 * 7 + 0.5) / 8)),
    ],
)
def test_a_result_as_a_loss(task, asked, loss):
    assert lm_eval_feedback(RESULTS, {task: asked}) == {"source": pytest.approx(loss)}


def test_tasks_of_one_name_are_averaged_and_files_are_found(tmp_path):
    tasks = {"wikitext": "source", "lambada_openai": "source", "gsm8k": "target", "hellaswag": "web"}
    expected = lm_eval_feedback(RESULTS, tasks)
    assert expected["source"] == pytest.approx((math.log(1.7) + math.log(8)) / 2)
    assert set(expected) == {"source", "target", "web"}
    folder = tmp_path / "out" / "org__model"
    folder.mkdir(parents=True)
    (folder / "results_2026-01-02T03-04-05.json").write_text('{"results": {}}')
    (folder / "results_2026-01-03T03-04-05.json").write_text(json.dumps(RESULTS))
    assert lm_eval_feedback(tmp_path / "out", tasks) == expected
    assert lm_eval_feedback(str(folder / "results_2026-01-03T03-04-05.json"), tasks) == expected


@pytest.mark.parametrize(
    ("task", "asked", "words"),
    [
        ("arc", "source", "have no task 'arc'; they have wikitext, lambada_openai"),
        ("wikitext", ("source", "acc"), "have no acc for 'wikitext'; they have alias, word_perplexity,none"),
        ("odd", ("source", "brier_score"), "brier_score is better the lower it is, and no perplexity"),
        ("odd", "source", "acc,none is nan; expected a finite number"),
        ("odd", ("source", "f1"), r"f1,none is 30\.0; expected an accuracy from 0 to 1"),
        ("odd", ("source", "em"), "em,none is 0 of unknown many"),
        ("wikitext", ("source", "word_perplexity_stderr"), "is 'N/A'; expected a finite number"),
    ],
)
def test_what_is_no_loss_is_said(task, asked, words):
    with pytest.raises(FeedbackError, match=words):
        lm_eval_feedback(RESULTS, {task: asked})


def test_files_that_hold_no_results(tmp_path):
    with pytest.raises(FeedbackError, match=r"holds no results\*\.json"):
        lm_eval_feedback(tmp_path, {"a": "source"})
    with pytest.raises(FeedbackError, match="cannot read"):
        lm_eval_feedback(tmp_path / "none.json", {"a": "source"})
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(FeedbackError, match='have no "results"'):
        lm_eval_feedback(tmp_path, {"a": "source"})
    with pytest.raises(ConfigError, match="no tasks are given"):
        lm_eval_feedback(RESULTS, {})


class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(VOCAB_SIZE, VOCAB_SIZE))

    def forward(self, input_ids):
        return self.logits[input_ids]


def test_held_out_losses_are_told_at_their_steps(tmp_path):
    """The same ones when the run goes on in another process; what they are is held_out_loss's."""
    data, model = tiny_data(tmp_path), Bigram()
    (tmp_path / "probe.jsonl").write_text('{"prompt_ids": [1, 2], "answer_ids": [3]}\n')
    policy = Told(lambda _: None)
    with MixLoader(data, 4, 16) as loader, Mixer(loader, policy, lag=0) as mixer:
        evaluation = HeldOutFeedback(
            mixer, model, 3, answers={"target": Answers(tmp_path / "probe.jsonl", 16)}, windows_per_domain=8
        )
        told = {}
        for step in range(1, 8):
            train(loader, mixer, step)
            if (losses := evaluation.step()) is not None:
                told[step] = losses
        expected = held_out_loss(model, loader.manifest, seq_len=16, windows_per_domain=8, batch_size=4)
    assert list(told) == [3, 6]
    assert told[3] == told[6]
    assert {name: told[3][name] for name in FIELDS} == expected
    assert told[3]["source"] == pytest.approx((expected["prose"] + expected["code"]) / 2)
    assert told[3]["target"] == pytest.approx(-model.logits.detach()[2].log_softmax(0)[3].item(), abs=1e-5)
    ages = [observation.feedback["maths"].age for observation in policy.seen if observation.feedback]
    assert list(ages) == [1, 2, 3, 1]
