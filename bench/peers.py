"""Other people's loaders, each in a process of its own that answers lines, so that all are measured in turn.

    .venv-peers/bin/python -m bench.peers NAME --tokens FILE --folder DIR [--workers N]

`make peers` sets the environment up: some of them pin a numpy that mixloader's own does not have. Needs no
mixloader. Answers on standard output: "ready {versions}" when the data is written and the loader made; to
"verify": "ok" or "error ..."; to "measure SECONDS": tokens a second; to "train DEVICE STEPS": what
PlainTrainer.run gives, as JSON; ends with "quit".

How each is set, which is the fastest way that its documentation shows: two workers are persistent with
4 batches ahead each; litData and MDS shuffle, hold uint16 and are widened a batch at a time; Megatron has
no attention mask, cached masks, memory-mapped files and long documents.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.plain_trainer import PlainTrainer, cross_entropy
from bench.tokens import MODULUS, Batches, tokens_per_second, verify

DOCUMENT = 16 * MODULUS
"""Tokens of a document. Megatron joins documents, which costs it less when they are long, in a shuffled order; as
each of them begins with token 0, a window over their joint is a run of the tokens, too."""


def workers_of(count: int) -> dict[str, Any]:
    """What torch's DataLoader takes for this many worker processes."""
    more = {"prefetch_factor": 4, "persistent_workers": True} if count else {}
    return {"num_workers": count, **more}


def split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T + 1] of any type into int64 inputs and targets, views of one tensor."""
    rows = rows.to(torch.int64)
    return rows[:, :-1], rows[:, 1:]


class Windows(torch.utils.data.Dataset):
    """The map-style data set that people write: one window an item, collated by torch."""

    def __init__(self, path: Path, seq_len: int):
        self.tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
        self.seq_len = seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.seq_len
        return torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))


class WholeBatches(torch.utils.data.IterableDataset):
    """The fastest one: the best numpy loop, a new tensor for each batch, nothing left to collate."""

    def __init__(self, path: Path, shape: tuple[int, int]):
        self.path, self.shape = path, shape

    def __iter__(self) -> Iterator[torch.Tensor]:
        tokens = np.asarray(np.memmap(self.path, dtype=np.uint16, mode="r"))
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng(0 if worker is None else worker.id)
        rows, length = self.shape
        while True:
            batch = torch.empty((rows, length + 1), dtype=torch.int64)
            array = batch.numpy()
            for row, start in enumerate(rng.integers(0, len(tokens) - length, rows).tolist()):
                array[row] = tokens[start : start + length + 1]
            yield batch


def for_ever(loader: Any, unpack: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]) -> Batches:
    while True:
        for batch in loader:
            yield unpack(batch)


def torch_map(args: argparse.Namespace) -> Batches:
    data = Windows(args.tokens, args.seq_len)
    options: dict[str, Any] = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True}
    return for_ever(torch.utils.data.DataLoader(data, **options, **workers_of(args.workers)), split)


def torch_batches(args: argparse.Namespace) -> Batches:
    data = WholeBatches(args.tokens, (args.batch_size, args.seq_len))
    return for_ever(torch.utils.data.DataLoader(data, batch_size=None, **workers_of(args.workers)), split)


def torchdata_batches(args: argparse.Namespace) -> Batches:
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = WholeBatches(args.tokens, (args.batch_size, args.seq_len))
    return for_ever(StatefulDataLoader(data, batch_size=None, **workers_of(args.workers)), split)


def _run_of_tokens(bounds: tuple[int, int], path: Path) -> torch.Tensor:
    start, end = bounds
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16, count=end - start, offset=2 * start))


def _documents(path: Path) -> list[tuple[int, int]]:
    """First token and end of each; what is left at the file's end is left out."""
    return [(i * DOCUMENT, (i + 1) * DOCUMENT) for i in range(path.stat().st_size // 2 // DOCUMENT)]


def write_litdata(args: argparse.Namespace, folder: Path) -> None:
    from litdata import TokensLoader, optimize

    optimize(
        fn=partial(_run_of_tokens, path=args.tokens),
        inputs=_documents(args.tokens),
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        item_loader=TokensLoader(),
        start_method="fork",
    )


def litdata(args: argparse.Namespace) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    folder = written(args, "litdata", write_litdata)
    data = StreamingDataset(str(folder), item_loader=TokensLoader(args.seq_len + 1), shuffle=True, drop_last=True)
    return for_ever(StreamingDataLoader(data, batch_size=args.batch_size, **workers_of(args.workers)), split)


def stand_in_for_torchvision() -> None:
    """mosaicml-streaming imports torchvision, whose wheel on PyPI is built for CUDA: beside a torch for the CPU
    it does not load. Nothing here needs images, so modules with the two names that are imported stand in for it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module: Any = ModuleType("torchvision" + name)
            module.__spec__ = ModuleSpec(module.__name__, None)
            module.VisionDataset, module.to_tensor = object, None
            sys.modules[module.__name__] = module


def write_mds(args: argparse.Namespace, folder: Path) -> None:
    from streaming import MDSWriter

    tokens = np.memmap(args.tokens, dtype=np.uint16, mode="r")
    length = args.seq_len + 1
    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{length}"}) as writer:
        for start in range(0, len(tokens) - length + 1, length):
            writer.write({"tokens": np.array(tokens[start : start + length])})


def stacked(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]))


def mosaic(args: argparse.Namespace) -> Batches:
    stand_in_for_torchvision()
    from streaming import StreamingDataLoader, StreamingDataset

    folder = written(args, "mds", write_mds)
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=args.batch_size)
    options = {"batch_size": args.batch_size, "collate_fn": stacked, "drop_last": True}
    return for_ever(StreamingDataLoader(data, **options, **workers_of(args.workers)), split)


def write_megatron(args: argparse.Namespace, folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir()
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=np.uint16)
    for bounds in _documents(args.tokens):
        document = _run_of_tokens(bounds, args.tokens)
        builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "tokens.idx"))


def megatron(args: argparse.Namespace) -> Batches:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split, compile_helpers

    folder = written(args, "megatron", write_megatron)
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        compile_helpers()
    # All that GPTDataset asks of a tokenizer.
    tokenizer: Any = SimpleNamespace(eod=0, pad=-1, vocab_size=MODULUS, unique_identifiers={"class": "none"})
    config = GPTDatasetConfig(
        random_seed=0, sequence_length=args.seq_len, blend=([str(folder / "tokens")], None), split="1,0,0",
        path_to_cache=str(folder / f"cache{args.workers}"), tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    source = IndexedDataset(str(folder / "tokens"), mmap=True)
    indices = np.arange(len(source), dtype=np.int32)
    data = GPTDataset(source, str(folder / "tokens"), indices, None, Split.train, config)
    options: dict[str, Any] = {"batch_size": args.batch_size, "drop_last": True}
    loader = torch.utils.data.DataLoader(data, **options, **workers_of(args.workers))
    return for_ever(loader, lambda batch: (batch["tokens"], batch["labels"]))


def written(args: argparse.Namespace, kind: str, write: Callable[[argparse.Namespace, Path], None]) -> Path:
    """The folder of the peer's own data, which the first process to need it writes."""
    folder = args.folder / kind
    done = args.folder / f"{kind}.done"
    if not done.exists():
        write(args, folder)
        done.touch()
    return folder


PEERS: dict[str, tuple[str, Callable[[argparse.Namespace], Batches]]] = {
    "torch-map": ("torch", torch_map),
    "torch": ("torch", torch_batches),
    "torchdata": ("torchdata", torchdata_batches),
    "litdata": ("litdata", litdata),
    "mosaic": ("mosaicml-streaming", mosaic),
    "megatron": ("megatron-core", megatron),
}
"""Name: the package, and what makes its batches."""


def serve(make: Callable[[], Batches], versions: dict[str, str], shape: tuple[int, int]) -> None:
    """Answer on what was standard output; what the libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    batches, trainer = make(), None
    next(batches)  # starts workers, builds orders
    print("ready", json.dumps(versions), file=answers)
    for line in sys.stdin:
        command, *values = line.split()
        if command == "verify":
            try:
                verify(batches, shape)
            except AssertionError as error:
                print("error", error, file=answers)
            else:
                print("ok", file=answers)
        elif command == "measure":
            print(tokens_per_second(batches, float(values[0])), file=answers)
        elif command == "train":
            device, steps = values
            trainer = trainer or PlainTrainer(device)
            triples = ((x, y, None) for x, y in batches)
            print(json.dumps(trainer.run(triples, int(steps), lambda _: cross_entropy)), file=answers)
        elif command == "quit":
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="A loader behind a line protocol.")
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--tokens", type=Path, required=True, help="headerless uint16 file of bench.tokens")
    parser.add_argument("--folder", type=Path, required=True, help="for the peer's own data")
    parser.add_argument("--workers", type=int, default=0, help="worker processes (default 0)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(1)
    package, make = PEERS[args.name]
    versions = {name: version(name) for name in {package, "torch", "numpy"}}
    serve(partial(make, args), versions, (args.batch_size, args.seq_len))


if __name__ == "__main__":
    main()
