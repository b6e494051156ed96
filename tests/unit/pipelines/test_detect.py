"""What detect.py says at its end."""

from pipelines.detect import in_words


def test_a_detector_without_masks_has_no_figures_of_masks():
    boxes = {"final/box_ap": 0.5, "final/box_ap50": 0.75, "final/box_ap75": 0.4, "best/box_ap": 0.6}
    assert in_words(boxes) == "AP of boxes 50.00% and AP50 75.00%"
    both = boxes | {"final/mask_ap": 0.25, "final/mask_ap50": 1.0}
    assert in_words(both) == "AP of boxes 50.00% and AP50 75.00%, AP of masks 25.00% and AP50 100.00%"
