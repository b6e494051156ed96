"""Sort the drawings of an npm package into a folder for each kind: a real set of small images for few_labels.py.

    npm pack emoji-datasource-google@16.0.0
    python benchmarks/emoji.py emoji-datasource-google-16.0.0.tgz FOLDER

1,906 drawings of 64 px: Google's Noto Emoji, under the Apache License 2.0. A class is a category, such as
Food & Drink. Variants in another skin colour are left out: the same drawing must not be learned from and tested on.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

IMAGES = "package/img/google/64"


def main(package: str, folder: str) -> None:
    """Write FOLDER/CATEGORY/CODE.png."""
    with tarfile.open(package) as tar:

        def read(member: str) -> bytes:
            file = tar.extractfile(member)
            assert file is not None, member
            return file.read()

        for drawing in json.loads(read("package/emoji.json")):
            # Component: the five skin colours.
            if drawing["has_img_google"] and drawing["category"] != "Component":
                path = Path(folder, drawing["category"].replace(" & ", "_and_"), drawing["image"])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read(f"{IMAGES}/{drawing['image']}"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if not Path(sys.argv[1]).is_file():
        sys.exit(f"error: {sys.argv[1]} is not there: fetch it with npm pack emoji-datasource-google@16.0.0")
    main(*sys.argv[1:])
