"""Hugging Face's Trainer on mixloader: `python examples/huggingface.py DATA OUT [STEPS]`; the same again goes on.

DATA is a manifest.json whose domains have a field ("source" to keep, "target" to learn), as
`python -m mixloader pack DATA prose=texts/ maths=problems/ --target maths` writes it. The model is a small Llama with
random weights; with AutoModelForCausalLM.from_pretrained(...) the rest stays as it is.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from mixloader import Manifest, Mixer
from mixloader.integrations.huggingface import MixTrainer, held_out_sets, trainer_loader

data, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1000
args = TrainingArguments(
    str(out),
    max_steps=steps,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    eval_strategy="steps",
    eval_steps=4,
    save_steps=4,
    logging_steps=1,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
set_seed(args.seed)
config = LlamaConfig(
    vocab_size=Manifest.open(data).vocab_size,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
model = LlamaForCausalLM(config)
with (
    trainer_loader(data, 64, args, model) as loader,
    Mixer(loader, policy="agent", device=args.device, record=out / "record.jsonl") as mixer,
):
    trainer = MixTrainer(model, args, mixer=mixer, eval_dataset=held_out_sets(loader))
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")))
    trainer.save_model()
