"""COCO's three ways to write a mask, crowds, and the crop that masks share with pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from hypersd_ray.data import images
from hypersd_ray.embedded import paths
from hypersd_ray.models.perception.coco import (
    CocoAnnotations,
    crop_square,
    decode_segmentation,
    mask_average_precision,
    to_results,
)
from hypersd_ray.models.perception.protocol import Instances


@pytest.fixture
def annotations(tmp_path):
    box = np.zeros((40, 60), np.uint8)
    box[10:30, 20:50] = 1
    compressed = coco_mask.encode(np.asfortranarray(box))
    # counts run down the columns: 20 columns and 10 rows of background first
    counts = [20 * 40 + 10]
    for _ in range(29):
        counts += [20, 20]
    counts += [20, 10 + 10 * 40]
    content = {
        "images": [
            {"id": 7, "file_name": "000000000007.jpg", "height": 40, "width": 60},
            {"id": 9, "file_name": "000000000009.jpg", "height": 40, "width": 60},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0,
             "segmentation": [[20, 10, 50, 10, 50, 30, 20, 30]]},
            {"id": 2, "image_id": 7, "category_id": 1, "iscrowd": 0,
             "segmentation": {"size": [40, 60], "counts": compressed["counts"].decode()}},
            {"id": 3, "image_id": 7, "category_id": 90, "iscrowd": 1,
             "segmentation": {"size": [40, 60], "counts": counts}},
        ],
    }  # fmt: skip
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path, box.astype(bool), counts


def test_polygons_and_both_rles_are_one_mask(annotations):
    path, box, counts = annotations
    read = CocoAnnotations(path)
    found = read.instances("000000000007")
    assert np.array_equal(found.masks[0].numpy(), box)
    assert np.array_equal(found.masks[1].numpy(), box)
    assert np.array_equal(decode_segmentation({"size": [40, 60], "counts": counts}, 40, 60), box)
    assert found.boxes().tolist() == [[20, 10, 50, 30]] * 2


def test_labels_count_the_ids_in_order_and_crowds_are_left_out(annotations):
    read = CocoAnnotations(annotations[0])
    assert read.num_classes == 3
    assert read.instances("000000000007").labels.tolist() == [1, 0]  # ids 18 and 1 of 1, 18, 90
    empty = read.instances("000000000009")
    assert len(empty) == 0 and empty.masks.shape == (0, 40, 60)
    with pytest.raises(ValueError, match="image 'x' has no entry"):
        read.instances("x")


def test_a_polygon_of_two_points_has_no_area():
    assert not decode_segmentation([[1, 1, 5, 5]], 10, 10).any()
    with pytest.raises(ValueError, match="neither polygons nor RLE"):
        decode_segmentation("nonsense", 10, 10)


@pytest.mark.parametrize(("height", "width"), [(120, 90), (64, 200), (64, 64)])
def test_masks_are_cropped_as_the_pictures_are(height, width):
    y, x = np.mgrid[:height, :width]
    mask = ((y - height / 2) / (height * 0.3)) ** 2 + ((x - width / 2) / (width * 0.2)) ** 2 < 1
    corner = np.zeros_like(mask)
    corner[:3, :3] = True
    picture = Image.fromarray((mask[..., None] * np.full(3, 255)).astype(np.uint8))
    pixels, _ = images.crop_square(picture, 64)
    cropped = crop_square(Instances(torch.from_numpy(np.stack([mask, corner])), torch.tensor([4, 5])), 64)
    expected = torch.from_numpy(pixels[0] >= 128)
    # the corner is cut away unless the picture is square
    assert cropped.labels.tolist() == ([4, 5] if height == width else [4])
    ours = cropped.masks[0]
    assert (ours & expected).sum() / (ours | expected).sum() > 0.97


def test_the_embedded_annotations_score_1_against_themselves():
    """pycocotools' AP of the exact masks is 1, of one-pixel-shifted masks less."""
    path = paths.DATA / "instances_val.json"
    read = CocoAnnotations(path)
    ids = [c["id"] for c in read.categories]
    keys = list(read.images)[:40]
    exact, shifted, image_ids = [], [], []
    for key in keys:
        truth = read.instances(key)
        image_id = read.images[key]["id"]
        image_ids.append(image_id)
        scores = torch.ones(len(truth))
        exact += to_results(image_id, Instances(truth.masks, truth.labels, scores), ids)
        shifted += to_results(image_id, Instances(truth.masks.roll(3, -1), truth.labels, scores), ids)
    assert mask_average_precision(path, exact, image_ids)["AP"] == pytest.approx(1.0)
    assert mask_average_precision(path, shifted, image_ids)["AP"] < 0.7
    assert mask_average_precision(path, [], image_ids)["AP"] == 0
