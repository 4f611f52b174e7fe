from collections import UserDict, namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchlr import supervised
from batchlr.operators.supervised import check_loss_function, piecewise_linear, split_batch

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])


class TestPiecewiseLinear:
    @pytest.mark.parametrize(
        "criterion",
        [
            nn.L1Loss(),
            nn.HingeEmbeddingLoss(),
            nn.MultiMarginLoss(),
            nn.MultiLabelMarginLoss(),
            F.l1_loss,
            F.multi_margin_loss,
        ],
    )
    def test_names_a_criterion_with_kinks(self, criterion):
        name = piecewise_linear(supervised(criterion))
        assert name == getattr(criterion, "__name__", type(criterion).__name__)

    @pytest.mark.parametrize(
        "criterion",
        [nn.CrossEntropyLoss(), nn.MSELoss(), nn.HuberLoss(), nn.MultiMarginLoss(p=2), F.mse_loss],
    )
    def test_leaves_smooth_ones_alone(self, criterion):
        assert piecewise_linear(supervised(criterion)) is None

    def test_sees_through_a_partial_one(self):
        assert piecewise_linear(supervised(partial(F.l1_loss, reduction="sum"))) == "l1_loss"

    def test_sees_nothing_inside_a_function(self):
        assert piecewise_linear(lambda model, batch: F.l1_loss(model(X), Y)) is None


class TestCheckLossFunction:
    @pytest.mark.parametrize(
        ("criterion", "name"),
        [
            (nn.CrossEntropyLoss(), "CrossEntropyLoss"),
            (nn.TripletMarginLoss(), "TripletMarginLoss"),
            (F.cross_entropy, "cross_entropy"),
            (partial(F.cross_entropy, label_smoothing=0.1), "cross_entropy"),
            (F.mse_loss, "mse_loss"),
        ],
    )
    def test_names_the_way_from_a_criterion_to_a_loss(self, criterion, name):
        words = (
            rf"loss_fn must be a function of \(model, batch\) .* got the criterion {name}, .* "
            r"pass batchlr\.supervised\(criterion\)"
        )
        with pytest.raises(TypeError, match=words):
            check_loss_function(criterion)

    def test_refuses_what_is_no_function(self):
        with pytest.raises(TypeError, match="that returns the mean loss, got float"):
            check_loss_function(0.5)

    @pytest.mark.parametrize(
        "loss_fn",
        [
            supervised(nn.CrossEntropyLoss()),
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            nn.Module(),  # with a forward of model and batch, say
        ],
    )
    def test_takes_what_may_be_a_loss(self, loss_fn):
        check_loss_function(loss_fn)


class TestSupervised:
    def test_is_the_criterion_of_the_models_outputs(self):
        model = nn.Linear(2, 2)
        loss_fn = supervised(nn.CrossEntropyLoss(label_smoothing=0.1))
        expected = F.cross_entropy(model(X), Y, label_smoothing=0.1)
        assert torch.equal(loss_fn(model, (X, Y)), expected)
        outputs = loss_fn.outputs(model, (X, Y))
        assert torch.equal(outputs, model(X))
        assert torch.equal(loss_fn.loss(outputs, (X, Y)), expected)

    @pytest.mark.parametrize("criterion", [F.cross_entropy, nn.CrossEntropyLoss()])
    def test_takes_functions_and_modules(self, criterion):
        model = nn.Linear(2, 2)
        expected = F.cross_entropy(model(X), Y)
        assert torch.equal(supervised(criterion)(model, (X, Y)), expected)

    def test_takes_a_model_without_parameters(self):
        loss_fn = supervised(nn.MSELoss())
        assert loss_fn(nn.Identity(), (X, X + 2)) == 4.0

    def test_brings_inputs_and_targets_to_the_models_device(self):
        model = nn.Linear(2, 2, device="meta")
        assert supervised(nn.CrossEntropyLoss())(model, (X, Y)).device.type == "meta"

    def test_refuses_a_loss_per_sample(self):
        with pytest.raises(ValueError, match=r"reduction='none'; .*reduction='mean' or"):
            supervised(nn.CrossEntropyLoss(reduction="none"))

    def test_refuses_outputs_that_are_no_tensor(self):
        model = nn.LSTM(2, 2)
        with pytest.raises(TypeError, match=r"returned tuple where a tensor.*your own loss_fn"):
            supervised(nn.MSELoss())(model, (X, Y))


class TestSplitBatch:
    @pytest.mark.parametrize("batch", [(X, Y), [X, Y], namedtuple("Pair", "inputs targets")(X, Y)])
    def test_pairs(self, batch):
        x, y = split_batch(batch)
        assert x is X
        assert y is Y

    @pytest.mark.parametrize(
        "x_key", ["x", "input", "inputs", "image", "images", "pixel_values", "input_ids"]
    )
    @pytest.mark.parametrize("y_key", ["y", "target", "targets", "label", "labels"])
    def test_dicts_with_the_usual_names(self, x_key, y_key):
        x, y = split_batch({"index": None, y_key: Y, x_key: X})
        assert x is X
        assert y is Y

    def test_mappings_that_are_no_dict(self):
        assert split_batch(UserDict(x=X, y=Y))[0] is X

    @pytest.mark.parametrize(
        "batch",
        [{"x": X}, {"labels": Y}, {}, {"x": X, "image": X, "y": Y}, {"x": X, "y": Y, "label": Y}],
    )
    def test_refuses_dicts_without_exactly_one_of_each(self, batch):
        with pytest.raises(TypeError, match=r"one of \('x',.*and one of \('y',.*got keys"):
            split_batch(batch)

    def test_names_the_keys_given(self):
        with pytest.raises(TypeError, match=r"got keys \['3', 'text'\].*your own loss_fn"):
            split_batch({"text": X, 3: Y})

    @pytest.mark.parametrize("batch", [X, (X,), (X, Y, Y), "xy", None])
    def test_refuses_anything_else(self, batch):
        more = r"( of [13]| \(one batch .*\))?"
        with pytest.raises(TypeError, match=f"got {type(batch).__name__}{more}; otherwise"):
            split_batch(batch)

    @pytest.mark.parametrize(
        ("batch", "words"),
        [
            (((X, X), Y), "inputs must be a tensor, got tuple; make it one, or write your own"),
            ({"x": X, "y": [0, 1]}, "targets must be a tensor, got list; make it one"),
        ],
    )
    def test_refuses_inputs_and_targets_that_are_no_tensors(self, batch, words):
        with pytest.raises(TypeError, match=words):
            split_batch(batch)


def test_the_mean_over_samples_of_a_divergence():
    """``reduction="batchmean"``, which torch recommends for `KLDivLoss`."""
    log_p = torch.randn(4, 3).log_softmax(1)
    q = torch.randn(4, 3).softmax(1)
    loss = supervised(nn.KLDivLoss(reduction="batchmean"))
    total = nn.functional.kl_div(log_p, q, reduction="sum")
    torch.testing.assert_close(loss(nn.Identity(), (log_p, q)), total / 4)
    assert loss.batch_weight((log_p, q)) == 4
