import copy
import math

import pytest
import torch
from accelerate import Accelerator

from mcdi_hf.training.reptile import reptile_step


TASKS, INNER_STEPS, ETA, ZETA = 3, 4, 0.1, 0.7


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def task_loss(model: torch.nn.Module, task: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * task + step)
    x, y = (torch.randn(6, width, generator=generator) for width in (3, 2))
    return torch.nn.functional.mse_loss(model(x), y)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def inner_loops_by_hand(model: torch.nn.Module) -> tuple[list[torch.Tensor], float]:
    """The weights phi_i after each task's own gradient steps, and the mean loss on the way."""
    found, losses = [], []
    for task in range(TASKS):
        clone = copy.deepcopy(model)
        for step in range(INNER_STEPS):
            loss = task_loss(clone, task, step)
            gradients = torch.autograd.grad(loss, list(clone.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(clone.parameters(), gradients):
                    parameter -= ETA * gradient
            losses.append(loss.item())
        found.append(flat(clone))
    return found, sum(losses) / len(losses)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss=task_loss, **options) -> tuple[float, float]:
    return reptile_step(Accelerator(cpu=True), model, optimizer, TASKS, loss, INNER_STEPS, ETA, **options)


def test_sgd_outside_is_reptile(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=ZETA)
    for _ in range(2):  # nothing is left over from one step to the next
        phi = flat(model)
        adapted, mean_loss = inner_loops_by_hand(model)
        expected = phi + ZETA / TASKS * sum(phi_i - phi for phi_i in adapted)
        assert step(model, optimizer) == (pytest.approx(mean_loss, rel=1e-5), 0.0)
        torch.testing.assert_close(flat(model), expected)
        assert (expected - phi).abs().max() > 1e-3


def test_inner_loops_leave_the_model_alone(model: torch.nn.Module) -> None:
    before, seen = flat(model), []

    def watched(clone: torch.nn.Module, task: int, inner_step: int) -> torch.Tensor:
        assert torch.equal(flat(model), before)
        assert torch.equal(flat(clone), before) == (inner_step == 0)
        seen.append((task, inner_step))
        return task_loss(clone, task, inner_step)

    step(model, torch.optim.SGD(model.parameters(), lr=ZETA), watched)
    assert seen == [(task, inner_step) for task in range(TASKS) for inner_step in range(INNER_STEPS)]
    assert not torch.equal(flat(model), before)


def test_the_outer_gradient_is_clipped(model: torch.nn.Module) -> None:
    before = flat(model)
    step(model, torch.optim.SGD(model.parameters(), lr=ZETA), max_grad_norm=0.01)
    assert (flat(model) - before).norm().item() == pytest.approx(ZETA * 0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(model: torch.nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=ZETA)
    step(model, optimizer)
    before, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])

    def diverging(clone: torch.nn.Module, task: int, inner_step: int) -> torch.Tensor:
        loss = task_loss(clone, task, inner_step)
        return loss * math.nan if (task, inner_step) == (TASKS - 1, INNER_STEPS - 1) else loss

    with pytest.raises(FloatingPointError, match="diverged"):
        step(model, optimizer, diverging)
    assert torch.equal(flat(model), before)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][name], after[i][name]) for i in state for name in state[i])


def test_an_outer_loss_counts_as_much_as_the_same_loss_inside_to_first_order(model: torch.nn.Module) -> None:
    """So with one inner step, where first order is all there is, it doubles the step of the same task's loss."""
    phi = flat(model)
    loss = task_loss(model, 0, 0)
    gradient = torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(model.parameters()))])

    def first_task(model: torch.nn.Module, *_: int) -> torch.Tensor:
        return task_loss(model, 0, 0)

    found = reptile_step(
        Accelerator(cpu=True),
        model,
        torch.optim.SGD(model.parameters(), lr=ZETA),
        1,
        first_task,
        1,
        ETA,
        outer_loss=first_task,
    )
    assert found == (pytest.approx(loss.item()), pytest.approx(loss.item()))
    torch.testing.assert_close(flat(model), phi - 2 * ZETA * ETA * gradient)


def test_without_tasks_the_outer_loss_is_all_there_is(model: torch.nn.Module) -> None:
    phi, before = flat(model), task_loss(model, 0, 0).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=ZETA)
    inner, outer = reptile_step(
        Accelerator(cpu=True), model, optimizer, 0, task_loss, outer_loss=lambda model: task_loss(model, 0, 0)
    )
    assert (inner, outer) == (0.0, pytest.approx(before))
    assert task_loss(model, 0, 0).item() < before and not torch.equal(flat(model), phi)


def test_an_outer_loss_that_is_not_finite_stops_the_run(model: torch.nn.Module) -> None:
    before = flat(model)
    with pytest.raises(FloatingPointError, match="outer loss nan"):
        step(model, torch.optim.SGD(model.parameters(), lr=ZETA), outer_loss=lambda m: task_loss(m, 0, 0) * math.nan)
    assert torch.equal(flat(model), before)
