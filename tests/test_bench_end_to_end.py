"""The benchmark of whole steps: what it counts, and that its sections run."""

import json
import time

import torch

from bench import end_to_end, plain_trainer
from bench.plain_trainer import PlainTrainer, Sizes, cross_entropy

TINY = {"cpu": Sizes(2, 16, 64, 1, 64)}


def test_a_step_waits_where_the_loader_does(monkeypatch):
    monkeypatch.setattr(plain_trainer, "SIZES", TINY)
    trainer, drawn = PlainTrainer("cpu"), []

    def slow():
        while True:
            time.sleep(0.05)
            drawn.append(torch.randint(0, 60_000, (2, 17)))
            yield drawn[-1][:, :-1], drawn[-1][:, 1:], None

    before = [parameter.clone() for parameter in trainer.model.parameters()]
    row = trainer.run(slow(), 4, lambda _: cross_entropy, after=lambda: time.sleep(0.02))
    assert len(drawn) == 4
    assert row["wait_ms"] >= 50
    assert row["after_ms"] >= 20
    assert row["ms"] >= row["wait_ms"] + row["after_ms"]
    assert 0 < row["wait_share"] < 1
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_token_cannot_see_those_after_it(monkeypatch):
    monkeypatch.setattr(plain_trainer, "SIZES", TINY)
    model, ids = PlainTrainer("cpu").model.eval(), torch.randint(0, 64, (1, 16))
    changed = ids.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 64
    first, second = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(first[:10], second[:10])
    assert not torch.allclose(first[10:], second[10:])


def test_mixing_is_compared_with_the_same_trainer_without(tmp_path, monkeypatch, capsys):
    for module in (plain_trainer, end_to_end):
        monkeypatch.setattr(module, "SIZES", TINY)
    path = tmp_path / "rows.json"
    arguments = ["--only", "mixing", "--device", "cpu", "--rounds", "2", "--steps", "5", "--tokens", "50000"]
    monkeypatch.setattr("sys.argv", ["end_to_end", *arguments, "--json", str(path)])
    threads = torch.get_num_threads()
    end_to_end.main()
    torch.set_num_threads(threads)
    rows = {row["side"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["mixing off"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert rows["mixing"]["after_ms"]["median"] > 0 == rows["mixing off"]["after_ms"]["median"]
    low, high = rows["mixing"]["interval_95_percent"]
    assert low <= rows["mixing"]["overhead_percent"] <= high
    assert "mixing costs" in capsys.readouterr().out
