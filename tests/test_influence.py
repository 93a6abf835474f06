"""Influence: sketches against full gradients, sums that do not depend on how rows come, and nothing counted twice."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from influence_run import NAMES, D, T, V, backward, begin, probes, rows, small_model, table
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixloader.errors import ConfigError, StateError, StatsError
from mixloader.influence import Influence
from mixloader.loss import domain_cross_entropy
from mixloader.probe_rows import ProbeRows
from mixloader.row_sums import RowSums
from mixloader.sketch import Sketcher


def row_gradients(model, batch, layers):
    """float64 [n, parameters]: of the sum of each row's token losses, in the weights of these layers."""
    modules = dict(model.named_modules())
    weights = [modules[name].weight for name in layers]
    found = []
    for x, y in zip(batch["input_ids"], batch["targets"], strict=True):
        loss = nn.functional.cross_entropy(model(x[None])[0], y, reduction="sum")
        found.append(torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(found)


def exact(model, batch, layers):
    """[D, F] influence, [D, D] gram and [D] mean squared norms from full gradients; means over all rows."""
    gradients = row_gradients(model, batch, layers)
    means = torch.stack([gradients[batch["domain_ids"] == d].mean(0) for d in range(D)])
    fields = [row_gradients(model, p[0], layers).sum(0) / p[0]["targets"].numel() for p in probes().values()]
    norms = torch.stack([gradients[batch["domain_ids"] == d].square().sum(1).mean() for d in range(D)])
    return (means @ torch.stack(fields).T).numpy(), (means @ means.T).numpy(), norms.numpy()


def measured(batches, factor=1.0, model=None, options=None, **begin_options):
    """The table after one plan step of these micro-batches and a probe."""
    model = small_model() if model is None else model
    influence, stats = begin(model, len(batches[0]["targets"]), **begin_options)
    for batch in batches:
        backward(model, stats, batch, factor, **(options or {}))
    influence.end_step()
    influence.close()
    return table(influence)


def split(batch, *sizes):
    parts = {key: value.split(sizes) for key, value in batch.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def assert_same(ours, theirs, rtol=2e-4):
    for key in ("value", "gram", "row_norm_sq", "rows"):
        mine, other = getattr(ours, key), getattr(theirs, key)
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=rtol * np.nanmax(np.abs(other)), err_msg=key)


# Against full gradients


@pytest.fixture(scope="module")
def trained():
    """A model of half the width of GPT-2's heads that has learned some of what rows() hold."""
    torch.manual_seed(1)
    model = small_model(n_embd=64, n_layer=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        batch = rows(24, step)
        domain_cross_entropy(model(batch["input_ids"]), batch["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_sketches_of_rank_32_correlate_with_full_gradients(trained):
    batch = rows(48, 999)
    ours = measured([batch], model=trained, rank=32)
    with torch.no_grad():
        assert domain_cross_entropy(trained(batch["input_ids"]), batch["targets"]) < 0.6 * math.log(V), "has learned"
    influence, gram, norms = exact(trained, batch, Influence(trained, probes()).layers)
    assert np.corrcoef(ours.value.ravel(), influence.ravel())[0, 1] > 0.95
    off = ~np.eye(D, dtype=bool)
    everything = np.concatenate([influence.ravel(), gram[off]])
    assert np.corrcoef(np.concatenate([ours.value.ravel(), ours.gram[off]]), everything)[0, 1] > 0.95
    np.testing.assert_allclose(ours.row_norm_sq, norms, rtol=0.3)


def test_estimates_are_unbiased_over_projections():
    model, batch, seeds = small_model(n_layer=1, n_embd=16), rows(12, 5), 100
    influence, gram, norms = exact(model, batch, Influence(model, probes()).layers)
    tables = [measured([batch], model=model, rank=3, seed=seed) for seed in range(seeds)]
    n = 12 // D
    without_noise = (np.diag(gram) * n - norms) / (n - 1)  # (|sum|² - sum |.|²) / (n² - n)
    truth = {"value": influence, "row_norm_sq": norms, "gram": gram - np.diag(np.diag(gram) - without_noise)}
    for key, expected in truth.items():
        values = np.stack([getattr(table, key) for table in tables])
        error = values.std(0) / math.sqrt(seeds)
        assert (np.abs(values.mean(0) - expected) < 4 * error).all(), key
        assert (error < 0.5 * np.abs(expected).max()).all(), "the test would not notice much"


def test_the_standard_error_is_that_of_new_rows():
    """With a fixed model, estimates of many draws of rows spread as each of them says."""
    torch.manual_seed(0)
    sums, groups = [], torch.arange(30) % 2
    truth = torch.randn(2, 6)
    for draw in range(150):
        domains, fields = RowSums(2, 6, 1, 10.0, "cpu"), RowSums(1, 6, 2, 10.0, "cpu")
        for step in range(4):
            g = torch.Generator().manual_seed(1000 * draw + step)
            known = step > 0
            domains.add(
                truth[groups] + torch.randn(30, 6, generator=g),
                groups,
                torch.ones(30),
                fields.means() if known else None,
            )
            probe = torch.ones(8, 6) * 5 + 3 * torch.randn(8, 6, generator=g)
            fields.add(
                probe, torch.zeros(8, dtype=torch.int64), torch.full((8,), 5.0), domains.means() if known else None
            )
            domains.fold(step), fields.fold(step)
        value = domains.means() @ fields.means().T
        std = (domains.variance() + fields.variance().T).sqrt()
        sums.append(((value - truth @ torch.ones(6, 1)) / std).numpy())
    assert 0.85 < np.std(sums) < 1.25
    assert abs(np.mean(sums)) < 0.15


def test_decay_halves_a_weight_and_a_silent_domain_keeps_its_mean():
    sums = RowSums(2, 1, 0, half_life=2.0, device="cpu")
    for step, (group, value) in enumerate([(0, 8.0), (1, 5.0), (0, 2.0), (0, 0.0)]):
        sums.add(torch.tensor([[value]]), torch.tensor([group]), torch.ones(1), None)
        sums.fold(step)
    w = 2.0 ** -(np.array([3, 1, 0]) / 2)
    assert sums.means()[0, 0] == pytest.approx((w * [8, 2, 0]).sum() / w.sum())
    assert sums.count()[0] == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert sums.means()[1, 0] == 5
    sums.add(torch.tensor([[1.0]]), torch.tensor([1]), torch.ones(1), None)
    sums.fold(5000)
    assert sums.means()[1, 0] == 1, "after 2,500 half-lives only what is new counts"


# What must not matter


@given(seed=st.integers(0, 99), cut=st.sampled_from([1, 2, 3, 4, 6]), factor=st.sampled_from([1.0, 1 / 8, 65536.0]))
@settings(max_examples=8)
def test_order_micro_batches_and_scale_do_not_matter(seed, cut, factor):
    batch = rows(12, seed)
    whole = measured([batch])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = {key: value[order] for key, value in batch.items()}
    assert_same(measured(split(shuffled, *[12 // cut] * cut), factor / cut), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "mean", "denominator": torch.tensor(1e4)},
        {"domain_weights": torch.tensor([0.5, 3.0, 1.0])},
    ],
    ids=["sum", "denominator", "domain weights"],
)
def test_how_the_loss_is_reduced_does_not_matter(options):
    assert_same(measured([rows(12, 3)], options=options), measured([rows(12, 3)]))


def test_token_losses_with_a_mask_of_the_users_own():
    model, batch = small_model(), rows(12, 3)
    influence, stats = begin(model, 12)
    losses = domain_cross_entropy(
        model(batch["input_ids"]), batch["targets"], batch["domain_ids"], stats=stats, reduction="none"
    )
    (losses * (torch.arange(T) < 5) / 60).sum().backward()
    influence.end_step()
    masked = {**batch, "targets": torch.where(torch.arange(T) < 5, batch["targets"], -100)}
    assert_same(table(influence), measured([masked]))


def test_ignored_tokens_add_nothing_to_a_row():
    batch = rows(12, 3)
    batch["targets"][::2, 4:] = -100
    batch["targets"][3] = -100
    model = small_model()
    ours = measured([batch], model=model, rank=24)
    norms = exact(model, batch, Influence(model, probes()).layers)[2]
    np.testing.assert_allclose(ours.row_norm_sq, norms, rtol=0.15)


def test_merged_domains_have_the_mean_of_their_rows():
    batch = rows(12, 4)
    merged = {**batch, "domain_ids": batch["domain_ids"].clamp(min=1)}
    apart, together = measured([batch]), measured([merged])
    np.testing.assert_allclose(together.value[1], (apart.value[0] + apart.value[1]) / 2, rtol=1e-4, atol=1e-6)
    assert together.rows[1] == apart.rows[0] + apart.rows[1]
    assert math.isnan(together.value[0, 0])
    assert together.step.tolist() == [-1, 0, 0]


def test_rows_of_no_domain_count_nowhere():
    batch = rows(12, 4)
    some = {key: value[:9] for key, value in batch.items()}
    batch["domain_ids"][9:] = -1
    assert_same(measured([batch]), measured([some]))


def test_ids_may_be_given_for_each_token():
    model, batch = small_model(), rows(12, 4)
    influence, stats = begin(model, 12)
    logits = model(batch["input_ids"]).flatten(0, 1)
    ids = batch["domain_ids"].repeat_interleave(T)
    domain_cross_entropy(logits, batch["targets"].flatten(), ids, stats=stats).backward()
    influence.end_step()
    assert_same(table(influence), measured([batch]))


# The training step is what it would be


def test_gradients_and_parameters_are_bit_for_bit_the_same():
    def gradients(with_influence):
        model, batch = small_model(dropout=0.1), rows(12, 0)
        influence, stats = begin(model, 12) if with_influence else (None, None)
        torch.manual_seed(7)
        result = []
        for _ in range(2):
            backward(model, stats, batch) if stats else domain_cross_entropy(
                model(batch["input_ids"]), batch["targets"]
            ).backward()
            result += [p.grad.clone() for p in model.parameters()]
            if influence:
                influence.end_step()
            assert all(
                torch.equal(a, p.grad)
                for a, p in zip(result[-len(list(model.parameters())) :], model.parameters(), strict=True)
            )
            assert model.training
        return result

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


class Checkpointed(nn.Module):
    """reentrant: which variant, None for neither."""

    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        m = self.model
        hidden = m.wte(x) + m.wpe.weight[: x.shape[1]]
        for block in m.h:
            if self.reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
        return m.lm_head(m.ln_f(hidden))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_pass_counts_once(reentrant):
    model = small_model()
    batches = split(rows(12, 0), 6, 6)
    plain = measured(batches, model=Checkpointed(model, None))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert_same(measured(batches, model=Checkpointed(model, reentrant)), plain)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True)), "nor does the probe"


def test_two_forward_passes_before_two_backward_passes():
    model = small_model()
    first, second = split(rows(12, 0), 6, 6)
    influence, stats = begin(model, 6)
    losses = [
        domain_cross_entropy(model(b["input_ids"]), b["targets"], b["domain_ids"], stats=stats) for b in (first, second)
    ]
    losses[1].backward()
    losses[0].backward()
    influence.end_step()
    assert_same(table(influence), measured([first, second]))


def test_passes_without_gradient_or_paused_or_never_finished_are_not_counted():
    model, batch, other = small_model(), rows(12, 0), rows(12, 1)
    influence, stats = begin(model, 12)
    with torch.no_grad():
        domain_cross_entropy(model(other["input_ids"]), other["targets"], other["domain_ids"], stats=stats)
    with stats.paused():
        backward(model, stats, other)
    domain_cross_entropy(model(other["input_ids"]), other["targets"], other["domain_ids"], stats=stats)
    backward(model, stats, batch)
    model(rows(5, 1)["input_ids"]).sum().backward()  # an evaluation of another size, with gradients
    influence.end_step()
    assert_same(table(influence), measured([batch]))


def test_autocast_changes_little():
    model, batch = small_model(), rows(12, 0)
    plain = measured([batch], model=model)
    influence, stats = begin(model, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch["input_ids"])
    assert logits.dtype == torch.bfloat16
    domain_cross_entropy(logits, batch["targets"], batch["domain_ids"], stats=stats).backward()
    influence.end_step()
    assert_same(table(influence), plain, rtol=0.03)


def test_conv1d_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=24, n_layer=2, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    batch = rows(24, 0)
    influence, stats = begin(model, 24, rank=32)
    assert len(influence.layers) == 8
    loss = domain_cross_entropy(model(batch["input_ids"]).logits, batch["targets"], batch["domain_ids"], stats=stats)
    loss.backward()
    influence.end_step()
    layers = influence.layers
    influence.close()

    class Logits(nn.Module):
        def forward(self, x):
            return model(x).logits

    plain = Logits()
    plain.named_modules = model.named_modules
    value, _, norms = exact(plain, batch, layers)
    assert np.corrcoef(table(influence).value.ravel(), value.ravel())[0, 1] > 0.95
    np.testing.assert_allclose(table(influence).row_norm_sq, norms, rtol=0.2)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_under_compile_the_model_stays_one_graph():
    model = small_model()
    plain = [measured([rows(12, step)], model=model) for step in range(2)]
    influence, stats = begin(model, 12, stride=2, probe_every=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for step in range(2):  # the first has no sketches
            backward(compiled, stats, rows(12, step))
            influence.end_step()
    assert table(influence).step.tolist() == [3, 3, 3]
    # Rows of steps 1 and 3, which are the same; probes of both, which are the same rows.
    np.testing.assert_allclose(table(influence).value, plain[1].value, rtol=1e-3, atol=1e-4)


# Bad input


def test_rows_whose_gradient_is_not_finite_are_left_out():
    model, batch = small_model(), rows(12, 0)
    influence, stats = begin(model, 12)
    logits = model(batch["input_ids"])
    logits.register_hook(lambda g: g.index_fill(0, torch.tensor([0, 5]), math.inf))
    domain_cross_entropy(logits, batch["targets"], batch["domain_ids"], stats=stats).backward()
    influence.end_step()
    keep = torch.tensor([i not in (0, 5) for i in range(12)])
    assert_same(table(influence), measured([{key: value[keep] for key, value in batch.items()}]))
    assert table(influence).bad.tolist() == [2, 0]


def test_an_overflow_of_the_whole_step_is_left_out():
    model = small_model()
    influence, stats = begin(model, 12)
    backward(model, stats, rows(12, 0), math.inf)
    influence.end_step()
    assert np.isnan(table(influence).value).all()
    assert table(influence).bad[0] == 12


@pytest.mark.parametrize("ids", [[0, 3, 1], [0, -2, 1]])
def test_an_unknown_domain_is_told_once(ids):
    model = small_model()
    influence, _ = begin(model, 3)
    batch = rows(3, 0)
    loss = nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
    influence.rows(loss, torch.tensor(ids), 3 * T)
    loss.backward()
    influence.end_step()
    with pytest.raises(StatsError, match=r"1 rows of plan step 0 have a domain id that is not in \[-1, 3\)"):
        influence.snapshot().wait()
    assert table(influence).rows[0] == 1


def test_a_row_of_several_domains_is_refused():
    model = small_model()
    influence, stats = begin(model, 3)
    batch = rows(3, 0)
    batch["domain_ids"] = torch.zeros(3, T, dtype=torch.int64)
    batch["domain_ids"][1, 4:] = 1
    backward(model, stats, batch)
    influence.end_step()
    with pytest.raises(StatsError, match="differ within the row"):
        influence.snapshot().wait()


def test_layers_are_chosen_by_name_and_a_model_without_any_is_refused():
    model = small_model()
    assert len(Sketcher(model, 4).names) == 8, "linear layers of the blocks, without the head"
    assert Sketcher(model, 4, "*.mlp.*").names == ("h.0.mlp.c_fc", "h.0.mlp.c_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj")
    assert Sketcher(model, 4, ["lm_head"]).names == ("lm_head",)
    with pytest.raises(ConfigError, match="none that matches"):
        Sketcher(model, 4, "*.experts.*")
    with pytest.raises(ConfigError, match="no linear layer"):
        Sketcher(nn.Embedding(3, 4), 4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="weight that is trained"):
        Sketcher(model, 4)


def test_a_layer_that_sees_no_rows_is_named():
    class Flat(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.h = nn.ModuleList([nn.Linear(24, 24)])
            self.model = model

        def forward(self, x):
            hidden = self.model.wte(x)
            return self.model.lm_head(self.h[0](hidden.flatten(0, 1)).view_as(hidden))

    model = Flat(small_model())
    influence, stats = begin(model, 12, layers="h.0")
    backward(model, stats, rows(12, 0))
    with pytest.raises(ConfigError, match=r"layer h\.0 gave no sketch in a pass over 12 rows"):
        influence.end_step()


def test_a_step_whose_loss_does_not_say_its_rows_is_refused():
    model = small_model()
    influence, _ = begin(model, 12, stride=2)
    batch = rows(12, 0)
    for step in range(2):
        domain_cross_entropy(model(batch["input_ids"]), batch["targets"], batch["domain_ids"]).backward()
        if step == 0:
            influence.end_step()
    with pytest.raises(ConfigError, match="plan step 1 is one with sketches, but no loss said whose its rows are"):
        influence.end_step()


def test_no_hook_is_left_after_close():
    model = small_model()
    influence, _ = begin(model, 12)
    assert any(m._forward_hooks for m in model.modules())
    influence.close()
    assert not any(m._forward_hooks for m in model.modules())


def test_options_and_probes_are_checked():
    model = small_model()
    for name in ("rank", "stride", "probe_every", "probe_rows"):
        with pytest.raises(ConfigError, match=f"{name} is 0; expected a whole number of at least 1"):
            Influence(model, probes(), **{name: 0})
    with pytest.raises(ConfigError, match="half_life is 0"):
        Influence(model, probes(), half_life=0)
    with pytest.raises(ConfigError, match="no probes"):
        Influence(model).begin(NAMES, 4)
    with pytest.raises(ConfigError, match="field 'source' holds token 39; expected ids below 30"):
        ProbeRows({"source": [{k: v.clamp(min=39) for k, v in rows(2, 0).items()}]}, 30)
    with pytest.raises(ConfigError, match="holds token -1"):
        ProbeRows({"a": [{"input_ids": torch.tensor([[-1]]), "targets": torch.tensor([[1]])}]})
    with pytest.raises(ConfigError, match="no batches"):
        ProbeRows({"a": []})
    with pytest.raises(ConfigError, match=r"input_ids \[2, 3\] and targets \[2, 4\]"):
        ProbeRows({"a": [{"input_ids": torch.zeros(2, 3), "targets": torch.zeros(2, 4)}]})


@pytest.mark.parametrize(
    ("step_rows", "steps", "expected"),
    [(480, None, (20, 20)), (12, None, (20, 356)), (12, 10_000, (20, 356)), (12, 1600, (20, 100)), (12, 10, (1, 1))],
)
def test_probes_come_less_often_with_few_rows_a_step_and_often_enough_in_a_short_run(step_rows, steps, expected):
    influence = Influence(small_model(), probes())
    influence.begin(NAMES, 4, step_rows=step_rows, steps=steps)
    assert len(influence.fields) == 2
    assert (influence.stride, influence.probe_every) == expected
    assert influence.half_life == 2 * influence.probe_every
    given = Influence(small_model(), probes(), stride=7, probe_every=3, half_life=5)
    given.begin(NAMES, 4, step_rows=step_rows, steps=steps)
    assert (given.stride, given.probe_every, given.half_life) == (7, 3, 5)


def test_probes_go_on_where_they_ended_and_may_be_a_function():
    pool = ProbeRows({"a": [{"input_ids": torch.arange(5)[:, None], "targets": torch.arange(5)[:, None]}]})
    assert [pool.take(n, 2)[0].flatten().tolist() for n in range(3)] == [[0, 1], [2, 3], [4, 0]]
    drawn = ProbeRows({"a": lambda number: rows(3, number)})
    assert torch.equal(drawn.take(4, 8)[0], rows(3, 4)["input_ids"])


# State


def test_a_state_goes_on_exactly_and_is_of_one_run():
    def steps(model, influence, stats, first, last):
        for step in range(first, last):
            backward(model, stats, rows(12, step))
            influence.end_step()

    model = small_model()
    whole, stats = begin(model, 12, stride=2, probe_every=3, probe_rows=3)
    steps(model, whole, stats, 0, 9)
    for stop in (1, 4, 6):
        part, stats = begin(model, 12, stride=2, probe_every=3, probe_rows=3)
        steps(model, part, stats, 0, stop)
        saved = part.state_dict()
        before = part.snapshot()
        part, stats = begin(model, 12, stride=2, probe_every=3, probe_rows=3)
        part.load_state_dict(saved)
        assert part.step == stop
        if before is not None:
            assert np.array_equal(table(part).value, before.wait().value, equal_nan=True)
        steps(model, part, stats, stop, 9)
        for key in ("value", "std", "gram", "row_norm_sq", "rows", "step", "probe_step"):
            assert np.array_equal(getattr(table(part), key), getattr(table(whole), key), equal_nan=True), key
    with pytest.raises(StateError, match="other settings"):
        begin(model, 12, rank=8)[0].load_state_dict(saved)
    other = Influence(model, probes(), rank=16, half_life=20.0)
    other.begin(("one", "two"), 12)
    with pytest.raises(StateError, match="is of 3 domains; this run has 2"):
        other.load_state_dict(saved)


def test_more_domains_begin_with_nothing_and_change_nothing_else():
    model = small_model()
    influence, stats = begin(model, 12)
    backward(model, stats, rows(12, 0))
    influence.end_step()
    before = table(influence)
    influence.grow((*NAMES, "new"))
    after = table(influence)
    assert np.array_equal(after.value[:3], before.value)
    assert np.allclose(after.gram[:3, :3], before.gram, rtol=1e-4)
    assert np.isnan(after.value[3]).all()
    batch = rows(12, 1)
    batch["domain_ids"][:4] = 3
    loss = nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
    influence.rows(loss, batch["domain_ids"], 12 * T)
    loss.backward()
    influence.end_step()
    assert np.isfinite(table(influence).value).all()
    assert table(influence).rows[3] == 4
