"""What is found of a folder of pictures, and that the data set which it names reads just that."""

import io
import zipfile
from collections import Counter

import pytest
from PIL import Image

from ldm.data.layout import find_picture_layout
from ldm.data.lists import ListedImages, read_rows
from ldm.data.survey import survey_pictures
from ldm.util import instantiate_from_config

COUNTS = {"ant": 10, "bee": 20, "cat": 30}


def picture(size=(12, 9), mode="RGB", value=80):
    file = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(file, "PNG")
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def class_folders():
    return {f"{name}/{place}.png": picture() for name, count in COUNTS.items() for place in range(count)}


def listed(split=False):
    rows = [("path", "label", "split")] if split else [("path", "label")]
    files = {}
    for name, count in COUNTS.items():
        for place in range(count):
            files[f"images/{name}{place}.png"] = picture()
            row = (f"images/{name}{place}.png", name)
            rows.append((*row, "val" if place % 10 == 9 else "train") if split else row)
    return {**files, "labels.csv": "\n".join(",".join(row) for row in rows).encode()}


def parts():
    found = {}
    for name, count in COUNTS.items():
        for place in range(count):
            found[f"{'valid' if place % 10 == 9 else 'train'}/{name}/{place}.png"] = picture()
    return found


def captions():
    found = {}
    for name, count in COUNTS.items():
        for place in range(count):
            found |= {f"{name}{place}.png": picture(), f"{name}{place}.txt": f"a drawn {name}".encode()}
    return found


LAYOUTS = {"class folders": class_folders, "parts": parts, "list": listed, "parts of a list": lambda: listed(True)}
LAYOUTS["captions"] = captions
LAYOUTS["class folders in a folder"] = lambda: {f"my/own/{name}": own for name, own in class_folders().items()}
LAYOUTS["parts in a folder"] = lambda: {f"my/{name}": own for name, own in parts().items()}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_the_data_set_that_is_named_reads_what_was_counted(name, zipped, tmp_path):
    make = LAYOUTS[name]
    root = write(tmp_path / "data", make())
    if zipped:
        root = str(tmp_path / "data.zip")
        with zipfile.ZipFile(root, "w") as archive:
            for path, content in make().items():
                archive.writestr(path, content)
    found = survey_pictures(root, find_picture_layout(root))
    for part in ("train", "validation"):
        params = {**found.layout.shared, **getattr(found.layout, part), "image_size": 8}
        data = instantiate_from_config({"target": found.layout.target, "params": params})
        assert data.class_names == found.class_names
        own = Counter(data.class_names[label] for label in data.labels.tolist())
        assert own == {name: count for name, count in found.counts(part).items() if count}
    assert found.total("train") == 54 and found.total("validation") == 6
    assert found.channels == 3 and set(found.sizes) == {(12, 9)} and not found.skipped


def test_what_is_skipped_is_said_with_its_reason(tmp_path):
    files = {**class_folders(), "ant/broken.png": b"x", "notes.txt": b"hi", "bee/grey.png": picture(mode="L")}
    found = survey_pictures(write(tmp_path, files), find_picture_layout(str(tmp_path)))
    assert set(found.skipped) == {"ant/broken.png", "notes.txt"}
    assert found.grey == 1 and found.total("train") + found.total("validation") == 61
    text = "\n".join(found.describe())
    assert "skipped 2 files" in text and "1 picture is grey" in text
    assert any("smaller than 64" in line for line in found.warnings(64))


def test_a_zip_with_a_damaged_part_is_read_without_it(tmp_path):
    place = tmp_path / "data.zip"
    with zipfile.ZipFile(place, "w") as archive:
        for path, content in class_folders().items():
            archive.writestr(path, content)
    content = bytearray(place.read_bytes())
    content[100] ^= 0xFF  # in the first picture, which is stored as it is
    place.write_bytes(content)
    found = survey_pictures(str(place), find_picture_layout(str(place)))
    assert len(found.skipped) == 1 and found.total("train") + found.total("validation") == 59


def test_a_zip_without_its_list_of_files_is_named(tmp_path):
    place = tmp_path / "data.zip"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("ant/0.png", picture())
    content = place.read_bytes()
    place.write_bytes(content.replace(b"PK\x01\x02", b"PK\x09\x09"))
    with pytest.raises(ValueError, match=r"data\.zip is damaged, or is not a zip of pictures"):
        find_picture_layout(str(place))


def test_a_class_without_pictures_for_validation_keeps_the_numbers(tmp_path):
    files = {name: content for name, content in parts().items() if not name.startswith("valid/bee")}
    root = write(tmp_path, files)
    layout = find_picture_layout(root)
    params = {**layout.shared, **layout.validation, "image_size": 8}
    data = instantiate_from_config({"target": layout.target, "params": params})
    assert data.class_names == ["ant", "bee", "cat"] and set(data.labels.tolist()) == {0, 2}


def test_a_flat_folder_is_one_class_and_loose_pictures_are_refused(tmp_path):
    root = write(tmp_path / "flat", {f"{place}.png": picture() for place in range(10)})
    assert find_picture_layout(root).class_names == ["pictures"]
    with pytest.raises(ValueError, match="beside 1 class folders"):
        find_picture_layout(write(tmp_path / "loose", {"a/1.png": picture(), "2.png": picture()}))
    with pytest.raises(ValueError, match="valid has classes that train has not: dog"):
        find_picture_layout(write(tmp_path / "more", {**parts(), "valid/dog/1.png": picture()}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"picture,label\na.png,1\n", "needs a column with the pictures' paths"),
        (b"path,label\na.png,\n", "a row without 'label'"),
        (b"\xff\xfe\x00", "no list of pictures in UTF-8"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(content, said):
    with pytest.raises(ValueError, match=said):
        read_rows("list.csv", content)


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    names = ["10", "9", "2"]
    rows = "\n".join(f'{{"file_name": "{name}.png", "class": {name}}}' for name in names)
    root = write(tmp_path, {**{f"{name}.png": picture() for name in names}, "list.jsonl": rows.encode()})
    data = ListedImages(root, "list.jsonl", image_size=8)
    assert data.class_names == ["2", "9", "10"] and data.labels.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"1 of 4 pictures that are not in"):
        (tmp_path / "list.jsonl").write_text(rows + '\n{"file_name": "no.png", "class": 1}')
        ListedImages(root, "list.jsonl", image_size=8)
