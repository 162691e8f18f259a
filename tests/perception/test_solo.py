"""SOLO: mmdetection's tensors, torchvision's backbone, losses and decoding against independent forms."""

import pytest
import torch
import torchvision
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as Reference

from hypersd_ray.models.perception.protocol import Instances, no_instances
from hypersd_ray.models.perception.solo import Level, ResNet, SOLOConfig, SOLONetwork, coordinates
from hypersd_ray.models.perception.solo_decode import DecodeConfig, decode, matrix_nms
from hypersd_ray.models.perception.solo_model import SOLO, load_solo, save_solo
from hypersd_ray.models.perception.solo_targets import (
    dice,
    level_target,
    per_picture_loss,
    sigmoid_focal,
    training_loss,
)

SMALL = SOLOConfig(
    num_classes=3, blocks=(1, 1, 1, 1), width=8, fpn_channels=16, head_channels=16, stacked_convs=2, norm_groups=4,
    num_grids=(10, 8, 6, 4, 3), scale_ranges=((1, 24), (12, 48), (24, 96), (48, 192), (96, 512)), short_side=0,
)  # fmt: skip


def squares(size=64) -> Instances:
    """A 16 px square at (8, 8), class 0, and a 30 x 20 one at the lower right, class 2."""
    masks = torch.zeros(2, size, size, dtype=torch.bool)
    masks[0, 8:24, 8:24] = True
    masks[1, 30:60, 40:60] = True
    return Instances(masks, torch.tensor([0, 2]))


@pytest.fixture(scope="module")
def model() -> SOLO:
    torch.manual_seed(0)
    network = SOLONetwork(SMALL)
    for name, p in network.mask_head.named_parameters():
        if name.endswith("weight") and p.ndim == 4:
            torch.nn.init.normal_(p, std=0.1)  # the start's 0.01 would make every output alike
        if name.endswith("bias") and ("conv_mask" in name or "conv_cls" in name):
            torch.nn.init.zeros_(p)
    return SOLO(network.eval().requires_grad_(False)).eval()


def test_names_and_shapes_are_mmdetections():
    with torch.device("meta"):
        network = SOLONetwork(SOLOConfig())
        resnet = torchvision.models.resnet50()
    state = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert len(state) == 388
    assert sum(p.numel() for p in network.parameters()) == 36_301_232
    backbone = {f"backbone.{k}": tuple(v.shape) for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    assert len(backbone) == 318
    assert {k: v for k, v in state.items() if k.startswith("backbone.")} == backbone
    expected = {}
    for i, channels in enumerate((256, 512, 1024, 2048)):
        expected |= {f"neck.lateral_convs.{i}.conv.weight": (256, channels, 1, 1),
                     f"neck.lateral_convs.{i}.conv.bias": (256,),
                     f"neck.fpn_convs.{i}.conv.weight": (256, 256, 3, 3), f"neck.fpn_convs.{i}.conv.bias": (256,)}  # fmt: skip
    for i in range(7):
        for branch, first in (("mask", 258), ("cls", 256)):
            prefix = f"mask_head.{branch}_convs.{i}"
            expected[f"{prefix}.conv.weight"] = (256, first if i == 0 else 256, 3, 3)
            expected[f"{prefix}.gn.weight"] = expected[f"{prefix}.gn.bias"] = (256,)
    for i, grid in enumerate((40, 36, 24, 16, 12)):
        expected[f"mask_head.conv_mask_list.{i}.weight"] = (grid**2, 256, 1, 1)
        expected[f"mask_head.conv_mask_list.{i}.bias"] = (grid**2,)
    expected |= {"mask_head.conv_cls.weight": (80, 256, 3, 3), "mask_head.conv_cls.bias": (80,)}
    assert {k: v for k, v in state.items() if not k.startswith("backbone.")} == expected


def test_backbone_is_torchvisions_resnet():
    torch.manual_seed(0)
    ours, theirs = ResNet((1, 2, 1, 1), 64).eval(), Reference(Bottleneck, [1, 2, 1, 1]).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for feature, layer in zip(ours(x), (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
            y = layer(y)
            torch.testing.assert_close(feature, y)


def test_level_sizes(model):
    levels = model.network(torch.randn(2, 3, 64, 96))
    assert [tuple(level.class_logits.shape) for level in levels] == [(2, 3, g, g) for g in SMALL.num_grids]
    # P2 goes down to P3's size, P6 up to P5's; all doubled
    assert [tuple(level.mask_features.shape[-2:]) for level in levels] == [(16, 24), (16, 24), (8, 12), (4, 6), (4, 6)]


def test_coordinates_are_x_then_y():
    x, y = coordinates(torch.zeros(1, 5, 2, 3))[0]
    assert x.tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert y.tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_targets_of_two_squares():
    """Level 0 takes sqrt(area) 1..24: the 16 px square, not the one of sqrt(600) = 24.5."""
    wanted = level_target(squares(), SMALL, 0, (16, 16))
    # centre 15.5 of 64 in 10 cells: 2.42 -> cell 2; 0.5 * 0.2 * 16 = 1.6 px reach 2.17..2.67 -> only cell 2
    assert wanted.cells.tolist() == [2 * 10 + 2]
    assert wanted.classes[2, 2] == 0 and (wanted.classes != 3).sum() == 1
    assert wanted.masks.shape == (1, 16, 16)
    assert wanted.masks[0, 2:6, 2:6].all() and wanted.masks.sum() == 16
    wanted = level_target(squares(), SMALL, 1, (16, 16))
    # both (12..48). First: 15.5 +- 1.6 px of 8 px cells reach 1.74..2.14 -> cells 1, 2. Second: rows 30..59, centre 44.5 of 64 in 8 cells: 5.56, reach 3 px: 5.19..5.94; columns 49.5: 6.19, 5.94..6.44
    assert wanted.cells.tolist() == [8 + 1, 8 + 2, 16 + 1, 16 + 2, 5 * 8 + 5, 5 * 8 + 6]
    assert wanted.classes[5, 5] == wanted.classes[5, 6] == 2
    assert torch.equal(wanted.masks[4], wanted.masks[5]) and not torch.equal(wanted.masks[3], wanted.masks[4])
    assert not len(level_target(squares(), SMALL, 4, (4, 4)).cells)


def test_positive_cells_are_at_most_three_a_side():
    masks = torch.zeros(1, 640, 640, dtype=torch.bool)
    masks[0] = True
    config = SOLOConfig(num_grids=(40,) * 5, scale_ranges=((1, 2048),) * 5, strides=(8,) * 5)
    wanted = level_target(Instances(masks, torch.tensor([1])), config, 0, (160, 160))
    rows = sorted({c // 40 for c in wanted.cells.tolist()})
    # the centre 319.5 lies in cell 19; a reach of 64 px would be 4 cells either side
    assert rows == [18, 19, 20] and len(wanted.cells) == 9


def test_focal_is_torchvisions():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 5, generator=g) * 3
    classes = torch.randint(0, 4, (5, 5), generator=g)
    onehot = torch.stack([(classes == c).float() for c in range(3)])
    expected = torchvision.ops.sigmoid_focal_loss(logits, onehot, alpha=0.25, gamma=2, reduction="sum")
    torch.testing.assert_close(sigmoid_focal(logits, classes), expected)


def test_dice_in_numbers():
    """p = 1/2 on 4 pixels, 2 of them in the mask: 1 - 2 * 1 / (1 + .001 + 2 + .001) = 0.33378; p = t gives almost 0."""
    masks = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert dice(torch.zeros(1, 2, 2), masks).item() == pytest.approx(1 - 2 / 3.002, abs=1e-6)
    assert dice((masks - 0.5) * 60, masks).item() == pytest.approx(1 - 4 / 4.002, abs=1e-6)


def test_rows_at_positive_cells_give_the_full_loss(model):
    """Value and gradient to the pixels."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for rows_only in (True, False):
        x = images.clone().requires_grad_(True)
        loss = SOLO(model.network, rows_only=rows_only).loss(x, [squares(), squares()])
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)
    assert results[0][1].abs().max() > 0


def test_a_picture_without_objects_gives_zero_and_no_gradient(model):
    x = torch.rand(2, 3, 64, 64).requires_grad_(True)
    loss = model.loss(x, [no_instances(64, 64), squares()])
    assert loss[0] == 0 and loss[1] > 0
    loss.sum().backward()
    assert (x.grad[0] == 0).all() and (x.grad[1] != 0).any()
    # in the detector's own training such a picture still says "nothing here"
    sums = model.sums(x.detach(), [no_instances(64, 64), no_instances(64, 64)])
    assert torch.isfinite(training_loss(sums)) and training_loss(sums) > 0
    assert per_picture_loss(sums).tolist() == [0, 0]


def test_pictures_do_not_interact(model):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 64, 64, generator=g)
    targets = [squares(), no_instances(64, 64), Instances(squares().masks[:1], torch.tensor([1]))]
    x = images.clone().requires_grad_(True)
    loss = model.loss(x, targets)
    (together,) = torch.autograd.grad(loss.sum(), x)
    for i in (0, 2):
        one = images[i : i + 1].clone().requires_grad_(True)
        alone = model.loss(one, targets[i : i + 1])
        torch.testing.assert_close(alone[0], loss[i])
        torch.testing.assert_close(torch.autograd.grad(alone.sum(), one)[0][0], together[i], rtol=1e-3, atol=1e-7)


def matrix_nms_by_loops(masks, labels, scores, sigma):
    """SOLOv2's formula, one pair at a time."""

    def iou(i, j):
        if labels[i] != labels[j]:
            return 0.0
        return ((masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum()).item()

    out = []
    for j in range(len(scores)):
        decay = 1.0
        for i in range(j):
            most = max([iou(k, i) for k in range(i)], default=0.0)
            decay = min(decay, float(torch.exp(torch.tensor(-sigma * (iou(i, j) ** 2 - most**2)))))
        out.append(scores[j].item() * decay)
    return torch.tensor(out)


def test_matrix_nms_is_its_formula():
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(6, 20, 20, dtype=torch.bool)
    for i in range(6):
        top, left = torch.randint(0, 8, (2,), generator=g).tolist()
        masks[i, top : top + 10, left : left + 10] = True
    labels = torch.tensor([0, 0, 1, 0, 1, 0])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    ours = matrix_nms(masks, labels, scores, 2.0)
    torch.testing.assert_close(ours, matrix_nms_by_loops(masks, labels, scores, 2.0))
    assert ours[0] == scores[0] and ours[2] == scores[2]  # nothing of their class above them
    assert (ours < scores - 0.01).any()


def test_decoding_perfect_outputs_gives_the_objects_back(model):
    """Logits made from the targets themselves come back as the two squares, once each."""
    target = squares()
    head, levels = SOLONetwork(SMALL).mask_head.requires_grad_(False), []
    for number, grid in enumerate(SMALL.num_grids):
        size = ((16, 16), (16, 16), (8, 8), (4, 4), (4, 4))[number]
        wanted = level_target(target, SMALL, number, size)
        classes = torch.full((3, grid, grid), -10.0)
        features = torch.full((16, *size), -10.0)
        weight = torch.zeros(grid**2, 16, 1, 1)
        weight[:, 15] = 1
        for i, cell in enumerate(wanted.cells.tolist()):
            classes[wanted.classes.flatten()[cell], cell // grid, cell % grid] = 10
            features[i] = (wanted.masks[i] - 0.5) * 20
            weight[cell] = torch.eye(16)[i].view(16, 1, 1)
        head.conv_mask_list[number].weight.copy_(weight)
        head.conv_mask_list[number].bias.zero_()
        levels.append(Level(classes[None], features[None]))
    found = decode(head, levels, 0, SMALL, DecodeConfig(), (64, 64), (64, 64))
    # the level with coarse masks sees them too, a little less well
    best = [found.scores[found.labels == c].argmax() for c in (0, 2)]
    for mask, label, i in zip(target.masks, (0, 2), best, strict=True):
        ours = found.masks[found.labels == label][i]
        assert (ours & mask).sum() / (ours | mask).sum() > 0.85
    assert found.scores[0] > 0.9 and (found.scores > 0.5).sum() == 2


def test_predictions_have_the_pictures_size(model):
    found = SOLO(model.network, DecodeConfig(score_threshold=0.3)).predict(torch.rand(2, 3, 50, 70))
    assert len(found) == 2 and len(found[0]) > 0
    assert found[0].masks.shape[-2:] == (50, 70)
    assert (found[0].scores.diff() <= 0).all()
    nothing = SOLO(model.network, DecodeConfig(score_threshold=0.999)).predict(torch.rand(1, 3, 50, 70))[0]
    assert len(nothing) == 0 and nothing.masks.shape == (0, 50, 70)


def test_folder_and_mmdetections_nesting(model, tmp_path):
    save_solo(model, tmp_path)
    again = load_solo(tmp_path)
    x = torch.rand(1, 3, 64, 64)
    assert again.config == SMALL
    torch.testing.assert_close(again.loss(x, [squares()]), model.loss(x, [squares()]))
    torch.save({"meta": {"epoch": 1}, "state_dict": model.network.state_dict()}, tmp_path / "model.pth")
    # a checkpoint file is the published size: a small one does not fit, and says so
    with pytest.raises(ValueError, match=r"model.pth does not fit SOLONetwork: \d+ missing \(backbone.layer1.1"):
        load_solo(tmp_path / "model.pth")


def test_annotations_must_fit(model):
    with pytest.raises(ValueError, match=r"masks are \(64, 64\), the picture is \(32, 32\)"):
        model.loss(torch.rand(1, 3, 32, 32), [squares()])
    with pytest.raises(ValueError, match=r"must lie in 0..2"):
        model.loss(torch.rand(1, 3, 64, 64), [Instances(squares().masks, torch.tensor([0, 3]))])
