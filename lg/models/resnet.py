"""Residual networks: the guides (CIFAR form) and larger CNNs (ImageNet form).

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385: section 4.2
for the CIFAR form, table 1 for the ImageNet form. Departure, as in the published guides: where the
shape changes, the CIFAR form has a 1x1 convolution instead of zero padding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from timm.layers import get_act_layer
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import nn

from lg.models.backbone import Backbone, MapLayout
from lg.models.key_table import KeyTable

KEYS = KeyTable(
    renames=(
        ("conv1", "stem.conv"),
        ("bn1", "stem.bn"),
        ("layer{}.{}.downsample.0", "s{}.b{+1}.proj"),
        ("layer{}.{}.downsample.1", "s{}.b{+1}.bn"),
        ("layer{}.{}.conv1", "s{}.b{+1}.f.a"),
        ("layer{}.{}.bn1", "s{}.b{+1}.f.a_bn"),
        ("layer{}.{}.conv2", "s{}.b{+1}.f.b"),
        ("layer{}.{}.bn2", "s{}.b{+1}.f.b_bn"),
        ("layer{}.{}.conv3", "s{}.b{+1}.f.c"),
        ("layer{}.{}.bn3", "s{}.b{+1}.f.c_bn"),
        ("fc", "head.fc"),
    ),
    order=(("stem",), ("s{}.b{}.proj", "s{}.b{}.bn", "s{}.b{}.f"), ("head",)),
)

# Blocks of each of the four stages, by depth.
IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
CIFAR_WIDTHS = (16, 32, 64)
IMAGENET_WIDTHS = (64, 128, 256, 512)
HEAD_STD = 0.01  # of the initial weights of the classifier

Layer = Callable[..., nn.Module]


class CifarResNet(nn.Sequential):
    """The CIFAR form: 3x3 stem of 16 channels, then stages of 16, 32 and 64.

    Modules are named as in timm's ResNet, so both forms share one `KeyTable`.

    Args:
        blocks_per_stage: n of the depth 6n + 2.
        in_channels: Channels of the images.
        num_classes: K.
        act_layer: Returns an activation; called with `inplace`.
        norm_layer: Returns a normalisation of the given number of channels.
    """

    def __init__(
        self,
        *,
        blocks_per_stage: int,
        in_channels: int,
        num_classes: int,
        act_layer: Layer,
        norm_layer: Layer,
    ) -> None:
        # timm's hints ask for classes; any callable works.
        block = partial(BasicBlock, act_layer=act_layer, norm_layer=norm_layer)  # type: ignore[arg-type]

        def stage(width_in: int, width: int) -> nn.Sequential:
            stride, shortcut = 1, None
            if width != width_in:
                conv = nn.Conv2d(width_in, width, 1, stride=2, bias=False)
                stride, shortcut = 2, nn.Sequential(conv, norm_layer(width))
            rest = [block(width, width) for _ in range(blocks_per_stage - 1)]
            return nn.Sequential(block(width_in, width, stride, shortcut), *rest)

        first, second, third = CIFAR_WIDTHS
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, first, 3, padding=1, bias=False),
                bn1=norm_layer(first),
                act1=act_layer(inplace=True),
                layer1=stage(first, first),
                layer2=stage(first, second),
                layer3=stage(second, third),
                global_pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
                fc=nn.Linear(third, num_classes),
            )
        )

    def get_classifier(self) -> nn.Module:
        """Return the classifier, under the name that timm's models use."""
        return self[-1]


def resnet(
    *,
    depth: int,
    img_size: int,
    in_channels: int = 3,
    num_classes: int,
    num_groups: int = 1,
    width_per_group: int = 64,
    stride_1x1: bool = True,
    activation: str = "relu",
    activation_inplace: bool = True,
    bn_eps: float = 1e-5,
    bn_momentum: float = 0.1,
    zero_init_final_bn_gamma: bool = False,
) -> Backbone:
    """Return a ResNet whose `blocks` are its stages, the ones INTER_TEACHER_INDEX counts.

    Args:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks) for the ImageNet form of 4
            stages, else 6n + 2 for the CIFAR form of 3 stages (basic blocks).
        img_size: Height and width of the images in pixels; any size works.
        in_channels: Channels of the images.
        num_classes: K.
        num_groups: Groups of the 3x3 convolution of a bottleneck.
        width_per_group: Channels of each group of a bottleneck in the first stage; doubles from
            stage to stage.
        stride_1x1: Stride on the first 1x1 of a bottleneck, else on its 3x3.
        activation: Name of an activation in timm.
        activation_inplace: Let activations overwrite their input.
        bn_eps: Added to the variance in BatchNorm.
        bn_momentum: Weight of the new batch in BatchNorm's running statistics, 0 to 1.
        zero_init_final_bn_gamma: Start each residual branch at zero.
    """
    act_layer: Layer = get_act_layer(activation)
    norm_layer = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
    net: nn.Module
    if depth in IMAGENET_STAGES:
        block = BasicBlock if depth < 50 else Bottleneck
        net = TimmResNet(
            block,  # type: ignore[arg-type]  # timm's hint asks for an instance, it wants the class
            IMAGENET_STAGES[depth],
            num_classes=num_classes,
            in_chans=in_channels,
            cardinality=num_groups,
            base_width=width_per_group,
            act_layer=act_layer,
            norm_layer=norm_layer,
            zero_init_last=False,
        )
        widths = [width * block.expansion for width in IMAGENET_WIDTHS]
        for module in net.modules():
            if stride_1x1 and isinstance(module, Bottleneck):
                # The original paper has the stride on the first 1x1 convolution, timm on the 3x3.
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    else:
        blocks_per_stage, rest = divmod(depth - 2, 6)
        assert blocks_per_stage > 0 and rest == 0, f"no ResNet has depth {depth}"
        net = CifarResNet(
            blocks_per_stage=blocks_per_stage,
            in_channels=in_channels,
            num_classes=num_classes,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )
        widths = list(CIFAR_WIDTHS)
    _initialise(net, zero_init_final_bn_gamma=zero_init_final_bn_gamma)
    for module in net.modules():
        if hasattr(module, "inplace"):  # timm's blocks always ask for in-place activations
            module.inplace = activation_inplace  # type: ignore[assignment]
    return Backbone(
        net,
        family="ResNet",
        keys=KEYS,
        block_names=[f"layer{stage + 1}" for stage in range(len(widths))],
        layouts=[MapLayout("nchw", width) for width in widths],
    )


def _initialise(net: nn.Module, *, zero_init_final_bn_gamma: bool) -> None:
    """Draw the initial weights: convolutions by fan-out, the classifier small."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=HEAD_STD)
            nn.init.zeros_(module.bias)
    if zero_init_final_bn_gamma:
        for module in net.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                module.zero_init_last()
