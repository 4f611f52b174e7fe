import math
from itertools import chain

import pytest
import torch
from torch import nn

from batchlr.training.models import (
    MLP,
    MODELS,
    VGG,
    PreResNet,
    WideResNet,
    build_model,
    torchvision_model,
)


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The same counts as closed-form sums over layers, written without a look at the modules.


def vgg_params(convs_per_stage, *, num_classes, head=512, batch_norm=False):
    count, before = 0, 3
    for channels, num_convs in zip((64, 128, 256, 512, 512), convs_per_stage, strict=True):
        for _ in range(num_convs):
            count += 9 * before * channels + channels + 2 * channels * batch_norm
            before = channels
    return count + (512 * head + head) + (head * head + head) + (head * num_classes + num_classes)


def basic_params(n, widths, *, num_classes, conv_bias=False):
    count, before = 27 * 16 + 16 * conv_bias, 16
    for width in widths:
        first = 9 * before * width + 2 * before
        first += before * width + width * conv_bias if before != width else 0
        rest = (n - 1) * (9 * width * width + 2 * width)
        second = n * (9 * width * width + 2 * width)
        count += first + rest + second + 2 * n * width * conv_bias
        before = width
    return count + 2 * before + before * num_classes + num_classes


def bottleneck_params(n, *, num_classes):
    count, before = 27 * 16, 16
    for width in (16, 32, 64):
        wide = 4 * width
        for index in range(n):
            count += 2 * before + before * width + 2 * width + 9 * width * width
            count += 2 * width + width * wide + (before * wide if index == 0 else 0)
            before = wide
    return count + 2 * before + before * num_classes + num_classes


@pytest.mark.parametrize(
    ("make", "expected", "published"),
    [
        (lambda: VGG(16, num_classes=100), vgg_params((2, 2, 3, 3, 3), num_classes=100), 15.3e6),
        (
            lambda: VGG(16, num_classes=100, batch_norm=True, head=4096),
            vgg_params((2, 2, 3, 3, 3), num_classes=100, head=4096, batch_norm=True),
            34.0e6,
        ),
        (
            lambda: VGG(11, num_classes=100, batch_norm=True),
            vgg_params((1, 1, 2, 2, 2), num_classes=100, batch_norm=True),
            9.80e6,
        ),
        (
            lambda: VGG(13, num_classes=100, batch_norm=True),
            vgg_params((2, 2, 2, 2, 2), num_classes=100, batch_norm=True),
            9.99e6,
        ),
        (
            lambda: VGG(19, num_classes=100, batch_norm=True),
            vgg_params((2, 2, 4, 4, 4), num_classes=100, batch_norm=True),
            20.6e6,
        ),
        (
            lambda: WideResNet(28, 10, num_classes=100),
            basic_params(4, (160, 320, 640), num_classes=100),
            36.5e6,
        ),
        (
            lambda: WideResNet(28, 10, num_classes=100, conv_bias=True, shortcut="raw"),
            basic_params(4, (160, 320, 640), num_classes=100, conv_bias=True),
            36.5e6,
        ),
        (
            lambda: WideResNet(40, 4, num_classes=10),
            basic_params(6, (64, 128, 256), num_classes=10),
            8.9e6,
        ),
        (
            lambda: PreResNet(110, num_classes=100),
            bottleneck_params(12, num_classes=100),
            1.17e6,
        ),
        (
            lambda: PreResNet(110, block="basic", num_classes=10),
            basic_params(18, (16, 32, 64), num_classes=10),
            1.7e6,
        ),
        (lambda: PreResNet(164, num_classes=100), 1_726_388, 1.7e6),
        (lambda: PreResNet(164, num_classes=100), bottleneck_params(18, num_classes=100), 1.7e6),
    ],
)
def test_parameter_counts_are_the_published_ones(make, expected, published):
    with torch.device("meta"):
        count = num_params(make())
    assert count == expected
    assert count == pytest.approx(published, rel=0.02)  # publications give two or three digits


def test_mlp_counts_weights_and_biases_of_each_layer():
    model = MLP([30, 20], num_classes=10, in_features=64)
    assert num_params(model) == (64 + 1) * 30 + (30 + 1) * 20 + (20 + 1) * 10


SMALL = {
    "vgg": {"depth": 11, "width": 0.0625},
    "vgg with batch norm": {"depth": 11, "width": 0.0625, "batch_norm": True},
    "wide_resnet": {"depth": 10, "widen_factor": 1},
    "wide_resnet as reimplemented": {
        "depth": 10,
        "widen_factor": 1,
        "conv_bias": True,
        "shortcut": "raw",
    },
    "preresnet": {"depth": 11, "width": 0.25},
    "preresnet with basic blocks": {"depth": 8, "block": "basic", "width": 0.5},
    "mlp": {"hidden": [12, 8]},
    "mlp with relu": {"hidden": [12, 8], "activation": "relu"},
    "torchvision": {"arch": "squeezenet1_1"},
}


def small_model(case, **shape):
    shape = {"num_classes": 7, "in_channels": 3, "image_size": 32, **shape}
    return build_model(case.split(" ")[0], **shape, **SMALL[case])


def test_every_model_has_a_small_case():
    assert {case.split(" ")[0] for case in SMALL} == set(MODELS)


@pytest.mark.parametrize("case", SMALL)
def test_logits_have_one_column_per_class_and_each_row_is_its_own_image(case):
    model = small_model(case).eval()
    x = torch.randn(3, 3, 32, 32)
    logits = model(x)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in SMALL if case != "torchvision"])
def test_one_channel_and_larger_images_are_taken(case):
    model = small_model(case, in_channels=1, image_size=48)
    assert model(torch.randn(2, 1, 48, 48)).shape == (2, 7)


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
@pytest.mark.parametrize("case", SMALL)
def test_every_parameter_has_a_gradient_and_the_hessian_is_symmetric(case, norm_mode):
    torch.manual_seed(0)
    model = small_model(case).double()
    model.train(norm_mode == "train")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # squeezenet has one; two forward passes must see the same function
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 6, 3])
    params = list(model.parameters())

    def gradient():
        loss = nn.functional.cross_entropy(model(x), y)
        return torch.autograd.grad(loss, params, create_graph=True)

    u, v = ([torch.randn_like(p) for p in params] for _ in range(2))
    grads = gradient()
    assert all(g.isfinite().all() for g in grads)
    if norm_mode == "eval":  # in train mode, biases before a batch norm have none but rounding
        assert all(g.any() for g in grads)
    hu = torch.autograd.grad(grads, params, u, retain_graph=True, materialize_grads=True)
    hv = torch.autograd.grad(grads, params, v, materialize_grads=True)
    dots = [
        sum((a * b).sum().item() for a, b in zip(*pair, strict=True)) for pair in ((v, hu), (u, hv))
    ]
    assert dots[0] == pytest.approx(dots[1], rel=1e-8, abs=1e-8)
    assert any(h.abs().max() > 1e-3 for h in hv)


def test_width_scales_every_layer_and_stops_at_one_channel():
    halved = VGG(11, num_classes=10, width=0.5)
    assert halved.features[0].out_channels == 32
    assert (halved.hidden1.in_features, halved.hidden1.out_features) == (256, 256)
    tiny = VGG(11, num_classes=10, width=1e-6)
    assert {m.out_channels for m in tiny.modules() if isinstance(m, nn.Conv2d)} == {1}
    assert tiny(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_vgg_stages_and_head_are_in_the_published_order():
    model = VGG(11, num_classes=5, width=0.125, batch_norm=True)
    kinds = [type(layer) for layer in model.features]
    conv = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    stages = ([*conv * num_convs, nn.MaxPool2d] for num_convs in (1, 1, 2, 2, 2))
    assert kinds == list(chain.from_iterable(stages))
    model.features = nn.Identity()
    head = (model.hidden1, nn.ReLU(), model.hidden2, nn.ReLU(), model.output)
    x = torch.randn(6, 64)
    torch.testing.assert_close(model(x[:, :, None, None]), nn.Sequential(*head)(x))


def test_the_wide_resnet_shortcuts_read_what_they_are_told_to():
    x = torch.randn(2, 3, 8, 8)
    outputs = {}
    for shortcut in ("raw", "preactivated"):
        torch.manual_seed(0)
        model = WideResNet(10, 2, num_classes=5, shortcut=shortcut).eval()
        block = model.blocks[0]
        inner = torch.randn(2, 16, 8, 8)
        activated = block.norm1(inner).relu()
        carried = block.shortcut(inner if shortcut == "raw" else activated)
        residual = block.conv2(block.norm2(block.conv1(activated)).relu())
        torch.testing.assert_close(block(inner), carried + residual)
        outputs[shortcut] = model(x)
    assert not torch.allclose(outputs["raw"], outputs["preactivated"])


def test_initial_convolutions_have_variance_two_over_fan_out():
    torch.manual_seed(0)
    model = VGG(16, num_classes=10, batch_norm=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (9 * module.out_channels))
            sampling_error = expected / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(expected, abs=5 * sampling_error)
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert not module.bias.any()


def test_initial_mlp_keeps_the_scale_of_its_activation():
    torch.manual_seed(0)
    model = MLP([800, 800], num_classes=500, in_features=400, activation="tanh")
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    expected = [5 / 3 / 20, 5 / 3 / math.sqrt(800), 1 / math.sqrt(800)]
    # 320,000 weights and more: the deviation of their std is below 0.2 %
    assert [m.weight.std().item() for m in linear] == pytest.approx(expected, rel=0.01)
    assert not any(m.bias.any() for m in linear)


@pytest.mark.parametrize(
    "model",
    [
        VGG(11, num_classes=3, width=0.05, dropout=0.5),
        WideResNet(10, 1, num_classes=3, dropout=0.5),
    ],
    ids=["vgg", "wide_resnet"],
)
def test_dropout_acts_in_training_only(model):
    x = torch.randn(2, 3, 32, 32)
    for module in model.eval().modules():  # batch norm stays as in testing
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_torchvision_classifiers_are_built_by_name_with_plain_logits():
    with torch.device("meta"):
        model = torchvision_model("resnet50", 1000)
        inception = torchvision_model("googlenet", 10)
    assert num_params(model) == 25_557_032  # torchvision's own table
    assert inception(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)


SHAPE = {"num_classes": 10, "in_channels": 3, "image_size": 32}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vgg", {"depth": 12}, "VGG depth must be one of 11, 13, 16, 19, got 12"),
        ("vgg", {"depth": 11, "width": 0}, "width must be positive and finite, got 0"),
        ("vgg", {"depth": 11, "width": math.inf}, "width must be positive and finite, got inf"),
        ("vgg", {"depth": 11, "head": 0}, "VGG head must be at least 1, got 0"),
        ("vgg", {"depth": 11, "dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ("vgg", {}, "model vgg: missing a required argument: 'depth'; its options are depth, "),
        (
            "vgg",
            {"depth": 11, "dept": 3},
            "model vgg: got an unexpected keyword argument 'dept'; its options are depth, batch_n",
        ),
        ("wide_resnet", {"depth": 29, "widen_factor": 1}, "must be 6 n \\+ 4 with n >= 1, got 29"),
        ("wide_resnet", {"depth": 4, "widen_factor": 1}, "must be 6 n \\+ 4 with n >= 1, got 4"),
        ("wide_resnet", {"depth": 10, "widen_factor": 0}, "widen_factor must be at least 1, got 0"),
        (
            "wide_resnet",
            {"depth": 10, "widen_factor": 1, "dropout": -0.1},
            r"dropout must lie in \[0, 1\), got -0.1",
        ),
        (
            "wide_resnet",
            {"depth": 10, "widen_factor": 1, "shortcut": "none"},
            "shortcut must be one of raw, preactivated, got 'none'",
        ),
        (
            "preresnet",
            {"depth": 112},
            r"PreResNet depth must be 9 n \+ 2 with n >= 1 for bottleneck blocks, got 112",
        ),
        (
            "preresnet",
            {"depth": 11, "block": "basic"},
            r"PreResNet depth must be 6 n \+ 2 with n >= 1 for basic blocks, got 11",
        ),
        (
            "preresnet",
            {"depth": 11, "block": "wide"},
            "PreResNet block must be one of basic, bottleneck, got 'wide'",
        ),
        ("mlp", {"hidden": [3], "activation": "gelu"}, "must be one of tanh, relu, got 'gelu'"),
        ("mlp", {"hidden": [3, 0]}, r"MLP hidden widths must be at least 1, got \[3, 0\]"),
        (
            "torchvision",
            {"arch": "resnet51"},
            "torchvision.models has no classifier 'resnet51'; near names: .*resnet50",
        ),
        ("torchvision", {"arch": "?"}, "near names: resnet18, resnet50, vgg16_bn"),
        ("pre_resnet", {}, "must be one of vgg, .*, got 'pre_resnet'; did you mean 'preresnet'?"),
        ("?", {}, "must be one of vgg, wide_resnet, preresnet, mlp, torchvision, got '\\?'$"),
    ],
)
def test_an_illegal_option_is_refused_with_what_is_legal(name, options, words):
    with pytest.raises(ValueError, match=words):
        build_model(name, **SHAPE, **options)


@pytest.mark.parametrize(
    ("name", "options", "shape", "words"),
    [
        (
            "vgg",
            {"depth": 11},
            {"image_size": 28},
            "vgg needs images of at least 32 pixels, got 28",
        ),
        ("preresnet", {"depth": 11}, {"image_size": 3}, "needs images of at least 4 pixels, got 3"),
        ("mlp", {"hidden": []}, {"image_size": 0}, "mlp needs images of at least 1 pixels, got 0"),
        ("mlp", {"hidden": []}, {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("mlp", {"hidden": []}, {"in_channels": 0}, "in_channels must be at least 1, got 0"),
        (
            "torchvision",
            {"arch": "resnet18"},
            {"in_channels": 1},
            "torchvision's networks take images of 3 channels, got 1",
        ),
        (
            "torchvision",
            {"arch": "alexnet"},
            {"image_size": 16},
            r"alexnet takes no images of 16 pixels: .*Output size is too small$",
        ),
        (
            "torchvision",
            {"arch": "vit_b_16"},
            {},
            "vit_b_16 takes no images of 32 pixels: .*Expected 224 but got 32",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(name, options, shape, words):
    with pytest.raises(ValueError, match=words):
        build_model(name, **{**SHAPE, **shape}, **options)


def test_torchvision_networks_are_built_as_if_nothing_was_tried():
    torch.manual_seed(3)
    tried = build_model("torchvision", **SHAPE, arch="squeezenet1_1")
    state = torch.get_rng_state()
    torch.manual_seed(3)
    plain = torchvision_model("squeezenet1_1", 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in tried.modules())
    for a, b in zip(tried.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_building_twice_from_one_seed_gives_equal_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(small_model("preresnet"))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
