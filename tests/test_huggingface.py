"""Hugging Face's Trainer: the losses of its models, batches and decisions, exact resume, and what is refused."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import ROOT, kill_at_step
from tiny_run import FIELDS, VOCAB_SIZE, tiny_data
from torch.nn import functional

from mixloader import Guards, Influence, Mixer, MixLoader, read_record
from mixloader.errors import ConfigError, StateError

pytest.importorskip("transformers", reason="transformers is not installed (pip install 'mixloader[hf]')")
pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'mixloader[hf]')")
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments

from mixloader.integrations import huggingface, huggingface_head
from mixloader.integrations.huggingface import MixTrainer, held_out_sets, last_checkpoint, trainer_loader

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:mtime may not be reliable:UserWarning"
)
T = 16
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def gpt2(dropout=0.1):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=T,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    )


def arguments(out, **options):
    given = {
        "max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "save_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_total_limit": 5,
    }  # fmt: skip
    return TrainingArguments(str(out), **(given | options))


def build(data, out, policy="chase", model=None, mixing=None, loading=None, cls=MixTrainer, **options):
    model = gpt2() if model is None else model
    args = arguments(out, **options)
    loader = trainer_loader(data, T, args, model, **(loading or {}))
    if policy == "influence":
        mixing = {"influence": Influence(model, stride=2, probe_every=2, rank=4), **(mixing or {})}
    mixer = Mixer(loader, policy, record=Path(out) / "record.jsonl", **(mixing or {}))
    return cls(model, args, mixer=mixer, eval_dataset=held_out_sets(loader, 8))


def close(trainer):
    trainer.mixer.close()
    trainer.mixer.loader.close()


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# The loss


@pytest.fixture(scope="module")
def trainer(data, tmp_path_factory):
    trainer = build(data, tmp_path_factory.mktemp("one"), model=gpt2(dropout=0.0), policy="uniform")
    yield trainer
    close(trainer)


def models():
    """A tiny one of each class whose head is fused."""
    for name in sorted(huggingface_head.FUSED):
        cls = getattr(transformers, name)
        config = cls.config_class()
        keys = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
        yield pytest.param(cls, {key: value for key, value in SMALL.items() if key in keys}, id=name)


@pytest.mark.parametrize(("cls", "sizes"), list(models()))
def test_the_fused_head_gives_loss_and_gradients_of_the_logits(trainer, cls, sizes):
    torch.manual_seed(1)
    model = cls(cls.config_class(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, y = torch.randint(VOCAB_SIZE, (2, 3, T))
    y[0, :5] = -100
    inputs = {"input_ids": x, "labels": y, "domain_ids": torch.tensor([0, 2, 1])}
    model.eval()  # without dropout
    head = huggingface_head.fused_head(model)
    losses, gradients = [], []
    for fused in (head, None):
        trainer._head = fused
        model.zero_grad()
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(60))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    expected = functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item() / 60
    assert losses == pytest.approx([expected] * 2, rel=1e-5)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, msg=name)
    assert "forward" not in vars(model.get_output_embeddings())
    trainer.mixer.stats.snapshot()


def test_a_head_with_something_on_it_is_left_alone():
    model = gpt2()
    assert huggingface_head.fused_head(model) is not None
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert huggingface_head.fused_head(model) is None
    handle.remove()
    model.lm_head.forward = model.lm_head.forward
    assert huggingface_head.fused_head(model) is None


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_that_of_the_mean_over_all_targets_of_the_step(data, tmp_path, fused):
    """Nothing is shifted twice, documents do not see each other, micro-batches with fewer targets weigh less."""
    tokens = np.fromfile(data.parent / "prose" / "train_000.bin", "<u4")[256:].astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    loading = {"documents": "eot", "mask_boundaries": True, "eot": 1}
    options = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant", "learning_rate": 0.5}
    model = gpt2(dropout=0.0)
    expected = parameters(model)
    args = arguments(tmp_path / "out", **options)
    with MixLoader(
        tmp_path, 4, T, grad_accumulation_steps=2, seed=args.seed, vocab_size=VOCAB_SIZE, **loading
    ) as again:
        batches = [next(again) for _ in range(2)]
    targets = [batch["targets"] for batch in batches]
    assert len({int((y != -100).sum()) for y in targets}) == 2
    losses = []
    for batch, y in zip(batches, targets, strict=True):
        ids = batch["document_ids"]
        sees = (ids[:, :, None] == ids[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]  # each document by itself
        logits = model(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
        losses.append(functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    loss = sum(losses) / sum((y != -100).sum() for y in targets)
    for (name, parameter), gradient in zip(
        model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        expected[name] = parameter.detach() - 0.5 * gradient
    with trainer_loader(tmp_path, T, args, model, **loading) as loader, Mixer(loader, "natural") as mixer:
        trainer = MixTrainer(model, args, mixer=mixer)
        trainer._head = trainer._head if fused else None
        result = trainer.train()
        assert result.training_loss == pytest.approx(loss.item(), rel=1e-5)
        counted = mixer.state_dict()["pending"][0]["loss_tokens"]
        assert sum(counted) == sum(int((y != -100).sum()) for y in targets)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


# Runs


class Watched(MixTrainer):
    """Keeps digests of the batches that it trained on, by plan step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append((self.state.global_step, inputs["input_ids"].tolist(), inputs["domain_ids"].tolist()))
        return super().training_step(model, inputs, num_items_in_batch)


def finish(data, out, resume=None, **options):
    """Train to the end; returns parameters, batches and what was logged."""
    trainer = build(data, out, cls=Watched, **options)
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    close(trainer)
    return parameters(trainer.model), trainer.seen, trainer.state.log_history


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return *finish(data, out), out


@pytest.mark.parametrize("checkpoint", [3, 6])
def test_a_resumed_run_is_the_run_that_was_not_stopped(data, whole, tmp_path, checkpoint):
    """Batches, decisions that feedback has a part in, dropout and parameters, bit for bit."""
    expected, seen, _, out = whole
    shutil.copytree(out, tmp_path / "run")
    ours, again, _ = finish(data, tmp_path / "run", str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
    assert_same(ours, expected)
    assert again == [entry for entry in seen if entry[0] >= checkpoint]
    decisions = [read_record(folder / "record.jsonl").decisions for folder in (out, tmp_path / "run")]
    assert decisions[0] == decisions[1]
    assert any("feedback" in decision for decision in decisions[0])


@pytest.mark.slow
def test_a_resumed_run_with_influence_and_an_acting_loss_is_the_run_that_was_not_stopped(data, tmp_path):
    options = {"policy": "influence", "mixing": {"act": "objective", "guards": Guards(floor=0.05)}}
    expected, _, _ = finish(data, tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoint-6")
    ours, _, _ = finish(data, tmp_path, True, **options)
    assert_same(ours, expected)
    assert any("influence" in decision for decision in read_record(tmp_path / "record.jsonl").decisions)


def test_logs_and_feedback_have_the_names_of_domains(whole):
    _, _, history, out = whole
    logged = [line for line in history if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    decisions = read_record(out / "record.jsonl").decisions
    for line in logged:
        assert sum(line[f"mix/weight/{name}"] for name in FIELDS) == pytest.approx(1)
        assert sum(line[f"mix/tokens/{name}"] for name in FIELDS) == line["step"] * 8 * T
        assert line["epoch"] == line["step"] / 8
    # Lag 1: what is known after step s are the losses of steps up to s - 1.
    name = "code"
    known = [d for d in decisions if 3 <= d["effect"] <= 4]
    nats = sum(d["loss"][1] * d["loss_tokens"][1] for d in known) / sum(d["loss_tokens"][1] for d in known)
    assert logged[1][f"mix/loss/{name}"] == pytest.approx(nats, rel=1e-5)
    evaluated = {k: v for line in history for k, v in line.items() if line["step"] == 3 and k.endswith("_loss")}
    told = next(event for event in read_record(out / "record.jsonl").events if event["event"] == "feedback")["losses"]
    assert told == pytest.approx({n: evaluated[f"eval_{n}_loss"] for n in FIELDS} | {
        "source": (evaluated["eval_prose_loss"] + evaluated["eval_code_loss"]) / 2,
        "target": evaluated["eval_maths_loss"],
    }, rel=1e-5)  # fmt: skip


def test_an_evaluation_is_the_mean_loss_of_the_held_out_windows(trainer):
    trainer.model.eval()
    losses = []
    for batch in trainer.mixer.loader.held_out(1, domains=["maths"], windows_per_domain=8):
        logits = trainer.model(batch["input_ids"]).logits
        losses.append(functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item())
    assert trainer.evaluate()["eval_maths_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_half_a_checkpoint_is_passed_over(whole, tmp_path):
    out = whole[3]
    for step in (3, 6):
        shutil.copytree(out / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    (tmp_path / "checkpoint-3" / huggingface.STATE).unlink()
    with pytest.raises(StateError, match="no whole checkpoint"):
        last_checkpoint(tmp_path)


@pytest.mark.slow
def test_trls_sfttrainer_resumes_on_the_same_terms(data, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl datasets)")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install trl datasets)")
    from tokenizers import Tokenizer, models

    class MixSFTTrainer(MixTrainer, trl.SFTTrainer):
        pass

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB_SIZE)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")

    def run(resume):
        model = gpt2()
        args = trl.SFTConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=2,
            eval_steps=2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        with (
            trainer_loader(data, T, args, model) as loader,
            Mixer(loader, "chase", record=tmp_path / "record.jsonl") as mixer,
        ):
            unread = datasets.Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
            trainer = MixSFTTrainer(model, args, mixer=mixer, processing_class=tokenizer, train_dataset=unread)
            trainer.eval_dataset, args.eval_strategy = held_out_sets(loader, 8), "steps"
            trainer.train(resume_from_checkpoint=resume)
        return parameters(model)

    expected = run(None)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert_same(run(True), expected)
    assert any("feedback" in decision for decision in read_record(tmp_path / "record.jsonl").decisions)


# The examples


def run_example(monkeypatch, name, *argv):
    """In this process, with sys.path as it is: a script's own folder is not on it."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["huggingface.py", "accelerate_script.py"])
def test_an_example_that_is_killed_and_resumed_is_the_one_that_was_not(data, tmp_path, monkeypatch, name):
    from safetensors.torch import load_file

    run_example(monkeypatch, name, data, tmp_path / "whole", 10)
    kill_at_step(7, ROOT / "examples" / name, data, tmp_path / "killed", 10)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    run_example(monkeypatch, name, data, tmp_path / "killed", 10)
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("killed", "whole"))
    assert_same(ours, theirs)
    ours, theirs = (read_record(tmp_path / out / "record.jsonl") for out in ("killed", "whole"))
    assert (ours.attempts, theirs.attempts) == (2, 1)
    assert ours.decisions == theirs.decisions


# Misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size is 2 for the Trainer, and 4 for the loader"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4 for the Trainer, and 2"),
        ({"max_steps": 9}, "max_steps is 9 for the Trainer, but the loader ends after 8"),
        ({"auto_find_batch_size": True}, "cannot honour auto_find_batch_size"),
    ],
)
def test_arguments_that_do_not_fit_the_loader_are_refused(trainer, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        MixTrainer(
            gpt2(),
            arguments(tmp_path, **options),
            mixer=trainer.mixer,
            eval_dataset=held_out_sets(trainer.mixer.loader),
        )


def test_a_loss_function_that_sees_no_domains_is_refused(trainer, tmp_path):
    with pytest.raises(ConfigError, match="compute_loss_func"):
        MixTrainer(
            gpt2(),
            arguments(tmp_path, eval_strategy="no"),
            mixer=trainer.mixer,
            compute_loss_func=lambda outputs, labels, num_items_in_batch: None,
        )


def test_data_with_ids_that_the_model_does_not_embed_are_refused(data, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | {"vocab_size": 40})))
    with pytest.raises(ConfigError, match="the data have a vocabulary of 50 ids, but the model embeds 40"):
        trainer_loader(data, T, arguments(tmp_path), model)
    with MixLoader(data, 4, T, grad_accumulation_steps=2, max_steps=8) as loader, Mixer(loader, "natural") as mixer:
        args = arguments(tmp_path, eval_strategy="no")
        with pytest.raises(ConfigError, match="embeds 40"):
            MixTrainer(model, args, mixer=mixer)


def test_a_run_without_an_end_is_refused_and_one_of_the_loaders_is_taken(data, tmp_path):
    for steps in (None, 5):
        args = arguments(tmp_path, max_steps=-1, eval_strategy="no")
        model = gpt2()
        with trainer_loader(data, T, args, model, max_steps=steps) as loader, Mixer(loader, "natural") as mixer:
            if steps is None:
                with pytest.raises(ConfigError, match="the run has no end"):
                    MixTrainer(model, args, mixer=mixer)
            else:
                assert MixTrainer(model, args, mixer=mixer).args.max_steps == 5


def test_a_checkpoint_of_another_manifest_or_of_none_is_refused(data, whole, tmp_path):
    checkpoint = whole[3] / "checkpoint-3"
    other = tiny_data(tmp_path / "other")
    (other.parent / "prose" / "train_001.bin").unlink()
    trainer = build({name: other.parent / name for name in FIELDS}, tmp_path / "out")
    with pytest.raises(StateError, match="saved with other data"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    shutil.copytree(checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / huggingface.STATE).unlink()
    with pytest.raises(StateError, match="a checkpoint that a MixTrainer saved"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "bare"))
    with pytest.raises(StateError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    close(trainer)


@pytest.mark.parametrize(("version", "warns"), [("4.56.2", True), ("4.57.1", False), ("5.99.0", True)])
def test_a_version_that_was_not_tested_is_told(trainer, tmp_path, monkeypatch, version, warns):
    monkeypatch.setattr(huggingface.transformers, "__version__", version)
    low, high = (".".join(map(str, v)) for v in huggingface.TESTED)
    model, args = gpt2(), arguments(tmp_path, eval_strategy="no")
    if warns:
        with pytest.warns(RuntimeWarning, match=f"transformers is {version}; .* tested with {low} to {high}"):
            MixTrainer(model, args, mixer=trainer.mixer)
    else:
        MixTrainer(model, args, mixer=trainer.mixer)
