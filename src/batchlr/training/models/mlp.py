"""Fully connected networks: the small, smooth models on which exact curvature is affordable."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class MLP(nn.Module):
    """Linear layers with an activation between them; inputs are flattened.

    Initial weights: normal with variance ``gain^2 / fan_in``, the gain being the activation's
    (5/3 for tanh, sqrt 2 for ReLU) and 1 for the last layer; biases zero.

    Args:
        hidden: Widths of the hidden layers; none makes a linear (softmax) regression.
        num_classes: Number of outputs.
        in_features: Number of values in one flattened input.
        activation: What stands between the layers.

    Raises:
        ValueError: A width is below 1 or the activation is unknown.
    """

    def __init__(
        self,
        hidden: Sequence[int],
        *,
        num_classes: int,
        in_features: int,
        activation: Literal["tanh", "relu"] = "tanh",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            legal = ", ".join(ACTIVATIONS)
            msg = f"MLP activation must be one of {legal}, got {activation!r}"
            raise ValueError(msg)
        if any(width < 1 for width in hidden):
            msg = f"MLP hidden widths must be at least 1, got {list(hidden)}"
            raise ValueError(msg)
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers.append(_linear(in_features, width, gain=nn.init.calculate_gain(activation)))
            layers.append(ACTIVATIONS[activation]())
            in_features = width
        layers.append(_linear(in_features, num_classes, gain=1.0))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of inputs ``(B, ...)`` with ``in_features`` values each."""
        logits: Tensor = self.layers(x)
        return logits


def mlp_for_images(
    hidden: Sequence[int],
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    activation: Literal["tanh", "relu"] = "tanh",
) -> MLP:
    """An MLP on flattened square images."""
    in_features = in_channels * image_size**2
    return MLP(hidden, num_classes=num_classes, in_features=in_features, activation=activation)


def _linear(in_features: int, out_features: int, *, gain: float) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=gain * in_features**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
