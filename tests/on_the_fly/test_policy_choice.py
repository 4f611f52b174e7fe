"""Which policy goes with which optimizer and setting."""

import pytest
import torch

from batchlr.on_the_fly.policy_choice import LIMIT_POLICIES, check_policy, sets_momentum
from batchlr.policies import POLICIES

KINDS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
LEGAL = {  # policy: optimizers, whether it may be made safer, whether momentum may be adjusted
    "mean_square": ({"sgd", "adam", "adamw", "rmsprop"}, True, True),
    "edge": ({"sgd", "adam", "adamw", "rmsprop"}, True, True),
    "heavy_ball": ({"sgd"}, True, False),
    "cdat": (set(KINDS), False, False),
    **dict.fromkeys(POLICIES, ({"sgd"}, False, False)),
}


def optimizer(name):
    return KINDS[name]([torch.nn.Parameter(torch.ones(1))], lr=0.1)


def refused(policy, name, *, safety=1.0, adjust_momentum=False):
    try:
        check_policy(policy, optimizer(name), safety=safety, adjust_momentum=adjust_momentum)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("policy", LEGAL)
def test_a_policy_steers_the_optimizers_it_knows(policy):
    optimizers, safer, adjusted = LEGAL[policy]
    assert {name for name in KINDS if not refused(policy, name)} == optimizers
    assert refused(policy, "sgd", safety=0.5) is not safer
    for name in optimizers - {"rmsprop"}:
        assert refused(policy, name, adjust_momentum=True) is not adjusted


def test_those_with_a_momentum_of_their_own_are_heavy_ball_and_the_paper_s():
    assert {policy for policy in LEGAL if sets_momentum(policy)} == {"heavy_ball", *POLICIES}
    assert set(LIMIT_POLICIES) == {policy for policy, (_, safer, _) in LEGAL.items() if safer}


@pytest.mark.parametrize(
    ("policy", "name", "options", "words"),
    [
        ("best", "sgd", {}, "policy must be one of mean_square, .*, got 'best'"),
        ("heavy_ball", "adam", {}, "for SGD, got Adam: use SGD, or policy='edge'"),
        ("cdat", "sgd", {"safety": 0.5}, r"applied as published: safety must be 1, got 0\.5"),
        ("cdat", "sgd", {"adjust_momentum": True}, "cdat leaves it alone: leave adjust_mom"),
        ("heavy_ball", "sgd", {"adjust_momentum": True}, "sets the momentum itself: leave"),
        ("edge", "rmsprop", {"adjust_momentum": True}, "needs SGD or Adam, got RMSprop"),
    ],
)
def test_a_refusal_names_the_way_out(policy, name, options, words):
    settings = {"safety": 1.0, "adjust_momentum": False} | options
    with pytest.raises(ValueError, match=words):
        check_policy(policy, optimizer(name), **settings)
