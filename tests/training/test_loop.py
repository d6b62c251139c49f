from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline import artifacts
from pipeline.artifacts import StaleArtifact
from pipeline.training import checkpoint
from pipeline.training.loop import TrainingDiverged, TrainResult, train
from pipeline.training.policy import Movement
from tests.training.toy import BATCH, STEPS, Killed, ToyBatches, same_tensors, toy_model, toy_settings, without_times


def run(directory, batches=None, settings=None, **kwargs) -> TrainResult:
    directory = None if directory is None else str(directory)
    return train(
        toy_model(),
        None,
        batches or ToyBatches(),
        settings or toy_settings(ema_decay=0.9, warmup_epochs=1, clip_grad_norm=1.0),
        steps_per_epoch=STEPS,
        checkpoint_dir=directory,
        fingerprint="abc",
        **kwargs,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dies_at", [4, 6, 13])
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path, optimizer, dies_at):
    settings = toy_settings(ema_decay=0.9, warmup_epochs=1, optimizer=optimizer, lr=0.01)
    whole = run(tmp_path / "whole", settings=settings)
    with pytest.raises(Killed):
        run(tmp_path / "cut", ToyBatches(dies_at=dies_at), settings)
    torch.rand(3)  # the caller's random numbers do not matter
    resumed = run(tmp_path / "cut", settings=settings)
    assert resumed.resumed_from == dies_at // 4 * 4
    assert same_tensors(whole.state_dict, resumed.state_dict)
    assert without_times(whole.history) == without_times(resumed.history)
    last = [checkpoint.load(checkpoint.path_of(str(tmp_path / name), 15)) for name in ("whole", "cut")]
    assert same_tensors(last[0]["model"], last[1]["model"])
    assert torch.equal(last[0]["random_states"][0]["cpu"], last[1]["random_states"][0]["cpu"])


def test_rewinding_is_the_last_part_of_the_long_schedule_also_after_a_resume(tmp_path):
    long = run(None, settings=toy_settings(epochs=8, warmup_epochs=1, log_every_steps=1))
    settings = toy_settings(epochs=3, warmup_epochs=1, rewind_epochs=8, log_every_steps=1)
    whole = run(tmp_path / "whole", settings=settings)
    with pytest.raises(Killed):
        run(tmp_path / "cut", ToyBatches(dies_at=6), settings)
    resumed = run(tmp_path / "cut", settings=settings)
    assert resumed.resumed_from == 4
    # 40 steps in all, 5 of them warm-up; of the cosine's 35 the last 15, from step 20 on.
    cosine = [1e-5 + (0.1 - 1e-5) * (1 + math.cos(math.pi * t / 35)) / 2 for t in range(20, 35)]
    assert [record["lr"] for record in whole.history] == pytest.approx(cosine, rel=1e-12)
    for rates in ([record["lr"] for record in result.history] for result in (whole, resumed)):
        assert rates == [record["lr"] for record in long.history[25:]]
    assert same_tensors(whole.state_dict, resumed.state_dict)


def test_a_rewound_schedule_is_another_training(tmp_path):
    run(tmp_path, settings=toy_settings(rewind_epochs=8))
    with pytest.raises(StaleArtifact, match=r"settings.rewind_epochs: 8 -> None"):
        run(tmp_path, settings=toy_settings())


def test_movement_is_the_sum_of_minus_weight_times_gradient_also_after_a_resume(tmp_path):
    settings = toy_settings(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.01)
    whole = run(tmp_path / "whole", settings=settings, policies=[Movement])
    with pytest.raises(Killed):
        run(tmp_path / "cut", ToyBatches(dies_at=6), settings, policies=[Movement])
    assert same_tensors(run(tmp_path / "cut", settings=settings, policies=[Movement]).statistics, whole.statistics)
    # Plain SGD: the first step moves w by -lr g, so its -w g is w (w' - w) / lr.
    before = dict(toy_model().named_parameters())
    one = toy_settings(optimizer="sgd", momentum=0.0, weight_decay=0.0, epochs=1, lr=0.01)

    def first_step(epoch: int, start_step: int) -> list:
        return list(ToyBatches()(epoch, start_step))[:1]

    first = train(toy_model(), None, first_step, one, steps_per_epoch=1, policies=[Movement])
    assert len(first.statistics) == len(before)
    for key, movement in first.statistics.items():
        name = key.removeprefix("movement/")
        expected = before[name].detach() * (first.state_dict[name] - before[name].detach()) / 0.01
        assert torch.allclose(movement, expected, atol=1e-4), name
    assert run(None).statistics == {}


def test_finished_run_is_only_read_again(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, ToyBatches(dies_at=0))
    assert again.resumed_from == 15
    assert same_tensors(first.state_dict, again.state_dict)


def test_the_model_learns_and_is_not_changed_itself():
    model = toy_model(dropout=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = train(model, None, ToyBatches(), toy_settings(epochs=10), steps_per_epoch=STEPS)
    assert same_tensors(before, model.state_dict())
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert [record["rows"] for record in result.history] == [BATCH] * 50


def test_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(None)
    assert torch.equal(torch.rand(1), expected)


def test_records_come_at_the_end_of_an_epoch_and_as_often_as_asked(tmp_path):
    seen = []
    settings = toy_settings(log_every_steps=3, checkpoint_every_steps=100)
    result = run(tmp_path, settings=settings, on_progress=lambda history: seen.append(history[-1]))
    assert [record["step"] for record in seen] == [3, 5, 6, 9, 10, 12, 15]
    assert seen == result.history
    assert [record["epoch"] for record in seen] == [0, 0, 1, 1, 1, 2, 2]
    assert [record["rows"] for record in seen] == [24, 16, 8, 24, 8, 16, 24]


def test_the_last_two_checkpoints_are_kept(tmp_path):
    run(tmp_path)
    assert artifacts.list_dir(str(tmp_path)) == ["step-00000012.pt", "step-00000015.pt"]


def test_checkpoints_may_lie_behind_a_uri(tmp_path):
    with pytest.raises(Killed):
        run(f"file://{tmp_path}", ToyBatches(dies_at=13))
    assert artifacts.list_dir(str(tmp_path)) == ["step-00000008.pt", "step-00000012.pt"]
    assert run(f"file://{tmp_path}").resumed_from == 12


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    whole = run(tmp_path)
    newest = tmp_path / "step-00000015.pt"
    data = bytearray(newest.read_bytes())
    if damage == "flipped":
        data[data.index(checkpoint.load(str(newest))["model"]["6.weight"].numpy().tobytes())] ^= 1
    newest.write_bytes({"truncated": data[:-100], "flipped": data, "empty": b""}[damage])
    resumed = run(tmp_path)
    assert resumed.resumed_from == 12
    assert same_tensors(whole.state_dict, resumed.state_dict)
    assert checkpoint.load(str(newest))["step"] == 15


def test_leftovers_of_a_later_step_do_not_displace_good_checkpoints(tmp_path):
    (tmp_path / "step-00000014.pt").write_bytes(b"torn")
    with pytest.raises(Killed):
        run(tmp_path, ToyBatches(dies_at=9))
    assert checkpoint.steps_in(str(tmp_path)) == [8, 4]


def test_checkpoint_of_another_run_is_refused_with_both_fingerprints(tmp_path):
    run(tmp_path)
    with pytest.raises(StaleArtifact, match=r"step-00000015.pt was trained from abc, this run asks for xyz"):
        train(
            toy_model(),
            None,
            ToyBatches(),
            toy_settings(),
            steps_per_epoch=STEPS,
            checkpoint_dir=str(tmp_path),
            fingerprint="xyz",
        )
    with pytest.raises(StaleArtifact, match=r"settings.lr: 0.1 -> 0.2"):
        run(tmp_path, settings=toy_settings(ema_decay=0.9, warmup_epochs=1, clip_grad_norm=1.0, lr=0.2))


def test_cadence_is_no_part_of_the_identity(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, ToyBatches(dies_at=9), toy_settings(checkpoint_every_steps=4))
    assert run(tmp_path, settings=toy_settings(checkpoint_every_steps=5, log_every_steps=2)).resumed_from == 8


def test_nan_stops_with_the_step_the_rate_and_the_way_out(tmp_path):
    class Poisoned(ToyBatches):
        def __call__(self, epoch, start_step):
            for step, (images, labels) in enumerate(super().__call__(epoch, start_step), start=start_step):
                yield images * (float("nan") if epoch * STEPS + step == 6 else 1.0), labels

    settings = toy_settings(log_every_steps=100)
    with pytest.raises(
        TrainingDiverged, match=r"loss is nan at step 6 \(epoch 1, step 1 of 5\), lr 0.065.*Lower lr \(now 0.1\)"
    ):
        run(tmp_path, Poisoned(), settings)
    assert checkpoint.steps_in(str(tmp_path)) == [4]


def test_weights_that_are_not_finite_are_never_stored(tmp_path):
    # The loss of step 3 is finite; its update is not, and the checkpoint after step 4 would hold it.
    settings = toy_settings(lr=1e38, min_lr=1e38, weight_decay=1e38, checkpoint_every_steps=1)
    with pytest.raises(TrainingDiverged, match=r"the update made .* NaN or Inf at step"):
        run(tmp_path, settings=settings)
    for step in checkpoint.steps_in(str(tmp_path)):
        state = checkpoint.load(checkpoint.path_of(str(tmp_path), step))
        assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(("steps", "given"), [(4, "more"), (6, "only 5")])
def test_batches_must_give_as_many_steps_as_promised(steps, given):
    with pytest.raises(ValueError, match=f"has {steps} steps, the batches of rank 0 give {given}"):
        train(toy_model(), None, ToyBatches(), toy_settings(), steps_per_epoch=steps)


def test_teacher_is_followed_in_eval_mode_without_being_changed():
    teacher = toy_model(seed=5, dropout=0.9).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    settings = toy_settings(distill_weight=1.0, epochs=20)
    result = train(toy_model(dropout=0.0), teacher, ToyBatches(), settings, steps_per_epoch=STEPS)
    assert same_tensors(before, teacher.state_dict())
    assert teacher.training
    assert result.history[-1]["loss"] < 0.2 * result.history[0]["loss"]


def test_distillation_without_teacher_is_refused():
    with pytest.raises(ValueError, match=r"distill_weight is 0.5, but no teacher"):
        train(toy_model(), None, ToyBatches(), toy_settings(distill_weight=0.5), steps_per_epoch=STEPS)


def test_bf16_and_channels_last_train_on_the_cpu_too():
    settings = toy_settings(amp="bf16", channels_last=True, ema_decay=0.5)
    result = train(toy_model(), None, ToyBatches(), settings, steps_per_epoch=STEPS)
    assert {tensor.dtype for tensor in result.state_dict.values()} == {torch.float32, torch.int64}
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_one_step_is_the_gradient_of_the_batch_mean():
    # loss = mean over rows of ln(1 + exp(-w x)): at w = 0 its gradient is -mean(x) / 2 for class 1's weight.
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    images, labels = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([1, 1, 1])
    settings = toy_settings(epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0)
    result = train(model, None, lambda epoch, step: [(images, labels)], settings, steps_per_epoch=1)
    assert result.state_dict["weight"].flatten().tolist() == pytest.approx([-1.5, 1.5])


def test_a_step_without_any_row_changes_no_weight():
    model = nn.Linear(1, 2, bias=False)
    settings = toy_settings(epochs=1, weight_decay=0.0)
    empty = torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    result = train(model, None, lambda epoch, step: [empty], settings, steps_per_epoch=1)
    assert torch.equal(result.state_dict["weight"], model.weight)
    assert (result.history[0]["rows"], result.history[0]["loss"]) == (0, 0.0)
