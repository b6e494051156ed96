"""Finding objects with a pretrained encoder: Mask R-CNN on a feature pyramid, its losses, its scores and its pictures.

config.py has the settings, model.py the model, boxes.py the arithmetic of boxes, coco.py the score of record.
"""
