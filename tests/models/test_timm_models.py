"""DeiT's settings, and models by their timm name: blocks, maps and unchanged weights."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from lg.guidance import FrozenTeacher, GuidanceLoss, GuidedStudent
from lg.models import Backbone, MapLayout, deit, feature_maps, resnet, timm_model
from lg.models.backbone import probe_layouts

DEIT = {
    "img_size": 32,
    "num_classes": 10,
    "patch_size": 8,
    "hidden_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 3.0,
}
# name, image size, blocks, kind and prefix tokens of the last map, first map, last map
FAMILIES = [
    ("vit_tiny_patch16_224", 48, 12, "tokens", 1, (192, 3, 3), (192, 3, 3)),
    ("deit_tiny_distilled_patch16_224", 224, 12, "tokens", 2, (192, 14, 14), (192, 14, 14)),
    ("convnext_atto", 64, 12, "nchw", 0, (40, 16, 16), (320, 2, 2)),
    ("resnet18", 32, 8, "nchw", 0, (64, 8, 8), (512, 1, 1)),
    ("efficientnet_b0", 32, 16, "nchw", 0, (16, 16, 16), (320, 1, 1)),
    ("mobilenetv3_small_100", 64, 11, "nchw", 0, (16, 16, 16), (96, 2, 2)),
    ("pvt_v2_b0", 64, 8, "tokens", 0, (32, 16, 16), (256, 2, 2)),
    ("pit_ti_224", 64, 12, "tokens", 1, (64, 7, 7), (256, 2, 2)),
    ("cait_xxs24_224", 48, 24, "tokens", 0, (192, 3, 3), (192, 3, 3)),
    ("xcit_nano_12_p16_224", 64, 12, "tokens", 0, (128, 4, 4), (128, 4, 4)),
    ("mixer_s32_224", 64, 8, "tokens", 0, (512, 2, 2), (512, 2, 2)),
    ("levit_128s", 128, 9, "tokens", 0, (128, 8, 8), (384, 2, 2)),
    ("regnetx_002", 64, 13, "nchw", 0, (24, 16, 16), (368, 2, 2)),
    ("mobilevit_xxs", 64, 10, "nchw", 0, (16, 32, 32), (80, 2, 2)),
    ("maxvit_pico_rw_256", 64, 11, "nchw", 0, (32, 16, 16), (256, 2, 2)),  # blocks inside blocks
    ("repvgg_a0", 64, 21, "nchw", 0, (48, 16, 16), (1280, 2, 2)),  # a stem of the blocks' class
]
SLOW_FAMILIES = [
    ("swin_tiny_patch4_window7_224", 224, 12, "nhwc", 0, (96, 56, 56), (768, 7, 7)),
    ("coatnet_nano_rw_224", 224, 16, "nchw", 0, (64, 56, 56), (512, 7, 7)),
    ("poolformer_s12", 224, 12, "nchw", 0, (64, 56, 56), (512, 7, 7)),
    ("densenet121", 224, 4, "nchw", 0, (256, 56, 56), (1024, 7, 7)),
    ("convit_tiny", 224, 12, "tokens", 1, (192, 14, 14), (192, 14, 14)),
    ("tnt_s_patch16_224", 224, 12, "tokens", 1, (384, 14, 14), (384, 14, 14)),
    ("mvitv2_tiny", 224, 10, "tokens", 0, (96, 56, 56), (768, 7, 7)),
    ("gcvit_xxtiny", 224, 12, "nhwc", 0, (64, 56, 56), (512, 7, 7)),
    ("tiny_vit_5m_224", 224, 12, "nhwc", 0, (64, 56, 56), (320, 7, 7)),
    ("resnetv2_50", 224, 16, "nchw", 0, (256, 56, 56), (2048, 7, 7)),
    ("caformer_s18", 224, 18, "tokens", 0, (64, 56, 56), (512, 7, 7)),
]
# Students of many kinds, at the smallest image size that leaves their last stage a map.
GUIDED = [
    *((name, size) for name, size, *_ in FAMILIES if size < 224),
    ("swin_tiny_patch4_window7_224", 64),
    ("coatnet_nano_rw_224", 64),
    ("poolformer_s12", 64),
    ("densenet121", 32),
    ("convit_tiny", 32),
    ("mvitv2_tiny", 64),
    ("tiny_vit_5m_224", 64),
    ("resnetv2_50", 32),
    ("caformer_s18", 64),
    ("dla34", 32),
]


def build(name: str, img_size: int, **settings: object) -> Backbone:
    return timm_model(name, img_size=img_size, in_channels=3, num_classes=10, **settings)


def check_family(
    name: str, size: int, blocks: int, kind: str, prefix: int, first: tuple, last: tuple
) -> None:
    model = build(name, size)
    assert len(model.blocks) == blocks
    assert (model.layouts[-1].kind, model.layouts[-1].prefix) == (kind, prefix)
    with torch.no_grad():
        logits, maps = feature_maps(model.eval(), torch.randn(2, 3, size, size), range(blocks))
    assert logits.shape == (2, 10)
    assert maps[0].shape[1:] == first and maps[-1].shape[1:] == last
    assert [feature.shape[1] for feature in maps] == model.feature_dims
    assert all(len(m) == 2 and m.shape[2] == m.shape[3] for m in maps)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_blocks_and_maps_are_found(family: tuple) -> None:
    check_family(*family)


@pytest.mark.slow
def test_blocks_and_maps_are_found_in_more_families() -> None:
    for family in SLOW_FAMILIES:
        check_family(*family)
    with pytest.raises(ValueError, match=r"block_names .* features.\* \(Conv2d/ReLU/MaxPool2d\)"):
        build("vgg11", 32)


def spread(model: Backbone) -> list[int]:
    """Return the first, the middle and the last block."""
    return [0, len(model.blocks) // 2, len(model.blocks) - 1]


def check_guided_steps(student: Backbone, size: int, guide: Backbone, guide_size: int) -> None:
    """Check on one batch that steps on the imitation loss, then on the total loss, lower it."""
    teacher = FrozenTeacher(guide, indices=spread(guide), image_size=guide_size)
    guided = GuidedStudent(student, indices=spread(student), teacher_dims=teacher.feature_dims)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    goals, _ = teacher(images)
    loss = GuidanceLoss(inter_weight=2.5)
    # Without warm-up, Swin and CoAtNet diverge at ten times this learning rate.
    optimizer = torch.optim.AdamW(guided.train().parameters(), lr=1e-4)
    for lowered in ("inter", "loss"):
        history = []
        for _ in range(6):
            term = loss(*guided(images), torch.eye(10)[:4], goals)[lowered]
            history.append(term.item())
            optimizer.zero_grad()
            term.backward()
            for block in (student.blocks[index] for index in guided.indices):
                assert any(p.grad is not None and p.grad.any() for p in block.parameters())
            optimizer.step()
        assert history[-1] < history[0], (lowered, history)


@pytest.mark.slow
@pytest.mark.parametrize("student", GUIDED, ids=lambda student: student[0])
def test_students_of_every_kind_are_guided(student: tuple[str, int]) -> None:
    torch.manual_seed(0)
    guide = resnet(depth=8, img_size=32, num_classes=10)
    check_guided_steps(build(*student), student[1], guide, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["convnext_atto", "pvt_v2_b0", "resnet18", "swin_tiny_patch4_window7_224", "levit_128s"],
)
def test_guides_of_every_kind(name: str) -> None:
    torch.manual_seed(0)
    check_guided_steps(build("vit_tiny_patch16_224", 32), 32, build(name, 64), 64)


@pytest.mark.parametrize(
    ("name", "size", "taps"),
    [
        ("vit_tiny_patch16_224", 64, range(12)),
        ("mixer_s32_224", 64, range(8)),
        ("swin_tiny_patch4_window7_224", 64, [1, 3, 9, 11]),
        ("convnext_atto", 64, [1, 3, 9, 11]),
    ],
)
def test_maps_equal_forward_intermediates_of_timm(name: str, size: int, taps: list[int]) -> None:
    model = build(name, size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.net.forward_intermediates(
            images, output_fmt="NCHW", intermediates_only=True
        )
        _, maps = feature_maps(model, images, taps)
    for mine, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "levit_128s"])
def test_finding_the_blocks_changes_no_weight_or_mode(name: str) -> None:
    taken = {} if name == "resnet18" else {"img_size": 64}  # a ResNet takes any size
    torch.manual_seed(5)
    expected = timm.create_model(name, num_classes=10, **taken)
    draw = torch.rand(1)
    torch.manual_seed(5)
    model = build(name, 64)
    assert torch.equal(torch.rand(1), draw)
    for (key, mine), theirs in zip(
        model.net.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), key
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_probe_keeps_the_global_random_state() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(images + torch.randn_like(images))

    net = Noisy()
    before = torch.get_rng_state()
    assert probe_layouts(net, ["conv"], image_shape=(3, 8, 8)) == {"conv": MapLayout("nchw", 4)}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failed_attempt_to_build_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def late_refusal(name: str, **settings: object) -> nn.Module:
        if "img_size" in settings:
            torch.rand(3)
            raise TypeError("__init__() got an unexpected keyword argument 'img_size'")
        return create(name, **settings)

    torch.manual_seed(5)
    expected = create("mobilenetv3_small_100", num_classes=10)
    monkeypatch.setattr(timm, "create_model", late_refusal)
    torch.manual_seed(5)
    model = build("mobilenetv3_small_100", 32)
    assert torch.equal(model.net.conv_stem.weight, expected.conv_stem.weight)


def test_ambiguous_maps_are_read_like_those_of_other_blocks() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(images.permute(0, 2, 3, 1)))

    layouts = probe_layouts(ChannelsLast(), ["one", "two"], image_shape=(3, 4, 4))
    assert layouts == {"one": MapLayout("nhwc", 5), "two": MapLayout("nhwc", 4)}
    cube = probe_layouts(nn.Conv2d(3, 4, 1), [""], image_shape=(3, 4, 4))
    assert cube == {"": MapLayout("nchw", 4)}


def test_blocks_named_by_hand() -> None:
    model = build("resnet18", 64, block_names=["layer[34].1", "maxpool", "layer1"])
    assert model.block_names == ("maxpool", "layer1", "layer3.1", "layer4.1")
    assert model.feature_dims == [64, 64, 256, 512]
    _, maps = feature_maps(model.eval(), torch.randn(1, 3, 64, 64), [0, 1, 2, 3])
    assert [m.shape[-1] for m in maps] == [16, 16, 4, 2]


@pytest.mark.parametrize(
    ("name", "size", "settings", "message"),
    [
        ("nest_tiny", 32, {}, r"no blocks .* block_names .* levels.\* \(NestLevel\)"),
        ("resnet18", 32, {"block_names": ["body.*"]}, r"block_names has body.\*, .* no such"),
        ("resnet18", 32, {"block_names": ["fc"]}, "block_names has fc, .* no feature map"),
        # The next ReLU overwrites its output.
        ("resnet18", 32, {"block_names": ["bn1"]}, "bn1, .* the next module overwrites"),
        ("cait_xxs24_224", 32, {"block_names": ["blocks_token_only.*"]}, "no feature map"),
        ("hiera_tiny_224", 224, {"block_names": ["blocks.*"]}, "no feature map"),
        (
            "vit_tiny_patch16_24",
            32,
            {},
            "no model 'vit_tiny_patch16_24'; did you mean vit_tiny_p",
        ),
        ("hf-hub:timm/vit", 32, {}, "has no model 'hf-hub:timm/vit'"),
        ("vit_tiny_patch16_224", 8, {}, "img_size 8 does not fit .*: it is made for 224"),
        ("xcit_nano_12_p16_224", 50, {}, "img_size 50 does not fit .* divide image.* for 224"),
        ("inception_v3", 32, {}, "img_size 32 does not fit .* made for 299"),
        ("densenet121", 32, {"drop_path_rate": 0.1}, "drop_path_rate is 0.1, .* no such rate"),
    ],
)
def test_errors_name_the_argument_and_the_fix(
    name: str, size: int, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, size, **settings)


def test_rates_reach_timm_models() -> None:
    model = build("vit_tiny_patch16_224", 32, drop_rate=0.3, drop_path_rate=0.2)
    assert model.net.head_drop.p == 0.3
    assert model.net.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    build("densenet121", 32, drop_path_rate=0.0)  # zero needs no support


def test_deit_initial_weights() -> None:
    torch.manual_seed(0)
    model = deit(**{**DEIT, "hidden_dim": 192, "depth": 1}, distilled=True)
    for head in (model.net.head, model.net.head_dist):
        assert torch.all(head.weight == 0) and torch.all(head.bias == 0)
    block = model.net.blocks[0]
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert torch.all(linear.bias == 0)
    assert model.net.pos_embed.std().item() == pytest.approx(0.02, rel=0.06)


def test_deit_settings_reach_the_layers() -> None:
    model = deit(
        **DEIT,
        ln_eps=1e-3,
        drop_rate=0.1,
        drop_path_rate=0.4,
        attention_drop_rate=0.2,
        in_channels=1,
    )
    net = model.net
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    assert net.pos_drop.p == 0.1 and net.head_drop.p == 0.0
    rates = []
    for block in net.blocks:
        assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.1
        assert block.attn.attn_drop.p == 0.2
        assert block.mlp.fc1.out_features == 96
        rates.append(getattr(block.drop_path1, "drop_prob", 0.0))
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_deit_of_one_block() -> None:
    model = deit(**{**DEIT, "depth": 1}, drop_path_rate=0.1)
    _, maps = feature_maps(model, torch.zeros(1, 3, 32, 32), [0])
    assert maps[0].shape == (1, 32, 4, 4)


def test_distilled_deit_returns_two_logits_in_training_and_their_mean_in_evaluation() -> None:
    model = deit(**DEIT, distilled=True)
    nn.init.ones_(model.net.head.bias)
    nn.init.constant_(model.net.head_dist.bias, 4.0)
    (logits, distilled), maps = feature_maps(model.train(), torch.randn(2, 3, 32, 32), [2])
    assert torch.all(logits == 1) and torch.all(distilled == 4)
    assert maps[0].shape == (2, 32, 4, 4)
    assert torch.all(model.eval()(torch.randn(2, 3, 32, 32)) == 2.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"img_size": 30},
            "img_size 30 is not a multiple of patch_size 8: .* 24 or 32",
        ),
        ({"img_size": 4}, "img_size 4 is not a multiple .* 8 or 16"),
        ({"num_heads": 3}, "hidden_dim 32 is not divisible by num_heads 3"),
    ],
)
def test_deit_sizes_that_do_not_divide(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deit(**{**DEIT, **changes})
