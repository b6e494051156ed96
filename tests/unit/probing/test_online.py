"""The probe of a pretraining run: which images it takes, and how they are judged."""

import numpy as np
import pytest
import torch

from mixmae.probing.knn import KnnConfig, knn_leave_one_out
from mixmae.probing.online import OnlineProbeConfig, choose_images, draw_probe, probe_features, summarise_probe
from tests.factories import clouds, seeded


def test_classes_that_can_be_told_apart_and_such_that_cannot():
    features, labels = clouds(300, 16, 0.3)
    assert probe_features(features, labels, 20) == {"probe/knn_top1": 1.0, "probe/linear_top1": 1.0}
    noise = torch.randn(600, 16, generator=seeded(3))
    for value in probe_features(noise, torch.arange(600) % 3, 20).values():
        assert 0.25 < value < 0.42  # chance within four sigma


def test_it_is_the_knn_of_the_library_on_the_known_images():
    features, labels = clouds(60, 8, 1.5)
    expected = knn_leave_one_out(features, labels, num_classes=3, config=KnnConfig(k=5)).accuracy.top[1]
    hidden = torch.cat([labels * 7 + 2, torch.full((4,), -1)])  # numbers with gaps, as of a choice of classes
    value = probe_features(torch.cat([features, torch.zeros(4, 8)]), hidden, 5)["probe/knn_top1"]
    assert value == expected
    assert 0.4 < value < 1


def test_the_choice_of_images():
    labels = np.arange(1000) // 100  # stored by class
    rows = choose_images(labels, 200)
    assert len(rows) == 200
    assert np.bincount(labels[rows]).tolist() == [20] * 10
    assert np.array_equal(rows, np.sort(rows))
    assert np.diff(rows).min() == 5  # spread over each class
    # Fewer images than all classes would need: fewer classes, with 20 images each.
    rows = choose_images(labels, 60)
    assert np.bincount(labels[rows], minlength=10).tolist() == [20, 0, 0, 20, 0, 0, 20, 0, 0, 0]
    # Rare classes give what they have; one image alone, and images without a class, are of no use.
    few = np.array([0] * 50 + [1] * 3 + [2] + [-1] * 10)
    rows = choose_images(few, 80)
    assert np.bincount(few[rows]).tolist() == [40, 3]
    for useless in ([0] * 30, [-1] * 30, list(range(30)), []):
        assert len(choose_images(np.array(useless, dtype=np.int64), 100)) == 0


def test_mistakes():
    with pytest.raises(ValueError, match="probe images are 5: give at least 40"):
        OnlineProbeConfig(images=5)
    with pytest.raises(ValueError, match="probe k is 0"):
        OnlineProbeConfig(k=0)
    features, labels = clouds(30, 6, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        probe_features(features / 0, labels, 5)


PROBED = {"probe/knn_top1": 0.341, "probe/linear_top1": 0.38}
REFERENCES = {
    "reference/knn_untrained": 0.223,
    "reference/linear_untrained": 0.269,
    "reference/knn_pixels": 0.15,
    "reference/linear_pixels": 0.17,
    "reference/chance": 0.05,
}


def test_the_summary_is_one_line():
    assert summarise_probe(PROBED | REFERENCES) == (
        "kNN 34.1% (untrained encoder 22.3%, raw pixels 15.0%), linear probe 38.0% (26.9%, 17.0%), chance level 5.0%"
    )
    assert summarise_probe(PROBED) == "kNN 34.1%, linear probe 38.0%"


def test_the_picture_has_the_curve_and_its_references(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    start = {"step": 0, "probe/knn_top1": 0.223, "probe/linear_top1": 0.269, **REFERENCES}
    draw_probe([start, {"step": 9, **PROBED, **REFERENCES}], tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 5000
    knn, linear = ({line.get_label(): line for line in axes.lines} for axes in saved[0].axes)
    assert [line.tolist() for line in knn["pretrained"].get_data()] == [[0, 9], [0.223, 0.341]]
    levels = {label: line.get_ydata()[0] for label, line in linear.items() if label != "pretrained"}
    assert levels == {"untrained encoder": 0.269, "raw pixels": 0.17, "chance": 0.05}
