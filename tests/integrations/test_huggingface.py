"""The Trainer of transformers, steered: as a loop of one's own, and otherwise undisturbed."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_runs import (
    Net,
    digits,
    make,
    measured,
    rates,
    samples,
    sentences,
    sgd,
    tiny_bert,
    weights,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset, default_collate
from transformers import get_cosine_schedule_with_warmup

import batchlr
from batchlr.integrations.huggingface import steer
from batchlr.integrations.training_samples import TrainingSamples
from two_processes import run_in_two


def padded(batch):
    """Sentences of one batch at the length of its longest."""
    longest = max(len(sample["input_ids"]) for sample in batch)
    words = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in batch]
    return {
        "input_ids": torch.tensor(words),
        "attention_mask": (torch.tensor(words) > 0).long(),
        "labels": torch.tensor([sample["labels"] for sample in batch]),
    }


def hand_written(batches, total_steps):
    """The rates of a loop around the controller, on the samples that `steer` draws."""
    model = Net()
    optimizer, _ = sgd(model)
    loss_fn = batchlr.supervised(torch.nn.CrossEntropyLoss())
    shape = partial(
        get_cosine_schedule_with_warmup, num_warmup_steps=5, num_training_steps=total_steps
    )
    scheduler = batchlr.BatchAwareLR(optimizer, 1.0, shape)
    controller = batchlr.CurvatureController(
        scheduler, loss_fn, total_steps=total_steps, batch_size=64, dataset_size=len(digits()[1])
    )
    generator = torch.Generator().manual_seed(1)
    drawn = TrainingSamples(samples(), default_collate, batch_size=64, pass_size=64)

    def draw():
        torch.randint(2**31, (), generator=generator)  # of the data set's own randomness
        return [(batch["pixels"], batch["labels"]) for batch in drawn(generator)]

    found = []
    for batch in batches:
        controller.maybe_update(model.net, draw)
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = loss_fn(model.net, batch)
        loss.backward()
        optimizer.step()
        controller.observe(loss)
        scheduler.step()
    return found, model


def test_digits_are_learnt_at_the_rates_of_a_loop_of_ones_own(tmp_path):
    model, (pixels, labels) = Net(), digits()
    trainer = make(
        model,
        samples(),
        tmp_path,
        optimizers=sgd(model),
        num_train_epochs=6,
        lr_scheduler_type="cosine",
        warmup_steps=5,
    )
    trainer.train()
    assert (model.net(pixels).argmax(1) == labels).double().mean() > 0.9  # 0.94 with torch 2.6
    batches = list(zip(pixels.split(64), labels.split(64), strict=True)) * 6
    expected, same = hand_written(batches, len(batches))
    assert rates(trainer) == expected
    assert torch.equal(weights(model), weights(same))


def test_accumulated_batches_are_one_batch(tmp_path):
    whole, parts = Net(), Net()
    one = make(whole, samples(768), tmp_path, optimizers=sgd(whole))
    two = make(
        parts,
        samples(768),
        tmp_path,
        optimizers=sgd(parts),
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
    )
    one.train()
    two.train()
    assert two.lr_scheduler.controller.batch_size == 64
    assert len(rates(two)) == 24
    assert rates(two) == pytest.approx(rates(one), rel=1e-3)


BERT = {
    "data_collator": padded,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "random",
    "learning_rate": 1e-3,
    "max_steps": 14,
}


def test_a_run_of_a_transformer_goes_on_from_a_checkpoint_bit_identically(tmp_path):
    runs = []
    for name in ("whole", "resumed"):
        model = tiny_bert()
        trainer = make(
            model, sentences(), tmp_path / name, save_strategy="steps", save_steps=8, **BERT
        )
        checkpoint = None if name == "whole" else tmp_path / "whole" / "checkpoint-8"
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        runs.append((rates(trainer), weights(model)))
    (whole, weights_of_whole), (resumed, weights_of_resumed) = runs
    assert len(whole) == 14
    assert resumed == whole
    assert torch.equal(weights_of_whole, weights_of_resumed)
    limits = measured(trainer)
    assert list(limits)[:5] == [0, 1, 2, 4, 8]
    assert all(entry["max_lr_low"] < entry["max_lr"] for entry in limits.values())
    assert rates(trainer)[8] == limits[8]["learning_rate"]
    assert trainer.lr_scheduler.controller.limit.clip_norm == 1.0  # max_grad_norm


def test_measuring_alone_changes_nothing(tmp_path):
    runs = []
    for steered in (False, True):
        model = tiny_bert()
        trainer = make(
            model, sentences(), tmp_path, steered=steered, options={"apply": False}, **BERT
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((rates(trainer), losses, weights(model)))
    assert measured(trainer)
    assert runs[0][:2] == runs[1][:2]
    assert torch.equal(runs[0][2], runs[1][2])


def test_curvature_is_measured_in_full_precision(tmp_path):
    found = []
    for bf16 in (False, True):
        model = Net()
        trainer = make(model, samples(256), tmp_path, optimizers=sgd(model), bf16=bf16, max_steps=1)
        trainer.train()
        found.append(measured(trainer)[0]["largest_eigenvalue"])
    assert found[0] == found[1]


def test_the_loss_is_the_trainers(tmp_path):
    def twice(outputs, labels, num_items_in_batch=None):
        return 2 * torch.nn.functional.cross_entropy(outputs["logits"], labels)

    found = []
    for loss in (None, twice):
        model = Net()
        trainer = make(
            model,
            samples(256),
            tmp_path,
            optimizers=sgd(model),
            compute_loss_func=loss,
            max_steps=1,
        )
        trainer.train()
        found.append(measured(trainer)[0]["largest_eigenvalue"])
    assert found[1] == pytest.approx(2 * found[0], rel=1e-4)


def test_a_batch_weighs_what_the_trainer_divides_by(tmp_path):
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    for model, weight in ((tiny_bert(), 3.0), (Net(), 2.0)):  # labels that count; samples
        trainer = make(model, samples(64), tmp_path)
        trainer.create_optimizer_and_scheduler(1)
        loss_fn = trainer.lr_scheduler.controller.loss_fn
        assert loss_fn.batch_weight({"labels": labels}) == weight


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples(256))


def test_a_stream_is_measured_on_batches_given(tmp_path):
    model = Net()
    given = [default_collate(samples(256)[k : k + 32]) for k in range(0, 128, 32)]
    trainer = make(
        model,
        Stream(),
        tmp_path,
        optimizers=sgd(model),
        max_steps=3,
        options={"batches": lambda: given},
        train_sampling_strategy="random",
    )
    trainer.train()
    assert list(measured(trainer)) == [0, 1, 2]


def test_training_twice_measures_anew(tmp_path):
    model = Net()
    trainer = make(
        model,
        samples(256),
        tmp_path,
        optimizers=sgd(model),
        max_steps=2,
        lr_scheduler_type="linear",  # ends at zero
    )
    trainer.train()
    first = trainer.lr_scheduler
    trainer.train()
    assert trainer.lr_scheduler is not first
    assert list(measured(trainer)) == [0, 1]


def test_what_cannot_be_steered_is_refused(tmp_path):
    model = Net()
    optimizer, _ = sgd(model)
    given = (optimizer, LambdaLR(optimizer, lambda step: 1.0))
    with pytest.raises(ValueError, match=r"given a scheduler, LambdaLR, .*\(optimizer, None\)"):
        make(model, samples(64), tmp_path, optimizers=given)
    with pytest.raises(ValueError, match=r"type Stream: pass steer\(batches="):
        make(model, Stream(), tmp_path, max_steps=1)
    trainer = make(model, samples(64), tmp_path)
    with pytest.raises(ValueError, match="steered already: call steer once"):
        steer(trainer)
    trainer.is_fsdp_enabled = True
    trainer.callback_handler.callbacks.clear()
    with pytest.raises(ValueError, match="FSDP and DeepSpeed split the model"):
        steer(trainer)


def test_a_shape_that_follows_a_metric_is_refused(tmp_path):
    model = Net()
    trainer = make(model, samples(64), tmp_path, optimizers=sgd(model), max_steps=1)
    trainer.args.lr_scheduler_type = "reduce_lr_on_plateau"
    with pytest.raises(ValueError, match="follows a metric, not the steps: use linear"):
        trainer.train()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    run_in_two(Path(__file__).with_name("huggingface_in_two.py"), tmp_path, timeout=240)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    model = Net()
    trainer = make(model, samples(768), tmp_path, optimizers=sgd(model))
    trainer.train()
    # Rounding of sums over 64 samples, or twice 32.
    assert first["rates"] == pytest.approx(rates(trainer), rel=1e-3)
    assert first["norm"] == pytest.approx(float(weights(model).norm()), rel=1e-3)
