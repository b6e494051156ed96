"""Images with objects, in the layouts that they are published and annotated in; opening finds out which one it is.

raw.py has what all have in common, and what is counted and left out; coco.py, voc.py, yolo.py and labelme.py one layout
each; files.py the source.
"""

from mixmae.data.sources.objects.files import ObjectListing, list_objects, open_objects

__all__ = ["ObjectListing", "list_objects", "open_objects"]
