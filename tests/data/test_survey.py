"""What is found of a folder of pictures, and that the data set which it names reads just that."""

import io
import re
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


def within(folder, files):
    return {f"{folder}/{name}": content for name, content in files.items()}


def captioned():
    """The pictures of `listed`, with captions in a list."""
    return {**listed(), "labels.csv": listed()["labels.csv"].replace(b"path,label", b"file_name,text")}


def two_lists(form):
    """The rows of `listed` in a list a split: train.csv and val.csv, or a list in the folder of each split's pictures.

    Args:
        form: `form(split)` is the place of a split's list.
    """
    files = {}
    for split in ("train", "val"):
        place = form(split)
        folder = place.rpartition("/")[0]
        rows = [("path", "label")]
        for name, count in COUNTS.items():
            for number in range(count):
                if (number % 10 == 9) == (split == "val"):
                    picture_path = f"{name}{number}.png" if folder else f"images/{name}{number}.png"
                    files[f"{folder}/{picture_path}" if folder else picture_path] = picture()
                    rows.append((picture_path, name))
        files[place] = "\n".join(",".join(row) for row in rows).encode()
    return files


LAYOUTS["list in a folder"] = lambda: within("my", listed())
LAYOUTS["list in two folders"] = lambda: within("outer/inner", listed())
LAYOUTS["parts of a list in a folder"] = lambda: within("my", listed(True))
LAYOUTS["captions in a list"] = captioned
LAYOUTS["captions in a list in a folder"] = lambda: within("my", captioned())
LAYOUTS["captions in a folder"] = lambda: within("my", captions())
LAYOUTS["a list a split"] = lambda: two_lists("{}.csv".format)
LAYOUTS["a list a split in a folder"] = lambda: within("my", two_lists("{}.csv".format))
LAYOUTS["a list in the folder of each split"] = lambda: two_lists("{}/metadata.csv".format)
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
                if path.startswith("my/"):  # as macOS packs a folder
                    archive.writestr(f"__MACOSX/{path.replace('my/', 'my/._')}", b"\0\5\x16\7")
    found = survey_pictures(root, find_picture_layout(root))
    for part in ("train", "validation"):
        params = {**found.layout.shared, **getattr(found.layout, part), "image_size": 8}
        data = instantiate_from_config({"target": found.layout.target, "params": params})
        assert data.class_names == found.class_names
        own = Counter(data.class_names[label] for label in data.labels.tolist())
        assert own == {name: count for name, count in found.counts(part).items() if count}
    assert found.total("train") == 54 and found.total("validation") == 6
    assert found.channels == 3 and set(found.sizes) == {(12, 9)}
    assert set(found.skipped.values()) <= {"hidden, or left by a system"}


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
    with pytest.raises(ValueError, match=r"holds 1 picture beside class folders, 2\.png"):
        find_picture_layout(write(tmp_path / "loose", {"a/1.png": picture(), "2.png": picture()}))
    with pytest.raises(ValueError, match="valid has classes that train has not: dog"):
        find_picture_layout(write(tmp_path / "more", {**parts(), "valid/dog/1.png": picture()}))


WAYS = {
    "below the root": "images/{}.png",
    "with a dot": "./images/{}.png",
    "with backslashes": "images\\{}.png",
    "below the pictures' folder": "{}.png",
    "with the root's name": "data/images/{}.png",
    "of another machine": "/somewhere/else/images/{}.png",
    "without endings": "images/{}",
    "in other letters": "Images/{}.PNG",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_list_may_write_paths_in_many_ways(way, delimiter, tmp_path):
    owners = {"a": "ant", "b": "bee", "c": "bee"}
    rows = [("path", "label"), *((WAYS[way].format(name), owner) for name, owner in owners.items())]
    files = {**{f"images/{name}.png": picture() for name in owners}, "about.csv": b"who,when\nme,now\n"}
    files["labels.csv"] = "\n".join(delimiter.join(row) for row in rows).encode()
    root = write(tmp_path / "data", files)
    data = ListedImages(root, "labels.csv", image_size=8)
    assert data.relpaths == [f"images/{name}.png" for name in owners]
    assert [data.class_names[label] for label in data.labels.tolist()] == list(owners.values())
    found = survey_pictures(root, find_picture_layout(root))
    assert found.layout.shared["file"] == "labels.csv" and list(found.skipped) == ["about.csv"]


def test_pictures_for_a_test_without_classes_are_left_out(tmp_path):
    files = {name: content for name, content in parts().items() if name.startswith("train/")}
    root = write(tmp_path, {**files, "test/1.png": picture(), "test/2.png": picture()})
    layout = find_picture_layout(root)
    assert layout.class_names == list(COUNTS) and layout.shared["folder"] == "train"
    assert layout.skipped == {f"test/{name}.png": "in test, which has no class folders" for name in (1, 2)}
    loose = {**files, "train/loose.png": picture(), "test/ant/1.png": picture()}
    with pytest.raises(ValueError, match=r"holds 1 picture beside class folders, train/loose\.png"):
        find_picture_layout(write(tmp_path / "loose", loose))


def test_a_zip_whose_paths_are_those_of_windows_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path, content in parts().items():
            archive.writestr("my/" + path, content)
    place = tmp_path / "data.zip"
    place.write_bytes(re.sub(rb"my/(train|valid)/(ant|bee|cat)/", rb"my\\\1\\\2\\", place.read_bytes()))
    found = survey_pictures(str(place), find_picture_layout(str(place)))
    assert found.class_names == list(COUNTS) and (found.total("train"), found.total("validation")) == (54, 6)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["other/1.png"], "names 1 of 1 pictures that are not in"),
        (["1.png", "2.png"], "may mean pictures in several folders, a/, b/"),
        (["a/1.png", "./a/1.png"], "names the picture a/1.png 2 times"),
    ],
)
def test_paths_that_mean_no_picture_or_several_are_refused(paths, said, tmp_path):
    files = {f"{folder}/{number}.png": picture() for folder in "ab" for number in (1, 2)}
    rows = ["path,label", *(f"{path},x" for path in paths)]
    root = write(tmp_path, {**files, "list.csv": "\n".join(rows).encode()})
    with pytest.raises(ValueError, match=said):
        ListedImages(root, "list.csv", image_size=8)


def test_pictures_that_are_the_same_file_are_counted_by_what_it_means(tmp_path):
    shades = {"train/a/1": 1, "train/a/2": 1, "train/a/3": 2, "train/b/4": 2, "val/a/5": 1, "val/b/6": 3}
    files = {f"{name}.png": picture(value=value) for name, value in shades.items()}
    root = write(tmp_path, files)
    copies = survey_pictures(root, find_picture_layout(root)).copies
    assert (copies.inside, copies.across_splits, copies.across_classes) == (1, 1, 1)


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
