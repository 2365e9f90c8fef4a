"""Optimisation by row: against AdamW, against counted steps, and how far rows move that are seen 1, 10, 100 times."""

import math
from itertools import combinations, product

import pytest
import torch

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.models.diffusion.row_adam import RowAdam, RowRule, equal_rates, visit_probability


def table_of(rows, width=3):
    return torch.nn.Parameter(torch.zeros(rows, width, dtype=torch.float64))


def move(table, optimizer, schedule, steps):
    """Gradient 1 in each row at the steps that it is seen; `schedule` {row: steps}."""
    for step in range(steps):
        table.grad = torch.zeros_like(table)
        for row, seen in schedule.items():
            table.grad[row] = float(step in seen)
        optimizer.step()
    return -table.detach()[:, 0]


SEEN = {row: set(range(500 // count, 1000, 1000 // count)) for row, count in enumerate((1, 10, 100, 1000))}


@pytest.mark.parametrize(("cap", "expected"), [(2000.0, [1.0, 1, 1, 1]), (50.0, [0.05, 0.5, 1, 1])])
def test_rows_move_equally_far_under_equal_rates(cap, expected):
    """Gradients of 1 at 1, 10, 100 and all of 1000 steps, and a row that is never seen."""
    table = table_of(5)
    counts = torch.tensor([len(seen) for seen in SEEN.values()] + [0])
    assert counts.tolist() == [1, 10, 100, 1000, 0]
    rates = equal_rates(counts.double() / 1000, cap)
    moved = move(table, RowAdam([table], {table: RowRule(0, rates)}, 1e-3, 0.0), SEEN, 1000)
    # Adam's epsilon, 1e-8 beside a gradient of 1, is all that is missing.
    torch.testing.assert_close(moved, torch.tensor([*expected, 0], dtype=torch.float64), rtol=1e-6, atol=0)


def travelled_under_adam(visits, spacing, beta1=0.9, beta2=0.999):
    """Learning rates that Adam moves a parameter by, its gradient being 1 every `spacing` steps and 0 between.

    Far apart, the first moment is 1 - b1 at a visit and decays alone, a geometric series; the second is that of visits
    `spacing` apart, corrected: (1 - b2) / (1 - b2^spacing).
    """
    isolated = (1 - beta1) / math.sqrt(1 - beta2) / (1 - beta1 / math.sqrt(beta2))
    return visits * isolated * math.sqrt(1 - beta2**spacing)


def test_under_adam_rare_rows_lag():
    table, rate, steps = table_of(2), 1e-3, 3000
    seen = {0: set(range(499, 2500, 500)), 1: set(range(steps))}
    moved = move(table, torch.optim.AdamW([table], lr=rate, weight_decay=0.0), seen, steps) / rate
    # The correction of the bias goes on during the series: 0.999^20 changes it by 1 %.
    assert moved[0].item() == pytest.approx(travelled_under_adam(len(seen[0]), 500), rel=0.02)
    assert moved[1].item() == pytest.approx(steps, rel=1e-6)
    # DECU's command: 875,000 steps of 32 images at 1e-5, about 908,000 images, so 31 draws of each.
    for images, most in ((1, 0.010), (10, 0.09), (100, 0.48), (1300, 1.8)):
        found = 1e-5 * travelled_under_adam(31 * images, 908_000 / 32 / images)
        assert found == pytest.approx(most, rel=0.08), "what simulation of the published training gave"


def test_an_isolated_gradient_moves_by_31_8_learning_rates_and_its_first_step_by_3_16():
    table = table_of(1, 1)
    optimizer = torch.optim.AdamW([table], lr=1.0, weight_decay=0.0)
    # As it is late in a training without a gradient: no moments, and corrections of 1.
    zero = torch.zeros_like(table)
    optimizer.state[table] = {"step": torch.tensor(50_000.0), "exp_avg": zero.clone(), "exp_avg_sq": zero.clone()}
    steps = []
    for step in range(300):
        table.grad = torch.full_like(table, float(step == 0))
        optimizer.step()
        steps.append(-table.item())
    assert steps[0] == pytest.approx((1 - 0.9) / math.sqrt(1 - 0.999), rel=1e-4) == pytest.approx(3.16, abs=0.01)
    assert steps[-1] == pytest.approx(travelled_under_adam(1, 10**6), rel=1e-4) == pytest.approx(31.8, abs=0.05)


@pytest.mark.parametrize("step", [1, 2, 20, 200])
def test_a_first_visit_moves_by_one_where_sparse_adam_corrects_by_the_tables_steps(step):
    ours, theirs = table_of(2, 1), table_of(2, 1)
    by_row = RowAdam([ours], {ours: RowRule(0, torch.ones(2, dtype=torch.float64))}, 1.0, 0.0)
    sparse = torch.optim.SparseAdam([theirs], lr=1.0)
    for number in range(1, step + 1):
        row = int(number == step)  # row 0 at all steps but the last, which is row 1's
        gradient = torch.zeros(2, 1, dtype=torch.float64)
        gradient[row] = 0.5
        ours.grad = gradient.clone()
        theirs.grad = torch.sparse_coo_tensor(
            torch.tensor([[row]]), gradient[row : row + 1], (2, 1), check_invariants=True
        )
        by_row.step()
        sparse.step()
    corrected = 0.1 / math.sqrt(0.001) * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    assert -ours[1].item() == pytest.approx(1, rel=1e-6)
    assert -theirs[1].item() == pytest.approx(corrected, rel=1e-5)
    # A row that is in every batch moves alike.
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)


def test_rows_in_every_batch_are_adamw():
    source = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=source)
    pair = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    other = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    ours = RowAdam([pair[0], other[0]], {pair[0]: RowRule(0, torch.ones(4))}, 1e-2, 0.1)
    theirs = torch.optim.AdamW([pair[1], other[1]], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        gradient, second = torch.randn(4, 3, generator=source), torch.randn(2, generator=source)
        for table, rest, optimizer in zip(pair, other, (ours, theirs), strict=True):
            table.grad, rest.grad = gradient.clone(), second.clone()
            optimizer.step()
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(other[0], other[1]), "what is no table is AdamW's"


@pytest.mark.parametrize("axis", [0, 1])
def test_unvisited_rows_change_nothing_and_others_not_by_silence(axis):
    """A row seen at steps 0, 5, 9 ends where AdamW ends after three steps with the same gradients."""
    source = torch.Generator().manual_seed(1)
    gradients = torch.randn(3, 4, generator=source)
    table = torch.nn.Parameter(torch.ones(3, 4) if axis == 0 else torch.ones(4, 3))
    alone = torch.nn.Parameter(torch.ones(4))
    row_adam = RowAdam([table], {table: RowRule(axis, torch.ones(3))}, 1e-2, 0.1)
    adamw = torch.optim.AdamW([alone], lr=1e-2, weight_decay=0.1)
    seen = iter(gradients)
    for step in range(10):
        table.grad = torch.zeros_like(table)
        if step in (0, 5, 9):
            gradient = next(seen)
            table.grad.select(axis, 1).copy_(gradient)
            alone.grad = gradient.clone()
            adamw.step()
        row_adam.step()
    torch.testing.assert_close(table.select(axis, 1), alone, rtol=1e-6, atol=1e-7)
    assert torch.equal(table.select(axis, 0), torch.ones(4)) and torch.equal(table.select(axis, 2), torch.ones(4))
    assert row_adam.state[table]["step"].tolist() == [0, 3, 0]


def test_its_state_is_saved_whole(tmp_path):
    source = torch.Generator().manual_seed(2)
    gradients = torch.randn(8, 5, 3, generator=source) * (torch.rand(8, 5, 1, generator=source) < 0.5)

    def run(table, optimizer, part):
        for gradient in part:
            table.grad = gradient.clone()
            optimizer.step()

    def fresh():
        table = torch.nn.Parameter(torch.zeros(5, 3))
        return table, RowAdam([table], {table: RowRule(0, torch.arange(1.0, 6))}, 1e-2, 0.0)

    whole, optimizer = fresh()
    run(whole, optimizer, gradients)
    first, optimizer = fresh()
    run(first, optimizer, gradients[:4])
    save_checkpoint({"state": optimizer.state_dict(), "table": first.detach()}, tmp_path / "state.ckpt")
    kept = load_checkpoint(tmp_path / "state.ckpt")
    second, optimizer = fresh()
    with torch.no_grad():
        second.copy_(kept["table"])
    optimizer.load_state_dict(kept["state"])
    assert optimizer.state[second]["step"].dtype == torch.int64
    run(second, optimizer, gradients[4:])
    assert torch.equal(second, whole)


@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_probability_of_a_visit_is_that_of_all_batches_counted(batch, dropped):
    """Every batch of six images, every pattern of dropped labels."""
    labels = [0, 1, 1, 2, 2, 2]
    batches = list(combinations(range(6), batch))
    expected = [0.0] * 4
    for chosen, kept in product(batches, product([True, False], repeat=batch)):
        weight = math.prod((1 - dropped) if keep else dropped for keep in kept) / len(batches)
        for label in {labels[index] for index, keep in zip(chosen, kept, strict=True) if keep}:
            expected[label] += weight
    found = visit_probability(torch.tensor([1, 2, 3, 0]), 6, batch, dropped)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_rates_of_the_published_budgets():
    """100 classes of 1, 10 and 100 images and 700 of about 1,282, batches of 32: about 1282 : 128 : 13 : 1."""
    counts = torch.tensor([1] * 100 + [10] * 100 + [100] * 100 + [1282] * 700 + [0])
    visits = visit_probability(counts, int(counts.sum()), 32)
    assert visits[0].item() == pytest.approx(32 / int(counts.sum()), rel=1e-3)
    rates = equal_rates(visits, 2000.0)
    assert (rates[[0, 100, 200, 300, 1000]] - torch.tensor([1255.0, 125.5, 12.6, 1, 1])).abs().max() < 3
    assert equal_rates(visits, 50.0).max() == 50
    travelled = (visits * rates)[visits > 0]
    torch.testing.assert_close(travelled, travelled[-1].expand_as(travelled), rtol=1e-9, atol=0)
