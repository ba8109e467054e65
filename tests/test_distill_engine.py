"""The training loop: resumption at any step, schedule, accumulation, precision, skipped updates."""

import math

import pytest
import torch

pytest.importorskip("timm", reason="the trainer is built on timm (extra 'train')")

from small_training import IMAGES, BrokenLoss, Watch, images, make_training, numbers, through_a_file, weights  # noqa: E402
from small_vits import one_thread, vit  # noqa: E402, F401  (a fixture)
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.task import ClassificationTask  # noqa: E402
from torch import nn  # noqa: E402

from skd.distill import engine, updates  # noqa: E402
from skd.distill.distributed import World  # noqa: E402
from skd.distill.errors import DistillError  # noqa: E402
from skd.distill.interruption import Stopped  # noqa: E402
from skd.distill.testing import evaluate  # noqa: E402

STEPS = IMAGES // 8
PLAIN = {"epochs": 1, "opt": "momentum", "lr": 0.05, "schedule": "epoch"}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_it_learns_and_tells_of_every_epoch():
    training, watch = make_training(optim={"epochs": 6, "lr": 5e-3}), Watch()
    results = training.run(watch)
    assert results == watch.results and [result.epoch for result in results] == [1, 2, 3, 4, 5, 6]
    assert watch.steps == 6 * STEPS and len(watch.readings) == 6
    assert results[-1].train_loss < 0.8 * results[0].train_loss
    for result in results:
        parts = 0.1 * result.train_ce + 0.9 * result.train_kd + 0.2 * result.train_spectral
        assert result.train_loss == pytest.approx(parts, rel=1e-5)
        assert result.bad_steps == 0 and result.ema_top1 is None and 0 < result.lr <= 5e-3


@pytest.mark.parametrize("stop_after", [1, STEPS - 1, STEPS, 2 * STEPS + 3])
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_resumed_training_ends_with_the_same_bits(stop_after, amp):
    """Stopped within an epoch or at its end, with dropped paths, an average, mixed precision and accumulation."""
    options = {"optim": {"ema": 0.9, "clip_grad": 1.0, "epochs": 3}, "engine": {"amp": amp}}
    whole = make_training(**options)
    whole.run(Watch())
    first, watch = make_training(**options), Watch(stop_after=stop_after)
    watch.training = first
    with pytest.raises(Stopped):
        first.run(watch)
    assert watch.steps == stop_after
    torch.manual_seed(999)  # nothing may depend on what was drawn before
    second = make_training(**options)
    second.load_state_dict(through_a_file(watch.states[-1]))
    assert second.done_steps == stop_after
    second.run(Watch())
    assert same(weights(whole), weights(second))
    assert numbers(whole.results) == numbers(second.results)
    average = [training.task.get_eval_model(ema=True).state_dict() for training in (whole, second)]
    assert same(*average) and not same(average[0], weights(whole))


def test_the_state_has_the_best_score_and_nothing_but_plain_things():
    training, watch = make_training(), Watch()
    watch.training = training
    training.run(watch)
    state = through_a_file(watch.states[-1])
    assert state["best"] == max(result.test_top1 for result in training.results)
    assert {"model", "ema", "updates", "epoch", "step", "best"} <= state.keys() and state["ema"] is None


def rates(**optim) -> list[float]:
    training, watch = make_training(optim={"epochs": 4, **optim}), Watch()
    seen = []
    watch.stepped = lambda: seen.append(training.updates.lr)
    training.run(watch)
    return seen


def test_the_rate_moves_with_every_update_or_every_epoch():
    by_step = rates(schedule="step")
    # timm's warm-up runs into the cosine that began with the first epoch, here at a quarter of its way.
    top = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert by_step[0] == pytest.approx(1e-4) and max(by_step) == pytest.approx(top)
    assert len(set(by_step[:STEPS])) == STEPS and by_step[-1] < 1e-4
    by_epoch = rates(schedule="epoch")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = CosineLRScheduler(optimizer, t_initial=4, lr_min=1e-5, warmup_t=1, warmup_lr_init=1e-4)
    wanted = []
    for epoch in range(4):
        schedule.step(epoch)
        wanted += [optimizer.param_groups[0]["lr"]] * STEPS
    assert by_epoch == pytest.approx(wanted)
    # The published loop steps its scheduler after an epoch, with that epoch's number.
    assert rates(schedule="epoch-late") == pytest.approx(wanted[:STEPS] + wanted[:-STEPS])


def test_accumulated_batches_are_one_large_batch():
    """Without dropped paths, whose draws depend on the batch, and without Adam, which blows rounding up."""

    def trained(**sections):
        training = make_training(student=vit(dtype=torch.float32), **sections)
        training.run(Watch())
        return training

    large = trained(data={"batch_size": 16}, optim=PLAIN)
    small = trained(data={"batch_size": 8}, optim={**PLAIN, "accumulate": 2})
    assert small.updates_in_epoch == large.updates_in_epoch == STEPS // 2
    for a, b in zip(weights(large).values(), weights(small).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert small.results[0].train_loss == pytest.approx(large.results[0].train_loss, rel=1e-4)


def test_more_batches_per_update_than_an_epoch_has_is_refused():
    with pytest.raises(DistillError, match=f"an epoch has {STEPS} batches per process, fewer than --accumulate 7"):
        make_training(optim={"accumulate": 7})


@pytest.mark.parametrize("opt", ["adamw", "lion"], ids=["skipped on the device", "skipped by the host"])
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_bad_update_changes_no_weight_and_is_counted(opt, gradient):
    optim = {"epochs": 1, "opt": opt, "schedule": "epoch"}
    training = make_training(criterion=BrokenLoss([2, 4], gradient), optim=optim)
    seen = [weights(training)]
    watch = Watch()
    watch.stepped = lambda: seen.append(weights(training))
    result = training.run(watch)[0]
    assert [same(a, b) for a, b in zip(seen, seen[1:], strict=False)] == [False, False, True, False, True, False]
    assert result.bad_steps == 2 and math.isfinite(result.train_loss) and math.isfinite(result.test_ce)


@pytest.mark.parametrize("opt", ["adamw", "lion"], ids=["fused", "not fused"])
def test_a_bad_loss_changes_no_weight_in_float16_either(opt):
    """Its gradient may be finite all the same."""

    class Detached(BrokenLoss):
        def forward(self, logits, target):
            loss = super().forward(logits, target)
            return loss if loss.isfinite() else loss.detach() + logits.sum()

    optim = {"epochs": 1, "opt": opt, "schedule": "epoch"}
    training = make_training(criterion=Detached([2, 4]), engine={"amp": "fp16"}, optim=optim)
    training.updates.scaler = torch.amp.GradScaler("cpu", init_scale=16)
    seen = [weights(training)]
    watch = Watch()
    watch.stepped = lambda: seen.append(weights(training))
    result = training.run(watch)[0]
    assert [same(a, b) for a, b in zip(seen, seen[1:], strict=False)] == [False, False, True, False, True, False]
    assert result.bad_steps == 2 and math.isfinite(result.train_loss)


def test_a_gradient_that_overflows_at_every_scale_of_float16_ends_the_training(monkeypatch):
    """A few overflows are how the scale is found."""
    monkeypatch.setattr(updates, "SCALINGS", 4)

    def train(broken_steps):
        criterion = BrokenLoss(broken_steps, gradient=True)
        training = make_training(criterion=criterion, engine={"amp": "fp16", "max_bad_steps": 3})
        training.updates.scaler = torch.amp.GradScaler("cpu", init_scale=16)
        return training.run(Watch())

    assert [result.bad_steps for result in train(range(1, 5))] == [0, 0, 0]
    assert [result.bad_steps for result in train(range(1, 7))] == [1, 1, 0]
    with pytest.raises(DistillError, match="the gradient became infinite or NaN in . updates in a row"):
        train(range(1, 100))


def test_who_goes_on_after_bad_updates_is_not_held_to_them():
    broken = make_training(criterion=BrokenLoss(range(1, 100)), engine={"max_bad_steps": 3})
    watch = Watch(save_every=4)
    watch.training = broken
    with pytest.raises(DistillError, match="in 5 updates in a row"):
        broken.run(watch)
    mended = make_training(engine={"max_bad_steps": 3})
    mended.load_state_dict(through_a_file(watch.states[-1]))
    assert mended.run(Watch())[0].bad_steps == 3


@pytest.mark.parametrize("average", [False, True], ids=["of the model", "of its average"])
def test_a_stop_is_heeded_within_a_test(average):
    """Nothing of the epoch is lost; the test begins anew."""
    whole = make_training(optim={"ema": 0.9})
    whole.run(Watch())
    training, watch = make_training(optim={"ema": 0.9}), Watch()
    watch.training, loader, tests = training, training.test_loader, []

    class Asked:
        def __iter__(self):
            tests.append(0)
            for batch in loader:
                if len(tests) == 3 + average:
                    watch.stop.signum, tests[-1] = 15, tests[-1] + 1
                yield batch

    training.test_loader = Asked()
    with pytest.raises(Stopped):
        training.run(watch)
    state = through_a_file(watch.states[-1])
    assert (state["epoch"], state["step"], tests[-1]) == (1, STEPS, 1) and len(loader) > 1
    again = make_training(optim={"ema": 0.9})
    again.load_state_dict(state)
    again.run(Watch())
    assert same(weights(again), weights(whole)) and numbers(again.results) == numbers(whole.results)


def test_too_many_bad_updates_in_a_row_end_the_training():
    bad = {"criterion": BrokenLoss([1, 3, 4, 5], gradient=False), "optim": {"epochs": 2}}
    with pytest.raises(DistillError, match="loss and ce_loss became infinite or NaN in 3 updates in a row"):
        make_training(**bad, engine={"max_bad_steps": 3}).run(Watch())
    bad["criterion"].calls = 0
    assert make_training(**bad, engine={"max_bad_steps": 4}).run(Watch())[0].bad_steps == 4


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_precision(amp):
    """The student computes in it, its weights stay float32, and every precision learns about the same."""
    training = make_training(engine={"amp": amp}, optim={"epochs": 2})
    seen = []
    student = training.task.get_eval_model()
    student.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    results = training.run(Watch())
    assert set(seen) == {{"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    plain = make_training(optim={"epochs": 2}).run(Watch())
    assert results[-1].train_loss == pytest.approx(plain[-1].train_loss, rel=0.03)
    assert (training.updates.scaler is not None) == (amp == "fp16")


def test_clipping_bounds_the_gradient():
    norms = []

    def keep(training):
        original = training.updates._step_unless

        def step(bad):
            gradients = [p.grad for p in training.updates._parameters if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            original(bad)

        training.updates._step_unless = step
        training.run(Watch())

    keep(make_training(optim={"epochs": 1}))
    assert min(norms) > 0.05
    norms.clear()
    keep(make_training(optim={"epochs": 1, "clip_grad": 0.05}))
    assert max(norms) <= 0.05 * 1.001


def test_channels_last_and_compile_do_not_change_what_is_computed(monkeypatch):
    plain = make_training(optim=PLAIN)
    plain.run(Watch())
    compiled = torch.compile
    # Dynamo's capture without inductor's code, which takes minutes on a small machine.
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(model, **{**options, "backend": "eager"}))
    other = make_training(optim=PLAIN, engine={"compile": True, "channels_last": True})
    watch = Watch()
    watch.training = other
    other.run(watch)
    for (name, a), b in zip(weights(plain).items(), watch.states[-1]["model"]["state_dict"].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert watch.states[-1]["model"]["state_dict"].keys() == weights(plain).keys()


def test_a_plain_classification_task_trains_too():
    model = vit(dtype=torch.float32)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    results = make_training(task=task, optim={"epochs": 2}).run(Watch())
    assert results[-1].train_loss == results[-1].train_ce > 0 == results[-1].train_kd == results[-1].train_spectral
    tested = evaluate(model, images().make_test_loader(World()), World())
    assert tested.correct == results[-1].test_correct and tested.ce == pytest.approx(results[-1].test_ce)


def test_costs_of_the_parts_are_measured_now_and_then():
    training = make_training(optim={"epochs": 6})
    training.run(Watch())
    costs = training.costs.mean()
    assert training.costs.steps == 6, "in the middle of each short epoch"
    assert costs["student"] > 0 and all(seconds >= 0 for seconds in costs.values())
    seconds = make_training().try_steps(6)
    assert len(seconds) == STEPS and all(second > 0 for second in seconds)


def test_batch_norms_that_could_not_be_averaged_stay_as_they_were(monkeypatch):
    """A process was lost between the sum and its division."""
    training, model = make_training(), torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def fail(model, size, reduce):
        model[0].running_mean += 1
        model[1].running_var *= 2
        raise RuntimeError("gloo: connection closed by peer")

    monkeypatch.setattr(engine, "distribute_bn", fail)
    with pytest.raises(RuntimeError, match="gloo"):
        training._average_batch_norms(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
